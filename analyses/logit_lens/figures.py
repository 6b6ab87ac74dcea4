"""Figures and depth profiles of the logit lens."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from analyses.logit_lens.curve import ROWS, curve
from analyses.reading.token_grid import token_grid
from analyses.results.card import FigureSpec, ProfileSpec, Tables
from analyses.results.profiles import mean_by_layer
from analyses.results.theme import COLOURS, finish, menu, shorten, side_by_side, whiskers
from analyses.tokens import joined

SHOWN = 40
"""Prompts offered in a figure's menu."""


def lens_table(tables: Tables) -> go.Figure:
    """Top token by layer and position, coloured by its probability; one prompt at a time."""
    top = tables["top"][tables["top"]["rank"] == 0]
    figure, labels, widths = go.Figure(), [], []
    for shown, (prompt, one) in enumerate(list(top.groupby("prompt", sort=False))[:SHOWN]):
        widths.append(token_grid(figure, one, visible=shown == 0))
        inputs = one.drop_duplicates("position").sort_values("position")["input_token"]
        labels.append(shorten(f"{prompt}: {joined(inputs)}"))
    finish(figure, x="position and token whose continuation is predicted", y="layer", height=780)
    figure.update_xaxes(tickangle=-45)
    return menu(figure, labels, widths)


def convergence(tables: Tables) -> go.Figure:
    """Entropy and distance to the final prediction, and agreement with it, by layer."""
    # From the rows, not from the table `curve`, so that a choice of prompts is drawn with its own intervals.
    means = dict(iter(curve(tables["read"]).groupby("measure")))
    figure = side_by_side(("entropy and divergence", "agreement"))
    curves = (
        ("entropy_bits", "entropy (bits)", 1),
        ("kl_to_final", "KL to the final prediction (nats)", 1),
        ("agrees", "share of positions that agree", 2),
        ("chance_agrees", "agreement with other prompts' final tokens (control)", 2),
    )
    for colour, (measure, name, panel) in zip(COLOURS, curves, strict=False):
        if measure in means:
            rows = means[measure]
            figure.add_scatter(
                x=rows["mean"], y=rows["layer"], name=name, mode="lines+markers", line={"color": colour}, row=1, col=panel,
                error_x=whiskers(rows["mean"], rows["ci_low"], rows["ci_high"]),
            )  # fmt: skip
    titles = ("bits or nats", "share of positions")
    finish(figure, x=titles, y=("layer",), height=540, legend=-0.15, top=60, bottom=90)
    return figure.update_xaxes(range=[0, 1.02], row=1, col=2)


FIGURES = {
    "lens": FigureSpec(
        "Lens table: top token by layer and position",
        "Each cell is the token that the residual stream leaving this layer would predict, through the model's own final norm and "
        "unembedding, coloured by its probability. The top row is the model's own prediction. Early layers are not calibrated for this "
        "read-out, so read them as a hint.",
        lens_table,
    ),
    "convergence": FigureSpec(
        "Convergence along depth",
        "Averages over all positions read. Left: the entropy of the lens's distribution, and its divergence from the final prediction. "
        "Right: the share of positions whose top token is already the final one, and the share that would be so if a position's final token "
        "were one of another prompt's: agreement that the lens gets by naming frequent tokens. Whiskers are 95 % intervals over prompts; "
        "fewer than six prompts have none.",
        convergence,
    ),
}


def agreement(tables: Tables) -> pd.DataFrame:
    """Share of positions whose top token is already the final one."""
    return mean_by_layer(tables["read"], "agrees", ROWS)


def entropy(tables: Tables) -> pd.DataFrame:
    """Entropy of the layer's prediction, in bits."""
    return mean_by_layer(tables["read"], "entropy_bits", ROWS)


PROFILES = {
    "agreement": ProfileSpec(
        "Agreement with the output",
        "share of positions",
        "The share of positions at which the layer's top token, read through the final norm and unembedding, is already the model's own.",
        agreement,
    ),
    "entropy": ProfileSpec(
        "Entropy of the lens",
        "bits",
        "The entropy of the prediction read at each layer, averaged over positions: low where the layer is sure of a token.",
        entropy,
    ),
}
