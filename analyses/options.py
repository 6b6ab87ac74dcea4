"""Options of an analysis: dataclass fields that carry their help text and limits."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from probes.errors import OptionError, unknown


def option(default: Any, help: str, *, low: float | None = None, high: float | None = None, flag: str = "") -> Any:
    """A field with a help text, and the closed range of a number (or of each number of a tuple).

    `flag` names it on the command line where that is not the field's own name.
    """
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high, "flag": flag})


def choices(annotation: Any) -> tuple[str, ...] | None:
    """The legal values of an option typed `Literal[...]` or `tuple[Literal[...], ...]`, else None."""
    if typing.get_origin(annotation) is typing.Literal:
        return typing.get_args(annotation)
    if typing.get_origin(annotation) is tuple:
        return choices(typing.get_args(annotation)[0])
    return None


def types_of(cls: type) -> Mapping[str, Any]:
    """The resolved type of each option."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def defaults_of(cls: type) -> dict[str, Any]:
    """The default of each option."""
    return {field.name: field.default for field in dataclasses.fields(cls)}


def validate(instance: Any) -> None:
    """Checks every option against its type's legal values and its range.

    Raises:
        OptionError: the first illegal value, with the legal ones.
    """
    types = types_of(type(instance))
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        legal = choices(types[field.name])
        for item in value if isinstance(value, tuple) else (value,):
            if legal is not None and item not in legal:
                raise OptionError(unknown(field.name, item, legal))
            _check_range(field, item)
        if value == () and field.default != ():
            raise OptionError(f"option {field.name} is empty: give at least one value")


def _check_range(field: dataclasses.Field[Any], value: Any) -> None:
    low, high = field.metadata.get("low"), field.metadata.get("high")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if value != value or (low is not None and value < low) or (high is not None and value > high):
        span = f"{'any' if low is None else low} to {'any' if high is None else high}"
        raise OptionError(f"option {field.name} is {value}: legal values are {span}")
