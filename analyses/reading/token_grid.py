"""The grid of top tokens by layer and position, which every figure of a lens shows."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd
import plotly.graph_objects as go

from analyses.results.theme import SCALE, finish, menu, shorten, token_label
from analyses.tokens import joined


def token_menu(grids: Iterable[tuple[object, pd.DataFrame]]) -> go.Figure:
    """Draw grids of top tokens, one at a time, each chosen by its name and its prompt's text.

    Args:
        grids: names, and rows of a table `top` of rank 0, of one prompt and lens.
    """
    figure, labels, widths = go.Figure(), list[str](), list[int]()
    for name, one in grids:
        inputs = one.drop_duplicates("position").sort_values("position")
        widths.append(_grid(figure, one, inputs, visible=not labels))
        labels.append(shorten(f"{name}: {joined(inputs['input_token'])}"))
    finish(figure, x="position and token whose continuation is predicted", y="layer", height=780)
    figure.update_xaxes(tickangle=-45)
    return menu(figure, labels, widths)


def _grid(figure: go.Figure, one: pd.DataFrame, inputs: pd.DataFrame, visible: bool) -> int:
    """Add a heat map of one prompt's top tokens, coloured by probability; return the width it asks for, in pixels."""
    probability = one.pivot(index="layer", columns="position", values="probability")
    tokens = one.pivot(index="layer", columns="position", values="token")
    names = [f"{p} {token_label(t)}" for p, t in zip(inputs["position"], inputs["input_token"], strict=True)]
    figure.add_heatmap(
        z=probability, x=names, y=probability.index,
        text=tokens.map(lambda t: token_label(t, 10)), texttemplate="%{text}", customdata=tokens.map(token_label), visible=visible,
        zmin=0, zmax=1, colorscale=SCALE, colorbar={"title": "probability"}, textfont={"size": 11},
        hovertemplate="after %{x}, layer %{y}<br>%{customdata}<br>probability %{z:.3f}<extra></extra>",
    )  # fmt: skip
    return max(560, 84 * probability.shape[1] + 200)
