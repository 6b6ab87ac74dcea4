"""Figures of circuits: the graph, and what circuits keep of the metric."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analyses.contextual_decomposition.methods import COLOUR, NAMES
from analyses.results.card import Tables
from analyses.results.theme import COLOURS, finish, whiskers

BLUE, RED = "33,102,172", "178,24,43"


def _places(nodes: pd.DataFrame, top: int) -> dict[tuple[int, int, int], tuple[float, float]]:
    """Place each node: higher for later layers, nodes of one layer side by side."""
    places: dict[tuple[int, int, int], tuple[float, float]] = {(top, -1, -1): (0.0, float(top))}
    for number, (_, group) in enumerate(nodes.sort_values(["layer", "head", "position"]).groupby("layer")):
        offset = 0.35 if number % 2 else -0.35
        for i, place in enumerate(_triples(group)):
            places[place] = ((i - (len(group) - 1) / 2) + offset, float(place[0]))
    return places


def circuit(tables: Tables) -> go.Figure:
    """Draw nodes by layer, and edges from source to target."""
    edges, nodes = tables["edges"], tables["circuit"]
    top = int(edges["target_layer"].max())
    places = _places(nodes, top)
    sizes = edges["score"].abs() / edges.groupby("step")["score"].transform(lambda s: s.abs().max())
    figure = go.Figure()
    ends = zip(_triples(edges, "source_"), _triples(edges, "target_"), edges["score"], sizes, strict=True)
    for source, target, score, size in ends:
        begin, end = places[source], places[target]
        colour = BLUE if score > 0 else RED
        figure.add_scatter(
            x=[begin[0], end[0]], y=[begin[1], end[1]], mode="lines", hoverinfo="skip", showlegend=False,
            line={"width": 0.6 + 4 * size, "color": f"rgba({colour},{0.25 + 0.5 * size:.2f})"},
        )  # fmt: skip
    for kept, opacity in ((True, 1.0), (False, 0.35)):
        drawn = nodes[nodes["kept"] == kept]
        spots = [places[place] for place in _triples(drawn)]
        if not spots:
            continue
        figure.add_scatter(
            x=[x for x, _ in spots], y=[y for _, y in spots], mode="markers+text", showlegend=False, opacity=opacity,
            text=[_label(*place) for place in _triples(drawn)], textposition="middle right",
            marker={"size": 13, "color": COLOURS[0], "line": {"width": 1, "color": "white"}},
            hovertext=[f"found in step {step}" for step in drawn["step"]], hoverinfo="text",
        )  # fmt: skip
    figure.add_scatter(
        x=[0], y=[top], mode="markers+text", text=["metric"], textposition="middle right", showlegend=False,
        marker={"size": 15, "color": COLOURS[1], "symbol": "diamond"}, hoverinfo="skip",
    )  # fmt: skip
    finish(figure, x="", y="layer", height=max(420, 17 * (top - int(nodes["layer"].min())) + 160))
    width = max(abs(x) for x, _ in places.values()) + 1.2
    figure.update_xaxes(visible=False, range=[-width, width])
    return figure.update_yaxes(
        range=[int(nodes["layer"].min()) - 0.8, top + 0.8], zeroline=False, dtick=1 if top <= 16 else 5
    )


def _triples(table: pd.DataFrame, prefix: str = "") -> list[tuple[int, int, int]]:
    """(layer, position, head) of each row."""
    columns = (table[prefix + name].tolist() for name in ("layer", "position", "head"))
    return [(int(a), int(b), int(c)) for a, b, c in zip(*columns, strict=True)]


def _label(layer: int, position: int, head: int) -> str:
    return f"{layer}.{head}" if position < 0 else f"{layer}.{head} @{position}"


def faithfulness(tables: Tables) -> go.Figure:
    """Faithfulness against the number of heads, with the band of random circuits."""
    table = tables["faithfulness"]
    curves = table[table["method"] != "circuit"]
    band = curves.drop_duplicates("size").sort_values("size")
    figure = go.Figure()
    if band["random_low"].notna().all():
        figure.add_scatter(
            x=[*band["size"], *band["size"][::-1]], y=[*band["random_high"], *band["random_low"][::-1]], fill="toself",
            mode="lines", line={"width": 0}, fillcolor="rgba(120,120,120,0.25)", name="random circuits, 5–95 %",
            hoverinfo="skip",
        )  # fmt: skip
    elif len(band):
        figure.add_scatter(
            x=band["size"], y=band["random_mean"], mode="markers", marker={"color": "#888", "size": 6},
            name=f"{int(band['n_random'].iloc[0])} random circuit(s), mean",
        )  # fmt: skip
    for method, name in NAMES.items():
        rows = curves[curves["method"] == method].sort_values("size")
        if rows.empty:
            continue
        figure.add_scatter(
            x=rows["size"], y=rows["faithfulness"], mode="lines+markers", name=name,
            line={"color": COLOUR[method], "width": 3 if method == "cdt" else 1.6},
            marker={"size": 6}, customdata=np.stack([rows["random_share_beaten"] * rows["n_random"], rows["n_random"]], -1),
            hovertemplate="%{x} heads: %{y:.2f}, above %{customdata[0]:.0f} of %{customdata[1]} random circuits<extra>" + name + "</extra>",
        )  # fmt: skip
    searched = table[table["method"] == "circuit"]
    figure.add_scatter(
        x=searched["size"], y=searched["faithfulness"], mode="markers", name="searched circuit",
        marker={"size": 15, "symbol": "star", "color": "#000"},
        error_y=whiskers(searched["faithfulness"], searched["ci_low"], searched["ci_high"], 4),
    )  # fmt: skip
    for level in (0, 1):
        figure.add_hline(y=level, line={"color": "#888", "width": 1, "dash": "dot"})
    finish(figure, x="heads kept (logarithmic)", y="faithfulness", height=460, top=90)
    return figure.update_xaxes(type="log", dtick="D2")
