"""Figures and depth profiles of the voids analysis."""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd
import plotly.graph_objects as go

from analyses.results.card import FigureSpec, ProfileSpec, Tables
from analyses.results.profiles import columns
from analyses.results.theme import COLOURS, coloured, finish, menu, shorten, side_by_side, token_label, whiskers
from analyses.tokens import joined

SHOWN = 40
"""Prompts offered in a figure's menu."""


def raster(tables: Tables) -> go.Figure:
    """Token by layer activity, one prompt at a time, chosen from a menu."""
    activity = tables["activity"]
    activity = activity[activity["alpha"] == activity["alpha"].iloc[0]]
    figure, labels = go.Figure(), []
    for shown, (prompt, one) in enumerate(list(activity.groupby("prompt", sort=False))[:SHOWN]):
        grid = one.pivot(index="layer", columns="position", values="active").astype(int)
        delta = one.pivot(index="layer", columns="position", values="delta")
        tokens = one.drop_duplicates("position").sort_values("position")
        names = [f"{p} {token_label(t)}" for p, t in zip(tokens["position"], tokens["token"], strict=True)]
        figure.add_heatmap(
            z=grid, x=names, y=grid.index, customdata=delta, visible=shown == 0,
            zmin=0, zmax=1, xgap=1, ygap=1, colorscale=[[0, "#e8e8e8"], [0.5, "#e8e8e8"], [0.5, COLOURS[0]], [1, COLOURS[0]]],
            colorbar={"tickvals": [0.25, 0.75], "ticktext": ["void", "active"], "len": 0.5},
            hovertemplate="token %{x}<br>layer %{y}<br>step %{customdata:.2f}<extra></extra>",
        )  # fmt: skip
        prompt_tokens = tokens[tokens["phase"] == "prompt"] if (tokens["phase"] == "prompt").any() else tokens
        labels.append(shorten(f"{prompt}: {joined(prompt_tokens['token'])}"))
    finish(figure, x="position and token", y="layer", height=560)
    figure.update_xaxes(tickangle=-60)
    return menu(figure, labels)


def usage_by_layer(tables: Tables) -> go.Figure:
    """Share of active tokens per layer, a bar per phase, with intervals."""
    usage = tables["usage"]
    usage = usage[usage["alpha"] == usage["alpha"].iloc[0]]
    figure = go.Figure()
    for colour, (phase, group) in coloured(usage, "phase"):
        figure.add_bar(
            y=group["layer"], x=group["active_fraction"], orientation="h", name=f"{phase} tokens", marker_color=colour,
            error_x=whiskers(group["active_fraction"], group["ci_low"], group["ci_high"], 2),
        )  # fmt: skip
    finish(figure, x="share of tokens for which the layer is active", y="layer", height=620)
    figure.update_layout(barmode="group", bargap=0.15)
    return figure.update_xaxes(range=[0, 1.05])


def norms(tables: Tables) -> go.Figure:
    """Norm of the stream and the threshold along depth, median and middle half of the tokens."""
    activity = tables["activity"]
    activity = activity[(activity["alpha"] == activity["alpha"].iloc[0]) & (activity["token_class"] != "first")]
    figure = side_by_side(("norm of the stream", "step and its threshold"), shared_yaxes=False)
    for column, names in ((1, ("norm",)), (2, ("delta", "threshold"))):
        for colour, name in zip(COLOURS, names, strict=False):
            quartiles = activity.groupby("layer")[name].quantile([0.25, 0.5, 0.75]).unstack()
            figure.add_scatter(
                x=quartiles[0.5], y=quartiles.index, name={"delta": "step"}.get(name, name), mode="lines+markers",
                line={"color": colour}, error_x=whiskers(quartiles[0.5], quartiles[0.25], quartiles[0.75]),
                row=1, col=column,
            )  # fmt: skip
    x = "L2 norm (units of the residual stream)"
    return finish(figure, x=x, y="layer", height=540, legend=-0.15, top=60, bottom=90)


def token_classes(tables: Tables) -> go.Figure:
    """Void rate per class of token."""
    rates = tables["void_rate"].sort_values("alpha", kind="stable")
    figure = go.Figure()
    for colour, (alpha, group) in coloured(rates, "alpha"):
        figure.add_bar(
            x=group["token_class"], y=group["void_rate"], name=f"alpha {alpha:g}", marker_color=colour,
            error_y=whiskers(group["void_rate"], group["ci_low"], group["ci_high"], 3),
        )  # fmt: skip
    finish(figure, x="class of token", y="share of layers that are void")
    return figure.update_yaxes(range=[0, 1])


def against_alpha(tables: Tables) -> go.Figure:
    """Usage, changed predictions and accuracy as alpha grows, one panel each."""
    curves = _alpha_curves(tables)
    panels = list(dict.fromkeys(curve.panel for curve in curves))
    figure = side_by_side(panels, shared_yaxes=False)
    for number, curve in enumerate(curves):
        points, panel = curve.points.sort_values("alpha"), panels.index(curve.panel)
        figure.add_scatter(
            x=points["alpha"], y=points["y"], error_y=whiskers(points["y"], points["low"], points["high"], 3), name=curve.name, mode="lines+markers",
            line={"color": COLOURS[number % len(COLOURS)]}, row=1, col=panel + 1,
        )  # fmt: skip
    finish(figure, x="alpha", y="share", height=460, legend=-0.2, top=60, bottom=110)
    return figure.update_yaxes(range=[0, 1.02])


