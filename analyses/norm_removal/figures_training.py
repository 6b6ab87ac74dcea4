"""Figures of a removal by fine-tuning."""

from __future__ import annotations

import plotly.graph_objects as go

from analyses.results.card import FigureSpec, Tables
from analyses.results.theme import COLOURS, coloured, finish, whiskers

VARIANTS = {
    "original": "original",
    "control": "control (norms kept)",
    "norm_free": "norm-free (schedule)",
    "at_once": "all frozen at once, then trained",
    "untrained": "all frozen at once, not trained",
}


def training(tables: Tables) -> go.Figure:
    """Loss by step of every training, with the schedule's events marked."""
    figure = go.Figure()
    table = tables["training"]
    for colour, (variant, group) in coloured(table, "variant"):
        smooth = group["loss"].rolling(max(1, len(group) // 60), min_periods=1, center=True).mean()
        figure.add_scatter(x=group["step"], y=smooth, mode="lines", name=VARIANTS[str(variant)], line={"color": colour})
        events = group[(group["event"] != "") & (variant == "norm_free")]
        figure.add_scatter(
            x=events["step"], y=smooth[events.index], mode="markers", text=events["event"], showlegend=len(events) > 0,
            name="a norm is frozen", marker={"color": COLOURS[6], "size": 6, "symbol": "diamond"},
            hovertemplate="step %{x}: %{text}<extra></extra>",
        )  # fmt: skip
    return finish(figure, x="training step", y="training loss (nats)", height=460)


def losses(tables: Tables) -> go.Figure:
    """Mean loss of every variant with its interval."""
    table = tables["losses"].sort_values("mean", ascending=False)
    figure = go.Figure()
    figure.add_scatter(
        x=table["mean"], y=[VARIANTS[v] for v in table["variant"]], mode="markers", marker={"size": 10, "color": COLOURS[0]},
        error_x=whiskers(table["mean"], table["ci_low"], table["ci_high"]), customdata=table[["median", "p999", "gap_to_control"]],
        hovertemplate="%{x:.4f} nats<br>median %{customdata[0]:.3f}, 99.9 % %{customdata[1]:.2f}<br>gap %{customdata[2]:.4f}<extra></extra>",
    )  # fmt: skip
    for mean, gap, variant in zip(table["mean"], table["gap_to_control"], table["variant"], strict=True):
        text = "" if variant == "control" else f" gap {gap:+.3f}"
        figure.add_annotation(x=mean, y=VARIANTS[variant], text=text, showarrow=False, yshift=16)
    return finish(figure, x="loss on held-out text (nats)", y="", height=360, left=230)


TRAINING_FIGURES: dict[str, FigureSpec] = {
    "training": FigureSpec(
        "Losing the norms step by step",
        "Training loss of the model whose norms are frozen one after the other, of the control that is trained alike with its norms kept, and where asked for of all norms "
        "frozen at once. Diamonds mark the schedule's events. Lines are running means over a sixtieth of the training.",
        training,
        lambda tables: "training" in tables,
        data="own",
    ),
    "losses": FigureSpec(
        "Loss on held-out text",
        "Mean next-token loss on blocks of text that no training saw, with 95 % intervals over blocks; the gap to the control is from the same blocks. The mean alone can hide a "
        "few catastrophic tokens: the table also has the median and the 99.9 % quantile.",
        losses,
        lambda tables: "losses" in tables,
        data="own",
    ),
}
