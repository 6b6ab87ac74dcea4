"""Light and dark, and one colour for each analysis on every page."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
import streamlit as st

from analyses.theme import COLOURS

DARK = {
    "#000000": "#d0d0d0",
    "#e8e8e8": "#3a4048",
    "#8c8c8c": "#a8a8a8",
    "#444": "#bbbbbb",
    "#0072B2": "#3d9be0",
    "#882255": "#c4527f",
}
"""Colours that would vanish on a dark page, and what takes their place."""
MORE = ("#882255", "#44AA99", "#999933")
"""Three hues of Tol's muted palette, after those of the figures."""
SELECTED = {"light": "rgba(230,159,0,0.25)", "dark": "rgba(230,159,0,0.33)"}
"""What marks selected layers."""
INK = {"light": "#1b2733", "dark": "#e6e6e6"}
LINE = {"light": "#dfe5ea", "dark": "#3a4048"}


def mode() -> str:
    """`light` or `dark`, as the browser shows the page."""
    kind = getattr(getattr(st.context, "theme", None), "type", None)
    return "dark" if kind == "dark" else "light"


def restyled(figure: go.Figure, kind: str) -> go.Figure:
    """The figure with colours that are seen on a page of that kind."""
    if kind == "light":
        return figure
    return go.Figure(_swap(figure.to_dict()), skip_invalid=True)


def _swap(value: Any) -> Any:
    if isinstance(value, str):
        return DARK.get(value, value)
    if isinstance(value, dict):
        return {name: inner if name in ("x", "y", "z", "text") else _swap(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_swap(inner) for inner in value]
    return value


def colour_of(analysis: str, order: list[str]) -> str:
    """The colour of an analysis, the same on every page; black is left for what is not one."""
    usable = [colour for colour in (*COLOURS, *MORE) if colour not in ("#000000", "#F0E442")]
    return usable[order.index(analysis) % len(usable)] if analysis in order else "#8c8c8c"
