"""What circuits are made of: heads and MLPs, or the edges between them; with what each method says of every one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from analyses.causal_patching.ablation import Ablated, AblationKind, ablated
from analyses.causal_patching.attribution import Attributed
from analyses.causal_patching.cells import Cell
from analyses.causal_patching.edge_circuits import EdgeCircuits, edge_weights
from analyses.causal_patching.edge_tables import edge_scores
from analyses.causal_patching.edges import EdgeAttribution, Line
from analyses.causal_patching.graph import Sender, receivers_of, senders_of
from analyses.causal_patching.node_circuits import NodeCircuits
from analyses.causal_patching.pairs import Pair
from analyses.causal_patching.running import Run
from analyses.results.statistics import Array
from probes.models.protocol import Shape
from probes.progress import Progress
from probes.weights.composition import Heads

Indices = NDArray[np.intp]
"""Items of a circuit, by their place among all items."""


class Level(Protocol):
    """Items that circuits are made of."""

    @property
    def name(self) -> str:
        """`nodes` or `edges`."""
        ...

    @property
    def layers(self) -> Indices:
        """The layer of every item, which a random circuit of the same size per layer keeps."""
        ...

    def last_rows(self, opened: Ablated, circuits: Sequence[Indices]) -> Float[Tensor, "circuit d_model"]:
        """Return what leaves the last block at the last position with every item outside each circuit ablated."""
        ...

    def support(self, run: Run, pair: Pair, method: str) -> Array:
        """Return how much each item supports the answer on a pair by a method, [item]; for `atp_star` the size alone."""
        ...


@dataclass(frozen=True)
class NodeLevel:
    """Heads and MLPs at all positions."""

    shape: Shape
    name: str = "nodes"

    @cached_property
    def nodes(self) -> list[Sender]:
        """Every head and MLP."""
        return [sender for sender in senders_of(self.shape) if not sender.embed]

    @cached_property
    def layers(self) -> Indices:
        """The layer of every node."""
        return np.array([node.layer for node in self.nodes])

    def keep(self, circuits: Sequence[Indices]) -> Tensor:
        """Return which heads and MLPs stay, bool [circuit, layer, unit]."""
        keep = torch.zeros(len(circuits), len(self.nodes), dtype=torch.bool)
        for row, circuit in enumerate(circuits):
            keep[row, torch.as_tensor(np.asarray(circuit, dtype=np.int64))] = True
        return keep.view(len(circuits), self.shape.n_layers, self.shape.n_heads + 1)

    def last_rows(self, opened: Ablated, circuits: Sequence[Indices]) -> Float[Tensor, "circuit d_model"]:
        """Return last rows, as `Level`."""
        return NodeCircuits(opened).last_rows(self.keep(circuits))

    def support(self, run: Run, pair: Pair, method: str) -> Array:
        """Return what is lost without each node: measured against the corrupted run (`exact`) or a mean (`mean`), or predicted."""
        if method in ABLATIONS:
            return self._without_each(run, pair, ABLATIONS[method])
        cells = [Cell("mlp_out", n.layer) if n.head < 0 else Cell("z", n.layer, n.head) for n in self.nodes]
        scores = Attributed(run.model, pair, "noise", run.metrics[0]).scores(cells, method)  # type: ignore[arg-type]
        values: Array = scores.double().numpy()
        return values if method == "atp_star" else -values

    def _without_each(self, run: Run, pair: Pair, kind: AblationKind) -> Array:
        opened, every = ablated(run, pair, kind), np.arange(len(self.nodes))
        rows = self.last_rows(opened, [np.delete(every, node) for node in every])
        values = opened.reader.read(torch.cat([opened.base.entering[-1][-1:], rows]))[:, 0].numpy()
        run.tally.count(len(every))
        return np.asarray(values[0] - values[1:])


@dataclass(frozen=True, eq=False)
class EdgeLevel:
    """Edges from the embedding, heads and MLPs to queries, keys, values, MLPs and the final norm."""

    attribution: EdgeAttribution
    weights: Heads
    line: Line
    name: str = "edges"

    @cached_property
    def senders(self) -> list[Sender]:
        """Everything that writes to the stream."""
        return senders_of(self.attribution.model.shape)

    @cached_property
    def connected(self) -> Tensor:
        """Which edges there are, bool [sender, receiver]."""
        return self.attribution.connected(self.senders)

    @cached_property
    def layers(self) -> Indices:
        """The layer of every edge's receiver."""
        receivers = receivers_of(self.attribution.model.shape)
        return np.array([receiver.layer for receiver in receivers])[self.connected.nonzero()[:, 1].numpy()]

    def last_rows(self, opened: Ablated, circuits: Sequence[Indices]) -> Float[Tensor, "circuit d_model"]:
        """Return last rows, as `Level`."""
        places = self.connected.flatten().nonzero()[:, 0]
        keep = torch.zeros(len(circuits), self.connected.numel(), dtype=torch.bool)
        for row, circuit in enumerate(circuits):
            keep[row, places[torch.as_tensor(np.asarray(circuit, dtype=np.int64))]] = True
        runner = EdgeCircuits(self.attribution.model, opened, self.weights)
        return runner.last_rows(keep.view(len(circuits), *self.connected.shape))

    def support(self, run: Run, pair: Pair, method: str) -> Array:
        """Return what is predicted to be lost without each edge."""
        scores = edge_scores(run, pair, self.attribution, method, self.line, "noise")
        values: Array = -scores[self.connected].double().numpy()
        return values


ABLATIONS: dict[str, AblationKind] = {"exact": "counterfactual", "mean": "mean"}
"""What measures every node by itself, and against what."""
METHODS = {"nodes": ("exact", "mean", "atp", "atp_star"), "edges": ("eap", "eap_ig")}
"""What orders the items of each level."""


def level_of(run: Run, name: str, line: Line) -> Level:
    """Return what circuits are made of.

    Raises:
        PointError: a model without edges.
    """
    if name == "nodes":
        return NodeLevel(run.model.shape)
    return EdgeLevel(EdgeAttribution.of(run.model), edge_weights(run.model), line)


def supports(run: Run, level: Level, method: str, progress: Progress) -> Array:
    """Return how much every item supports the answer on every pair by a method, [pair, item]."""
    progress.start(len(run.pairs), f"pair's {level.name} by {method}")
    return _each(run, lambda pair: level.support(run, pair, method), progress)


def circuit_metrics(
    run: Run,
    level: Level,
    circuits: Sequence[Indices],
    kind: AblationKind,
    progress: Progress,
    tried: NDArray[np.bool_] | None = None,
) -> Array:
    """Return the first metric [pair, circuit] with every item outside each circuit ablated.

    Args:
        circuits: items of each.
        tried: which circuits run on which pairs, [pair, circuit]; NaN elsewhere.
    """
    which = {
        pair.index: np.ones(len(circuits), dtype=bool) if tried is None else tried[i]
        for i, pair in enumerate(run.pairs)
    }

    def values(pair: Pair) -> Array:
        opened, own = ablated(run, pair, kind), which[pair.index]
        out = np.full(len(circuits), np.nan)
        rows = level.last_rows(opened, [circuits[int(i)] for i in own.nonzero()[0]])
        out[own] = opened.reader.read(rows)[:, 0].numpy()
        run.tally.count(int(own.sum()))
        return out

    progress.start(len(run.pairs), "pair's circuits")
    return _each(run, values, progress)


def _each(run: Run, of: Callable[[Pair], Array], progress: Progress) -> Array:
    rows = []
    for pair in run.pairs:
        rows.append(of(pair))
        progress.advance()
    return np.stack(rows)
