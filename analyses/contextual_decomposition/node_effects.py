"""What MLPs and positions of the stream do to the metric: each set to its mean, and what follows it run anew."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.contextual_decomposition.ablation import POSITIONS, Ablation
from probes.models.protocol import Write
from probes.points import Address


@torch.no_grad()
def mlp_ablation(ablation: Ablation, layers: Sequence[int]) -> Float[Tensor, " layer"]:
    """Return how much the metric falls when each MLP alone goes to its baseline at all positions; a forward each.

    Each starts at its own block where the model's blocks can be run by themselves.
    """
    base = None if ablation.baseline is None else ablation.baseline.mlp_out
    if ablation.cached is None:
        return _written(ablation, "mlp_out", [(layer, slice(None)) for layer in layers], base)
    cached, after = ablation.cached, []
    for layer in layers:
        mean = None if base is None else base[layer, ablation.start :]
        write: Write = partial(_filled, mean)
        after.append(cached.through(layer, cached.entering[layer][None], {Address("mlp_out", layer): write})[0])
    last = cached.resume([layer + 1 for layer in layers], torch.stack(after)).last
    return ablation.whole() - ablation.read(last)


@torch.no_grad()
def stream_ablation(ablation: Ablation, layers: Sequence[int]) -> Float[Tensor, "layer pos"]:
    """Return how much the metric falls when the stream that leaves a block goes to its baseline at one position; a forward each.

    Positions that all references share equal their baseline, and change nothing.

    Args:
        layers: blocks but the last, whose stream is read at the end alone.
    """
    n = len(ablation.case.tokens)
    base = None if ablation.baseline is None else ablation.baseline.stream
    if ablation.cached is None:
        nodes = [(layer, slice(at, at + 1)) for layer in layers for at in range(n)]
        after = None if base is None else torch.cat((base[1:], base[-1:]))
        return _written(ablation, "resid_post", nodes, after).reshape(len(layers), n)
    out = torch.zeros(len(layers), n, dtype=torch.float64)
    whole = ablation.whole()
    for at in range(ablation.start, n):
        cached = ablation.cached.narrowed(at)
        hidden = torch.stack([cached.entering[layer + 1] for layer in layers])
        hidden[:, 0] = 0 if base is None else base[[layer + 1 for layer in layers], at].to(hidden)
        out[:, at] = whole - ablation.read(cached.resume([layer + 1 for layer in layers], hidden).last)
    return out


def _filled(mean: Tensor | None, out: Tensor) -> Tensor:
    return torch.zeros_like(out) if mean is None else mean.to(out).expand_as(out).clone()


def _written(
    ablation: Ablation, point: str, nodes: Sequence[tuple[int, slice]], base: Tensor | None
) -> Float[Tensor, " node"]:
    """Measure nodes (layer, positions) by whole forwards, several rows at once; the last row is the prompt as it is."""
    values: list[Tensor] = []
    for rows in torch.split(torch.arange(len(nodes) + 1), max(1, POSITIONS // len(ablation.case.tokens))):
        writes: dict[Address, Write] = {}
        here = {row: nodes[int(node)] for row, node in enumerate(rows) if node < len(nodes)}
        for layer in {layer for layer, _ in here.values()}:
            writes[Address(point, layer)] = _writer(
                layer, {r: at for r, (own, at) in here.items() if own == layer}, base
            )
        values.append(ablation.under(len(rows), writes))
    metric = torch.cat(values)
    return metric[-1] - metric[:-1]


def _writer(layer: int, rows: dict[int, slice], base: Tensor | None) -> Write:
    def write(out: Tensor) -> Tensor:
        out = out.clone()
        for row, at in rows.items():
            out[row, at] = 0 if base is None else base[layer, at].to(out)
        return out

    return write
