"""Options of an analysis: dataclass fields that carry their help text and limits."""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from probes.errors import OptionError, shown, unknown
from probes.strict_json import text_fault

NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
"""The types an option or a key of a study may have, as messages call them."""
OPTIONAL = str | None
"""The type of a text that may be left out."""
LARGEST = 2**31 - 1
"""The largest whole number that an option without a limit of its own takes."""
LONGEST = 4096
"""Characters of the longest text that an option takes."""


T = TypeVar("T")


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    flag: str = "",
    form: Any = None,
    aliases: Sequence[str] = (),
    old_values: Mapping[str, str] | None = None,
    lenses: Sequence[str] | None = None,
) -> Any:
    """Return a dataclass field with a help text, and the closed range of a number (or of each number of a tuple).

    Args:
        flag: its name on the command line where that is not the field's own.
        form: the value a form on a screen begins with where that is not the default.
        aliases: names it had before; a class with such options is decorated with `accept_old_names`.
        old_values: values that had another name before, and what they are called now.
        lenses: makes a text one that names a lens: logit, one of these, or a folder; None for other texts.
    """
    start = default if form is None else form
    limits = {"low": low, "high": high}
    before = {"aliases": tuple(aliases), "old_values": dict(old_values or {}), "lenses": lenses}
    return dataclasses.field(default=default, metadata={"help": help, "flag": flag, "form": start, **limits, **before})


def accept_old_names(cls: type[T]) -> type[T]:
    """Let a dataclass of options be made with old names and values of its options too."""
    init = cls.__init__

    @functools.wraps(init)
    def __init__(self: T, *args: Any, **options: Any) -> None:
        init(self, *args, **renewed(cls, options))

    cls.__init__ = __init__  # type: ignore[method-assign, assignment]
    return cls


def renewed(cls: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options under today's names and with today's values.

    Raises:
        OptionError: one option by two of its names.
    """
    old_values = {field.name: field.metadata.get("old_values", {}) for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for given, value in options.items():
        name = name_today(cls, given)
        if name in values:
            raise OptionError(f"option {name} is given twice, by its old name too: give it once")
        values[name] = _renewed_value(old_values.get(name, {}), value)
    return values


def name_today(cls: type, name: str) -> str:
    """Return what the option of this name is called now; a name that no option had stays as it is."""
    return next((f.name for f in dataclasses.fields(cls) if name in f.metadata.get("aliases", ())), name)  # type: ignore[arg-type]


def _renewed_value(old: Mapping[str, str], value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_renewed_value(old, item) for item in value)
    return old.get(value, value) if isinstance(value, str) else value


def flag_of(cls: Any, name: str) -> str:
    """Return the name of an option on the command line."""
    field = next(field for field in dataclasses.fields(cls) if field.name == name)
    return field.metadata.get("flag") or name.replace("_", "-")


def as_flag(flag: str, value: Any) -> list[str]:
    """Return the command-line words that give the option of that flag this value."""
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return [f"--{flag}={text}"] if text.startswith("-") else [f"--{flag}", text]


def choices(annotation: Any) -> tuple[str, ...] | None:
    """Return the legal values of an option typed `Literal[...]` or `tuple[Literal[...], ...]`, else None."""
    if typing.get_origin(annotation) is typing.Literal:
        return typing.get_args(annotation)
    if typing.get_origin(annotation) is tuple:
        return choices(typing.get_args(annotation)[0])
    return None


def types_of(cls: type) -> Mapping[str, Any]:
    """Return the resolved type of each option."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def defaults_of(cls: type) -> dict[str, Any]:
    """Return the default of each option."""
    return {field.name: field.default for field in dataclasses.fields(cls)}


def with_options(cls: type[T], values: Mapping[str, Any]) -> T:
    """Return a dataclass of options with these values, as a file, a form, a saved run or a command gives them.

    Old names and values become today's, lists tuples, one value a tuple of one, and 1 becomes 1.0.

    Raises:
        OptionError: an unknown option, or a value that is not legal.
    """
    types, today = types_of(cls), renewed(cls, values)
    for name in today:
        if name not in types:
            raise OptionError(unknown(f"option of {getattr(cls, 'name', cls.__name__)}", name, types))
    return cls(**{name: _as_kind(value, types[name]) for name, value in today.items()})


def _as_kind(value: Any, kind: Any) -> Any:
    if typing.get_origin(kind) is tuple:
        several = value if isinstance(value, list | tuple) else [value]
        return tuple(_as_kind(item, typing.get_args(kind)[0]) for item in several)
    return float(value) if kind is float and type(value) is int else value


def validate(instance: Any) -> None:
    """Check every option against its type's legal values and its range.

    Raises:
        OptionError: the first illegal value, with the legal ones.
    """
    types = types_of(type(instance))
    for field in dataclasses.fields(instance):
        value, kind = getattr(instance, field.name), types[field.name]
        many = typing.get_origin(kind) is tuple
        if many and not isinstance(value, tuple):
            raise OptionError(f"option {field.name} is {shown(value)}: give a tuple of values, ({shown(value)},)")
        for item in value if many else (value,):
            _check_value(field, item, typing.get_args(kind)[0] if many else kind)
        if value == () and field.default != ():
            raise OptionError(f"option {field.name} is empty: give at least one value")


def _check_value(field: dataclasses.Field[Any], value: Any, kind: Any) -> None:
    legal = choices(kind)
    if kind == OPTIONAL:
        kind = type(None) if value is None else str
    if legal is not None:
        if value not in legal:
            raise OptionError(unknown(field.name, value, legal))
    elif kind in NAMES and type(value) is not kind and not (kind is float and type(value) is int):
        raise OptionError(f"option {field.name} is {shown(value)}: give {NAMES[kind]}")
    elif kind in (int, float):
        _check_range(field, value, kind)
    elif kind is str:
        _check_text(field, value)
        if (lenses := field.metadata.get("lenses")) is not None:
            from probes.lenses.names import check_lens

            check_lens(value, *lenses)


def _check_range(field: dataclasses.Field[Any], value: float, kind: type) -> None:
    low, high = field.metadata.get("low"), field.metadata.get("high")
    if kind is int:
        # What draws at random takes no negative seed, and no count or seed of ours needs more than 31 bits.
        low, high = (0 if field.name == "seed" else -LARGEST) if low is None else low, LARGEST if high is None else high
    if not math.isfinite(value) or (low is not None and value < low) or (high is not None and value > high):
        span = f"{'any' if low is None else low} to {'any' if high is None else high}"
        raise OptionError(f"option {field.name} is {shown(value)}: legal values are {span}")


def _check_text(field: dataclasses.Field[Any], value: str) -> None:
    if len(value) > LONGEST:
        raise OptionError(f"option {field.name} has {len(value):,} characters: legal are at most {LONGEST:,}")
    if "\0" in value or text_fault(value):
        raise OptionError(
            f"option {field.name} is {shown(value)}: {text_fault(value) or 'it holds a NUL'}; leave it out"
        )
