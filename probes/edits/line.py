"""One line of the edit grammar, read from left to right, and the words that an edit's text is made of."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterable

from probes.errors import OptionError, UserError, shown
from probes.points import POINTS, Address

_QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"")
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?", re.IGNORECASE)
_SPANS = re.compile(r"none|\d{1,9}(?:-\d{1,9})?(?:,\d{1,9}(?:-\d{1,9})?)*")
_PLACES = re.compile(r"-?\d{1,9}(?:-\d{1,9})?(?:,-?\d{1,9}(?:-\d{1,9})?)*")
LONGEST_SPAN = 100_000
"""Numbers that one list may name."""


class EditError(OptionError):
    """Text that is no edit; the message names the place and the legal forms."""


class Line:
    """The text of one edit and how far it was read.

    Args:
        text: the whole edit.
        legal: the forms that are legal, for messages.
    """

    def __init__(self, text: str, legal: str) -> None:
        self.text, self.legal, self.at = text, legal, 0
        self.space()

    def space(self) -> None:
        """Pass over blanks."""
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    @property
    def ended(self) -> bool:
        """Whether nothing is left."""
        return self.at >= len(self.text)

    def fault(self, expected: str) -> EditError:
        """Return the error that something else was expected here."""
        rest = shown(self.text[self.at :]) if not self.ended else "the end"
        return EditError(
            f"edit {shown(self.text)}: expected {expected} at character {self.at + 1}, where {rest} stands. "
            f"Legal: {self.legal}"
        )

    def match(self, pattern: re.Pattern[str]) -> str | None:
        """Return what the pattern matches here, passed over with the blanks behind it; None where it does not."""
        if not (part := pattern.match(self.text, self.at)):
            return None
        self.at = part.end()
        self.space()
        return part[0]

    def takes(self, word: str) -> bool:
        """Return whether a word or sign stands here; if so it is passed over."""
        return self.match(re.compile(re.escape(word) + (r"(?!\w|-\w)" if word[-1].isalnum() else ""))) is not None

    def need(self, word: str) -> None:
        """Pass over a word that must stand here."""
        if not self.takes(word):
            raise self.fault(word)

    def word(self, expected: str) -> str:
        """Return the word that stands here, up to the next blank."""
        if (word := self.match(re.compile(r"[^\s'\"]+"))) is None:
            raise self.fault(expected)
        return word

    def rest(self, expected: str) -> str:
        """Return all that is left, which must be something."""
        if self.ended:
            raise self.fault(expected)
        text, self.at = self.text[self.at :], len(self.text)
        return text.strip()

    def quoted(self, expected: str = "quoted text") -> str:
        """Return text in quotes, as Python writes it."""
        start = self.at
        if (part := self.match(_QUOTED)) is None:
            raise self.fault(expected)
        try:
            return str(ast.literal_eval(part))
        except (ValueError, SyntaxError):
            self.at = start
            raise self.fault(f"{expected}, its escapes as Python has them") from None

    def is_quoted(self) -> bool:
        """Whether quoted text stands here."""
        return not self.ended and self.text[self.at] in "'\""

    def factor(self) -> float:
        """Return the number after the x that must stand here."""
        if (factor := self.times(math.nan)) != factor:
            raise self.fault("a factor such as x0.5")
        return factor

    def times(self, default: float = 1.0) -> float:
        """Return the number after an x, such as x0.5; the default where none stands here."""
        if not self.match(re.compile(r"x(?=[-+.\d])")):
            return default
        return self.number()

    def repetitions(self, default: int) -> int:
        """Return the whole number after an x, such as x3; the default where none stands here."""
        return self.integer("how many times") if self.match(re.compile(r"x(?=\d)")) else default

    def number(self) -> float:
        """Return the number that stands here."""
        if (part := self.match(_NUMBER)) is None:
            raise self.fault("a number")
        return float(part)

    def integer(self, expected: str) -> int:
        """Return the whole number, not negative, that stands here."""
        if (part := self.match(re.compile(r"\d{1,9}"))) is None:
            raise self.fault(expected)
        return int(part)

    def head(self) -> tuple[int, int]:
        """Return the layer and head that stand here, such as 5.3."""
        if (part := self.match(re.compile(r"\d{1,9}\.\d{1,9}(?![\w.])"))) is None:
            raise self.fault("a head: LAYER.HEAD, such as 5.3")
        layer, _, head = part.partition(".")
        return int(layer), int(head)

    def numbers(self, expected: str) -> tuple[int, ...]:
        """Return numbers such as 3,5-7, or none."""
        if (part := self.match(_SPANS)) is None:
            raise self.fault(expected)
        return self._expanded(part)

    def places(self) -> tuple[int, ...]:
        """Return positions such as 3, -1 or 2-5."""
        if (part := self.match(_PLACES)) is None:
            raise self.fault(
                "a position: an index such as 4 or -1, a range such as 2-5, last, all, or quoted token text"
            )
        return self._expanded(part)

    def _expanded(self, text: str) -> tuple[int, ...]:
        if text == "none":
            return ()
        out: list[int] = []
        for part in text.split(","):
            low, _, high = part.partition("-") if not part.startswith("-") else (part, "", "")
            span = range(int(low), int(high or low) + 1)
            if not span:
                raise self.fault(f"the lower number of {part} first")
            if len(span) + len(out) > LONGEST_SPAN:
                raise self.fault(f"at most {LONGEST_SPAN:,} numbers")
            out += span
        return tuple(out)

    def address(self) -> tuple[Address, tuple[int, ...] | None]:
        """Return the point that stands here, such as resid_post.3 or z.5.3, and its heads; None for all heads."""
        start = self.at
        name = self.match(re.compile(r"[a-z_]+(?=[.\s@]|$)"))
        if name is None or (name not in POINTS):
            self.at = start
            raise self.fault(f"a point ({', '.join(POINTS)}), with its layer where it has one, such as resid_post.3")
        layer, heads = None, None
        if self.takes("."):
            layer = self.integer("a layer number")
            if self.takes("."):
                heads = self.numbers("a head number, or several such as 0,3")
        try:
            return Address(name, layer), heads
        except UserError as error:
            self.at = start
            raise self.fault(f"a point of this vocabulary ({error})") from None

    def end(self) -> None:
        """Refuse what is left."""
        if not self.ended:
            raise self.fault("nothing more")


def spans(numbers: Iterable[int]) -> str:
    """Return numbers as `Line.numbers` reads them: rising runs of three and more as 2-5, nothing as none."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1 and runs[-1][0] >= 0:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs]
    return ",".join(parts) or "none"


