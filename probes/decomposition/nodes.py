"""What is declared relevant: heads at positions, MLP layers, tokens, and sets of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from probes.errors import OptionError, PointError, unknown

Kind = Literal["head", "mlp", "token"]


@dataclass(frozen=True, order=True)
class Node:
    """A head's z, an MLP's output, or the stream entering a block (a token's row at layer 0), at one position or all."""

    kind: Kind
    layer: int
    head: int = -1
    """-1 where the kind is not head."""
    position: int = -1
    """-1 means all positions."""

    def __post_init__(self) -> None:
        if self.kind not in ("head", "mlp", "token"):
            raise OptionError(unknown("kind of node", self.kind, ("head", "mlp", "token")))
        if (self.kind == "head") != (self.head >= 0):
            raise OptionError(f"a node of kind {self.kind!r} has {'a' if self.kind == 'head' else 'no'} head")

    def __str__(self) -> str:
        name = {"head": f"{self.layer}.{self.head}", "mlp": f"mlp {self.layer}", "token": f"token {self.layer}"}[
            self.kind
        ]
        return name if self.position < 0 else f"{name}@{self.position}"


Source = tuple[Node, ...]
"""Nodes that are relevant together."""


def head(layer: int, head: int, position: int = -1) -> Node:
    """Return the node of head `head` of a layer, at one position or all."""
    return Node("head", layer, head, position)


def mlp(layer: int, position: int = -1) -> Node:
    """Return the node of the MLP of a layer, at one position or all."""
    return Node("mlp", layer, -1, position)


def token(position: int, layer: int = 0) -> Node:
    """Return the node of the stream entering block `layer` at a position (-1 for all): at layer 0 the prompt's token."""
    return Node("token", layer, -1, position)


@dataclass(frozen=True, eq=False)
class Baseline:
    """What a node's activation is compared to: its mean over a reference set."""

    z: Tensor
    """[layer, pos, head, d_head]."""
    mlp_out: Tensor
    """[layer, pos, d_model]."""
    stream: Tensor
    """[layer, pos, d_model], what enters each block."""

    def at(self, kind: Kind, layer: int) -> Float[Tensor, "pos *width"]:
        """Return the mean of one kind of node at a layer."""
        return {"head": self.z, "mlp": self.mlp_out, "token": self.stream}[kind][layer]


def check(sources: Iterable[Source], n_layers: int, n_heads: int, n_positions: int) -> None:
    """Refuse nodes that this prompt or model does not have.

    Raises:
        PointError: names the first such node.
    """
    for node in (node for source in sources for node in source):
        for name, value, n in (("layer", node.layer, n_layers), ("position", node.position, n_positions)):
            if value >= n or (name == "layer" and value < 0) or value < -1:
                raise PointError(f"source {node}: {name} {value} does not exist; legal are 0 to {n - 1}")
        if node.kind == "head" and node.head >= n_heads:
            raise PointError(f"source {node}: head {node.head} does not exist; legal are 0 to {n_heads - 1}")


def first_layer(source: Source) -> int:
    """Return the earliest layer of a source; 0 where it has no nodes."""
    return min((node.layer for node in source), default=0)


def first_position(source: Source) -> int:
    """Return the earliest position of a source."""
    return max(0, min((node.position for node in source), default=0))


def groups(sources: Sequence[Source], n_positions: int, rows: int, causal: bool) -> list[list[int]]:
    """Return indices of sources in batches of about `rows` rows that begin near the same position, ordered by first layer."""
    order = sorted(range(len(sources)), key=lambda i: (first_position(sources[i]), first_layer(sources[i]), i))
    out: list[list[int]] = []
    width = n_positions
    for i in order:
        if out and (len(out[-1]) + 1) * width <= rows:
            out[-1].append(i)
        else:
            out.append([i])
            width = n_positions - first_position(sources[i]) if causal else n_positions
    return [sorted(batch, key=lambda i: first_layer(sources[i])) for batch in out]


@dataclass(frozen=True, eq=False)
class Placing:
    """Where the nodes of one kind and layer stand in a batch of sources: index tensors of equal length."""

    rows: Tensor
    positions: Tensor
    heads: Tensor


def placings(batch: Sequence[Source], n_positions: int) -> Mapping[tuple[Kind, int], Placing]:
    """Return, per kind and layer, which rows of the batch have nodes where."""
    placed: dict[tuple[Kind, int], list[tuple[int, int, int]]] = {}
    for row, source in enumerate(batch):
        for node in source:
            spots = range(n_positions) if node.position < 0 else (node.position,)
            placed.setdefault((node.kind, node.layer), []).extend((row, p, node.head) for p in spots)
    return {key: Placing(*torch.tensor(spots).T) for key, spots in placed.items()}
