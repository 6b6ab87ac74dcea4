"""Light and dark pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import plotly.graph_objects as go
import streamlit as st

from analyses.results.theme import DARK, INK

LANE = 30
"""Pixels above a figure for its tool bar."""
CODE = {
    "light": {
        "keyword": "#0b5cad", "string": "#0f6b2f", "number": "#8a3b00", "operator": "#8a3b00", "function": "#7a1f6b",
        "comment": "#55606b", "punctuation": "#46505a", "parameter": "#00566e", "builtin": "#7a1f6b", "boolean": "#8a3b00",
    },
    "dark": {
        "keyword": "#79b8ff", "string": "#85d996", "number": "#ffb07a", "operator": "#ffb07a", "function": "#e3a5d8",
        "comment": "#a9b3bd", "punctuation": "#b8c0c8", "parameter": "#7fd3ea", "builtin": "#e3a5d8", "boolean": "#ffb07a",
    },
}  # fmt: skip
"""Colours of code by the kind of word, each at least 4.5 to 1 on the page."""


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


def page_style(kind: str) -> str:
    """CSS for pages of that kind: room, code that can be read, and figures' tool bars in a lane of their own.

    What waits to be drawn again fades at once and not by degrees, since a browser that draws sixty frames a second while somebody waits
    takes the processor from what is waited for. What stands in pairs on the page Live stands one above the other where half a page cuts
    a grid; the names of its buttons of one icon are told, not shown.
    """
    rules = "".join(f"code .token.{name} {{color: {colour} !important;}}" for name, colour in CODE[kind].items())
    return f"""<style>
.stMainBlockContainer {{padding: 3rem clamp(1rem, 3vw, 5rem) 4rem;}}
[data-testid=stMain] code, [data-testid=stMain] code .token {{color: {INK[kind]} !important;}}
{rules}
[data-testid=stCaptionContainer] {{opacity: 0.9;}}
.stElementContainer[data-stale=true] {{transition: opacity 0s linear 0.6s !important;}}
.stElementContainer:has([data-testid=stPlotlyChart]) {{padding-top: {LANE}px; box-sizing: content-box;}}
.stElementContainer[class*=st-key-live]:has([data-testid=stPlotlyChart]) {{padding-top: 0;}}
[class*=st-key-live-icon] button [data-testid=stMarkdownContainer] {{position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap;}}
@media (max-width: 1200px) {{
  [class*=st-key-live-pair] [data-testid=stHorizontalBlock]:not([data-testid=stColumn] *) {{flex-wrap: wrap;}}
  [class*=st-key-live-pair] [data-testid=stColumn]:not([data-testid=stColumn] *) {{min-width: 100%;}}
}}
[data-testid=stPlotlyChart] .modebar-container {{top: -{LANE}px !important;}}
[data-testid=stPlotlyChart] .js-plotly-plot, [data-testid=stPlotlyChart] .svg-container {{overflow: visible !important;}}
</style>"""


def at_least(key: str, width: int) -> str:
    """CSS that keeps figures of a container as wide as they need; where the page is narrower, the container scrolls."""
    return (
        f"<style>.st-key-{key} {{overflow-x: auto;}} .st-key-{key} .stElementContainer,"
        f" .st-key-{key} [data-testid=stFullScreenFrame] {{min-width: {width}px;}}</style>"
    )


def draw_depth(draw: Callable[[str], go.Figure], width: int, place: str, **how: Any) -> None:
    """A figure of depth that `draw` makes for a kind of page, in a container of that name; `how` are the chart's arguments."""
    st.html(at_least(place, width))
    with st.container(key=place):
        st.plotly_chart(restyled(draw(mode()), mode()), config={"displaylogo": False}, **how)
