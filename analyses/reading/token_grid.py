"""The grid of top tokens by layer and position, which every figure of a lens shows."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from analyses.results.theme import SCALE, token_label


def token_grid(figure: go.Figure, one: pd.DataFrame, visible: bool) -> int:
    """Add a heat map of one prompt's top tokens, coloured by probability; return the width it asks for, in pixels.

    Args:
        one: rows of a table `top` of rank 0, of one prompt and lens.
        visible: whether it is shown before a menu chooses.
    """
    probability = one.pivot(index="layer", columns="position", values="probability")
    tokens = one.pivot(index="layer", columns="position", values="token")
    inputs = one.drop_duplicates("position").sort_values("position")
    names = [f"{p} {token_label(t)}" for p, t in zip(inputs["position"], inputs["input_token"], strict=True)]
    figure.add_heatmap(
        z=probability, x=names, y=probability.index,
        text=tokens.map(lambda t: token_label(t, 10)), texttemplate="%{text}", customdata=tokens.map(token_label), visible=visible,
        zmin=0, zmax=1, colorscale=SCALE, colorbar={"title": "probability"}, textfont={"size": 11},
        hovertemplate="after %{x}, layer %{y}<br>%{customdata}<br>probability %{z:.3f}<extra></extra>",
    )  # fmt: skip
    return max(560, 84 * probability.shape[1] + 200)
