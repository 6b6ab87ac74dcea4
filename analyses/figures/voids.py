"""Figures of the voids analysis."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analyses.figures.theme import COLOURS, finish, visible
from analyses.result import FigureSpec, Tables


def raster(tables: Tables) -> go.Figure:
    """Token by layer activity, one prompt at a time, chosen from a menu."""
    activity = tables["activity"]
    activity = activity[activity["alpha"] == activity["alpha"].iloc[0]]
    figure, buttons = go.Figure(), []
    prompts = list(dict.fromkeys(activity["prompt"]))[:40]
    for shown, prompt in enumerate(prompts):
        one = activity[activity["prompt"] == prompt]
        grid = one.pivot(index="layer", columns="position", values="active").astype(int)
        delta = one.pivot(index="layer", columns="position", values="delta")
        tokens = one.drop_duplicates("position").sort_values("position")
        labels = [f"{p} {visible(t)}" for p, t in zip(tokens["position"], tokens["token"], strict=True)]
        figure.add_heatmap(
            z=grid, x=labels, y=grid.index, customdata=delta, visible=shown == 0,
            zmin=0, zmax=1, xgap=1, ygap=1, colorscale=[[0, "#e8e8e8"], [0.5, "#e8e8e8"], [0.5, COLOURS[0]], [1, COLOURS[0]]],
            colorbar={"tickvals": [0.25, 0.75], "ticktext": ["void", "active"], "len": 0.5},
            hovertemplate="token %{x}<br>layer %{y}<br>step %{customdata:.2f}<extra></extra>",
        )  # fmt: skip
        buttons.append(
            {"label": f"prompt {prompt}", "method": "update", "args": [{"visible": [p == prompt for p in prompts]}]}
        )
    finish(figure, x="position and token", y="layer", height=560)
    figure.update_xaxes(tickangle=-60)
    if len(prompts) > 1:
        figure.update_layout(
            updatemenus=[{"buttons": buttons, "x": 1, "xanchor": "right", "y": 1.1, "yanchor": "bottom"}]
        )
    return figure


def usage_by_layer(tables: Tables) -> go.Figure:
    """Share of active tokens per layer, a bar per phase, with intervals."""
    usage = tables["usage"]
    usage = usage[usage["alpha"] == usage["alpha"].iloc[0]]
    figure = go.Figure()
    for colour, (phase, group) in zip(COLOURS, usage.groupby("phase", sort=False), strict=False):
        figure.add_bar(
            y=group["layer"], x=group["active_fraction"], orientation="h", name=f"{phase} tokens", marker_color=colour,
            error_x={"type": "data", "array": group["ci_high"] - group["active_fraction"],
                     "arrayminus": group["active_fraction"] - group["ci_low"], "thickness": 1, "width": 2},
        )  # fmt: skip
    finish(figure, x="share of tokens for which the layer is active", y="layer", height=620)
    figure.update_layout(barmode="group", bargap=0.15)
    figure.update_xaxes(range=[0, 1.05])
    return figure


def norms(tables: Tables) -> go.Figure:
    """Norm of the stream and the threshold along depth, median and middle half of the tokens."""
    activity = tables["activity"]
    activity = activity[(activity["alpha"] == activity["alpha"].iloc[0]) & (activity["token_class"] != "first")]
    figure = make_subplots(rows=1, cols=2, subplot_titles=("norm of the stream", "step and its threshold"))
    for column, names in ((1, ("norm",)), (2, ("delta", "threshold"))):
        for colour, name in zip(COLOURS, names, strict=False):
            quartiles = activity.groupby("layer")[name].quantile([0.25, 0.5, 0.75]).unstack()
            figure.add_scatter(
                x=quartiles[0.5], y=quartiles.index, name={"delta": "step"}.get(name, name), mode="lines+markers",
                line={"color": colour}, error_x={"type": "data", "array": quartiles[0.75] - quartiles[0.5],
                                                 "arrayminus": quartiles[0.5] - quartiles[0.25], "thickness": 1, "width": 0},
                row=1, col=column,
            )  # fmt: skip
    finish(figure, x="L2 norm (units of the residual stream)", y="layer", height=520)
    return figure


def token_classes(tables: Tables) -> go.Figure:
    """Void rate per class of token."""
    rates = tables["void_rate"]
    figure = go.Figure()
    for colour, (alpha, group) in zip(COLOURS, rates.groupby("alpha", sort=False), strict=False):
        figure.add_bar(
            x=group["token_class"], y=group["void_rate"], name=f"alpha {alpha:g}", marker_color=colour,
            error_y={"type": "data", "array": group["ci_high"] - group["void_rate"],
                     "arrayminus": group["void_rate"] - group["ci_low"], "thickness": 1, "width": 3},
        )  # fmt: skip
    finish(figure, x="class of token", y="share of layers that are void")
    figure.update_yaxes(range=[0, 1])
    return figure


def against_alpha(tables: Tables) -> go.Figure:
    """Usage, changed predictions and accuracy as alpha grows."""
    figure = make_subplots(specs=[[{"secondary_y": True}]])
    usage = tables["usage"].groupby(["phase", "alpha"], sort=False)["active_fraction"].mean().reset_index()
    for colour, (phase, group) in zip(COLOURS, usage.groupby("phase", sort=False), strict=False):
        figure.add_scatter(
            x=group["alpha"],
            y=group["active_fraction"],
            name=f"usage, {phase}",
            mode="lines+markers",
            line={"color": colour},
        )
    curves = _alpha_curves(tables)
    for colour, (name, curve) in zip(COLOURS[2:], curves.items(), strict=False):
        error = {
            "type": "data",
            "array": curve["high"] - curve["y"],
            "arrayminus": curve["y"] - curve["low"],
            "thickness": 1,
        }
        figure.add_scatter(
            x=curve["alpha"], y=curve["y"], error_y=error, name=name, mode="lines+markers",
            line={"color": colour, "dash": "dot"}, secondary_y=True,
        )  # fmt: skip
    finish(figure, x="alpha", y="share of layers active")
    figure.update_yaxes(title="share of predictions", secondary_y=True, range=[0, 1.02])
    figure.update_yaxes(range=[0, 1.02], secondary_y=False)
    return figure


def _alpha_curves(tables: Tables) -> dict[str, pd.DataFrame]:
    curves: dict[str, pd.DataFrame] = {}
    if "controls" in tables:
        for variant, group in tables["controls"].groupby("variant", sort=False):
            columns = {"changed": "y", "changed_low": "low", "changed_high": "high"}
            curves[f"changed, {variant}"] = group.rename(columns=columns)[["alpha", "y", "low", "high"]]
    if "accuracy" in tables:
        for key, group in tables["accuracy"].groupby(["variant", "scoring"], sort=False):
            columns = {"accuracy": "y", "ci_low": "low", "ci_high": "high"}
            curves["accuracy, {} ({})".format(*key)] = group.rename(columns=columns)[["alpha", "y", "low", "high"]]
    return curves


def control_bars(tables: Tables) -> go.Figure:
    """Divergence from the full model: the rule beside its controls."""
    controls = tables["controls"]
    figure = go.Figure()
    for colour, (alpha, group) in zip(COLOURS, controls.groupby("alpha", sort=False), strict=False):
        figure.add_bar(
            x=group["variant"], y=group["kl_to_full"], name=f"alpha {alpha:g}", marker_color=colour,
            error_y={"type": "data", "array": group["kl_high"] - group["kl_to_full"],
                     "arrayminus": group["kl_to_full"] - group["kl_low"], "thickness": 1, "width": 3},
        )  # fmt: skip
    return finish(figure, x="what decides where to exit or skip", y="KL from the full model (nats)")


FIGURES = {
    "raster": FigureSpec(
        "Activity raster",
        "Each cell is one block for one token: blue where the block is active, grey where it is void, that is, where its "
        "change of the residual stream's L2 norm stays below alpha times the range of the changes of the blocks before it. "
        "Layer 0 is at the bottom; choose the prompt in the menu.",
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
        "Solid: mean usage per phase (left axis). Dotted: the share of next-token predictions that change when the rule, or a control, decides "
        "what is read, and the accuracy on questions with choices where there are any (right axis), with 95 % intervals.",
        against_alpha,
        lambda tables: tables["usage"]["alpha"].nunique() > 1,
    ),
    "controls": FigureSpec(
        "The rule beside controls of equal skipping",
        "How far the read prediction is from the full model's, in nats. `voids` follows the rule; `fixed_exit` reads every token at the rule's mean "
        "exit layer, `shuffled_exit` deals the rule's exits to other tokens, `random_voids` skips each block at the rule's rate at random. "
        "Whiskers are 95 % intervals over prompts.",
        control_bars,
        lambda tables: "controls" in tables,
    ),
}
