"""Figures of what stands beside the grid: estimates against exact effects, and circuits."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from analyses.causal_patching.captions import captioned
from analyses.causal_patching.circuit_plan import SHUFFLED
from analyses.results.card import FigureSpec, Tables
from analyses.results.theme import band, coloured, finish

METHODS = {
    "atp": "attribution patching", "atp_star": "AtP*, sizes", "eap": "edge attribution", "eap_ig": "edge attribution, integrated",
    "exact": "exact effect of each node", "mean": "mean ablation of each node",
}  # fmt: skip


def _name(method: str) -> str:
    plain = method.removesuffix(SHUFFLED)
    return METHODS[plain] + (", on shuffled pairs" if plain != method else "")


def _scored(tables: Tables) -> pd.DataFrame:
    return pd.concat([tables[name] for name in ("nodes", "edges") if name in tables], ignore_index=True)


def agreement(tables: Tables) -> go.Figure:
    """Draw estimates against exact effects, those of the top and those drawn at random, with the identity line."""
    table = _scored(tables)
    verified = table[table["verified"]]
    figure = go.Figure()
    for colour, (method, part) in coloured(verified, "method"):
        signed = method != "atp_star"
        for random, symbol in ((False, "circle"), (True, "x")):
            drawn = part[part["drawn_at_random"] == random]
            figure.add_scatter(
                x=drawn["exact"] if signed else drawn["exact"].abs(), y=drawn["score"], mode="markers",
                name=f"{METHODS[str(method)]}, {'drawn at random' if random else 'largest'}",
                marker={"color": colour, "symbol": symbol, "size": 7},
            )  # fmt: skip
    ends = [float(verified[["exact", "score"]].min().min()), float(verified[["exact", "score"]].max().max())]
    figure.add_scatter(x=ends, y=ends, mode="lines", line={"color": "#888888", "dash": "dot"}, showlegend=False)
    finish(figure, x="exact effect on the metric", y="estimate", height=480)
    return captioned(figure, tables, verified["direction"])


def kept_by_circuits(tables: Tables) -> go.Figure:
    """Draw what circuits keep of the metric over their size, beside random ones."""
    table = tables["faithfulness"]
    table = table[table["ordered_by"] == "score"]
    split = "held_out" if (table["split"] == "held_out").any() else "in_sample"
    figure = go.Figure()
    for colour, (method, part) in coloured(table[table["split"] == split], "method"):
        part = part.sort_values("share")
        band(figure, part["share"], part["ci_low"], part["ci_high"], colour)
        figure.add_scatter(
            x=part["share"], y=part["f"], mode="lines+markers", name=_name(str(method)), line={"color": colour}
        )
    random = table[table["split"] == split].drop_duplicates("share").sort_values("share")
    band(figure, random["share"], random["random_low"], random["random_high"], "#888888")
    figure.add_scatter(
        x=random["share"],
        y=random["random_mean"],
        mode="lines",
        name="random",
        line={"color": "#888888", "dash": "dot"},
    )
    level, kind = table["level"].iloc[0], table["ablation"].iloc[0]
    finish(figure, x=f"share of all {level} (logarithmic)", y="share of the metric's span kept", height=440)
    return captioned(figure, tables, (), f"{kind} ablation, {split.replace('_', ' ')}").update_xaxes(type="log")


ESTIMATES = {
    "agreement": FigureSpec(
        "Estimates against exact effects",
        "Each point is a cell or an edge that was also patched exactly, as a mean over pairs: the largest estimates (dots), and as many drawn at "
        "random from the others (crosses). On the dotted line both agree. AtP* has sizes alone. Points far above nothing on the horizontal "
        "axis are estimates of what is not there; crosses far to either side are effects that the estimate missed.",
        agreement,
        lambda tables: "verification" in tables and bool(_scored(tables)["verified"].any()),
    ),
    "faithfulness": FigureSpec(
        "What circuits keep",
        "The metric of the clean prompt with everything outside a circuit ablated, as a share of the span from nothing kept to everything kept; "
        "1 is the whole model. Nodes or edges are ordered on half of the pairs, and circuits tried on the others. Grey: random circuits of the same "
        "size. Bands are 95 % intervals over pairs, or the 5 and 95 % points over random circuits.",
        kept_by_circuits,
        lambda tables: "faithfulness" in tables,
    ),
}
