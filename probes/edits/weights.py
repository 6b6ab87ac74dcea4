"""Edits of weights, undone on the way out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from probes.blocks.rerouting import block_access
from probes.edits.directions import Direction, Place, read_direction
from probes.edits.edit import Edit
from probes.edits.line import Line, times
from probes.edits.positions import Texts
from probes.edits.values import Values
from probes.errors import PointError
from probes.models.protocol import BlockAccess, Model, Shape, Write
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
        rows = self.directions.values(model, Place(self.stream), texts).tensor.reshape(-1, model.shape.d_model)
        basis = torch.linalg.qr(rows.double().T)[0].T.float()
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

    @contextmanager
    def within(self, model: Model) -> Iterator[None]:
        """Give the model these weights inside; outside it has the very same bits as before.

        Raises:
            PointError: a head this model does not have, or weights that are not a plain matrix.
        """
        assert isinstance(self.directions, Values)
        shape = model.shape
        if not (0 <= self.layer < shape.n_layers and 0 <= self.head < shape.n_heads):
            raise PointError(
                f"head {self.layer}.{self.head}: layers end at {shape.n_layers - 1}, heads at {shape.n_heads - 1}"
            )
        access = block_access(model)
        with access.altering(self.layer, partial(self._changed, access, self.directions.tensor)):
            yield

    @contextmanager
    def _changed(self, access: BlockAccess, directions: Tensor) -> Iterator[None]:
        shape = access.shape
        weight, rows = matrix(access.anatomy.component("attn.o", self.layer), shape.n_heads * shape.d_head)
        part = slice(self.head * shape.d_head, (self.head + 1) * shape.d_head)
        before = weight.detach().clone()
        try:
            with torch.no_grad():
                v = directions.to(weight.device, torch.float32)
                old = (weight[part] if rows else weight[:, part].T).float()
                new = (old + (self.keep - 1) * (old @ v.T) @ v).to(weight.dtype)
                (weight[part] if rows else weight[:, part].T).copy_(new)
            yield
        finally:
            with torch.no_grad():
                weight.copy_(before)


def matrix(projection: nn.Module, n_inputs: int) -> tuple[Tensor, bool]:
    """Return (a projection's weights, whether their rows are its inputs).

    Raises:
        PointError: the weights are quantised, offloaded or no matrix of this many inputs.
    """
    weight = getattr(projection, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.is_meta or not weight.is_floating_point():
        raise PointError("the output projection's weights are quantised or not in memory, so they cannot be edited")
    rows = type(projection).__name__ == "Conv1D"
    if weight.shape[0 if rows else 1] != n_inputs:
        raise PointError(
            f"the output projection has weights {tuple(weight.shape)}, which do not take {n_inputs} inputs"
        )
    return weight, rows