class _Curve(NamedTuple):
    panel: str
    name: str
    points: pd.DataFrame
    """Columns alpha, y, low, high."""


def _alpha_curves(tables: Tables) -> list[_Curve]:
    usage = (
        tables["usage"]
        .groupby(["phase", "alpha"], sort=False)[["active_fraction", "ci_low", "ci_high"]]
        .mean()
        .reset_index()
    )
    sources = [
        ("layers active", usage, ["phase"], {"active_fraction": "y", "ci_low": "low", "ci_high": "high"}),
        (
            "predictions changed",
            tables.get("controls"),
            ["variant"],
            {"changed": "y", "changed_low": "low", "changed_high": "high"},
        ),
        (
            "accuracy on choices",
            tables.get("accuracy"),
            ["variant", "scoring"],
            {"accuracy": "y", "ci_low": "low", "ci_high": "high"},
        ),
    ]
    return [
        _Curve(
            panel,
            ", ".join(map(str, key)).replace("_", " "),
            group.rename(columns=names)[["alpha", "y", "low", "high"]],
        )
        for panel, table, by, names in sources
        if table is not None
        for key, group in table.groupby(by, sort=False)
    ]


def control_bars(tables: Tables) -> go.Figure:
    """Divergence from the full model: the rule beside its controls."""
    controls = tables["controls"].sort_values("alpha", kind="stable")
    figure = go.Figure()
    for colour, (alpha, group) in coloured(controls, "alpha"):
        figure.add_bar(
            x=group["variant"], y=group["kl_to_full"], name=f"alpha {alpha:g}", marker_color=colour,
            error_y=whiskers(group["kl_to_full"], group["kl_low"], group["kl_high"], 3),
        )  # fmt: skip
    return finish(figure, x="what decides where to exit or skip", y="KL from the full model (nats)")


FIGURES = {
    "raster": FigureSpec(
        "Activity raster",
        "Each cell is one block for one token: blue where the block is active, grey where it is void, that is, where its "
        "change of the residual stream's L2 norm stays below alpha times the range of the changes of the blocks before it. "
        "Drawn for the first alpha asked for. Layer 0 is at the bottom; choose the prompt in the menu.",
        raster,
    ),
    "usage": FigureSpec(
        "Usage per layer and phase",
        "The share of tokens for which each layer is active, for prompt tokens and for the tokens of the response. Bars end at "
        "the mean over tokens; whiskers are 95 % intervals from resampling whole prompts. Usage is a measurement, not a saving of compute.",
        usage_by_layer,
    ),
    "norms": FigureSpec(
        "Norm, step and threshold",
        "Left: the L2 norm of the residual stream leaving each block. Right: the step each block makes, and the threshold it must "
        "reach to count as active. Markers are medians over tokens, whiskers the middle half; each prompt's first token is left out, "
        "because its massive norm would set the scale.",
        norms,
    ),
    "token_classes": FigureSpec(
        "Void rate per class of token",
        "The share of layers that are void, averaged over the tokens of a class: `first` is a prompt's first token (BOS where the tokenizer "
        "adds one), `template` belongs to the chat template, `last` is the last prompt token. Whiskers are 95 % intervals over prompts.",
        token_classes,
    ),
    "alpha": FigureSpec(
        "Usage and predictions against alpha",
        "Left: the mean usage per phase. Then the share of next-token predictions that change when the rule, or a control, decides what is "
        "read. Last, where prompts carry choices, the accuracy by the choices' logits and by what the response says. Whiskers are 95 % intervals "
        "(of the usage: the mean over layers of each layer's interval).",
        against_alpha,
        lambda tables: tables["usage"]["alpha"].nunique() > 1,
    ),
    "controls": FigureSpec(
        "The rule beside controls of equal skipping",
        "How far the read prediction is from the full model's, in nats. `voids` follows the rule; `fixed_exit` reads all tokens at the two layers "
        "next to the rule's mean exit, `shuffled_exit` deals the rule's exits to other tokens, `random_voids` skips each block at the rule's rate at random. "
        "Whiskers are 95 % intervals over prompts.",
        control_bars,
        lambda tables: "controls" in tables,
    ),
}


def active(tables: Tables) -> pd.DataFrame:
    """Share of tokens for which the layer is active, at the first alpha and in the first phase."""
    usage = tables["usage"]
    first = usage.iloc[0]
    rows = usage[(usage["alpha"] == first["alpha"]) & (usage["phase"] == first["phase"])]
    return columns(rows, "active_fraction", "ci_low", "ci_high")


PROFILES = {
    "active": ProfileSpec(
        "Active tokens",
        "share of tokens",
        "The share of tokens for which the layer's step in L2 norm reaches the void rule's threshold, at the first alpha and in the "
        "first phase of the run. Layers near 0 are void for almost every token.",
        active,
    ),
}
