"""Figures and depth profiles of passage use."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analyses.results.card import FigureSpec, ProfileSpec, Tables
from analyses.results.profiles import named_rows
from analyses.results.theme import COLOURS, MORE, band, finish, token_label, whiskers

NAMES = {
    "iks": "MLP read-out change",
    "sim_hidden": "without the passage",
    "sim_neutral": "neutral text in its place",
    "sim_noise": "noise in its place",
    "mass": "attention to the passage",
    "diff_attn": "divergence, scores masked",
    "diff_attn_propagated": "divergence, blind in every block",
    "knock_out_loss": "loss without a view",
}
PANELS = (
    ("what the answer loses without a view of the passage", "nats", ("knock_out_loss",)),
    ("attention of the last position", "share, nats", ("mass", "diff_attn", "diff_attn_propagated")),
    ("what the MLP adds, with and without the passage", "cosine", ("sim_hidden", "sim_neutral", "sim_noise")),
    ("prediction before and after the MLP", "nats", ("iks",)),
)
_COLOURS = dict(zip(("knock_out_loss", "mass", "diff_attn", "diff_attn_propagated", "sim_hidden", "sim_neutral", "iks", "sim_noise"), (*COLOURS[:6], MORE[0], "#8c8c8c"), strict=True))  # fmt: skip


def curves(tables: Tables) -> go.Figure:
    """Four kinds of measures over one depth axis."""
    table = tables["means"]
    figure = make_subplots(
        rows=len(PANELS),
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.06,
        subplot_titles=[title for title, *_ in PANELS],
    )
    finish(figure, x="", y="", height=900, legend=1.04, top=130)
    for row, (_, unit, measures) in enumerate(PANELS, 1):
        for measure in measures:
            rows = table[table["measure"] == measure]
            if rows.empty:
                continue
            band(figure, rows["layer"], rows["low"], rows["high"], _COLOURS[measure], row=row, col=1)
            figure.add_scatter(
                x=rows["layer"], y=rows["mean"], name=NAMES[measure], mode="lines+markers", line={"color": _COLOURS[measure]},
                marker={"size": 4}, row=row, col=1,
            )  # fmt: skip
        figure.update_yaxes(title=unit, row=row, col=1)
    figure.update_xaxes(title="layer", row=len(PANELS), col=1)
    return figure.update_layout(legend_traceorder="normal")


def chosen(tables: Tables) -> go.Figure:
    """Where in the second half the read-out changes least, prompt by prompt."""
    counted = tables["chosen"]["layer"].value_counts().sort_index()
    figure = go.Figure(go.Bar(x=counted.index, y=counted, marker_color=COLOURS[0]))
    return finish(figure, x="layer of the second half whose MLP changes the read-out least", y="prompts", height=320)


def answers(tables: Tables) -> go.Figure:
    """Log-probability of each answer with and without the passage."""
    table = tables["prompts"]
    figure = go.Figure()
    for colour, (column, name) in zip(
        COLOURS,
        (("logprob_without", "without"), ("logprob_neutral", "neutral text"), ("logprob_noise", "noise")),
        strict=False,
    ):
        figure.add_scatter(
            x=table["logprob"], y=table[column], mode="markers", name=name, marker={"color": colour, "size": 7},
            text=[f"prompt {i}: {a}" for i, a in zip(table["prompt"], table["answer"].map(token_label), strict=True)],
        )  # fmt: skip
    values = table[["logprob", "logprob_without", "logprob_neutral", "logprob_noise"]].to_numpy(dtype=float)
    ends = [float(np.nanmin(values)), float(np.nanmax(values))]
    figure.add_scatter(x=ends, y=ends, mode="lines", line={"dash": "dot", "color": "#8c8c8c"}, hoverinfo="skip", showlegend=False)  # fmt: skip
    return finish(
        figure, x="log-probability of the answer with the passage", y="with something else in its place", height=420
    )


def fusion(tables: Tables) -> go.Figure:
    """Change of the answer's log-probability by fusion and its controls."""
    table: pd.DataFrame = tables["fusion"]
    table = table[table["variant"] != "none"]
    figure = go.Figure(
        go.Scatter(
            x=table["gain"], y=table["variant"].str.replace("_", " "), mode="markers",
            marker={"size": 10, "color": COLOURS[0]}, error_x=whiskers(table["gain"], table["gain_low"], table["gain_high"]),
        )
    )  # fmt: skip
    figure.add_vline(x=0, line={"dash": "dot", "color": "#8c8c8c"})
    return finish(figure, x="change of the answer's log-probability (nats)", y="", height=300, left=120)


FIGURES = {
    "curves": FigureSpec(
        "Where a passage enters",
        "From the top: what the answer loses when nothing behind the passage sees it in blocks around each one; the attention that the last position gives to the passage, and how far "
        "its attention changes without it (DiffAttn; with the scores masked it follows from the attention to the passage alone); the cosine of what each MLP adds with and without the "
        "passage (SimHidden), beside other text in its place; and how far the prediction read before an MLP is from that after it (IKS of layer-fused decoding; our reading of its formula). "
        "Bands are 95 % intervals over prompts. Attention to a passage does not say that it is used.",
        curves,
    ),
    "answers": FigureSpec(
        "What the passage does for the answer",
        "Each point is a prompt: the answer's log-probability with the passage, and without it or with other text in its place. Points below the line: the passage helps.",
        answers,
    ),
    "chosen": FigureSpec(
        "Where the read-out changes least",
        "The layer of the second half whose MLP changes the prediction least, prompt by prompt: the layer that layer-fused decoding takes.",
        chosen,
    ),
    "fusion": FigureSpec(
        "Does fusing layers help?",
        "Ours, after LFD: the final prediction times that of each prompt's own layer. A gain counts only where its interval lies above 0 and above those of a random layer, of one layer for all "
        "(chosen on the other half) and of a temperature. Whiskers are 95 % intervals over prompts.",
        fusion,
        lambda tables: "fusion" in tables,
    ),
}


PROFILES = {
    "knock_out_loss": ProfileSpec(
        "Need of the passage",
        "nats",
        "How much the answer's log-probability falls when nothing behind the passage sees it in blocks around this one.",
        *named_rows("means", "measure", "knock_out_loss", "low", "high"),
    ),
    "mass": ProfileSpec(
        "Attention to the passage",
        "share",
        "Share of its attention that the position that predicts the answer gives to the passage, averaged over heads. Attention is not use.",
        *named_rows("means", "measure", "mass", "low", "high"),
    ),
    "iks": ProfileSpec(
        "MLP read-out change",
        "nats",
        "How far the prediction read before this block's MLP is from that read after it (Jensen-Shannon divergence).",
        *named_rows("means", "measure", "iks", "low", "high"),
    ),
}
