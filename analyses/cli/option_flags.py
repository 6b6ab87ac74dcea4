"""Command-line flags from an analysis's options."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Optional, TypeVar

import typer

from analyses.options import choices, flag_of, types_of
from probes.errors import OptionError

T = TypeVar("T")


def flags(cls: Any) -> list[inspect.Parameter]:
    """One keyword parameter per option of a dataclass, as Typer reads them.

    A tuple is given as `a,b` or by repeating the flag, a truth value as `--flag` or `--no-flag`.
    """
    types = types_of(cls)
    parameters = []
    for field in dataclasses.fields(cls):
        kind, default = types[field.name], field.default
        text = field.metadata.get("help", "")
        if typing.get_origin(kind) is tuple:
            legal = choices(kind)
            shown = ",".join(str(value) for value in default) if isinstance(default, tuple) else ""
            text += f" Legal: {', '.join(legal)}." if legal else ""
            annotation: Any = Annotated[Optional[list[str]], typer.Option(help=text, show_default=shown or False)]  # noqa: UP045
            default = None
        elif kind is bool:
            names = [f"--{name}/--no-{name}" for name in _names(cls, field)]
            annotation = Annotated[bool, typer.Option(*names, help=text)]
        else:
            # A value's old name is no value of the type: the options themselves know both.
            old = field.metadata.get("old_values")
            values = f"[{'|'.join(choices(kind) or ())}]" if old else None
            names = [f"--{name}" for name in _names(cls, field)]
            annotation = Annotated[str if old else kind, typer.Option(*names, help=text, metavar=values)]
        parameters.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )
    return parameters


def _names(cls: Any, field: dataclasses.Field[Any]) -> list[str]:
    """Return the names of an option on the command line, today's first."""
    return [flag_of(cls, field.name), *(name.replace("_", "-") for name in field.metadata.get("aliases", ()))]


def build(cls: type[T], values: Mapping[str, Any]) -> T:
    """The dataclass with the options given on the command line.

    Raises:
        OptionError: a value that is not legal.
    """
    types, options = types_of(cls), {}
    for name, kind in types.items():
        value = values[name]
        if typing.get_origin(kind) is tuple:
            if value is None:
                continue
            element = typing.get_args(kind)[0]
            parts = [part.strip() for text in value for part in text.split(",") if part.strip()]
            options[name] = tuple(_convert(name, part, element) for part in parts)
        else:
            options[name] = value
    return cls(**options)


def _convert(name: str, text: str, element: Any) -> Any:
    if element in (int, float):
        try:
            return element(text)
        except ValueError:
            raise OptionError(f"option {name}: {text!r} is not a number") from None
    return text
