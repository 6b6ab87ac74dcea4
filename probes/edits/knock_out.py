"""Attention knockout: queries that cannot see keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from probes.edits.edit import Edit, Scope
from probes.edits.line import Line, spans
from probes.edits.positions import Texts, TokenText, indices, need_texts, place, read_place
from probes.errors import OptionError, PointError, unknown
from probes.models.protocol import Model, Shape, Write
from probes.points import Address

Positions = str | tuple[int, ...] | TokenText


@dataclass(frozen=True)
class KnockOut(Edit):
    """In a window of layers, the given queries get a score of minus infinity at the given keys.

    The other keys' probabilities grow so that they sum to one; a query left without keys attends to nothing.
    Under scope `every_step` the queries must be `all` and the keys count from the start of the prompt.
    """

    layers: tuple[int, ...]
    queries: Positions
    keys: Positions
    heads: tuple[int, ...] | None = None
    scope: Scope = "prefill"

    verbs: ClassVar[Mapping[str, str]] = {
        "knock-out": "knock-out LAYER[.HEAD] QUERY->KEY [every-step], such as knock-out 5.3 last->0 or knock-out 3-5 7->' Paris'"
    }

    @classmethod
    def from_line(cls, verb: str, line: Line) -> Edit:
        """Return the edit that a line says."""
        layers = line.numbers("a layer, or several such as 3-5")
        heads = line.numbers("a head, or several such as 0,3") if line.takes(".") else None
        queries = read_place(line)
        line.need("->")
        return cls(layers, queries, read_place(line), heads, "every_step" if line.takes("every-step") else "prefill")

    def line(self) -> str:
        """Return the edit as one line."""
        heads = "" if self.heads is None else f".{spans(self.heads)}"
        step = " every-step" if self.scope == "every_step" else ""
        return f"knock-out {spans(self.layers)}{heads} {place(self.queries)}->{place(self.keys)}{step}"

    def resolved(self, model: Model, texts: Texts | None = None) -> Edit:
        """Return the edit with positions that are named by token text as indices."""
        named = {n: at for n in ("queries", "keys") if isinstance(at := getattr(self, n), TokenText)}
        if not named:
            return self
        tokens = need_texts(texts, "a position named by its token's text").tokens
        return replace(self, **{n: indices(at, model.tokenizer, tokens) for n, at in named.items()})  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        if self.scope not in ("prefill", "every_step"):
            raise OptionError(unknown("scope", self.scope, ("prefill", "every_step")))
        counted_back = isinstance(self.keys, tuple) and any(key < 0 for key in self.keys)
        if self.scope == "every_step" and (self.queries != "all" or self.keys == "last" or counted_back):
            raise OptionError("scope 'every_step' needs queries 'all', and keys counted from the start of the prompt")

    def text(self) -> str:
        """Return the edit as it enters store keys."""
        return f"knockout({self.layers},{self.queries},{self.keys},{self.heads},{self.scope})"

    def writes(self, shape: Shape, lengths: Sequence[int] | None = None) -> Mapping[Address, Write]:
        """Return one write of the pattern per layer, none where nothing is named.

        Raises:
            PointError: a layer or head this model does not have.
        """
        if () in (self.queries, self.keys, self.heads):
            return {}
        for kind, values, n in (("layer", self.layers, shape.n_layers), ("head", self.heads or (), shape.n_heads)):
            if bad := [value for value in values if not 0 <= value < n]:
                raise PointError(f"{kind} {bad[0]} of an attention knockout: legal are 0 to {n - 1}")
        from probes.edits.attention import Blocked

        return {
            Address("pattern", layer): Blocked(self.queries, self.keys, self.heads, lengths) for layer in self.layers
        }
