"""Figures and depth profiles of norm removal."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analyses.norm_removal.figures_training import TRAINING_FIGURES
from analyses.results.card import FigureSpec, ProfileSpec, Tables
from analyses.results.theme import COLOURS, SCALE, finish, menu, side_by_side, whiskers

NAMES = {
    "attn": "attention's norm", "qk": "queries and keys only", "v": "values only", "mlp": "MLP's norm", "final": "final norm",
    "block": "block's norm", "q_norm": "query norm", "k_norm": "key norm", "attn_post": "norm after attention", "mlp_post": "norm after MLP",
}  # fmt: skip
CLASSES = {"first": "first position", "end_of_text": "end-of-text tokens", "other": "other positions"}


def _first_variant(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["variant"] == table["variant"].iloc[0]]


def freeze_effect(tables: Tables) -> go.Figure:
    """Change of loss by layer, one line a kind of site; and of sites frozen together."""
    table, joint = _first_variant(tables["freeze_effect"]), _first_variant(tables["freeze_together"])
    table = table[np.isfinite(table["delta_ce"])]
    figure = side_by_side(
        ("one norm at a time", "several at once"), shared_yaxes=False, column_widths=[0.6, 0.4], horizontal_spacing=0.2
    )
    for colour, (site, group) in zip(COLOURS * 2, table.groupby("site", sort=False), strict=False):
        figure.add_scatter(
            x=group["delta_ce"], y=group["layer"], name=NAMES[str(site)], mode="lines+markers", line={"color": colour},
            marker={"size": 5}, error_x=whiskers(group["delta_ce"], group["ci_low"], group["ci_high"]), row=1, col=1,
        )  # fmt: skip
    joint = joint.replace({"delta_ce": np.inf, "ci_low": np.inf, "ci_high": np.inf}, np.nan)
    points = joint.assign(label=[_together(str(site)) for site in joint["site"]], **sizes(joint))
    figure.update_yaxes(categoryorder="array", categoryarray=points["label"], row=1, col=2)
    figure.add_scatter(
        x=points["size"], y=points["label"], mode="markers", showlegend=False, customdata=points[["delta_ce", "ci_low", "ci_high"]],
        marker={"color": COLOURS[6], "size": 9, "symbol": ["circle-open" if v < 0 else "circle" for v in points["delta_ce"]]},
        error_x=whiskers(points["size"], points["size_low"], points["size_high"]), row=1, col=2,
        hovertemplate="%{y}: %{customdata[0]:.4g} (%{customdata[1]:.4g} to %{customdata[2]:.4g})<extra></extra>",
    )  # fmt: skip
    for site, share in joint.loc[joint["diverged"] > 0, ["site", "diverged"]].itertuples(index=False):
        figure.add_annotation(
            x=1, xref="x2 domain", xanchor="right", y=_together(str(site)), yref="y2", showarrow=False, text=f"infinite: overflows for {share:.0%} of tokens"
        )  # fmt: skip
    finish(figure, x="change of loss (nats)", y="", height=620)
    figure.update_yaxes(title="layer (the final norm on top)", row=1, col=1)
    figure.update_xaxes(zeroline=True, zerolinecolor="#444", row=1, col=1)
    figure.update_xaxes(type="log", title="size of the change (nats, logarithmic)", tickformat="~g", row=1, col=2)
    return figure.update_layout(legend={"y": 1.07}, margin={"t": 100})


def _together(site: str) -> str:
    """What is frozen together, as a reader sees it."""
    return "all norms" if site == "all" else site.replace("all ", "every ")


def sizes(table: pd.DataFrame) -> dict[str, pd.Series]:
    """(size, size_low, size_high) of changes delta_ce with bounds ci_low and ci_high, for a logarithmic axis.

    A fall is mirrored; a bound on the other side of zero is drawn a decade below the size. Zero has no place.
    """
    change = table["delta_ce"]
    sign = np.sign(change).replace(0, np.nan)
    size = change * sign
    ends = pd.concat([table["ci_low"] * sign, table["ci_high"] * sign], axis=1)
    low, high = ends.min(axis=1, skipna=False), ends.max(axis=1, skipna=False)
    return {"size": size, "size_low": low.clip(lower=size / 10), "size_high": high}


def scales(tables: Tables) -> go.Figure:
    """Scale of every site by layer and position class, one panel a kind; logarithmic."""
    table = _first_variant(tables["scales"])
    table = table[table["site"] != "v"].assign(site=table["site"].replace("qk", "attn"))
    kinds = [k for k in NAMES if k in set(table["site"]) and k != "final"]
    figure = side_by_side([NAMES[k] for k in kinds])
    for column, kind in enumerate(kinds, 1):
        here = table[table["site"].isin([kind, "final"] if kind == "mlp" else [kind])]
        for colour, name in zip(COLOURS, CLASSES, strict=False):
            group = here[here["position_class"] == name]
            if len(group):
                figure.add_scatter(
                    x=group["scale"], y=group["layer"], name=CLASSES[name], legendgroup=name, mode="lines+markers",
                    showlegend=column == 1, line={"color": colour}, marker={"size": 5}, row=1, col=column,
                    error_x=whiskers(group["scale"], group["ci_low"], group["ci_high"]),
                )  # fmt: skip
    return finish(figure, x="divisor", y=("layer",), height=600, legend=1.06, top=80).update_xaxes(type="log")


def stream(tables: Tables) -> go.Figure:
    """Residual norm by layer and position class, and kurtosis of the features; one line a variant and class."""
    table = tables["stream"]
    figure = side_by_side(("norm of the stream", "kurtosis of its features"))
    groups = table.groupby(["variant", "position_class"], sort=False)
    many = table["variant"].nunique() > 1
    for colour, ((variant, name), group) in zip(COLOURS * 3, groups, strict=False):
        label = f"{CLASSES[str(name)]}, {str(variant).replace('_', '-')}" if many else CLASSES[str(name)]
        for column, value in enumerate(("norm", "kurtosis"), 1):
            error = whiskers(group["norm"], group["ci_low"], group["ci_high"]) if value == "norm" else None
            figure.add_scatter(
                x=group[value], y=group["layer"], name=label, legendgroup=label, mode="lines+markers", error_x=error,
                line={"color": colour}, marker={"size": 5}, showlegend=column == 1, row=1, col=column,
            )  # fmt: skip
    titles = ("length", "kurtosis (1 = all features alike)")
    finish(figure, x=titles, y=("layer",), height=600, legend=1.06, top=110 if many else 80)
    return figure.update_xaxes(type="log")


def attribution(tables: Tables) -> go.Figure:
    """Layer by head heat map of the attribution error; one variant at a time."""
    return _by_head(tables["attribution_error"], "nmae", "error", 100, "%", zmax=100)


def sinks(tables: Tables) -> go.Figure:
    """Layer by head heat map of the sink rate; one variant at a time."""
    return _by_head(tables["sinks"], "rate", "share", 1, "", zmax=1)


def _by_head(table: pd.DataFrame, value: str, name: str, factor: float, unit: str, zmax: float) -> go.Figure:
    figure, labels = go.Figure(), list[str]()
    for variant, group in table.groupby("variant", sort=False):
        grid = group.pivot(index="layer", columns="head", values=value) * factor
        figure.add_heatmap(
            z=grid, x=grid.columns, y=grid.index, visible=not labels, zmin=0, zmax=zmax, colorscale=SCALE,
            colorbar={"title": name, "ticksuffix": unit, "len": 0.6},
            hovertemplate="layer %{y}, head %{x}: %{z:.3g}" + unit + "<extra></extra>",
        )  # fmt: skip
        labels.append(str(variant).replace("_", "-"))
    finish(figure, x="head", y="layer", height=600)
    figure.update_xaxes(dtick=max(1, table["head"].nunique() // 16))
    return menu(figure, labels)


def neurons(tables: Tables) -> go.Figure:
    """Change of loss when a neuron is mean-ablated, final norm live against held; top-ranked beside random neurons."""
    figure = go.Figure()
    groups = tables["neurons"].groupby(["variant", "chosen"], sort=False)
    many = tables["neurons"]["variant"].nunique() > 1
    for index, ((variant, how), group) in enumerate(groups):
        label = "highest ranked" if how == "top" else "drawn at random"
        text = [f"neuron {n}, rank {r}" for n, r in zip(group["neuron"], group["rank"], strict=True)]
        figure.add_scatter(
            x=group["abs_delta_ce"], y=group["abs_delta_ce_held"], mode="markers", text=text, hovertemplate="%{text}<br>live %{x:.3g}<br>held %{y:.3g}<extra></extra>",
            name=f"{label}, {str(variant).replace('_', '-')}" if many else label,
            marker={"color": COLOURS[(index // 2) % len(COLOURS)] if many else COLOURS[index], "size": 9, "symbol": "circle" if how == "top" else "circle-open"},
        )  # fmt: skip
    floor = 1e-6
    high = max(float(tables["neurons"][["abs_delta_ce", "abs_delta_ce_held"]].max().max()), 10 * floor)
    low = max(float(tables["neurons"][["abs_delta_ce", "abs_delta_ce_held"]].min().min()), floor)
    figure.add_scatter(
        x=[low, high],
        y=[low, high],
        mode="lines",
        line={"color": "#888", "dash": "dot"},
        name="no part through the norm",
    )
    finish(
        figure,
        x="mean change of a token's loss, final norm live (nats)",
        y="the same, final norm's divisor held",
        height=520,
    )
    figure.update_xaxes(type="log")
    figure.update_yaxes(type="log")
    return figure.update_layout(legend={"y": 1.04}, margin={"t": 90})


FIGURES: dict[str, FigureSpec] = {
    "freeze_effect": FigureSpec(
        "What freezing a norm's scale costs, without training",
        "Change of the next-token loss when a norm divides every token by one number, its mean scale on these prompts (the first position has a number of its "
        "own unless asked otherwise), instead of by the token's own scale. Left: one norm at a time, by layer. Right: every norm of "
        "a kind, and all norms, at once, by the size of the change, since such changes span decades; open markers are falls, and a whisker a decade long ends beyond zero. Whiskers are 95 % intervals over prompts; a whisker wholly right of zero means that the model relies on that scale. Changes that are infinite are left out of the lines and named in the notes.",
        freeze_effect,
        lambda tables: "freeze_effect" in tables,
    ),
    "scales": FigureSpec(
        "What each norm divides by",
        "The mean divisor of every norm by layer, at the first position, at tokens that end a text and at all others (logarithmic; the final norm stands above the "
        "last layer of the MLP panel). Far apart lines mean that one number cannot stand for all positions. Whiskers are 95 % intervals over prompts.",
        scales,
        lambda tables: "scales" in tables,
    ),
    "stream": FigureSpec(
        "Length of the residual stream",
        "Left: the mean length of what leaves each block, by position class (logarithmic), with 95 % intervals over prompts; a spike of the first position is the usual "
        "companion of attention sinks. Right: how unevenly the length is spread over features, mean(s⁴)/mean(s²)² of the features' root mean squares.",
        stream,
    ),
    "attribution_error": FigureSpec(
        "How wrong direct logit attribution is, head by head",
        "Mean absolute difference between a head's direct logit attribution (final norm's divisor held) and its direct effect (divisor computed anew without the head), "
        "relative to the mean absolute effect, for the token that comes next. Colours stop at 100 %. Without norms the two are the same and the error is zero.",
        attribution,
        lambda tables: "attribution_error" in tables,
    ),
    "sinks": FigureSpec(
        "Attention sinks",
        "The share of queries that give more than 0.3 of their attention to the first position, by layer and head. The first three queries of a prompt would do so under even "
        "attention; the column `uniform` of the table gives that share on these prompts.",
        sinks,
        lambda tables: "sinks" in tables,
    ),
    "neurons": FigureSpec(
        "Confidence neurons",
        "Each point is a neuron of the last MLP set to its mean: how much tokens' losses change with the final norm live (across) and with its divisor held at the "
        "clean value (up). Points far below the dotted line act through the norm. Filled: highest ratio of written length to the variance of its cosine with the "
        "unembedding; open: as many drawn at random.",
        neurons,
        lambda tables: "neurons" in tables,
    ),
    **TRAINING_FIGURES,
}


def _freeze_profile(site: str) -> ProfileSpec:
    what = NAMES[site]

    def read(tables: Tables) -> pd.DataFrame:
        table = _first_variant(tables["freeze_effect"])
        table = table[np.isfinite(table["delta_ce"])]
        of_site = table[table["site"] == site].rename(columns={"delta_ce": "value"})
        return of_site[["layer", "value", "ci_low", "ci_high"]].reset_index(drop=True)

    def applies(tables: Tables) -> bool:
        return "freeze_effect" in tables and bool((tables["freeze_effect"]["site"] == site).any())

    return ProfileSpec(
        f"Cost of freezing {what}",
        "nats of loss",
        f"Change of the next-token loss when the {what.replace(chr(39) + 's norm', '')} norm of one block divides by its mean scale, untrained.",
        read,
        applies,
    )


def _error_profile(tables: Tables) -> pd.DataFrame:
    table = _first_variant(tables["attribution_error"])
    weighted = table.assign(wrong=table["nmae"] * table["effect_size"]).groupby("layer")[["wrong", "effect_size"]].sum()
    return pd.DataFrame({"layer": weighted.index, "value": (weighted["wrong"] / weighted["effect_size"]).to_numpy()})


def _spike_profile(tables: Tables) -> pd.DataFrame:
    grid = _first_variant(tables["stream"]).pivot(index="layer", columns="position_class", values="norm")
    return pd.DataFrame({"layer": grid.index, "value": (grid["first"] / grid["other"]).to_numpy()})


PROFILES: dict[str, ProfileSpec] = {
    "freeze_attn": _freeze_profile("attn"),
    "freeze_mlp": _freeze_profile("mlp"),
    "attribution_error": ProfileSpec(
        "Error of direct logit attribution",
        "share of the effect",
        "Mean absolute error of a layer's heads' attribution, relative to their mean absolute direct effect.",
        _error_profile,
        lambda tables: "attribution_error" in tables,
    ),
    "first_spike": ProfileSpec(
        "First position's spike",
        "times the others",
        "Mean length of the stream at the first position over that at the others, after each block.",
        _spike_profile,
        lambda tables: "stream" in tables and {"first", "other"} <= set(tables["stream"]["position_class"]),
    ),
}
