"""Figures of relevance: tokens with the account beneath, layers, and curves of removal."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analyses.contextual_decomposition.methods import COLOUR, NAMES
from analyses.results.card import Tables
from analyses.results.theme import band, finish, menu, side_by_side, token_label, whiskers

DIVERGING = "RdBu"
SHOWN = 12
"""Prompts that are drawn as text."""


def tokens(tables: Tables) -> go.Figure:
    """Draw each prompt as a line of tokens coloured by relevance, a menu of methods; what is not the tokens' stands beneath."""
    table = tables["token_relevance"]
    methods = [name for name in NAMES if name in set(table["method"])]
    methods = sorted(methods, key=lambda name: name != "lrp")
    figure = go.Figure()
    heights = 0
    for number, method in enumerate(methods):
        rows = table[table["method"] == method]
        prompts = list(dict.fromkeys(rows["prompt"]))[:SHOWN]
        kept = rows[rows["prompt"].isin(prompts)]
        heights, width = max(heights, len(prompts)), int(kept["position"].max()) + 1
        z, text, hover = (np.full((len(prompts), width), fill, dtype=object) for fill in (None, "", ""))
        for prompt, position, score, piece in kept[["prompt", "position", "score", "text"]].to_numpy():
            at = prompts.index(prompt), int(position)
            z[at], text[at], hover[at] = (
                score,
                token_label(piece.strip(" "), 12),
                f"{token_label(piece)}: {score:+.3f} logits",
            )
        # Position 0 often stands for all the rest.
        later = kept.loc[kept["position"] > 0, "score"].abs()
        top = float(later.max()) if len(later) and later.max() > 0 else 1.0
        figure.add_heatmap(
            z=z, x=list(range(width)), y=[_row(tables, prompt, _rule(methods, method)) for prompt in prompts], text=text,
            texttemplate="%{text}", hovertext=hover, hovertemplate="%{hovertext}<extra></extra>", colorscale=DIVERGING,
            zmid=0, zmin=-top, zmax=top, xgap=1, ygap=3, colorbar={"title": "logits"}, visible=number == 0,
        )  # fmt: skip
    finish(figure, x="position", y="", height=190 + 40 * heights)
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(showgrid=False)
    return menu(figure, [NAMES[name] for name in methods])


def _row(tables: Tables, prompt: int, rule: str | None) -> str:
    """A prompt's label: its metric, and where it goes under a rule."""
    if rule is None or "leak" not in tables:
        return f"prompt {prompt}"
    sums = tables["leak"].query("prompt == @prompt and rule == @rule").groupby("kind")["amount"].sum()
    parts = ", ".join(f"{kind} {sums[kind]:+.2f}" for kind in ("tokens", "bias", "softmax"))
    return f"prompt {prompt}<br><sub>{sums['metric']:+.2f} = {parts}</sub>"


def _rule(methods: list[str], method: str) -> str | None:
    """The rule whose account a method of tokens has: one with zero as its baseline."""
    if method in ("dynamic", "lrp_cp", "lrp_attnlrp"):
        return method.removeprefix("lrp_")
    others = [rule for rule in ("attnlrp", "cp") if f"lrp_{rule}" not in methods]
    return others[0] if method == "lrp" and others else None


def routed(tables: Tables) -> go.Figure:
    """Draw the relevance that passes each layer's attention and MLP, side by side."""
    table = tables["routed"]
    figure = go.Figure()
    for part, colour in (("attention", COLOUR["cdt"]), ("mlp", COLOUR["ablation"])):
        rows = table[table["part"] == part]
        figure.add_bar(
            x=rows["layer"], y=rows["relevance"], name=part, marker_color=colour,
            error_y=whiskers(rows["relevance"], rows["ci_low"], rows["ci_high"], 2),
        )  # fmt: skip
    return finish(figure, x="layer", y="relevance of what is added (logits)", height=420)


def curves(tables: Tables) -> go.Figure:
    """Draw the metric as heads or tokens are taken away, the most relevant first (full) and last (dashed)."""
    table = tables["curves"]
    units = list(dict.fromkeys(table["unit"]))
    figure = side_by_side(units, horizontal_spacing=0.06)
    for column, unit in enumerate(units, 1):
        own = table[table["unit"] == unit]
        random = own[own["method"] == "random"].pivot_table(index="share", columns="order", values="value")
        band(figure, random.index, random["random_low"], random["random_high"], "#8c8c8c", row=1, col=column)
        for method in (name for name in NAMES if name in set(own["method"]) - {"random"}):
            for order, dash in (("morf", "solid"), ("lerf", "dash")):
                line = own[(own["method"] == method) & (own["order"] == order)]
                figure.add_scatter(
                    x=line["share"], y=line["value"], mode="lines", name=NAMES[method], legendgroup=method,
                    showlegend=column == 1 and order == "morf", line={"color": COLOUR[method], "dash": dash, "width": 2},
                    hovertemplate="%{x:.0%} gone: %{y:.2f}<extra>" + f"{NAMES[method]}, {order}" + "</extra>", row=1, col=column,
                )  # fmt: skip
    return finish(figure, x="share taken away", y=("metric (1 whole, 0 nothing left)",), height=440, top=80)


def has_curves(tables: Tables) -> bool:
    """Whether anything was taken away."""
    return "curves" in tables and not pd.DataFrame(tables["curves"]).empty
