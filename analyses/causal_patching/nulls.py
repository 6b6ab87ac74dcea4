"""Other sources for the same cells: what a cell moves when what is copied does not hold the fact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from analyses.causal_patching.pairs import Direction, Pair

Null = Literal["none", "unrelated", "same_class"]


def null_partner(pair: Pair, pairs: Sequence[Pair], direction: Direction, null: Null) -> Pair | None:
    """Return the pair whose clean prompt is copied from instead: the next one that fits, round the end; None for none.

    `unrelated`: of the same length, its answers in neither set of this pair. `same_class`: of the same length, with the
    same answers on the side that is copied from, and other tokens.
    """
    if null == "none" or (pair.span is not None and null == "same_class"):
        return None
    place = next(i for i, other in enumerate(pairs) if other.index == pair.index)
    length = len(pair.base(direction))
    for other in (*pairs[place + 1 :], *pairs[:place]):
        if len(other.clean) == length and _fits(pair, other, direction, null):
            return other
    return None


def _fits(pair: Pair, other: Pair, direction: Direction, null: Null) -> bool:
    if null == "unrelated":
        return not set(other.answers) & set(pair.ids)
    expected = pair.answers if direction == "denoise" else pair.distractors
    return set(other.answers) == set(expected) and other.clean not in (pair.clean, pair.corrupted)