def times(factor: float, default: float = 1.0) -> str:
    """Return a factor as `Line.times` reads it, with a blank before it; nothing where it is the default."""
    return "" if factor == default else f" x{factor!r}"


def split_layers(text: str, n_layers: int) -> list[str]:
    """Return an edit's text once for each layer that its address names, as in `zero mlp_out.3-5` or `zero attn_out.*`."""
    match = re.match(r"^(\s*[a-z-]+\s+[a-z_]+\.)(\*|\d{1,9}-\d{1,9})(?=[.\s@]|$)", text)
    if match is None or match[1].split()[1][:-1] not in POINTS:
        return [text]
    low, high = (0, n_layers - 1) if match[2] == "*" else map(int, match[2].split("-"))
    return [f"{match[1]}{layer}{text[match.end() :]}" for layer in range(low, min(high, n_layers) + 1)] or [text]


def watched(text: str) -> tuple[str, ...]:
    """Return tokens to watch, of text such as `' Paris' ' Rome'`, or ` Paris, Rome` without quotes.

    Without quotes tokens are divided by commas, and each begins with one blank.

    Raises:
        OptionError: quotes that are not closed.
    """
    line = Line(text, "' Paris' ' Rome', or Paris, Rome")
    if not line.is_quoted():
        return tuple(f" {part.strip()}" for part in text.split(",") if part.strip())
    tokens: list[str] = []
    while not line.ended:
        tokens.append(line.quoted())
        line.takes(",")
    return tuple(tokens)
