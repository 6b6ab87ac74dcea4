"""Edits of a point's rows: replace, add, scale, and change coefficients along directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from probes.edits.edit import Edit, Scope
from probes.edits.values import Source, Values
from probes.errors import OptionError, PointError, unknown
from probes.models.protocol import Model, Shape, Write
from probes.points import POINTS, Address
from probes.prompts import select

At = Literal["all", "last"] | tuple[int, ...]
"""Positions of each prompt; ints count from the end where negative. An empty tuple edits nothing."""


@dataclass(frozen=True, kw_only=True)
class PointEdit:
    """Where and when a point is changed.

    Raises:
        PointError: heads of a point without heads, or a point that is not one row per position.
        OptionError: an unknown scope, or numbered positions outside the prompt's own forward.
    """

    address: Address
    positions: At = "all"
    heads: tuple[int, ...] | None = None
    """Heads (key-value heads for `k` and `v`); None is all."""
    scope: Scope = "prefill"

    def __post_init__(self) -> None:
        dims = POINTS[self.address.point].dims
        if dims[0] != "pos":
            raise PointError(f"{self.address} has no rows per position; edit attention with KnockOut")
        if self.heads is not None and len(dims) < 3:
            raise PointError(f"{self.address} has no heads: leave heads out, or edit q, k, v or z")
        if self.scope not in ("prefill", "every_step"):
            raise OptionError(unknown("scope", self.scope, ("prefill", "every_step")))
        if self.scope == "every_step" and not isinstance(self.positions, str):
            raise OptionError(
                f"positions {self.positions} name places in the prompt: use scope 'prefill', or positions 'all' or 'last'"
            )

    def text(self) -> str:
        """Return the edit as it enters store keys."""
        heads = "" if self.heads is None else f",heads={','.join(map(str, self.heads))}"
        at = self.positions if isinstance(self.positions, str) else ",".join(map(str, self.positions))
        return f"{type(self).__name__.lower()}({self.address}@{at}{heads},{self.scope},{self.detail()})"

    def detail(self) -> str:
        """Return the part of the text that says what is done."""
        raise NotImplementedError

    def changed(self, rows: Tensor, order: Tensor) -> Tensor:
        """Return new rows [n, ...] for old ones; `order` [n] says which of the named positions each row is."""
        raise NotImplementedError

    def writes(self, shape: Shape, lengths: Sequence[int] | None = None) -> Mapping[Address, Write]:
        """Return one write, or none where no position or head is named.

        Raises:
            PointError: a head this model does not have.
        """
        if self.positions == () or self.heads == ():
            return {}
        if self.heads is not None:
            n = shape.width(POINTS[self.address.point].dims[1])
            if bad := [head for head in self.heads if not 0 <= head < n]:
                raise PointError(f"head {bad[0]} of {self.address}: legal heads are 0 to {n - 1}")

        def write(tensor: Tensor) -> Tensor:
            spans = lengths if lengths is not None else [tensor.shape[1]] * tensor.shape[0]
            rows = torch.cat([torch.full_like(select(n, self.positions), row) for row, n in enumerate(spans)])
            at = torch.cat([select(n, self.positions) for n in spans]).to(tensor.device)
            order = torch.cat([torch.arange(len(select(n, self.positions))) for n in spans]).to(tensor.device)
            index: tuple[Tensor, ...] = (rows.to(tensor.device), at)
            if self.heads is not None:
                heads = torch.tensor(self.heads, device=tensor.device)
                index = (index[0][:, None], index[1][:, None], heads[None])
            out = tensor.clone()
            out[index] = self.changed(tensor[index], order).to(tensor.dtype)
            return out

        return {self.address: write}


def _rows(values: Tensor, rows: Tensor, order: Tensor) -> Tensor:
    """`values` for each of `rows` [n, ...]: one for all where it has fewer axes, otherwise one per named position."""
    values = values.to(rows.device, rows.dtype)
    if values.dim() < rows.dim():
        return values.expand_as(rows)
    if len(values) <= int(order.max()):
        raise OptionError(f"{len(values)} rows of values for {int(order.max()) + 1} positions: give one each, or one")
    return values[order].expand_as(rows)


@dataclass(frozen=True, kw_only=True)
class Replace(PointEdit):
    """The point becomes other values: [width] for every position, [positions, width], or another prompt's rows."""

    value: Values | Source

    def detail(self) -> str:
        """Return what is done, as text."""
        return self.value.text()

    def resolved(self, model: Model) -> Edit:
        """Return the edit with the values read from their own prompt."""
        return replace(self, value=self.value.read(model)) if isinstance(self.value, Source) else self

    def changed(self, rows: Tensor, order: Tensor) -> Tensor:
        """Return the new rows for `rows` [n, ...]."""
        if isinstance(self.value, Source):
            raise OptionError("values from another prompt must be resolved on a model first: probes.edits.resolve")
        return _rows(self.value.tensor, rows, order)


@dataclass(frozen=True, kw_only=True)
class Add(PointEdit):
    """Values are added to the point: [width], or [positions, width]."""

    value: Values
    factor: float = 1.0

    def detail(self) -> str:
        """Return what is done, as text."""
        return f"{self.factor!r}*{self.value.text()}"

    def changed(self, rows: Tensor, order: Tensor) -> Tensor:
        """Return the new rows for `rows` [n, ...]."""
        return rows + self.factor * _rows(self.value.tensor, rows, order)


@dataclass(frozen=True, kw_only=True)
class Scale(PointEdit):
    """The point is multiplied by a number; 0 ablates it."""

    factor: float

    def detail(self) -> str:
        """Return what is done, as text."""
        return repr(self.factor)

    def changed(self, rows: Tensor, order: Tensor) -> Tensor:
        """Return the new rows for `rows` [n, ...]."""
        return rows * self.factor


@dataclass(frozen=True, kw_only=True)
class Coefficients(PointEdit):
    """Coefficients c = x · read become keep * c + offset, by adding the difference times `write`.

    `read` and `write` are [m, width] with read · writeᵀ the identity, so that each coefficient takes its new value.
    """

    read: Values
    write: Values
    keep: float = 0.0
    offset: tuple[float, ...] = ()

    def detail(self) -> str:
        """Return what is done, as text."""
        return f"{self.read.text()},{self.write.text()},{self.keep!r},{self.offset!r}"

    def changed(self, rows: Tensor, order: Tensor) -> Tensor:
        """Return the new rows for `rows` [n, ...]."""
        x = rows.float()
        read, write = (values.tensor.to(x.device, torch.float32) for values in (self.read, self.write))
        change = (self.keep - 1) * (x @ read.T)
        if self.offset:
            change = change + torch.tensor(self.offset, device=x.device)
        return (x + change @ write).to(rows.dtype)


def project_out(address: Address, directions: Tensor, keep: float = 0.0, **where: object) -> Coefficients:
    """Return the edit that multiplies the part of a point inside the span of `directions` [m, width] by `keep`.

    Raises:
        OptionError: directions that are not linearly independent.
    """
    basis, triangle = torch.linalg.qr(directions.detach().double().cpu().T)
    if (triangle.diagonal().abs() < 1e-9 * triangle.abs().max()).any():
        raise OptionError("the directions to project out are linearly dependent: give a basis of their span")
    values = Values(basis.T.float())
    return Coefficients(address=address, read=values, write=values, keep=keep, **where)  # type: ignore[arg-type]
