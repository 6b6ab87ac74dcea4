"""Positions of a prompt: by index, from the end, all, the last, or by the text of their token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from probes.edits.line import Line, spans
from probes.errors import OptionError, PromptError, shown
from probes.points import Address

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor


@dataclass(frozen=True)
class TokenText:
    """Every position whose token reads like this, blanks included."""

    text: str

    def __repr__(self) -> str:
        return repr(self.text)

    def positions(self, tokenizer: Any, tokens: Sequence[int]) -> tuple[int, ...]:
        """Return the positions of such tokens.

        Raises:
            PromptError: no token of the prompt reads like this, or there is no tokenizer.
        """
        if tokenizer is None:
            raise PromptError(f"position {self.text!r}: the model came without a tokenizer, so give an index")
        texts = [tokenizer.decode([token]) for token in tokens]
        if at := tuple(i for i, text in enumerate(texts) if text == self.text):
            return at
        raise PromptError(
            f"no token of the prompt reads {shown(self.text)}: legal are {', '.join(map(repr, dict.fromkeys(texts)))}"
        )


At = Literal["all", "last", "after_first"] | tuple[int, ...] | TokenText
"""Positions of each prompt; ints count from the end where negative. An empty tuple edits nothing."""


def read_at(line: Line, after: str = "@") -> At:
    """Return the positions that stand after a sign; all where it does not stand here."""
    return read_place(line) if line.takes(after) else "all"


def read_place(line: Line) -> At:
    """Return the positions that stand here."""
    if line.is_quoted():
        return TokenText(line.quoted())
    if line.takes("*"):
        return "all"
    word: Literal["last", "all", "after_first"]
    for word in ("last", "all", "after_first"):
        if line.takes(word):
            return word
    return () if line.takes("none") else line.places()


def place(at: At | str) -> str:
    """Return positions as `read_place` reads them."""
    if isinstance(at, tuple):
        return spans(at)
    return repr(at) if isinstance(at, TokenText) else at


def at_text(at: At) -> str:
    """Return positions as `read_at` reads them, with a blank before them; nothing for all."""
    return "" if at == "all" else f" @{place(at)}"


def indices(at: At, tokenizer: Any, tokens: Sequence[int]) -> tuple[int, ...]:
    """Return positions of one prompt as indices from its start.

    Raises:
        PromptError: a position outside the prompt.
    """
    named = at.positions(tokenizer, tokens) if isinstance(at, TokenText) else at
    return tuple(int(position) for position in chosen(len(tokens), named))


def chosen(length: int, at: At | str) -> Int[Tensor, " row"]:
    """Return positions of a prompt of some length.

    Raises:
        OptionError: positions named by token text, which no length tells.
        PromptError: a position outside the prompt.
    """
    if isinstance(at, TokenText):
        raise OptionError(f"positions {at!r} are named by token text, and must be resolved on a prompt first")
    from probes.batches import select

    return select(length, at)


RowReader = Callable[[tuple[int, ...], Address], "Tensor"]
"""Returns a point's rows [pos, ...] in the unedited run of some tokens."""


@dataclass(frozen=True)
class Texts:
    """The prompts that an edit's words are about."""

    tokens: tuple[int, ...]
    """The prompt that is edited."""
    other: tuple[int, ...] | None = None
    """The prompt that is copied from."""
    rows: RowReader | None = field(default=None, compare=False)
    """Gives the rows of a prompt without edits where somebody keeps them; None reads them by a forward."""

    def other_or_refuse(self, what: str) -> tuple[int, ...]:
        """Return the other prompt.

        Raises:
            OptionError: there is none.
        """
        if self.other is None:
            raise OptionError(f"{what} needs a second prompt to copy from: give one (--other TEXT)")
        return self.other


def need_texts(texts: Texts | None, what: str) -> Texts:
    """Return the prompts that words are about.

    Raises:
        OptionError: there are none, because the edit is applied to many prompts at once.
    """
    if texts is None:
        raise OptionError(f"{what} is about one prompt: use it in a session (bathyscope edit), not over a prompt set")
    return texts
