"""Figure of the effective depth: three curves by layer, and the layer that each definition reads off them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analyses.depth_use.effective_depth import COSINES, RELEASED, ratio_text
from analyses.results.card import FigureSpec, Tables
from analyses.results.theme import COLOURS, finish, side_by_side

_TITLES = ("mean cosine with the stream", "lens KL / largest", "top 5 shared with the final")


def effective_depth(tables: Tables) -> go.Figure:
    """Three curves on one depth axis, each with the layer that its released and its persistent definition name."""
    proxies, depths = tables["proxies"], tables["effective_depth"]
    curves = {
        "cosine": proxies[list(COSINES)].mean(axis=1),
        "lens_kl": proxies["lens_kl"] / proxies["lens_kl"].max(),
        "lens_overlap": proxies["lens_overlap"],
    }
    n_layers = len(proxies)
    figure = side_by_side([_heading(depths, name) for name in curves])
    for column, (name, values) in enumerate(curves.items(), 1):
        figure.add_scatter(
            x=values, y=proxies["layer"], mode="lines+markers", line={"color": "#777"}, marker={"size": 4},
            showlegend=False, name=RELEASED[name], row=1, col=column,
        )  # fmt: skip
        kinds = [(name, "as released", "diamond"), (f"{name}_persistent", "from there to the end", "triangle-up")]
        kinds += [("half_area", "half of all change", "star")] if name == "lens_kl" else []
        for colour, (definition, label, symbol) in zip(COLOURS, kinds, strict=False):
            rows = depths[(depths["definition"] == definition) & depths["layer"].notna()]
            layers = rows["layer"].to_numpy(dtype=float)
            above, below = ((rows[edge] * n_layers - 1).to_numpy(dtype=float) for edge in ("ci_high", "ci_low"))
            figure.add_scatter(
                x=np.interp(layers, proxies["layer"], values.interpolate().bfill()), y=layers, mode="markers", name=label,
                legendgroup=label, showlegend=column == 2, customdata=rows["threshold"],
                marker={"color": colour, "size": 12, "symbol": symbol, "line": {"width": 1, "color": "black"}},
                error_y={"type": "data", "array": above - layers, "arrayminus": layers - below, "thickness": 2},
                hovertemplate=f"{label}<br>threshold %{{customdata}}<br>layer %{{y}}<extra></extra>", row=1, col=column,
            )  # fmt: skip
    return finish(figure, x="", y=("layer",), height=600, legend=1.1, top=110)


def _heading(depths: pd.DataFrame, name: str) -> str:
    first = depths[depths["definition"] == name].iloc[0]
    return f"{_TITLES[list(RELEASED).index(name)]}<br>ratio {ratio_text(first)}"


EFFECTIVE_DEPTH_FIGURES = {
    "effective_depth": FigureSpec(
        "Effective depth, by three definitions",
        "Left: the mean cosine of attention, MLP and block with the stream; the depth is the last layer before it turns positive. Middle: how far each layer's "
        "reading is from the final one; the depth is the first layer below a share of the largest (0.1, 0.5). Right: how many of the five most probable tokens are "
        "among the final five; the depth is the first layer above a share (0.2, 0.3). Diamonds follow the released code; triangles are the first layer from which the condition holds to the "
        "end; the star halves the curve's summed changes. Whiskers are 95 % intervals over prompts. A mark that fewer than 90 % of resampled prompts define is not "
        "drawn. The three measure different things and may differ by a third of the depth: no one of them is the depth that the model uses.",
        effective_depth,
    ),
}
