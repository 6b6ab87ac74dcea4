"""Cheap estimates of what heads do to the metric: attribution patching and direct logit attribution."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.contextual_decomposition.cases import Case
from probes.blocks.rerouting import module_of
from probes.decomposition import Baseline, Decomposer, Rules
from probes.decomposition import rules as rule
from probes.decomposition.walk import Prepared
from probes.hooks.forward_hooks import tensor_of
from probes.models.protocol import Model


def attribution_patching(model: Model, case: Case, baseline: Baseline | None) -> Float[Tensor, "layer pos head"]:
    """Return the gradient of the metric times (z - baseline), its first-order change on ablating each node.

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
) -> Float[Tensor, "layer head"] | None:
    """Return what each head's output at the end adds to the metric through the final norm alone.

    None where blocks normalise each sum, so that nothing reaches the end unchanged.
    """
    shape = decomposer.operations
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
        rel, _ = decomposer.logit_operations.relevant(rel, last, ids, frozen)
        out.append(case.metric(rel)[:, 0])
    return torch.stack(out).cpu()
