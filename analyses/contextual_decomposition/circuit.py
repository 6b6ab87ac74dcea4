"""The search for a circuit: from the metric back to the heads that feed it, and what can be left out again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from probes.decomposition import Node


@dataclass(frozen=True)
class Edge:
    """The score of a source for a target; the target None is the metric."""

    source: Node
    target: Node | None
    score: float
    step: int


Links = Callable[[Sequence[Node], Sequence[Node]], Tensor]
"""A function of sources and targets that gives each pair's score [source, target], mean over prompts."""


@dataclass(frozen=True)
class Search:
    """The settings of a search.

    `top` nodes are kept in each of at most `steps` steps; scores of a layer may first be divided by their sum of
    magnitudes, since relevance grows with depth.
    """

    top: int
    steps: int
    layer_normalise: bool


def ranked(nodes: Sequence[Node], scores: Float[Tensor, " node"], layer_normalise: bool) -> list[int]:
    """Return the indices of nodes by the magnitude of their scores, largest first; zeros are left out."""
    values = scores.abs().clone()
    if layer_normalise:
        for layer in {node.layer for node in nodes}:
            of_layer = torch.tensor([node.layer == layer for node in nodes])
            values[of_layer] = values[of_layer] / values[of_layer].sum().clamp_min(1e-30)
    order = sorted(range(len(nodes)), key=lambda i: (-float(values[i]), i))
    return [i for i in order if float(values[i]) > 0]


def search(
    links: Links, nodes: Sequence[Node], to_metric: Float[Tensor, " node"], how: Search
) -> tuple[list[Node], list[Edge]]:
    """Search a circuit from the metric backwards; return its nodes in the order of the search, and its edges.

    Hsu et al. 2024, section 3: the nodes that score highest on the logits become targets, those that score highest on
    these the next targets, until all chosen nodes are in block 0 or the steps are spent.

    Args:
        to_metric: scores of `nodes` on the metric, averaged over prompts.
    """
    chosen = [nodes[i] for i in ranked(nodes, to_metric, how.layer_normalise)[: how.top]]
    value = {node: float(score) for node, score in zip(nodes, to_metric, strict=True)}
    edges = [Edge(node, None, value[node], 0) for node in chosen]
    circuit, targets = list(chosen), [node for node in chosen if node.layer > 0]
    for step in range(1, how.steps + 1):
        deepest = max((node.layer for node in targets), default=0)
        left = [node for node in nodes if node.layer < deepest and node not in circuit]
        if not left:
            break
        scores = links(left, targets)
        best = ranked(left, scores.sum(1), how.layer_normalise)[: how.top]
        for i in best:
            edges += [
                Edge(left[i], target, float(scores[i, column]), step)
                for column, target in enumerate(targets)
                if float(scores[i, column]) != 0
            ]
        circuit += [left[i] for i in best]
        targets = [left[i] for i in best if left[i].layer > 0]
    return circuit, edges


def pruned(
    circuit: Sequence[Node], protected: Sequence[Node], value: Callable[[list[list[Node]]], Tensor]
) -> list[Node]:
    """Delete nodes while that raises the metric, each time the one that raises it most; return the rest.

    Args:
        value: the mean metric [circuit] of circuits under ablation of everything else.
    """
    kept = list(circuit)
    current = float(value([kept])[0])
    while True:
        candidates = [node for node in kept if node not in protected]
        if not candidates:
            return kept
        without = [[node for node in kept if node != gone] for gone in candidates]
        values = value(without)
        best = int(values.argmax())
        if float(values[best]) <= current:
            return kept
        kept, current = without[best], float(values[best])
