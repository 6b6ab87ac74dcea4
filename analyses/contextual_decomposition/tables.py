"""Scores, rankings and agreements as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from analyses.contextual_decomposition.circuit import Edge
from analyses.results.statistics import Array, cluster_bootstrap
from probes.decomposition import Node


def relevance_table(nodes: Sequence[Node], scores: Array, prompts: Sequence[int]) -> pd.DataFrame:
    """Return columns prompt, source, kind, layer, position, head, score, of scores [prompt, node]; position and head -1 mean all."""
    parts = []
    for prompt, row in zip(prompts, scores, strict=True):
        parts.append(pd.DataFrame({
            "prompt": prompt, "source": [str(node) for node in nodes], "kind": [node.kind for node in nodes],
            "layer": [node.layer for node in nodes], "position": [node.position for node in nodes],
            "head": [node.head for node in nodes], "score": row,
        }))  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def heads_table(heads: Sequence[Node], scores: Mapping[str, Array], seed: int) -> pd.DataFrame:
    """Return columns layer, head, score, ci_low, ci_high, rank, and for each other method its mean over prompts, `_low` and `_high`.

    Args:
        scores: per method [prompt, head]; `cdt` is the decomposition's.
    """
    own = scores["cdt"]
    interval = cluster_bootstrap(own, np.arange(len(own)), seed=seed)
    table = pd.DataFrame({
        "layer": [node.layer for node in heads], "head": [node.head for node in heads], "score": interval.mean,
        "ci_low": interval.low, "ci_high": interval.high,
        "rank": pd.Series(-np.abs(interval.mean)).rank(method="first").astype(int),
    })  # fmt: skip
    for method, values in scores.items():
        if method != "cdt":
            other = cluster_bootstrap(values, np.arange(len(values)), seed=seed)
            table[method], table[f"{method}_low"], table[f"{method}_high"] = other.mean, other.low, other.high
    return table


def edges_table(edges: Sequence[Edge], n_layers: int) -> pd.DataFrame:
    """Return columns source_layer, source_position, source_head, target_layer, target_position, target_head, score, step.

    The metric as a target has layer `n_layers` and head -1; positions are -1 where a node is at all of them.
    """
    rows = []
    for edge in edges:
        target = (n_layers, -1, -1) if edge.target is None else _place(edge.target)
        rows.append((*_place(edge.source), *target, edge.score, edge.step))
    columns = [
        *("source_layer", "source_position", "source_head", "target_layer", "target_position", "target_head"),
        *("score", "step"),
    ]
    return pd.DataFrame(rows, columns=columns)


def _place(node: Node) -> tuple[int, int, int]:
    return node.layer, node.position, node.head


def circuit_table(circuit: Sequence[Node], kept: Sequence[Node], edges: Sequence[Edge]) -> pd.DataFrame:
    """Return columns layer, position, head, step, kept of the circuit's nodes; `kept` says which pruning left in."""
    step = {edge.source: edge.step for edge in reversed(edges)}
    rows = [(node.layer, node.position, node.head, step.get(node, -1), node in kept) for node in circuit]
    return pd.DataFrame(rows, columns=["layer", "position", "head", "step", "kept"])


def layer_profile(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return the sum of |score| over a layer's heads, mean over prompts with its interval: layer, value, ci_low, ci_high."""
    table = tables["relevance"].query("kind == 'head'")
    sums = table.assign(size=table["score"].abs()).pivot_table(
        index="prompt", columns="layer", values="size", aggfunc="sum"
    )
    interval = cluster_bootstrap(sums.to_numpy(), np.arange(len(sums)))
    out = pd.DataFrame({"layer": sums.columns.astype(int), "value": interval.mean})
    return out.assign(ci_low=interval.low, ci_high=interval.high)
