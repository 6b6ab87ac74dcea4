"""Widgets for the options of an analysis, drawn from its dataclass."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import streamlit as st

from analyses.base import Analysis
from analyses.options import choices, defaults_of, types_of
from app.ui.keep import begin
from probes.errors import OptionError

FIRST = 6
"""Options shown at once; the others are one click away."""
PREFIX = "keep:option:"
"""Widget keys that begin with `keep:` outlive a change of page."""


def draw_options(cls: type[Analysis]) -> dict[str, Any]:
    """A widget for each option; returns the values, not yet checked as a whole.

    Raises:
        OptionError: a text that is not the list of numbers it should be.
    """
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    types = types_of(cls)
    texts: dict[str, Any] = {}
    _rows(cls, fields[:FIRST], types, texts)
    if fields[FIRST:]:
        changed = _changed(cls, fields[FIRST:])
        label = f"{len(fields) - FIRST} more options" + (f", {changed} changed" if changed else "")
        with st.expander(label, key=f"keep:more:{cls.name}"):
            _rows(cls, fields[FIRST:], types, texts)
    return {name: _value(name, types[name], text) for name, text in texts.items()}


def key_of(cls: type[Analysis], name: str) -> str:
    """The widget key of an option."""
    return f"{PREFIX}{cls.name}:{name}"


def set_options(cls: type[Analysis], options: typing.Mapping[str, Any]) -> None:
    """Gives the widgets of an analysis these values, for instance those of a saved run; the others get their default."""
    types = types_of(cls)
    for name, default in defaults_of(cls).items():
        value = options.get(name, default)
        st.session_state[key_of(cls, name)] = _shown(types[name], value)


def _rows(
    cls: type[Analysis], fields: typing.Sequence[Any], types: typing.Mapping[str, Any], texts: dict[str, Any]
) -> None:
    columns = st.columns(3)
    for i, field in enumerate(fields):
        with columns[i % 3]:
            texts[field.name] = _widget(cls, field, types[field.name])


def _changed(cls: type[Analysis], fields: typing.Sequence[Any]) -> int:
    types = types_of(cls)
    return sum(
        st.session_state.get(key_of(cls, f.name), _start(f, types[f.name])) != _start(f, types[f.name]) for f in fields
    )


def _shown(kind: Any, value: Any) -> Any:
    """A value as its widget holds it."""
    if typing.get_origin(kind) is tuple:
        return list(value) if choices(kind) else ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value)
    return float(value) if kind is float else value


def _start(field: dataclasses.Field[Any], kind: Any) -> Any:
    """What a form begins with, as the widget holds it."""
    return _shown(kind, field.metadata.get("form", field.default))


def _widget(cls: type[Analysis], field: dataclasses.Field[Any], kind: Any) -> Any:
    key, label, help_ = key_of(cls, field.name), field.name.replace("_", " "), field.metadata.get("help", "")
    start, legal = _start(field, kind), choices(kind)
    begin(key, start)
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
