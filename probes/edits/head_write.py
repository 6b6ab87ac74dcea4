"""A head that writes less along some directions, by its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import ClassVar

from probes.edits.directions import Direction, Place, read_direction
from probes.edits.edit import Edit
from probes.edits.line import Line, times
from probes.edits.positions import Texts
from probes.edits.values import Values
from probes.models.protocol import Model, Shape, Write
from probes.points import Address


@dataclass(frozen=True)
class HeadWriteEdit(Edit):
    """A head's output weights W_O [d_head, d_model] become W_O (I + (keep - 1) V Vᵀ), V orthonormal rows.

    With keep = 0 the head can no longer write along V; this equals zeroing its output's coefficients on V at every
    position.
    """

    layer: int
    head: int
    directions: Values | Direction
    """[m, d_model], orthonormal; a direction in words becomes one unit vector."""
    keep: float = 0.0

    verbs: ClassVar[Mapping[str, str]] = {
        "head-write": "head-write LAYER.HEAD DIRECTION [xKEEP], such as head-write 5.3 token ' Paris' (the head no longer writes along it)"
    }
    strength: ClassVar[str | None] = "keep"

    @classmethod
    def from_line(cls, verb: str, line: Line) -> Edit:
        """Return the edit that a line says."""
        return cls(*line.head(), read_direction(line), line.times(0.0))

    @property
    def stream(self) -> Address:
        """The stream that the head writes into."""
        return Address("resid_post", self.layer)

    def line(self) -> str:
        """Return the edit as one line."""
        if isinstance(self.directions, Values):
            return super().line()
        return f"head-write {self.layer}.{self.head} {self.directions}{times(self.keep, 0.0)}"

    def resolved(self, model: Model, texts: Texts | None = None) -> Edit:
        """Return the edit with its direction read from the model."""
        if isinstance(self.directions, Values):
            return self
        from probes.edits.weights import orthonormal

        rows = self.directions.values(model, Place(self.stream), texts).tensor.reshape(-1, model.shape.d_model)
        basis = orthonormal(rows)
        return replace(self, directions=Values(basis, self.directions.text(self.stream)))

    def text(self) -> str:
        """Return the edit as it enters store keys."""
        rows = self.directions
        what = rows.text() if isinstance(rows, Values) else rows.text(self.stream)
        return f"head_write_edit({self.layer},{self.head},{what},{self.keep!r})"

    def first_block(self, shape: Shape) -> int:
        """Return the head's block."""
        return self.layer

    def writes(self, shape: Shape, lengths: Sequence[int] | None = None) -> Mapping[Address, Write]:
        """Return none: the weights themselves are changed."""
        return {}

    def within(self, model: Model) -> AbstractContextManager[None]:
        """Give the model these weights inside; outside it has the very same bits as before.

        Raises:
            PointError: a head this model does not have, or weights that are not a plain matrix.
        """
        from probes.edits.weights import writing_less

        assert isinstance(self.directions, Values)
        return writing_less(model, self.layer, self.head, self.directions.tensor, self.keep)
