"""Widgets for the options of an analysis or of a model's loading, drawn from the dataclass that holds them."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import streamlit as st

from analyses.base import Analysis
from analyses.options import OPTIONAL, choices, defaults_of, renewed, types_of
from app.ui.keep import begin
from probes.errors import OptionError

FIRST = 6
"""Options shown at once; the others are one click away."""
Field = dataclasses.Field[Any]
PREFIX = "keep:option:"
"""Widget keys that begin with `keep:` outlive a change of page."""


def draw_options(cls: type[Analysis]) -> dict[str, Any]:
    """Draw a widget for each option; return the values, not yet checked as a whole.

    Raises:
        OptionError: a text that is not the list of numbers it should be.
    """
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    values = draw_fields(cls, fields[:FIRST])
    if more := fields[FIRST:]:
        with st.expander(f"{len(more)} more options{changed(cls, more)}", key=f"keep:more:{cls.name}"):
            values |= draw_fields(cls, more)
    return values


def draw_fields(cls: type, fields: Sequence[Field], legal: Mapping[str, Sequence[str]] = {}) -> dict[str, Any]:
    """Draw a widget for each of some fields of `cls`, three in a row; return the values.

    Args:
        legal: the values to choose from, of fields whose type does not say them.

    Raises:
        OptionError: a text that is not the list of numbers it should be.
    """
    types, columns = types_of(cls), st.columns(3)
    values = {}
    for i, field in enumerate(fields):
        kind = types[field.name]
        with columns[i % len(columns)]:
            shown = _widget(cls, field, kind, legal.get(field.name) or choices(kind))
        values[field.name] = _value(field.name, kind, shown)
    return values


def changed(cls: type, fields: Sequence[Field]) -> str:
    """How many of the fields are not as the form began, for a label; empty for none."""
    types = types_of(cls)
    starts = {key_of(cls, field.name): _start(field, types[field.name]) for field in fields}
    count = sum(st.session_state.get(key, start) != start for key, start in starts.items())
    return f", {count} changed" if count else ""


def key_of(cls: type, name: str) -> str:
    """The widget key of a field."""
    return f"{PREFIX}{getattr(cls, 'name', cls.__name__)}:{name}"


def set_options(cls: type[Analysis], options: Mapping[str, Any]) -> None:
    """Give the widgets of an analysis these values, for instance those of a saved run; the others get their default."""
    types = types_of(cls)
    for name, default in defaults_of(cls).items():
        value = renewed(cls, options).get(name, default)
        st.session_state[key_of(cls, name)] = _shown(types[name], value)


def _shown(kind: Any, value: Any) -> Any:
    """A value as its widget holds it."""
    if typing.get_origin(kind) is tuple:
        return list(value) if choices(kind) else ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value)
    if kind == OPTIONAL:
        return value or ""
    return float(value) if kind is float else value


def _start(field: Field, kind: Any) -> Any:
    """What a form begins with, as the widget holds it."""
    return _shown(kind, field.metadata.get("form", field.default))


def _widget(cls: type, field: Field, kind: Any, legal: Sequence[Any] | None) -> Any:
    key, label, help_ = key_of(cls, field.name), field.name.replace("_", " "), field.metadata.get("help", "")
    begin(key, _start(field, kind))
    low, high = field.metadata.get("low"), field.metadata.get("high")
    if typing.get_origin(kind) is tuple and legal:
        return st.multiselect(label, legal, key=key, help=help_)
    if typing.get_origin(kind) is tuple:
        span = "" if low is None and high is None else f" Each from {low} to {high}."
        return st.text_input(label, key=key, help=f"{help_} Several are separated by commas.{span}")
    if legal:
        return st.selectbox(label, legal, key=key, help=help_)
    if kind is bool:
        return st.toggle(label, key=key, help=help_)
    if kind is int:
        return st.number_input(label, min_value=_int(low), max_value=_int(high), step=1, key=key, help=help_)
    if kind is float:
        limits = {"min_value": _float(low), "max_value": _float(high)}
        return st.number_input(label, **limits, step=0.1, format="%g", key=key, help=help_)
    return st.text_input(label, key=key, help=help_)


def _int(limit: float | None) -> int | None:
    return None if limit is None else int(limit)


def _float(limit: float | None) -> float | None:
    return None if limit is None else float(limit)


def _value(name: str, kind: Any, shown: Any) -> Any:
    """What the analysis is given for a widget's value."""
    if kind == OPTIONAL:
        return shown.strip() or None
    if typing.get_origin(kind) is not tuple:
        return shown
    if choices(kind):
        return tuple(shown)
    element = typing.get_args(kind)[0]
    parts = [part.strip() for part in str(shown).split(",") if part.strip()]
    try:
        return tuple(element(part) for part in parts)
    except ValueError:
        raise OptionError(f"option {name}: {shown!r} is not a list of numbers separated by commas") from None
