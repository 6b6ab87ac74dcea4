"""Figures of the one table: every proxy of a layer's importance beside its measured loss."""

from __future__ import annotations

import math

import pandas as pd
import plotly.graph_objects as go

from analyses.results.card import FigureSpec, Tables
from analyses.results.theme import COLOURS, SCALE, finish, whiskers

TARGETS = {
    "delta_ce_block": "loss without the block",
    "delta_ce_attn": "loss without its attention",
    "delta_ce_mlp": "loss without its MLP",
}
_NAMES = {
    **TARGETS,
    "jsd_block": "JSD without the block",
    "jsd_attn": "JSD without its attention",
    "jsd_mlp": "JSD without its MLP",
    "delta_ce_frozen_norm": "loss, norms frozen",
    "relative_norm_block": "size of block",
    "relative_norm_attn": "size of attention",
    "relative_norm_mlp": "size of MLP",
    "cosine_block": "cosine of block",
    "cosine_attn": "cosine of attention",
    "cosine_mlp": "cosine of MLP",
    "similarity_block": "1 − cos, block (LLM-Drop)",
    "similarity_attn": "1 − cos, attention (LLM-Drop)",
    "similarity_mlp": "1 − cos, MLP (LLM-Drop)",
    "lim": "LIM",
    "zd": "ZD",
    "probe_accuracy": "probe accuracy",
    "lens_kl": "lens KL",
    "lens_overlap": "lens overlap",
    **{
        f"{name}_{part}": f"{shown} without {what}"
        for name, shown in (
            ("diverged", "texts changed"),
            ("text_lost", "tokens changed"),
            ("accuracy_drop", "accuracy lost"),
        )
        for part, what in (("block", "the block"), ("attn", "its attention"), ("mlp", "its MLP"))
    },
    "layer_index": "depth alone (control)",
}


def label(proxy: str) -> str:
    """A proxy's name as a reader sees it."""
    if proxy in _NAMES:
        return _NAMES[proxy]
    stem, _, last = proxy.rpartition("_")
    if proxy.startswith("delta_ce_int"):
        return f"loss, block at {last.removeprefix('int')} bits"
    if stem == "skip_effect":
        return f"skip effect of {last} on later blocks"
    second = "second_order" in stem
    kind = "loss" if stem.startswith("delta_ce") else stem.rpartition("_")[2]
    return f"{kind}, {last} blocks side by side{' with pairs' if second else ''}"


_CHEAP = ("relative_norm", "similarity", "lim", "zd", "cosine", "lens", "probe")
"""What the names of proxies begin with that need one forward pass, or only the weights."""


def kind(proxy: str) -> int:
    """0 for a measured loss, 1 for a cheap proxy, 2 for what needs other interventions, 3 for the control."""
    if proxy in TARGETS:
        return 0
    return 1 if proxy.startswith(_CHEAP) else 3 if proxy == "layer_index" else 2


def proxy_table(tables: Tables) -> go.Figure:
    """Layer by proxy: the value, coloured by its rank in its column."""
    table = tables["proxies"].set_index("layer").dropna(axis=1, how="all")
    names = sorted((str(name) for name in table), key=lambda name: (kind(name), not name.startswith(_CHEAP[:4])))
    table = table[names]
    shade = table.rank(pct=True)
    text = table.map(lambda v: "" if pd.isna(v) else f"{v:.2g}")
    figure = go.Figure(
        go.Heatmap(
            z=shade, x=[label(name) for name in names], y=table.index, text=text, texttemplate="%{text}", customdata=table,
            textfont={"size": 9}, colorscale=SCALE, zmin=0, zmax=1, xgap=1, ygap=1,
            colorbar={"title": "rank", "tickvals": [0.03, 1], "ticktext": ["lowest", "highest"], "len": 0.4},
            hovertemplate="layer %{y}<br>%{x}<br>%{customdata:.4g}<extra></extra>",
        )
    )  # fmt: skip
    finish(figure, x="", y="layer", height=280 + 20 * len(table))
    figure.update_xaxes(side="top", tickangle=-50)
    figure.update_yaxes(dtick=1)
    for edge in (1, 2):
        figure.add_vline(x=sum(kind(name) < edge for name in names) - 0.5, line={"color": "black", "width": 3})
    return figure.update_layout(width=max(900, 40 * table.shape[1] + 160), margin={"t": 210, "r": 60, "b": 20})


