"""JSON from outside, read strictly: whatever two readers could take for different things is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from probes.errors import shown

MAX_DEPTH = 64
"""Objects and lists inside each other; no input of ours has more than a handful."""
MAX_DIGITS = 19
"""Digits of the largest 64-bit integer."""


class JsonFault(ValueError):
    """What is wrong with a text, in one line without its place."""

    def __init__(self, message: str, path: tuple[str | int, ...] = ()) -> None:
        super().__init__(message)
        self.path = path
        """The keys that lead to the value, where there is one."""


def parse(text: str, *, infinite: bool = False) -> Any:
    """Return the value of a JSON text.

    Args:
        infinite: let `Infinity` pass, which configurations of models write for a range without end.

    Raises:
        JsonFault: not JSON, NaN or infinite, an integer past 64 bits, a key given two values, a lone surrogate, or values
            nested more than `MAX_DEPTH` deep.
    """
    constant = _not_nan if infinite else _number
    try:
        value = json.loads(
            text, parse_int=_integer, parse_float=_number, parse_constant=constant, object_pairs_hook=_object
        )
    except json.JSONDecodeError as error:
        raise JsonFault(f"not JSON ({error.msg} at column {error.colno} of line {error.lineno})") from None
    except RecursionError:
        raise JsonFault(_too_deep()) from None
    check_tree(value)
    return value


def check_tree(value: Any) -> None:
    """Refuse nested lists and mappings whose depth, integers or texts two readers could take differently.

    Raises:
        JsonFault: as `parse`.
    """
    for path, leaf in _leaves(value):
        if problem := _leaf_fault(path, leaf):
            raise JsonFault(problem, path[:MAX_DEPTH])


def _leaf_fault(path: tuple[str | int, ...], leaf: Any) -> str | None:
    if len(path) >= MAX_DEPTH and isinstance(leaf, dict | list):
        return _too_deep()
    if isinstance(leaf, int) and not -(2**63) <= leaf < 2**63:
        return f"the integer {shown(leaf)} does not fit 64 bits: give a smaller one"
    texts = [part for part in (leaf, *path[-1:]) if isinstance(part, str)]
    return next(filter(None, map(text_fault, texts)), None)


def text_fault(text: str) -> str | None:
    """Return what keeps a text from being UTF-8, or None."""
    lone = next((char for char in text if "\ud800" <= char <= "\udfff"), None)
    if lone is None:
        return None
    return f"half a character, the lone surrogate \\u{ord(lone):04x}: write the whole character, or leave it out"


def _leaves(value: Any) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Yield (keys that lead to it, value) for a value and everything below it, without recursion."""
    waiting: list[tuple[tuple[str | int, ...], Any]] = [((), value)]
    while waiting:
        path, node = waiting.pop()
        yield path, node
        if isinstance(node, dict):
            waiting += [((*path, key), part) for key, part in node.items()]
        elif isinstance(node, list):
            waiting += [((*path, i), part) for i, part in enumerate(node)]


def _integer(text: str) -> int:
    # Longer ones are refused unread: Python itself stops at 4,300 digits, with an error of its own.
    if len(text.lstrip("-")) > MAX_DIGITS:
        raise JsonFault(f"the integer {shown(text)} does not fit 64 bits: give a smaller one")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if value - value != 0:
        raise JsonFault(f"{shown(text)} is no finite number: give one, or null")
    return value


def _not_nan(text: str) -> float:
    return _number(text) if text == "NaN" else float(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, given in pairs:
        if value.setdefault(key, given) is not given and value[key] != given:
            raise JsonFault(f"the key {shown(key)} is given twice: keep one")
    return value


def _too_deep() -> str:
    return f"values are nested more than {MAX_DEPTH} deep: flatten them"
