"""Typed reading of a table of a study file; whatever is not asked for is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from analyses.options import NAMES
from analyses.studies.origin import Origin, fault
from probes.errors import shown, unknown

Kind = TypeVar("Kind", bool, int, str)


class Table:
    """A table whose keys are read one by one.

    Raises:
        StudyError: a missing or unknown key, or a value of the wrong type; with file and line.
    """

    def __init__(self, values: Any, origin: Origin) -> None:
        if not isinstance(values, Mapping):
            raise fault(f"{shown(values)} is not a table: write keys and values", origin)
        self.values, self.origin = dict(values), origin
        self._known: set[str] = set()

    def get(self, key: str, default: Kind) -> Kind:
        """A value of the type of `default`, which stands where the key is left out."""
        self._known.add(key)
        value = self.values.get(key, default)
        self._expect(value, type(default), key)
        return value

    def required(self, key: str, example: str) -> str:
        """A text that must be there and not be empty."""
        if not self.get(key, ""):
            raise fault(f"{key!r} is missing: write {key} = {example}", self.origin)
        return str(self.values[key])

    def values_of(self, key: str, kind: type[Kind]) -> tuple[Kind, ...] | None:
        """A list of values of one type, or None where the key is left out."""
        self._known.add(key)
        if key not in self.values:
            return None
        values = self.values[key]
        if not isinstance(values, list):
            raise fault(f"{key} is {shown(values)}: write a list, [{shown(values)}]", self.origin, key)
        for i, value in enumerate(values):
            self._expect(value, kind, key, i)
        return tuple(values)

    def tables(self, key: str) -> list[Table]:
        """The tables of a list such as `[[models]]`; none where it is left out."""
        self._known.add(key)
        values = self.values.get(key, [])
        if not isinstance(values, list):
            raise fault(f"{key} is one table: write its header as [[{key}]]", self.origin, key)
        return [Table(value, self.origin.child(key, i)) for i, value in enumerate(values)]

    def table(self, key: str) -> dict[str, Any]:
        """The keys and values of a table below; none where it is left out."""
        self._known.add(key)
        return Table(self.values.get(key, {}), self.origin.child(key)).values

    def raw(self, key: str) -> Any:
        """A value as it stands, or None."""
        self._known.add(key)
        return self.values.get(key)

    def close(self) -> None:
        """Refuses keys that nobody has asked for."""
        for key in self.values:
            if key not in self._known:
                raise fault(unknown("key", key, sorted(self._known)), self.origin, key)

    def _expect(self, value: Any, kind: type, *path: str | int) -> None:
        # bool is an int in Python, but true is no number in a study.
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise fault(f"{path[0]} is {shown(value)}: give {NAMES[kind]}", self.origin, *path)
        if isinstance(value, str) and "\0" in value:
            raise fault(f"{path[0]} is {shown(value)}: leave out the NUL", self.origin, *path)
