"""Edits of a point's rows: replace, add, scale, and change coefficients along directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from probes.edits.directions import Direction, Place, read_direction
from probes.edits.edit import Edit
from probes.edits.line import Line, times
from probes.edits.other_prompt import Other
from probes.edits.point_edit import PointEdit
from probes.edits.positions import Texts, read_place
from probes.edits.values import Source, Values
from probes.errors import OptionError
from probes.models.protocol import Model
from probes.points import Address

if TYPE_CHECKING:
    from torch import Tensor


def _placed(values: Tensor, rows: Tensor, order: Tensor) -> Tensor:
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

    value: Values | Source | Other
    share: float = 1.0
    """1 replaces; 0 leaves as it was; between, a mixture."""

    verbs: ClassVar[Mapping[str, str]] = {
        "patch": "patch POINT.LAYER[.HEAD] [@POS] from other[@POS] [xSHARE], such as patch resid_post.12 @4 from other"
    }
    strength: ClassVar[str | None] = "share"

    @classmethod
    def read_what(cls, verb: str, line: Line) -> dict[str, Any]:
        """Return the fields that a line says behind the place."""
        line.need("from")
        line.need("other")
        return {"value": Other(read_place(line) if line.takes("@") else None), "share": line.times()}

    def line(self) -> str:
        """Return the edit as one line."""
        if not isinstance(self.value, Other):
            return super().line()
        return f"patch {self.where()} {self.value.text()}{self.ending(self.share)}"

    def detail(self) -> str:
        """Return what is done, as text."""
        return self.value.text() + times(self.share)

    def with_values(self, model: Model, texts: Texts | None) -> Edit:
        """Return the edit with the values read from their own prompt."""
        value = self.value
        if isinstance(value, Other):
            value = value.source(model, texts, Place(self.address, self.positions, self.heads))
        return (
            replace(self, value=value.read(model, None if texts is None else texts.rows))
            if isinstance(value, Source)
            else self
        )

    def changed(self, rows: Tensor, order: Tensor) -> Tensor:
        """Return the new rows for `rows` [n, ...]."""
        if not isinstance(self.value, Values):
            raise OptionError("values from another prompt must be resolved on a model first: probes.edits.resolve")
        return _mixed(rows, _placed(self.value.tensor, rows, order), self.share)


def _mixed(rows: Tensor, new: Tensor, share: float) -> Tensor:
    return new if share == 1 else rows + share * (new - rows)


@dataclass(frozen=True, kw_only=True)
class Mean(PointEdit):
    """The point becomes its mean over the prompt's positions in the same forward, the first left out where there are more."""

    share: float = 1.0
    """1 replaces; 0 leaves as it was; between, a mixture."""

    verbs: ClassVar[Mapping[str, str]] = {
        "mean": "mean POINT.LAYER[.HEAD] [@POS] [xSHARE], such as mean mlp_out.5 @last (its mean over the prompt's positions)"
    }
    strength: ClassVar[str | None] = "share"

    @classmethod
    def read_what(cls, verb: str, line: Line) -> dict[str, Any]:
        """Return the fields that a line says behind the place."""
        return {"share": line.times()}

    def line(self) -> str:
        """Return the edit as one line."""
        return f"mean {self.where()}{self.ending(self.share)}"

    def detail(self) -> str:
        """Return what is done, as text."""
        return f"mean{times(self.share)}"

    def new_rows(self, tensor: Tensor, index: tuple[Tensor, ...], order: Tensor, spans: Sequence[int]) -> Tensor:
        """Return the means of each row's own prompt."""
        from probes.edits.row_writes import prompt_means

        means = prompt_means(tensor, spans)
        new = means[index[0]] if self.heads is None else means[index[0], index[2]]
        return _mixed(tensor[index], new, self.share)


