"""Command-line flags from an analysis's options."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Optional, TypeVar

import typer

from analyses.options import choices, flag_of, types_of, with_options
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
    types = types_of(cls)
    tuples = {name: typing.get_args(kind)[0] for name, kind in types.items() if typing.get_origin(kind) is tuple}
    given = {name: values[name] for name in types if name not in tuples}
    for name, element in tuples.items():
        if values[name] is not None:
            parts = [part.strip() for text in values[name] for part in text.split(",") if part.strip()]
            given[name] = [_convert(name, part, element) for part in parts]
    return with_options(cls, given)


def _convert(name: str, text: str, element: Any) -> Any:
    if element in (int, float):
        try:
            return element(text)
        except ValueError:
            raise OptionError(f"option {name}: {text!r} is not a number") from None
    return text
