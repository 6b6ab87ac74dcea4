"""Edges of a run: attributed, verified by exact path patching, and those that were named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analyses.causal_patching.edges import EdgeAttribution, Line
from analyses.causal_patching.graph import Edge, Sender, receivers_of, senders_of
from analyses.causal_patching.nodes import attribution_direction
from analyses.causal_patching.opened import OpenedPair, Opener, first_patched
from analyses.causal_patching.pairs import Direction, Pair
from analyses.causal_patching.paths import PathGrid, Through, sender_changes, written_points
from analyses.causal_patching.resumed_grid import ResumedGrid
from analyses.causal_patching.running import Run
from analyses.causal_patching.statistics import ratios
from analyses.causal_patching.verification import budget, ranked, verification_row
from analyses.results.statistics import Array
from probes.blocks.rerouting import module_of
from probes.errors import PointError
from probes.models.protocol import Model
from probes.progress import Progress


def parallel_blocks(model: Model) -> bool:
    """Return whether attention and MLP read the same stream.

    Raises:
        PointError: the backend keeps its module to itself.
    """
    with module_of(model) as (_, anatomy):
        return anatomy.parallel


@dataclass(frozen=True, eq=False)
class OpenedEdges:
    """A pair opened for edges in one direction: the run that is patched, and what each sender changes."""

    opened: OpenedPair
    changes: Mapping[Sender, Tensor]

    @classmethod
    def of(cls, run: Run, pair: Pair, direction: Direction, senders: Sequence[Sender]) -> OpenedEdges:
        """Open a pair.

        Raises:
            PointError: a model that cannot be resumed from inside the stack.
        """
        points = written_points(run.model.shape.n_layers)
        opener = Opener(run.model, run.metrics[:1], frozenset(points))
        noise = run.noises(pair)[0]
        opened = opener.open(pair, (direction,), noise)[0]
        if not isinstance(opened.grid, ResumedGrid):
            raise PointError(
                f"{run.model.ref} cannot be resumed from inside the stack, so it has no paths: patch nodes instead"
            )
        base = opener.values(pair, direction == "denoise", noise)
        changes = sender_changes(run.model, senders, base, opened.sources)
        return cls(opened, dict(zip(senders, changes, strict=True)))

    def effects(self, model: Model, edges: Sequence[Edge], through: Through, parallel: bool) -> Array:
        """Return what each edge changes in the first metric, m_patched less the base, [edge]."""
        assert isinstance(self.opened.grid, ResumedGrid)
        grid = PathGrid(model, self.opened.grid, parallel, through)
        rows = grid.last_rows(edges, self.changes)
        effects: Array = (self.opened.reader.read(rows)[:, 0] - self.opened.base[0]).numpy()
        return effects


def edge_scores(
    run: Run, pair: Pair, attribution: EdgeAttribution, method: str, line: Line, direction: Direction
) -> Tensor:
    """Return the predicted effect of every edge on a pair, [sender, receiver], NaN where there is none."""
    senders = senders_of(run.model.shape)
    changes = OpenedEdges.of(run, pair, direction, senders).changes
    start = first_patched(pair, direction)
    stacked = torch.stack([changes[sender] for sender in senders])[:, start:]
    rows = [
        attribution.scores(gradients[:, start:], senders[those], stacked[those])
        for those, gradients in attribution.along(pair, direction, run.metrics[0], line if method == "eap_ig" else None)
    ]
    return torch.cat(rows)


def edge_tables(
    run: Run, method: str, line: Line, verify: int, seed: int, progress: Progress
) -> tuple[pd.DataFrame, dict[str, object]]:
    """Return (the table `edges`, a row of `verification`).

    Raises:
        PointError: a model without edges, or one that keeps its weights to itself.
    """
    direction = attribution_direction(run.directions)
    attribution = EdgeAttribution.of(run.model)
    senders, receivers = senders_of(run.model.shape), receivers_of(run.model.shape)
    connected = attribution.connected(senders)
    at = connected.nonzero().tolist()
    edges = [(senders[s], receivers[r]) for s, r in at]
    progress.start(len(run.pairs), "pair's edges attributed")
    scores = []
    for pair in run.pairs:
        scores.append(edge_scores(run, pair, attribution, method, line, direction)[connected].double().numpy())
        progress.advance()
    every = np.stack(scores)
    means = every.mean(0)
    chosen = budget(means, verify, seed)
    exact = exact_edges(run, [edges[i] for i in chosen.chosen], direction, "residual", progress)
    table = pd.DataFrame({
        "method": method, "direction": direction, "sender": [str(s) for s, _ in edges], "receiver": [str(r) for _, r in edges],
        "input": [r.input for _, r in edges], "receiver_unit": [r.unit for _, r in edges], "score": means,
    })  # fmt: skip
    row = verification_row(method, every, exact, chosen, True, run.groups, seed)
    return ranked(table, chosen, exact.mean(0)), row


def exact_edges(run: Run, edges: Sequence[Edge], direction: Direction, through: Through, progress: Progress) -> Array:
    """Return the exact effect of edges on every pair, [pair, edge]."""
    senders, parallel = sorted({sender for sender, _ in edges}), parallel_blocks(run.model)
    if not edges:
        return np.zeros((len(run.pairs), 0))
    progress.start(len(run.pairs), "pair's edges patched")
    out = []
    for pair in run.pairs:
        out.append(OpenedEdges.of(run, pair, direction, senders).effects(run.model, edges, through, parallel))
        run.tally.count(len(edges))
        progress.advance()
    return np.stack(out)


def paths_table(
    run: Run,
    edges: Sequence[Edge],
    through: Through,
    gaps: Array,
    seed: int,
    progress: Progress,
) -> pd.DataFrame:
    """Return the effect of named edges in each direction, with the share of the gap and its interval over pairs.

    Args:
        gaps: of the first metric, [pair].
    """
    parts = []
    for direction in run.directions:
        effects = exact_edges(run, edges, direction, through, progress)
        sign = 1.0 if direction == "denoise" else -1.0
        share, (low, high) = ratios(sign * effects, np.repeat(gaps[:, None], len(edges), 1), run.groups, seed)
        parts.append(pd.DataFrame({
            "sender": [str(s) for s, _ in edges], "receiver": [str(r) for _, r in edges], "input": [r.input for _, r in edges],
            "receiver_unit": [r.unit for _, r in edges], "through": through, "direction": direction, "n": len(effects),
            "effect": effects.mean(0), "recovery": share, "ci_low": low, "ci_high": high,
        }))  # fmt: skip
    return pd.concat(parts, ignore_index=True)
