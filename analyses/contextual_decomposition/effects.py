"""What heads do to the metric by other means: ablation, attribution patching and direct logit attribution."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from analyses.contextual_decomposition.cases import Case
from probes.decomposition import Baseline, Decomposer, Rules
from probes.decomposition import rules as rule
from probes.decomposition.walk import Prepared
from probes.models.base import Model, Write
from probes.models.blocks import module_of
from probes.models.taps import tensor_of
from probes.points import Address
from probes.resume import Resumable

ROWS = 32
"""Ablated copies of a prompt in one forward."""


class Ablation:
    """A prompt whose heads can be set to their baseline; counts the forwards it takes."""

    def __init__(self, model: Model, case: Case, baseline: Baseline | None) -> None:
        self.model, self.case, self.baseline = model, case, baseline
        readable = model.shape.causal and "lens" not in model.faithfulness.refused
        self.held = Resumable(model, case.tokens, 0) if readable else None
        self.forwards = 1

    @torch.no_grad()
    def metric(self, first: int, keep: Tensor) -> Tensor:
        """The metric [rows] with every head where `keep` [rows, layer, head] or [rows, layer, pos, head] is False at its baseline.

        Args:
            first: the first layer in which a head is ablated.
        """
        return torch.cat([self._rows(first, part) for part in torch.split(keep, ROWS)])

    def _rows(self, first: int, keep: Tensor) -> Tensor:
        keep = keep[:, :, None] if keep.dim() == 3 else keep
        writes: dict[Address, Write] = {}
        for layer in range(first, self.model.shape.n_layers):
            if not keep[:, layer].all():
                writes[Address("z", layer)] = self._write(layer, keep[:, layer])
        self.forwards += len(keep)
        ids = torch.tensor(self.case.ids)
        if self.held is not None:
            last = self.held.edited(first, len(keep), writes)
            return self.case.metric(_logits(self.model, last, ids)).double().cpu()
        found: list[Tensor] = []
        tokens = torch.tensor([self.case.tokens]).expand(len(keep), -1)
        self.model.run(tokens, {Address("logits"): lambda t: found.append(t[:, -1, ids.to(t.device)].clone())}, writes)
        return self.case.metric(found[0]).double().cpu()

    def _write(self, layer: int, keep: Tensor) -> Write:
        def write(z: Tensor) -> Tensor:
            base = torch.zeros_like(z[0]) if self.baseline is None else self.baseline.z[layer].to(z)
            return torch.where(keep.to(z.device)[..., None], z, base)

        return write


def _logits(model: Model, last: Tensor, ids: Tensor) -> Tensor:
    unembedding = model.unembedding()
    ids = ids.to(unembedding.weight.device)
    hidden = unembedding.norm(last.to(unembedding.weight))
    bias = None if unembedding.bias is None else unembedding.bias[ids]
    out = nn.functional.linear(hidden, unembedding.weight[ids], bias).float()
    return out if unembedding.softcap is None else unembedding.softcap * torch.tanh(out / unembedding.softcap)


def head_ablation(ablation: Ablation, positions: Sequence[int] | None = None) -> Tensor:
    """How much the metric falls when one head goes to its baseline [layer, head], or at each position [layer, pos, head]."""
    shape = ablation.model.shape
    n_layers, n_heads, n = shape.n_layers, shape.n_heads, len(ablation.case.tokens)
    full = ablation.metric(n_layers - 1, torch.ones(1, n_layers, n_heads, dtype=torch.bool))
    out = torch.zeros(n_layers, n_heads) if positions is None else torch.zeros(n_layers, n, n_heads)
    for layer in range(n_layers):
        if positions is None:
            keep = torch.ones(n_heads, n_layers, n_heads, dtype=torch.bool)
            keep[torch.arange(n_heads), layer, torch.arange(n_heads)] = False
            out[layer] = (full - ablation.metric(layer, keep)).float()
        else:
            spots = [(p, h) for p in positions for h in range(n_heads)]
            keep = torch.ones(len(spots), n_layers, n, n_heads, dtype=torch.bool)
            for row, (p, h) in enumerate(spots):
                keep[row, layer, p, h] = False
            effects = (full - ablation.metric(layer, keep)).float()
            for (p, h), effect in zip(spots, effects.tolist(), strict=True):
                out[layer, p, h] = effect
    return out


def attribution_patching(model: Model, case: Case, baseline: Baseline | None) -> Tensor:
    """Gradient of the metric times (z - baseline) [layer, pos, head]: its first-order change on ablating each node.

    Attribution patching (Nanda 2023; Syed, Rager, Conmy 2023) at nodes; one forward and one backward.
    """
    with module_of(model) as (module, anatomy), ExitStack() as stack, torch.enable_grad():
        seen: dict[int, Tensor] = {}
        for layer in range(anatomy.n_layers):
            hook = anatomy.component("attn.o", layer).register_forward_pre_hook(_keep(seen, layer))
            stack.callback(hook.remove)
        entry = anatomy.component("embed").register_forward_hook(lambda _, __, out: out.detach().requires_grad_())
        stack.callback(entry.remove)
        kwargs: dict[str, Any] = {"use_cache": False} if model.shape.causal else {}
        output = module(input_ids=torch.tensor([case.tokens], device=model.device), **kwargs)
        logits = tensor_of(output)[0, -1, torch.tensor(case.ids, device=model.device)]
        zs = [seen[layer] for layer in range(anatomy.n_layers)]
        gradients = torch.autograd.grad(case.metric(logits.float()), zs)
    out = []
    for layer, (z, gradient) in enumerate(zip(zs, gradients, strict=True)):
        shaped = (model.shape.n_heads, model.shape.d_head)
        change = z.detach().reshape(len(case.tokens), *shaped).float()
        if baseline is not None:
            change = change - baseline.z[layer].to(change)
        out.append((change * gradient.reshape(len(case.tokens), *shaped).float()).sum(-1))
    return torch.stack(out).cpu()


def _keep(seen: dict[int, Tensor], layer: int) -> Any:
    return lambda _, args: seen.__setitem__(layer, args[0])


@torch.no_grad()
def direct_attribution(
    decomposer: Decomposer, prompt: Prepared, case: Case, baseline: Baseline | None
) -> Tensor | None:
    """What each head's output at the end adds to the metric through the final norm alone [layer, head].

    None where blocks normalise each sum, so that nothing reaches the end unchanged.
    """
    shape = decomposer.structure
    if shape.kind == "post_norm":
        return None
    frozen, seen, end = Rules(), prompt.trace, len(case.tokens) - 1
    last = seen.get("block", "out", len(shape.blocks) - 1)[end:]
    ids = torch.tensor(case.ids, device=last.device)
    out = []
    for layer, block in enumerate(shape.blocks):
        z = seen.get("attn.o", "in", layer)[end].reshape(shape.n_heads, shape.d_head)
        change = z if baseline is None else z - baseline.z[layer, end].to(z)
        each = torch.zeros(shape.n_heads, 1, shape.n_heads, shape.d_head, dtype=z.dtype, device=z.device)
        each[torch.arange(shape.n_heads), 0, torch.arange(shape.n_heads)] = change
        rel = each.flatten(-2) @ block.o.weight
        if block.ln1_post is not None:
            rel = rule.norm(rel, block.ln1_post, seen.get("ln1_post", "in", layer)[end:], frozen)
        rel, _ = decomposer.readout.relevant(rel, last, ids, frozen)
        out.append(case.metric(rel)[:, 0])
    return torch.stack(out).cpu()
