"""Reducers: what is kept of a captured tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import xxhash

from probes.errors import PointError, unknown

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

Positions = str | tuple[int, ...]
"""`all`, `last`, `after_first`, or positions (negative from the end)."""

KINDS = ("rows", "int8", "mean", "mean_square", "norm", "moments", "project", "lens_ids", "lens_top")
NAMED = ("rows", "int8", "mean", "mean_square", "norm", "moments")
"""Kinds that a command line names without an argument."""
POOLED = ("mean", "mean_square")
"""Kinds that keep one row of a whole sequence."""
TAIL = 8
"""Bytes behind the codes of an int8 row: its scale and its error, float32 each."""


@dataclass(frozen=True)
class Reducer:
    """What is kept of a captured tensor [pos, ...]; everything but `rows` and `int8` is float32.

    `rows` keeps the rows as captured; `int8` as codes with a scale and an error each [pos, width + 8], which
    `probes.kernels.unpacked` reads; `mean` their average over the positions, `mean_square` that of their squares; `norm` the L2 norm of each row [pos];
    `moments` mean, variance and max|x| [pos, 3]; `project` coordinates on a basis [pos, k]; `lens_ids` log-probabilities
    of given tokens through the final norm and unembedding [pos, n_ids]; `lens_top` the most probable tokens
    [pos, k, 2] as (log-probability, token id).
    """

    kind: str = "rows"
    positions: Positions = "all"
    ids: tuple[int, ...] = ()
    """Token ids, for `lens_ids`."""
    top_k: int = 0
    """How many tokens, for `lens_top`."""
    basis: Float[Tensor, "k width"] | None = None
    """Directions, for `project`."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise PointError(unknown("reducer", self.kind, KINDS))
        if self.kind == "project" and (self.basis is None or self.basis.ndim != 2):
            raise PointError("reducer 'project' needs a basis of shape [k, width]")
        if self.kind == "lens_ids" and not self.ids:
            raise PointError("reducer 'lens_ids' needs token ids")
        if self.kind == "lens_top" and self.top_k < 1:
            raise PointError(f"reducer 'lens_top' needs top_k of at least 1, not {self.top_k}")

    def __str__(self) -> str:
        detail = ""
        if self.basis is not None:
            array = self.basis.detach().cpu().float().contiguous().numpy()
            detail = ":" + xxhash.xxh3_128_hexdigest(repr(array.shape).encode() + array.tobytes())
        elif self.ids:
            detail = ":" + ",".join(map(str, self.ids))
        elif self.top_k:
            detail = f":{self.top_k}"
        at = self.positions if isinstance(self.positions, str) else ",".join(map(str, self.positions))
        return f"{self.kind}{detail}@{at}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Reducer) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    @classmethod
    def parse(cls, text: str) -> Reducer:
        """Return the reducer named on a command line: rows, int8, last, mean, mean_square, norm, moments, at:0,-1 or lens:10."""
        name, _, detail = text.partition(":")
        try:
            if name == "at":
                return cls(positions=tuple(int(p) for p in detail.split(",")))
            if name == "lens":
                return cls("lens_top", top_k=int(detail))
        except ValueError:
            raise PointError(f"reducer {text!r}: write at:0,-1 or lens:10") from None
        if name == "last":
            return cls(positions="last")
        if name not in NAMED:
            raise PointError(unknown("reducer", text, (*NAMED, "last", "at:0,-1", "lens:10")))
        return cls(name)

    def count(self, length: int) -> int:
        """Return how many rows are kept of a sequence of `length` tokens."""
        if self.kind in POOLED:
            return 1
        if isinstance(self.positions, str):
            return {"all": length, "last": 1, "after_first": max(1, length - 1)}[self.positions]
        return len(self.positions)

    @property
    def per_position(self) -> bool:
        """Whether it keeps one row per token, each from that token's own tensor."""
        return self.positions == "all" and self.kind not in POOLED


ROWS = Reducer()
"""All rows as captured."""
