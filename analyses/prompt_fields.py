"""Checks of what further fields of a prompt line hold: what values must be, in the words of a refusal, and a test of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from probes.prompts import FieldCheck

Test = Callable[[Any], Any]


def must(be: str, test: Test) -> FieldCheck:
    """Return a check that says `must {be}` of every value that does not pass the test."""
    return lambda value: None if test(value) else f"must {be}"


def is_text(value: Any) -> bool:
    """Whether a value is a text of more than blanks."""
    return isinstance(value, str) and bool(value.strip())


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, and no truth value."""
    return type(value) is int


def some(test: Test, n: int | None = None) -> Test:
    """Return a test of a list of values that all pass another: of at least one, or of `n`."""
    return lambda value: isinstance(value, list | tuple) and (len(value) == n if n else value) and all(map(test, value))


def named(test: Test) -> Test:
    """Return a test of an object with at least one value, all of which pass another."""
    return lambda value: isinstance(value, dict) and value and all(map(test, value.values()))


check_text = must("be a text that is not empty", is_text)
check_group = must(
    "be a text or a number that names a group", lambda value: isinstance(value, str | int) and str(value)
)
