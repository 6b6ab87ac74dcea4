"""Scores of sources: how much of the metric, or of a target node, comes from each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.contextual_decomposition.cases import Case
from probes.decomposition import Baseline, Decomposer, Node, Rules, Source, head, mlp
from probes.decomposition.walk import Prepared, Visit
from probes.points import Address

At = Literal["z", "q", "k", "v"]
How = Literal["dot", "ratio"]


@dataclass(frozen=True, eq=False)
class PreparedCase:
    """A case that was traced once, with its baseline."""

    case: Case
    prompt: Prepared
    baseline: Baseline | None


def position_sources(heads: Sequence[Node], positions: Sequence[int]) -> list[Source]:
    """Return each of `heads` at each of `positions`."""
    places = sorted((node.layer, p, node.head) for p in positions for node in heads)
    return [(head(layer, h, p),) for layer, p, h in places]


def mlp_sources(layers: Sequence[int]) -> list[Source]:
    """Return the MLPs of `layers` at all positions."""
    return [(mlp(layer),) for layer in layers]


@dataclass(frozen=True)
class Reading:
    """Where a target head's relevance is read, and what it is compared to.

    `dot`: <relevant part, z - baseline>, summed over positions and divided by |z - baseline|^2, so 1 is all of it.
    `ratio`: mean |relevant| / (mean |relevant| + mean |irrelevant|).
    """

    at: At = "z"
    how: How = "dot"


def to_metric(
    decomposer: Decomposer, prepared: PreparedCase, sources: Sequence[Source], rules: Rules
) -> Float[Tensor, " source"]:
    """Return the metric of each source's relevant part of the logits at the end."""
    return sweep(decomposer, prepared, sources, rules, None)[0]


def sweep(
    decomposer: Decomposer, prepared: PreparedCase, sources: Sequence[Source], rules: Rules, reading: Reading | None
) -> tuple[Float[Tensor, " source"], Float[Tensor, "source layer head"] | None]:
    """Return each source's score on the metric and, under `reading`, on every head.

    One sweep gives both: on its way to the end a source passes every head.
    """
    case, shape = prepared.case, decomposer.operations
    out = torch.zeros(len(sources), dtype=torch.float64)
    heads = (
        None if reading is None else torch.zeros(len(sources), len(shape.blocks), shape.n_heads, dtype=torch.float64)
    )
    last = prepared.prompt.trace.get("block", "out", len(shape.blocks) - 1)
    ids = torch.tensor(case.ids, device=last.device)

    def visit(indices: list[int]) -> tuple[dict[Address, Visit], Callable[[Tensor, Tensor], None]]:
        def end(rel: Tensor, at: Tensor) -> None:
            logits, _ = decomposer.logit_operations.relevant(rel, last[at], ids, rules)
            out[torch.tensor(indices)] = case.metric(logits)[:, -1].double().cpu()

        def passing(layer: int) -> Visit:
            def read(rel: Tensor, total: Tensor, where: Tensor) -> None:
                assert reading is not None
                assert heads is not None
                scores = _of_heads(prepared, reading, layer, rel, total, where)
                heads[torch.tensor(indices[: len(rel)]), layer] = _spread(scores, shape.n_heads)

            return read

        stops = {} if reading is None else {Address(reading.at, i): passing(i) for i in range(len(shape.blocks))}
        return stops, end

    decomposer.walk(prepared.prompt, sources, visit, rules=rules, baseline=prepared.baseline, keep=(-1,))
    return out, heads


def to_nodes(
    decomposer: Decomposer,
    prepared: PreparedCase,
    sources: Sequence[Source],
    targets: Sequence[Node],
    rules: Rules,
    reading: Reading = Reading(),
) -> Float[Tensor, "source target"]:
    """Return each source's score on each target head."""
    out = torch.zeros(len(sources), len(targets), dtype=torch.float64)
    n_heads = decomposer.operations.n_heads

    def visit(indices: list[int]) -> tuple[dict[Address, Visit], None]:
        def reads(layer: int) -> Visit:
            def read(rel: Tensor, total: Tensor, where: Tensor) -> None:
                for column, node in enumerate(targets):
                    if node.layer == layer:
                        spots = slice(None) if node.position < 0 else torch.nonzero(where == node.position)[:, 0]
                        scores = _of_heads(prepared, reading, layer, rel[:, spots], total[spots], where[spots])
                        out[torch.tensor(indices[: len(rel)]), column] = _spread(scores, n_heads)[:, node.head]

            return read

        return {Address(reading.at, layer): reads(layer) for layer in {node.layer for node in targets}}, None

    decomposer.walk(prepared.prompt, sources, visit, rules=rules, baseline=prepared.baseline)
    return out


def _of_heads(
    prepared: PreparedCase, reading: Reading, layer: int, rel: Tensor, total: Tensor, where: Tensor
) -> Tensor:
    """Return scores [source, head] from relevant parts [source, pos, head, d_head] and totals [pos, head, d_head] at positions `where`."""
    if reading.how == "ratio":
        part, rest = rel.abs().mean((1, 3)), (total - rel).abs().mean((1, 3))
        return part / (part + rest).clamp_min(torch.finfo(rel.dtype).tiny)
    change = total
    if reading.at == "z" and prepared.baseline is not None:
        change = total - prepared.baseline.z[layer].to(total)[where]
    size = change.square().sum((0, 2)).clamp_min(torch.finfo(change.dtype).tiny)
    return torch.einsum("sphd,phd->sh", rel, change) / size


def _spread(scores: Tensor, n_heads: int) -> Tensor:
    """Return scores [source, head] with those of a key or value head repeated for every query head that shares it."""
    return scores.double().cpu().repeat_interleave(n_heads // scores.shape[1], dim=1)
