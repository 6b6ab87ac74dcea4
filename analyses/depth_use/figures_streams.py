"""Figures of depth use that compare groups of prompts, and layers with layers."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analyses.results.card import FigureSpec, Tables
from analyses.results.theme import SCALE, band, coloured, finish, menu, side_by_side, whiskers

CURVES = {
    "mean_cosine": "mean streams",
    "pair_cosine": "pairs of tokens",
    "text_cosine": "pairs of texts",
    "best_text_cosine": "best token, by pair of texts",
    "best_cosine": "best token of all",
    "median_cosine": "median token pair",
    "max_cosine": "closest token pair",
    "min_cosine": "farthest token pair",
}
KINDS = {"k": "keys", "v": "values", "stream": "stream"}


def _same_layer(table: pd.DataFrame) -> pd.DataFrame:
    return table[~table["anchored"]] if "anchored" in table else table.assign(point="resid_post")


def alignment(tables: Tables) -> go.Figure:
    """Cosines between groups by layer, beside random regroupings."""
    table = _same_layer(tables["alignment"])
    table = table[table["point"] == table["point"].iloc[0]]
    figure = side_by_side(("mean streams", "pairs of tokens, common mean subtracted"))
    panels = ((1, "mean_cosine", False), (2, "pair_cosine", True))
    for colour, ((a, b), pair) in coloured(table, ["group_a", "group_b"]):
        for column, value, centred in panels:
            rows = pair[pair["centred"] == centred]
            for edge in ("_low", "_high"):
                figure.add_scatter(
                    x=rows[value + edge], y=rows["layer"], mode="lines", line={"color": colour, "width": 1, "dash": "dot"},
                    name=f"{a} and {b}, 95 % of random regroupings", legendgroup=f"{a}{b}control", hoverinfo="skip",
                    showlegend=column == 1 and edge == "_low", row=1, col=column,
                )  # fmt: skip
            bounds = {"error_x": whiskers(rows[value], rows[f"{value}_ci_low"], rows[f"{value}_ci_high"])} if f"{value}_ci_low" in rows else {}  # fmt: skip
            figure.add_scatter(
                x=rows[value], y=rows["layer"], name=f"{a} and {b}", mode="lines+markers", line={"color": colour},
                marker={"size": 5}, legendgroup=f"{a}{b}", showlegend=column == 1, row=1, col=column, **bounds,
            )  # fmt: skip
    return finish(figure, x="cosine", y=("layer",), height=560, legend=1.06, top=100)


def alignment_points(tables: Tables) -> go.Figure:
    """Point by layer: how far two groups' tokens lie apart, beyond random regroupings; one pair of groups and cosine at a time."""
    table = _same_layer(tables["alignment"])
    figure, labels = go.Figure(), list[str]()
    for (a, b, centred), rows in table.groupby(["group_a", "group_b", "centred"], sort=False):
        for column, name in CURVES.items():
            grid = rows.pivot(index="point", columns="layer", values=column).reindex(rows["point"].unique())
            inside = (rows[column] >= rows[f"{column}_low"]) & (rows[column] <= rows[f"{column}_high"])
            chance = rows.assign(inside=np.where(inside, "within", "outside")).pivot(
                index="point", columns="layer", values="inside"
            )
            figure.add_heatmap(
                z=grid, x=grid.columns, y=grid.index, customdata=chance.reindex(grid.index), visible=not labels, zmin=-1,
                zmax=1, zmid=0, colorscale="RdBu", colorbar={"title": "cosine"},
                hovertemplate="%{y}, layer %{x}<br>%{z:.3f}, %{customdata} random regroupings<extra></extra>",
            )  # fmt: skip
            labels.append(f"{a} and {b}, {name}{', common mean subtracted' if centred else ''}")
    menu(figure, labels)
    return finish(figure, x="layer", y="", height=420, top=90, left=100)


def steps(tables: Tables) -> go.Figure:
    """Cosine of each token's stream with itself some layers on, by group."""
    table = tables["steps"]
    wide = list(dict.fromkeys(table["step"]))
    figure = side_by_side([f"{step} layer{'s' * (step > 1)} on" for step in wide])
    table = table[~table["centred"]]
    for colour, (name, group) in coloured(table, "group"):
        for column, step in enumerate(wide, 1):
            rows = group[group["step"] == step]
            figure.add_scatter(
                x=rows["cosine"], y=rows["layer"], name=str(name), mode="lines+markers", line={"color": colour},
                marker={"size": 5}, error_x=whiskers(rows["cosine"], rows["low"], rows["high"]), legendgroup=str(name),
                showlegend=column == 1, row=1, col=column,
            )  # fmt: skip
            for edge in ("shuffled_low", "shuffled_high"):
                figure.add_scatter(
                    x=rows[edge], y=rows["layer"], mode="lines", line={"color": colour, "width": 1, "dash": "dot"},
                    hoverinfo="skip", showlegend=False, row=1, col=column,
                )  # fmt: skip
    return finish(figure, x="cosine", y=("layer",), height=520, legend=1.06, top=90)


def readouts(tables: Tables) -> go.Figure:
    """Divergence of what two groups' streams would say next, beside random regroupings."""
    figure = go.Figure()
    for colour, ((a, b), rows) in coloured(tables["readouts"], ["group_a", "group_b"]):
        band(figure, rows["layer"], rows["low"], rows["high"], colour)
        figure.add_scatter(x=rows["layer"], y=rows["jsd"], name=f"{a} and {b}", mode="lines+markers", line={"color": colour})  # fmt: skip
    finish(figure, x="layer", y="Jensen-Shannon divergence (nats)")
    return figure.update_yaxes(rangemode="tozero")