def foretelling(tables: Tables) -> go.Figure:
    """Rank agreement of every proxy with a measured loss, best first, beside what chance gives."""
    figure, buttons = go.Figure(), list[dict[str, object]]()
    targets = {target: _correlated(tables["agreement"], target) for target in TARGETS}
    targets = {target: rows for target, rows in targets.items() if len(rows)}
    for shown, (target, rows) in enumerate(targets.items()):
        _chance(figure, rows, shown == 0)
        for which, (name, colour) in _KINDS.items():
            some = rows[[kind(proxy) == which for proxy in rows["proxy_a"]]]
            figure.add_scatter(
                x=some["spearman"], y=[label(proxy) for proxy in some["proxy_a"]], mode="markers", name=name, visible=shown == 0,
                marker={"color": colour, "size": 9, "line": {"width": 1, "color": "#555"}},
                customdata=some[["ci_low", "ci_high", "p_value", "n"]],
                error_x=whiskers(some["spearman"], some["ci_low"], some["ci_high"], 3, color="#555"),
                hovertemplate="%{y}: %{x:.2f} (%{customdata[0]:.2f} to %{customdata[1]:.2f})<br>p %{customdata[2]:.4f}, "
                              "%{customdata[3]} layers<extra></extra>",
            )  # fmt: skip
        order = [label(proxy) for proxy in rows["proxy_a"]]
        each = 1 + len(_KINDS)
        visible = {"visible": [i // each == shown for i in range(each * len(targets))]}
        buttons.append(
            {"label": TARGETS[target], "method": "update", "args": [visible, {"yaxis.categoryarray": order}]}
        )
        if shown == 0:
            figure.update_yaxes(categoryorder="array", categoryarray=order)
    finish(
        figure,
        x="Spearman rank correlation over layers with the measured loss (grey: 95 % of random orders)",
        y="",
        height=820,
    )
    figure.update_xaxes(range=[-1.05, 1.05], zeroline=True, zerolinecolor="#444")
    return figure.update_layout(
        updatemenus=[{"buttons": buttons, "x": 0, "xanchor": "right", "y": 1.02, "yanchor": "bottom"}],
        margin={"l": 260, "t": 70}, barmode="overlay",
    )  # fmt: skip


_KINDS = {
    1: ("one forward pass or the weights", COLOURS[0]),
    2: ("other interventions", COLOURS[7]),
    3: ("control", COLOURS[1]),
}


def _correlated(table: pd.DataFrame, target: str) -> pd.DataFrame:
    """What could foretell a target, the strongest last."""
    rows = table[(table["proxy_b"] == target) & ~table["proxy_a"].isin([*TARGETS, *_direct(target)])]
    rows = rows.dropna(subset="spearman")
    return rows.reindex(rows["spearman"].abs().sort_values(kind="stable").index)


def _chance(figure: go.Figure, rows: pd.DataFrame, visible: bool) -> None:
    """A grey bar behind each proxy, as wide as its number of layers makes chance."""
    known = rows.dropna(subset="null_95")
    figure.add_bar(
        x=2 * known["null_95"], base=-known["null_95"], y=[label(proxy) for proxy in known["proxy_a"]], orientation="h",
        width=0.9, marker={"color": "#777", "opacity": 0.18}, name="95 % of random orders", hoverinfo="skip", visible=visible,
    )  # fmt: skip


def _direct(target: str) -> list[str]:
    """What is the same measurement as a target, read in another way."""
    return [target.replace("delta_ce", "jsd")]


def agreement(tables: Tables) -> go.Figure:
    """Proxy by proxy rank correlations."""
    table = tables["agreement"]
    names = list(dict.fromkeys(table["proxy_a"]))
    grids = [
        table.pivot(index="proxy_a", columns="proxy_b", values=value).reindex(index=names, columns=names)
        for value in ("spearman", "ci_low", "ci_high")
    ]
    shown = [label(name) for name in names]
    both = [[f"{low:.2f} to {high:.2f}" for low, high in zip(*pair, strict=True)] for pair in zip(grids[1].to_numpy(), grids[2].to_numpy(), strict=True)]  # fmt: skip
    figure = go.Figure(
        go.Heatmap(
            z=grids[0], x=shown, y=shown, customdata=both, colorscale="RdBu", zmin=-1, zmax=1, xgap=1, ygap=1,
            colorbar={"title": "rho", "len": 0.5},
            hovertemplate="%{y}<br>%{x}<br>rho %{z:.2f} (%{customdata})<extra></extra>",
        )
    )  # fmt: skip
    finish(figure, x="", y="", height=260 + 22 * len(names))
    figure.update_xaxes(tickangle=-50, side="top")
    figure.update_yaxes(autorange="reversed")
    return figure.update_layout(width=360 + 26 * len(names), margin={"l": 230, "t": 200})


def measured_loss(tables: Tables) -> go.Figure:
    """Change of the loss per layer: left out, coarser, norms frozen."""
    table = tables["proxy_intervals"]
    shown = [
        *TARGETS,
        *(n for n in dict.fromkeys(table["proxy"]) if n.startswith("delta_ce_int") or n == "delta_ce_frozen_norm"),
    ]
    figure = go.Figure()
    for colour, name in zip(COLOURS, shown, strict=False):
        rows = table[(table["proxy"] == name) & (table["mean"] > 0)]
        figure.add_scatter(
            x=rows["mean"], y=rows["layer"], name=label(name), mode="lines+markers", line={"color": colour}, marker={"size": 5},
            error_x=whiskers(rows["mean"], rows["ci_low"].clip(lower=rows["mean"] / 10), rows["ci_high"]),
        )  # fmt: skip
    finish(figure, x="rise of the loss (nats per token, logarithmic)", y="layer", height=640, legend=1.02, top=90)
    top = float(table.loc[table["proxy"].isin(shown), "ci_high"].max())
    return figure.update_xaxes(type="log", tickformat="~g", range=[-3, math.log10(max(top, 0.01)) + 0.1])


PROXY_FIGURES = {
    "proxy_table": FigureSpec(
        "The one table: every proxy beside the measured loss",
        "One row per layer, layer 0 at the bottom. Left of the line: how much the loss rises (nats per token) when the block, its attention or its MLP is left out. "
        "Then everything that could foretell this from one forward pass or from the weights alone, and, right of the second line, from other interventions. Numbers are means over tokens; "
        "colour is the rank within a column, so columns that look alike order the layers alike. Intervals are in the table `proxy_intervals`.",
        proxy_table,
    ),
    "foretelling": FigureSpec(
        "Which proxy foretells the measured loss",
        "Rank correlation over layers of each proxy with the loss chosen in the menu, the strongest at the top. Blue proxies cost one forward pass or only look at the weights; yellow ones need interventions themselves. Whiskers are 95 % intervals over resampled prompts. In the grey "
        "bar of a proxy lie 95 % of random orders of its layers (none is drawn below five layers): what lies inside it is not told from chance. The orange control is depth alone; a proxy whose whisker does not clear it is not shown to be worth computing. "
        "LIM and cosines fall where importance rises or the reverse, so the sign is part of the definition.",
        foretelling,
        lambda tables: any(len(_correlated(tables["agreement"], target)) for target in TARGETS),
    ),
    "measured_loss": FigureSpec(
        "The measured loss of every layer",
        "How much the loss rises when a block, its attention or its MLP is left out, when the block's weights are rounded, and when its norms divide by their mean divisor. Logarithmic, so "
        "layers whose loss falls, or rises by less than 0.001, are not drawn. Whiskers are 95 % intervals over prompts.",
        measured_loss,
    ),
    "agreement": FigureSpec(
        "Do the proxies agree with each other?",
        "Spearman rank correlation over layers of every two columns of the table: blue where they order the layers alike, red where they reverse each other. Hover for 95 % intervals over prompts.",
        agreement,
    ),
}
