"""The parts that models are planted with: look-ups, copying heads, look-alikes and distractors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from probes.planted.blueprint import Blueprint, Head, Units
from probes.planted.stream import CONSTANT

SOFT, SHARP = 6.0, 40.0
"""Attention score of a match: soft leaves a tenth to other tokens, sharp leaves attention without a gradient."""
STEP = (0.65, 0.4)
"""The usual step: it begins well above nothing and ends well below a whole key."""
JUNK = "junk"
"""The slot that distractors read and write, and nothing else reads."""
BOS_FLAG = "bos"

Vector = Float[Tensor, "d_model"]


def lookup(
    blueprint: Blueprint,
    rules: Sequence[tuple[Sequence[Vector], Vector]],
    *,
    absent: Sequence[Vector] = (),
    step: tuple[float, float] | bool = False,
    size: float | None = 1.0,
    hardness: float = 40.0,
) -> Units:
    """Return units of which each adds its vector where all its keys are present.

    Args:
        rules: the keys of each unit, features that are 1 where present, and what it adds.
        absent: features of which none may be present, for every rule.
        step: how far below its full sum of keys a rule begins to add and adds all, by two units a rule, so that what it
            adds is the same however large the keys are; True is the usual step, False in proportion to the keys' excess.
        size: mean norm of what is added.
        hardness: factor of the gates.
    """
    constant = blueprint.stream.vector(CONSTANT)
    minus = torch.stack(list(absent)).sum(0) if absent else torch.zeros_like(constant)
    present = torch.stack([torch.stack(list(keys)).sum(0) - minus for keys, _ in rules])
    counts = torch.tensor([float(len(keys)) for keys, _ in rules])[:, None]
    down = torch.stack([added for _, added in rules], dim=1)
    if step is False:
        return Units(present - (counts - 0.5) * constant, down, hardness, size)
    begins, ends = (present - (counts - below) * constant for below in (STEP if step is True else step))
    return Units(torch.cat([begins, ends]), torch.cat([down, -down], dim=1), hardness, size)


def copy_head(
    blueprint: Blueprint,
    *,
    query: str,
    key: str,
    source: str,
    target: str,
    score: float = SOFT,
    size: float = 1.0,
) -> Head:
    """Return a head that copies slot `source` at the token with flag `key` into slot `target` at the one with flag `query`.

    At every other query it rests on BOS, whose slot is empty.
    """
    stream = blueprint.stream
    reads, writes = stream.basis(source), stream.basis(target)
    return Head(*_pattern(blueprint, query, key, score), reads, writes.T, size)


def _pattern(blueprint: Blueprint, query: str, key: str, score: float) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and scores of a head that looks from one flag to another, half as strongly at BOS, else at BOS alone."""
    ask, match = blueprint.stream.vector(query), blueprint.stream.vector(key)
    rest, bos = blueprint.stream.vector(CONSTANT), blueprint.stream.vector(BOS_FLAG)
    scores = torch.tensor([score, 2 * score, -1.5 * score])
    return torch.stack([ask, rest, ask]), torch.stack([match, bos, bos]), scores


def look_alike(blueprint: Blueprint, *, query: str, key: str, score: float = SOFT, size: float = 1.0) -> Head:
    """Return a head with the pattern of a copying head that moves junk alone."""
    read, write = junk_maps(blueprint, blueprint.host.head_width)
    return Head(*_pattern(blueprint, query, key, score), read, write, size)


def junk_head(blueprint: Blueprint, *, size: float) -> Head:
    """Return a head that attends by junk and moves junk."""
    junk = blueprint.stream.basis(JUNK)
    draw = _draw(blueprint, 4, len(junk)) @ junk
    read, write = junk_maps(blueprint, blueprint.host.head_width)
    return Head(draw[:2], draw[2:], torch.full((2,), 2.0), read, write, size)


def junk_units(blueprint: Blueprint, *, size: float, units: int = 16) -> Units:
    """Return units that make junk of junk."""
    junk = blueprint.stream.basis(JUNK)
    gate = _draw(blueprint, units, len(junk)) @ junk
    return Units(gate, junk.T @ _centred(_draw(blueprint, len(junk), units)), hardness=2.0, size=size)


def distract(
    blueprint: Blueprint, *, smallest: float = 0.3, largest: float = 1.5, blocks: Sequence[int] | None = None
) -> None:
    """Fill every free head and MLP with one that moves junk, of a size drawn between two; tokens get junk of their own.

    Args:
        blocks: the blocks to fill; all unless given.
    """
    if JUNK not in blueprint.stream:
        blueprint.stream.rest(JUNK)
    junk = blueprint.stream.basis(JUNK)
    codes = _centred(_draw(blueprint, len(junk), len(blueprint.embedding)))
    blueprint.embedding += torch.nn.functional.normalize(codes, dim=0).T @ junk

    def size() -> float:
        share = float(torch.rand(1, generator=blueprint.generator))
        return float(smallest * (largest / smallest) ** share)

    for layer in range(blueprint.host.layers) if blocks is None else blocks:
        for index in range(blueprint.host.heads):
            if (layer, index) not in blueprint.heads:
                blueprint.place_head(layer, junk_head(blueprint, size=size()), index)
        if not blueprint.mlps.get(layer):
            blueprint.place_mlp(layer, junk_units(blueprint, size=size()))


def junk_maps(blueprint: Blueprint, rank: int) -> tuple[Tensor, Tensor]:
    """Return rows that read junk and columns that write it, each set orthonormal and `rank` long where junk is as wide."""
    junk = blueprint.stream.basis(JUNK)
    rank = min(len(junk) - 1, rank)
    read = torch.linalg.qr(_draw(blueprint, len(junk), rank)).Q.T @ junk
    return read, junk.T @ torch.linalg.qr(_centred(_draw(blueprint, len(junk), rank))).Q


def _centred(columns: Float[Tensor, "junk n"]) -> Float[Tensor, "junk n"]:
    """Columns that sum to 0, so that the balance of a LayerNorm host is not moved by junk."""
    return columns - columns.mean(0)


def _draw(blueprint: Blueprint, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=blueprint.generator)
