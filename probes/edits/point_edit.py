"""What all edits of a point's rows share: where and when they act, and how their rows are placed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from probes.edits.edit import Edit, Scope
from probes.edits.line import Line, spans, times
from probes.edits.positions import At, Texts, TokenText, at_text, indices, need_texts, read_at
from probes.errors import OptionError, PointError, unknown
from probes.models.protocol import Model, Shape, Write
from probes.points import POINTS, Address

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PointEdit(Edit):
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
        if self.scope == "every_step" and self.positions not in ("all", "last"):
            raise OptionError(
                f"positions {self.positions} name places in the prompt: use scope 'prefill', or positions 'all' or 'last'"
            )

    def text(self) -> str:
        """Return the edit as it enters store keys."""
        heads = "" if self.heads is None else f",heads={','.join(map(str, self.heads))}"
        at = ",".join(map(str, self.positions)) if isinstance(self.positions, tuple) else str(self.positions)
        return f"{type(self).__name__.lower()}({self.address}@{at}{heads},{self.scope},{self.detail()})"

    def where(self) -> str:
        """Return where and when the edit acts, as its line says it."""
        heads = "" if self.heads is None else f".{spans(self.heads)}"
        return f"{self.address}{heads}{at_text(self.positions)}"

    def ending(self, factor: float, default: float = 1.0) -> str:
        """Return the end of the edit's line: its factor, and when it acts while the model writes."""
        return times(factor, default) + (" every-step" if self.scope == "every_step" else "")

    def resolved(self, model: Model, texts: Texts | None = None) -> Edit:
        """Return the edit with positions as indices and its values read from the model and the prompts."""
        edit = self
        if isinstance(self.positions, TokenText):
            tokens = need_texts(texts, "a position named by its token's text").tokens
            edit = replace(self, positions=indices(self.positions, model.tokenizer, tokens))
        return edit.with_values(model, texts)

    def with_values(self, model: Model, texts: Texts | None) -> Edit:
        """Return the edit with its values read."""
        return self

    @classmethod
    def from_line(cls, verb: str, line: Line) -> Edit:
        """Return the edit that a line says: where, what, and when it acts while the model writes."""
        address, heads = line.address()
        positions = read_at(line)
        what = cls.read_what(verb, line)
        scope: Scope = "every_step" if line.takes("every-step") else "prefill"
        return cls(address=address, positions=positions, heads=heads, scope=scope, **what)

    @classmethod
    def read_what(cls, verb: str, line: Line) -> dict[str, Any]:
        """Return the fields that a line says behind the place."""
        raise NotImplementedError

    def detail(self) -> str:
        """Return the part of the text that says what is done."""
        raise NotImplementedError

    def changed(self, rows: Tensor, order: Tensor) -> Tensor:
        """Return new rows [n, ...] for old ones; `order` [n] says which of the named positions each row is."""
        raise NotImplementedError

    def new_rows(self, tensor: Tensor, index: tuple[Tensor, ...], order: Tensor, spans: Sequence[int]) -> Tensor:
        """Return new rows [n, ...] for those at `index` of a point [batch, pos, ...] of prompts this long."""
        return self.changed(tensor[index], order)

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

        from probes.edits.row_writes import row_write

        return {self.address: row_write(self.positions, self.heads, self.new_rows, lengths)}
