"""The edges of a run as a layered graph: what writes to the stream, what reads it, and the largest edges between them."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analyses.causal_patching.captions import captioned
from analyses.results.card import FigureSpec, Tables
from analyses.results.theme import COLOURS, finish, plain

SHOWN = 40
"""Edges that are drawn, the largest."""
WIDTHS = (1.0, 2.5, 4.5, 7.0)
"""Of lines, for effects of up to a quarter, a half, three quarters and all of the largest."""


def largest(tables: Tables) -> pd.DataFrame:
    """Return the edges drawn, with `size`: their exact effect in the metric's unit, or what is estimated where it was not measured.

    Of several methods the last is taken, which is integrated where one is; random draws of the verification count as others do.
    """
    edges = tables["edges"]
    edges = edges[edges["method"] == edges["method"].iloc[-1]]
    edges = edges.assign(size=edges["exact"].where(edges["verified"], edges["score"]))
    order = edges["size"].abs().sort_values(ascending=False, kind="stable").index[:SHOWN]
    return edges.loc[order]


def place(node: str, n_layers: int, n_heads: int, group: int) -> tuple[float, float]:
    """Return (where a node lies across, its depth): heads side by side, MLPs to their right half a layer above.

    Args:
        node: `embed`, `logits`, `m5`, `9.6` or `9.6.q`; heads of keys and values are key-value heads.
        n_layers: of the model.
        n_heads: query heads of a layer.
        group: query heads that share keys and values; theirs lie in the middle of the group.
    """
    if node in ("embed", "logits"):
        return (n_heads - 1) / 2, -1.0 if node == "embed" else float(n_layers)
    if node.startswith("m"):
        return n_heads + 0.5, int(node[1:]) + 0.5
    layer, head, *reads = node.split(".")
    across = int(head) * group + (group - 1) / 2 if reads and reads[0] in "kv" else float(head)
    return across, float(layer)


def graph(tables: Tables) -> go.Figure:
    """Draw the largest edges; width by size, colour by sign, dashed where the size is an estimate alone."""
    edges = largest(tables)
    every = tables["edges"]
    heads = [int(node.split(".")[1]) for node in every["sender"].unique() if re.fullmatch(r"\d+\.\d+", node)]
    readers = [int(node.split(".")[1]) for node in every["receiver"].unique() if node.endswith(".k")]
    n_heads, n_layers = max(heads) + 1, 1 + max(int(node[1:]) for node in every["receiver"].unique() if node[0] == "m")
    group = n_heads // (max(readers) + 1)
    ends = [
        (place(sender, n_layers, n_heads, 1), place(receiver, n_layers, n_heads, 1 if unit == "query_head" else group))
        for sender, receiver, unit in zip(edges["sender"], edges["receiver"], edges["receiver_unit"], strict=True)
    ]
    share = edges["size"].abs().to_numpy() / max(float(edges["size"].abs().max()), 1e-30)
    width = np.minimum((share * len(WIDTHS)).astype(int), len(WIDTHS) - 1)
    figure = go.Figure()
    for sign, name, colour in ((1, "raises the metric", COLOURS[0]), (-1, "lowers it", COLOURS[1])):
        for verified, dash in ((True, "solid"), (False, "dot")):
            for step, thickness in enumerate(WIDTHS):
                chosen = np.flatnonzero(
                    (np.sign(edges["size"]) == sign) & (edges["verified"] == verified) & (width == step)
                )
                if not len(chosen):
                    continue
                xs = [x for i in chosen for x in (ends[i][0][0], ends[i][1][0], None)]
                ys = [y for i in chosen for y in (ends[i][0][1], ends[i][1][1], None)]
                figure.add_scatter(
                    x=xs, y=ys, mode="lines", line={"color": colour, "width": thickness, "dash": dash}, hoverinfo="skip",
                    showlegend=False,
                )  # fmt: skip
            figure.add_scatter(
                x=[None], y=[None], mode="lines", line={"color": colour, "width": 3, "dash": dash},
                name=name + (", patched" if verified else ", estimated"),
            )  # fmt: skip
    said = [
        f"{sender} → {receiver}: {value:+.3g} ({'patched' if verified else 'estimated'})"
        for sender, receiver, value, verified in zip(
            edges["sender"], edges["receiver"], edges["size"], edges["verified"], strict=True
        )
    ]
    middles = np.array(ends).mean(1)
    figure.add_scatter(
        x=middles[:, 0], y=middles[:, 1], mode="markers", marker={"size": 9, "opacity": 0}, text=said,
        hovertemplate="%{text}<extra></extra>", showlegend=False,
    )  # fmt: skip
    nodes = {place(name, n_layers, n_heads, 1): name for name in edges["sender"]}
    for receiver, (_, at) in zip(edges["receiver"], ends, strict=True):
        nodes.setdefault(at, receiver)
    figure.add_scatter(
        x=[x for x, _ in nodes], y=[y for _, y in nodes], mode="markers+text", text=[plain(name) for name in nodes.values()],
        textposition="middle right", textfont={"size": 10}, marker={"size": 8, "color": "#8c8c8c"}, hoverinfo="skip",
        showlegend=False,
    )  # fmt: skip
    finish(figure, x="head, and at the right the MLP", y="layer", height=max(420, 160 + 18 * n_layers))
    figure.update_xaxes(tickvals=[*range(n_heads), n_heads + 0.5], ticktext=[*map(str, range(n_heads)), "MLP"])
    figure.update_xaxes(range=[-0.7, n_heads + 1.4], zeroline=False).update_yaxes(zeroline=False)
    figure.update_layout(legend={"y": -0.12, "yanchor": "top"}, margin={"b": 110})
    return captioned(figure, tables, edges["direction"], f"{len(edges)} of {len(every):,} edges")


GRAPH = {
    "graph": FigureSpec(
        "The largest edges",
        "Heads from left to right, MLPs at the right, layer 0 at the bottom; a line leads from what writes to the stream to what reads it, and is as "
        "thick as its effect on the metric is large, of the largest quarter, half, three quarters or all. Solid lines were patched exactly, dotted "
        "ones are estimates. Only the largest edges are drawn: what is missing need not be small in sum.",
        graph,
        lambda tables: "edges" in tables and len(tables["edges"]) > 0,
    ),
}