@dataclass(frozen=True, kw_only=True)
class Add(PointEdit):
    """Values are added to the point: [width], or [positions, width], or a direction in words."""

    value: Values | Direction
    factor: float = 1.0

    verbs: ClassVar[Mapping[str, str]] = {
        "add": "add POINT.LAYER[.HEAD] [@POS] DIRECTION [xNUMBER], such as add resid_post.8 @last token ' Paris' x20"
    }
    strength: ClassVar[str | None] = "factor"

    @classmethod
    def read_what(cls, verb: str, line: Line) -> dict[str, Any]:
        """Return the fields that a line says behind the place."""
        return {"value": read_direction(line), "factor": line.times()}

    def line(self) -> str:
        """Return the edit as one line."""
        return (
            super().line()
            if isinstance(self.value, Values)
            else f"add {self.where()} {self.value}{self.ending(self.factor)}"
        )

    def detail(self) -> str:
        """Return what is done, as text."""
        value = self.value
        return f"{self.factor!r}*{value.text() if isinstance(value, Values) else value.text(self.address)}"

    def with_values(self, model: Model, texts: Texts | None) -> Edit:
        """Return the edit with its direction read from the model."""
        if isinstance(self.value, Values):
            return self
        return replace(self, value=self.value.values(model, Place(self.address, self.positions, self.heads), texts))

    def changed(self, rows: Tensor, order: Tensor) -> Tensor:
        """Return the new rows for `rows` [n, ...]."""
        assert isinstance(self.value, Values)
        return rows + self.factor * _placed(self.value.tensor, rows, order)


@dataclass(frozen=True, kw_only=True)
class Scale(PointEdit):
    """The point is multiplied by a number; 0 ablates it."""

    factor: float

    verbs: ClassVar[Mapping[str, str]] = {
        "zero": "zero POINT.LAYER[.HEAD] [@POS], such as zero z.5.3 or zero mlp_out.11 @-1",
        "scale": "scale POINT.LAYER[.HEAD] [@POS] xNUMBER, such as scale attn_out.3 x0.5",
    }
    strength: ClassVar[str | None] = "factor"

    @classmethod
    def read_what(cls, verb: str, line: Line) -> dict[str, Any]:
        """Return the fields that a line says behind the place."""
        return {"factor": line.factor() if verb == "scale" else 0.0}

    def line(self) -> str:
        """Return the edit as one line."""
        zero = repr(self.factor) == "0.0"
        return f"{'zero' if zero else 'scale'} {self.where()}{self.ending(self.factor, 0.0 if zero else float('nan'))}"

    def detail(self) -> str:
        """Return what is done, as text."""
        return repr(self.factor)

    def changed(self, rows: Tensor, order: Tensor) -> Tensor:
        """Return the new rows for `rows` [n, ...]."""
        return rows * self.factor


@dataclass(frozen=True, kw_only=True)
class ProjectOut(PointEdit):
    """The part of the point along a direction in words is multiplied by `keep`."""

    value: Direction
    keep: float = 0.0

    verbs: ClassVar[Mapping[str, str]] = {
        "project-out": "project-out POINT.LAYER[.HEAD] [@POS] DIRECTION [xKEEP], such as project-out resid_post.8 token ' Paris'"
    }
    strength: ClassVar[str | None] = "keep"

    @classmethod
    def read_what(cls, verb: str, line: Line) -> dict[str, Any]:
        """Return the fields that a line says behind the place."""
        return {"value": read_direction(line), "keep": line.times(0.0)}

    def line(self) -> str:
        """Return the edit as one line."""
        return f"project-out {self.where()} {self.value}{self.ending(self.keep, 0.0)}"

    def detail(self) -> str:
        """Return what is done, as text."""
        return f"{self.value.text(self.address)},{self.keep!r}"

    def with_values(self, model: Model, texts: Texts | None) -> Edit:
        """Return the edit of coefficients that does it."""
        rows = self.value.values(model, Place(self.address, self.positions, self.heads), texts).tensor
        where = {"positions": self.positions, "heads": self.heads, "scope": self.scope}
        return project_out(self.address, rows.reshape(-1, rows.shape[-1]), self.keep, **where)


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
        from probes.edits.row_writes import recombined

        return recombined(rows, self.read.tensor, self.write.tensor, self.keep, self.offset)


def project_out(address: Address, directions: Tensor, keep: float = 0.0, **where: object) -> Coefficients:
    """Return the edit that multiplies the part of a point inside the span of `directions` [m, width] by `keep`.

    Raises:
        OptionError: directions that are not linearly independent.
    """
    from probes.edits.row_writes import independent

    values = Values(independent(directions))
    return Coefficients(address=address, read=values, write=values, keep=keep, **where)  # type: ignore[arg-type]
