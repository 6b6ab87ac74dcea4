"""Scores of sources: what of the metric, or of a target node, comes from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from analyses.contextual_decomposition.cases import Case
from probes.decomposition import Baseline, Decomposer, Node, Rules, Source, head, mlp
from probes.decomposition.walk import Prepared
from probes.points import Address

At = Literal["z", "q", "k", "v"]
How = Literal["dot", "ratio"]


@dataclass(frozen=True, eq=False)
class Opened:
    """A case ready to be scored: traced once, with its baseline."""

    case: Case
    prompt: Prepared
    baseline: Baseline | None


def head_sources(n_layers: int, n_heads: int) -> list[Source]:
    """Every head at all positions."""
    return [(head(layer, h),) for layer in range(n_layers) for h in range(n_heads)]


def position_sources(n_layers: int, n_heads: int, positions: Sequence[int]) -> list[Source]:
    """Every head at every position of interest."""
    return [(head(layer, h, p),) for layer in range(n_layers) for p in positions for h in range(n_heads)]


def mlp_sources(n_layers: int) -> list[Source]:
    """Every MLP at all positions."""
    return [(mlp(layer),) for layer in range(n_layers)]


def to_metric(decomposer: Decomposer, opened: Opened, sources: Sequence[Source], rules: Rules) -> Tensor:
    """The metric of the relevant logits at the end, for each source [source]."""
    case, out = opened.case, torch.zeros(len(sources), dtype=torch.float64)
    last = opened.prompt.trace.get("block", "out", decomposer.model.shape.n_layers - 1)
    ids = torch.tensor(case.ids, device=last.device)

    def visit(indices: list[int]) -> tuple[dict[Address, Callable[..., None]], Callable[[Tensor, Tensor], None]]:
        def end(rel: Tensor, at: Tensor) -> None:
            logits, _ = decomposer.readout.relevant(rel, last[at], ids, rules)
            out[torch.tensor(indices)] = case.metric(logits)[:, -1].double().cpu()

        return {}, end

    decomposer.walk(opened.prompt, sources, visit, rules=rules, baseline=opened.baseline, keep=(-1,))
    return out


def to_nodes(
    decomposer: Decomposer,
    opened: Opened,
    sources: Sequence[Source],
    targets: Sequence[Node],
    rules: Rules,
    at: At = "z",
    how: How = "dot",
) -> Tensor:
    """What of each target head comes from each source [source, target].

    `dot`: <relevant part, z - baseline>, summed over positions and divided by |z - baseline|^2, so 1 is all of it.
    `ratio`: mean |relevant| / (mean |relevant| + mean |irrelevant|).
    """
    out = torch.zeros(len(sources), len(targets), dtype=torch.float64)
    addresses = {Address(at, node.layer) for node in targets}
    group = decomposer.structure.n_heads // decomposer.structure.n_kv_heads

    def visit(indices: list[int]) -> tuple[dict[Address, Callable[..., None]], None]:
        def score(rel: Tensor, total: Tensor, where: Tensor, address: Address) -> None:
            for column, node in enumerate(targets):
                if node.layer != address.layer:
                    continue
                h = node.head // group if at in ("k", "v") else node.head
                spots = slice(None) if node.position < 0 else torch.nonzero(where == node.position)[:, 0]
                part, whole = rel[:, spots, h], total[spots, h]
                change = whole
                if how == "dot" and at == "z" and opened.baseline is not None:
                    change = whole - opened.baseline.z[node.layer].to(whole)[where[spots], h]
                out[torch.tensor(indices), column] = _score(part, whole, change, how).double().cpu()

        return {a: (lambda rel, total, where, a=a: score(rel, total, where, a)) for a in addresses}, None

    decomposer.walk(opened.prompt, sources, visit, rules=rules, baseline=opened.baseline)
    return out


def _score(part: Tensor, whole: Tensor, change: Tensor, how: How) -> Tensor:
    """[source] from a relevant part [source, pos, d_head] and totals [pos, d_head]."""
    if how == "dot":
        size = change.square().sum().clamp_min(torch.finfo(change.dtype).tiny)
        return (part * change).sum((-1, -2)) / size
    rel, irr = part.abs().mean((-1, -2)), (whole - part).abs().mean((-1, -2))
    return rel / (rel + irr).clamp_min(torch.finfo(rel.dtype).tiny)
