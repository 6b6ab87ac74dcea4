"""What MLPs do to the metric: attribution patching and mean ablation, beside the decomposition's scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from analyses.contextual_decomposition.ablation import POSITIONS
from analyses.contextual_decomposition.cases import Case
from analyses.contextual_decomposition.prepared_cases import Array, PreparedCases
from analyses.results.statistics import cluster_bootstrap
from probes.blocks.rerouting import module_of
from probes.decomposition import Baseline
from probes.edits import read
from probes.hooks.forward_hooks import tensor_of
from probes.models.protocol import Model, Write
from probes.points import Address
from probes.progress import Progress


def mlp_attribution(model: Model, case: Case, baseline: Baseline | None) -> Float[Tensor, " layer"] | None:
    """Return the gradient of the metric times (MLP output - baseline) of each block, summed over positions.

    An MLP's output is added to what leaves its block, so the two have one gradient. None where blocks normalise that sum.
    """
    outputs = read(model, torch.tensor([case.tokens]), _addresses(model, range(model.shape.n_layers)))
    with module_of(model) as (module, anatomy), ExitStack() as stack, torch.enable_grad():
        if anatomy.kind == "post_norm":
            return None
        leaving: dict[int, Tensor] = {}
        for layer in range(anatomy.n_layers):
            hook = anatomy.component("block", layer).register_forward_hook(_keep(leaving, layer))
            stack.callback(hook.remove)
        entry = anatomy.component("embed").register_forward_hook(lambda _, __, out: out.detach().requires_grad_())
        stack.callback(entry.remove)
        kwargs: dict[str, Any] = {"use_cache": False} if model.shape.causal else {}
        result = module(input_ids=torch.tensor([case.tokens], device=model.device), **kwargs)
        logits = tensor_of(result)[0, -1, torch.tensor(case.ids, device=model.device)]
        gradients = torch.autograd.grad(case.metric(logits.float()), [leaving[n] for n in range(anatomy.n_layers)])
    changes = []
    for (address, output), gradient in zip(outputs.items(), gradients, strict=True):
        change = output[0].float() - (0 if baseline is None else baseline.mlp_out[address.layer].to(output).float())
        changes.append((change * gradient[0].float()).sum())
    return torch.stack(changes).cpu()


def _keep(store: dict[int, Tensor], layer: int) -> Any:
    return lambda _, __, output: store.__setitem__(layer, tensor_of(output))


def _addresses(model: Model, layers: Sequence[int]) -> list[Address]:
    return [Address("mlp_out", layer) for layer in layers]


@torch.no_grad()
def mlp_ablation(model: Model, case: Case, baseline: Baseline | None, layers: Sequence[int]) -> Float[Tensor, " layer"]:
    """Return how much the metric falls when each MLP alone goes to its baseline at all positions; a forward each.

    Prompts that lack one MLP each run together.
    """

    def write(layer: int, row: int) -> Write:
        def replaced(output: Tensor) -> Tensor:
            base = torch.zeros_like(output[row]) if baseline is None else baseline.mlp_out[layer].to(output)
            return torch.cat([output[:row], base.expand_as(output[row])[None], output[row + 1 :]])

        return replaced

    values: list[Tensor] = []
    # The row after the last MLP's is the prompt as it is.
    for rows in torch.split(torch.arange(len(layers) + 1), max(1, POSITIONS // len(case.tokens))):
        logits: list[Tensor] = []
        without = [layers[int(row)] for row in rows if row < len(layers)]
        writes = {Address("mlp_out", layer): write(layer, row) for row, layer in enumerate(without)}
        reads = {Address("logits"): lambda t, out=logits: out.append(t[:, -1, list(case.ids)].float().clone())}
        model.run(torch.tensor([case.tokens]).expand(len(rows), -1), reads, writes)
        values.append(case.metric(logits[0]).double().cpu())
    metric = torch.cat(values)
    return metric[-1] - metric[:-1]


def mlps_table(
    prepared: PreparedCases, layers: Sequence[int], scores: Array, ablation: bool, seed: int, progress: Progress
) -> tuple[pd.DataFrame, int]:
    """Return (columns layer, score, ci_low, ci_high, and for each other method its mean, `_low` and `_high`; ablated forwards).

    Args:
        scores: the decomposition's, [prompt, layer].
    """
    progress.start(len(prepared.cases), "prompt's MLPs compared")
    attributions, effects = [], []
    for one in prepared.cases:
        attribution = mlp_attribution(prepared.model, one.case, one.baseline)
        if attribution is not None:
            attributions.append(attribution[list(layers)].double().numpy())
        if ablation:
            effects.append(mlp_ablation(prepared.model, one.case, one.baseline, layers).numpy())
        progress.advance()
    methods: Mapping[str, Sequence[Array]] = {"attribution": attributions, "ablation": effects}
    interval = cluster_bootstrap(scores, np.arange(len(scores)), seed=seed)
    table = pd.DataFrame({"layer": layers, "score": interval.mean, "ci_low": interval.low, "ci_high": interval.high})
    for name, values in methods.items():
        if len(values):
            other = cluster_bootstrap(np.stack(values), np.arange(len(values)), seed=seed)
            table[name], table[f"{name}_low"], table[f"{name}_high"] = other.mean, other.low, other.high
    return table, len(layers) * len(effects)