def masks(tables: Tables) -> go.Figure:
    """How much less the weights two groups need overlap than those of random regroupings, by layer and matrix."""
    figure, labels = go.Figure(), list[str]()
    for (a, b, sparsity), rows in tables["masks"].groupby(["group_a", "group_b", "sparsity"], sort=False):
        grid = rows.pivot(index="layer", columns="matrix", values="excess")[list(dict.fromkeys(rows["matrix"]))]
        details = np.dstack(
            [
                rows.pivot(index="layer", columns="matrix", values=c)[grid.columns]
                for c in ("iou", "shuffled_low", "shuffled_high", "chance")
            ]
        )
        most = float(np.nanmax(np.abs(grid.to_numpy()), initial=1e-6))
        figure.add_heatmap(
            z=grid, x=grid.columns, y=grid.index, customdata=details, visible=not labels, zmin=-most, zmax=most, colorscale="RdBu",
            colorbar={"title": "excess"},
            hovertemplate="layer %{y}, %{x}<br>overlap %{customdata[0]:.3f}, %{z:+.3f} beyond random regroupings "
            "(%{customdata[1]:.3f} to %{customdata[2]:.3f}); random masks %{customdata[3]:.3f}<extra></extra>",
        )  # fmt: skip
        labels.append(f"{a} and {b}, {sparsity:.0%} pruned")
    menu(figure, labels)
    return finish(figure, x="", y="layer", height=560, top=90)


def kv_subspaces(tables: Tables) -> go.Figure:
    """Layer by layer: overlap of subspaces over tokens, keys above and values below the diagonal."""
    table = tables["kv_subspaces"]
    layers = sorted({*table["layer_a"], *table["layer_b"]})
    figure, labels = go.Figure(), list[str]()
    for value, name in (
        ("excess", "beyond what the token explains"), ("overlap", "overlap"), ("position_free", "without positions"), ("cka", "CKA"),
    ):  # fmt: skip
        for upper, lower in (("k", "v"), ("stream", "stream")):
            parts = [_square(table[table["kind"] == kind], value, layers) for kind in (upper, lower)]
            grid = np.triu(parts[0].to_numpy(), 1) + np.triu(parts[1].to_numpy(), 1).T
            np.fill_diagonal(grid, np.nan)
            figure.add_heatmap(
                z=grid, x=layers, y=layers, visible=not labels, colorscale=SCALE, zmin=0, zmax=1, hoverongaps=False,
                colorbar={"title": "share"}, hovertemplate="layers %{y} and %{x}: %{z:.3f}<extra></extra>",
            )  # fmt: skip
            where = KINDS[upper] if upper == lower else "keys right of the diagonal, values left of it"
            labels.append(f"{name}: {where}")
    menu(figure, labels)
    return finish(figure, x="layer", y="layer", height=620, top=90)


def _square(table: pd.DataFrame, value: str, layers: list[int]) -> pd.DataFrame:
    return table.pivot(index="layer_a", columns="layer_b", values=value).reindex(index=layers, columns=layers).fillna(0)


STREAM_FIGURES = {
    "alignment": FigureSpec(
        "How alike the groups' streams are",
        "Left: the cosine between the mean streams of two groups of prompts, by layer. Right: the mean cosine of one group's tokens with the other's, after subtracting the mean "
        "over all tokens, because streams share a large common direction. Dotted lines enclose 95 % of what prompts dealt to the groups at random give: a curve left of them "
        "means that the groups lie in different places. Whiskers are 95 % intervals over the texts of both groups. The comparison was proposed for images and text; "
        "on groups of texts it is our reading.",
        alignment,
        lambda tables: "alignment" in tables,
    ),
    "alignment_points": FigureSpec(
        "Where in a block the groups are alike",
        "Each cell is a cosine between two groups of prompts at one place of one block; the menu chooses how cosines of tokens become one number. The hover says whether prompts "
        "dealt to the groups at random give as much.",
        alignment_points,
        lambda tables: "alignment" in tables and tables["alignment"].get("point", pd.Series()).nunique() > 1,
    ),
    "steps": FigureSpec(
        "How fast each group's streams turn",
        "The cosine of a token's stream with itself some layers on, averaged over tokens: 1 means that the blocks between only stretch it. Whiskers are 95 % intervals over texts; "
        "dotted lines enclose 95 % of what as many texts drawn from all groups give.",
        steps,
        lambda tables: "steps" in tables,
    ),
    "readouts": FigureSpec(
        "What the groups' streams would say",
        "How far apart the mean predictions of two groups are, read from each layer through the final norm and unembedding. The band holds 95 % of what prompts dealt to the "
        "groups at random give.",
        readouts,
        lambda tables: "readouts" in tables,
    ),
    "masks": FigureSpec(
        "Do the groups need the same weights?",
        "For each group the weights with the largest |weight| times input are kept (as Wanda prunes), and the two sets are compared: intersection over union, minus what prompts "
        "dealt to the groups at random give. Magnitudes are shared, so any two groups overlap far; cells below 0 whose overlap lies below the random range in the hover tell them apart.",
        masks,
        lambda tables: "masks" in tables,
    ),
    "kv_subspaces": FigureSpec(
        "Which layers' keys and values span the same tokens",
        "How far the leading directions over tokens of two layers' keys (or values, or streams) agree: 1 is the same subspace, unrelated ones give rank over tokens. Beyond what "
        "the token explains: minus the overlap that is left when rows change places among equal tokens. The table holds intervals by a jackknife over prompts.",
        kv_subspaces,
        lambda tables: "kv_subspaces" in tables,
    ),
}
