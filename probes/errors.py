"""Errors a user can act on; each message has the value, the legal values and what to do next."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """Base of every mistake a user can mend; front ends print it as one line and exit with code 2."""


class PointError(UserError):
    """A point that does not exist, or that this model does not have."""


class ModelError(UserError):
    """A model that cannot be found, loaded or trusted."""


class PromptError(UserError):
    """A prompt or prompt file that cannot be run; names the file and line where there is one."""


class OptionError(UserError):
    """An option with an illegal value."""


class StoreError(UserError):
    """A store that cannot be read or written: no space, damaged, or a newer protocol."""


class ProbeError(UserError):
    """Rows, labels or groups that no probe can be fitted to."""


class TrainingError(UserError):
    """A training that cannot start or go on; names the step and what was kept."""


SHOWN = 120
"""Characters of a value that a message quotes."""


def shown(value: object) -> str:
    """Return a value as a message quotes it: its repr, the middle left out where it is long."""
    if isinstance(value, str) and len(value) > SHOWN:
        value, left_out = value[: SHOWN // 2], value[SHOWN // 2 :]
        return f"{value!r}… ({len(left_out):,} more characters)"
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits, or a deeper nest, than Python prints
        return f"a value of type {type(value).__name__} that is too long to print"
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]}…{text[-SHOWN // 4 :]}"


def unknown(kind: str, value: object, legal: Iterable[object]) -> str:
    """Return one line for an unknown name: the value, a did-you-mean, and the legal values."""
    names = [str(name) for name in legal]
    close = get_close_matches(str(value)[:SHOWN], names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {shown(str(value))}.{hint} Legal: {', '.join(names)}."


def one_line(error: BaseException, limit: int = 240) -> str:
    """Return an error's message on one line, cut to `limit` characters."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= limit else line[: limit - 1] + "…"
