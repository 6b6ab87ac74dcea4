"""Numbers inside an edit: tensors that compare by content, and rows borrowed from another prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import xxhash

from probes.errors import PromptError
from probes.models.protocol import Model
from probes.points import POINTS, Address

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Values:
    """A tensor as part of a frozen value: equal and hashed by shape and content."""

    tensor: Tensor
    label: str | None = None
    """Stands for the content in store keys, where the content follows from the label and the model."""

    @cached_property
    def digest(self) -> str:
        """Hash of the tensor's shape and content."""
        array = self.tensor.detach().cpu().float().contiguous().numpy()
        return xxhash.xxh3_128_hexdigest(repr(array.shape).encode() + array.tobytes())

    def text(self) -> str:
        """Return the label, or the digest where there is none."""
        return self.label or self.digest

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Values) and (self.label, self.digest) == (other.label, other.digest)

    def __hash__(self) -> int:
        return hash((self.label, self.digest))


@dataclass(frozen=True)
class Source:
    """Rows of a point in a forward pass over other tokens: the other half of a cross-prompt patch."""

    tokens: tuple[int, ...]
    address: Address
    positions: tuple[int, ...]
    """Negative from the end."""
    heads: tuple[int, ...] | None = None
    """None is all, or a point without heads."""

    def text(self) -> str:
        """Return address, positions and a hash of the tokens."""
        ids = xxhash.xxh3_128_hexdigest(",".join(map(str, self.tokens)).encode())
        heads = "" if self.heads is None else f".{','.join(map(str, self.heads))}"
        return f"{self.address}{heads}@{','.join(map(str, self.positions))}:{ids}"

    def read(self, model: Model, rows_of: Callable[[tuple[int, ...], Address], Tensor] | None = None) -> Values:
        """Return the rows [positions, ...] of one forward; a single position's row without that axis.

        Args:
            model: the model.
            rows_of: gives a point's rows [pos, ...] of some tokens where they are known.

        Raises:
            PromptError: a position outside the tokens.
        """
        from torch import tensor

        n = len(self.tokens)
        if bad := [p for p in self.positions if not -n <= p < n]:
            raise PromptError(f"source position {bad[0]} is outside a prompt of {n} tokens: legal are {-n} to {n - 1}")
        if POINTS[self.address.point].dims[0] != "pos":
            raise PromptError(f"{self.address} has no rows per position to take from another prompt")
        at = [p % n for p in self.positions]
        reads: list[Tensor] = []
        if rows_of is None:
            model.run(tensor([self.tokens]), {self.address: lambda t: reads.append(t[0].clone())})
        rows = (reads[0] if rows_of is None else rows_of(self.tokens, self.address))[at]
        rows = rows if self.heads is None else rows[:, list(self.heads)]
        return Values(rows[0] if len(self.positions) == 1 else rows, self.text())
