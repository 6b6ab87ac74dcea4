"""Axes of figures by what they count: depth or positions."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import Any

import plotly.graph_objects as go

FEW = 8
"""Layers up to which each has its own tick."""
SPARSE = 16
"""Layers up to which each has its own tick where those between were not looked at."""
FRACTIONS = ("share", "relative", "removed", "for which", "score")
"""Words of titles that speak of layers and do not count them."""

BY_COUNT = "number of layers"
"""What the title of a relative axis says where depth is divided by the number of layers, and not by the last layer."""


def is_depth(title: str) -> bool:
    """Whether an axis of that title counts layers."""
    words = title.lower()
    return ("layer" in words or "block" in words) and not any(other in words for other in FRACTIONS)


def layer_step(title: str, n_layers: int) -> float | None:
    """How far apart two layers are on an axis of that title, which begins at layer 0; None where it is not depth."""
    if is_depth(title):
        return 1.0
    if not title.lower().startswith("relative depth"):
        return None
    return 1 / n_layers if BY_COUNT in title.lower() else 1 / max(n_layers - 1, 1)


def is_position(title: str) -> bool:
    """Whether an axis of that title counts positions of a prompt."""
    return title.lower().startswith("position")


def axes_of(figure: go.Figure, matches: Callable[[str], bool]) -> dict[str, Any]:
    """The axes whose title is `wanted`, and those that follow one of them, by name (`xaxis2`)."""
    axes = {axis.plotly_name: axis for axis in (*figure.select_xaxes(), *figure.select_yaxes())}
    titled = {name for name, axis in axes.items() if axis.title.text and matches(axis.title.text)}
    names = {reference(name): name for name in axes}
    return {
        name: axis
        for name, axis in axes.items()
        if name in titled or (axis.matches and names.get(axis.matches) in titled)
    }


def reference(name: str) -> str:
    """How traces name an axis: `x2` for `xaxis2`."""
    return name.replace("axis", "")


def whole_layers(figure: go.Figure) -> go.Figure:
    """The figure with a tick at each layer where there are few, and none where no layer was looked at."""
    for name, axis in axes_of(figure, is_depth).items():
        values = sorted({v for trace in figure.data for v in _values(trace, name)})
        if not values or axis.type not in (None, "linear"):
            continue
        if (span := values[-1] - values[0]) < FEW:
            axis.update(tick0=0, dtick=1)
        elif len(values) <= min(SPARSE, span) and all(map(float.is_integer, values)):
            axis.update(tickmode="array", tickvals=values)
    return figure


def _values(trace: Any, axis: str) -> list[float]:
    """The numbers of a trace along an axis; none where it is drawn on others."""
    along = axis[0]
    if (getattr(trace, f"{along}axis", None) or along) != reference(axis):
        return []
    given = getattr(trace, along, None)
    if given is None and trace.type == "heatmap" and trace.z is not None and len(trace.z):
        return [float(i) for i in range(len(trace.z) if along == "y" else len(trace.z[0]))]
    numbers = [float(v) for v in ([] if given is None else given) if hasattr(v, "__float__")]
    return [v for v in numbers if isfinite(v)]
