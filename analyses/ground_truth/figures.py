"""Figures of a run: errors beside the constant control, and what readable, necessary, redundant and gated cases show."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analyses.results.card import FigureSpec, Tables
from analyses.results.theme import COLOURS, finish, whiskers

CONTROL = "control"


def errors(tables: Tables) -> go.Figure:
    """Draw each method's mean error by kind of question with its interval, beside that of the constant control."""
    table = tables["summary"]
    table = table[table["error"].notna() & ~table["method"].str.startswith("control: oracle")]
    figure = go.Figure()
    for number, (tier, group) in enumerate(table.groupby("tier", sort=False)):
        names = group["kind"] + ": " + group["method"]
        figure.add_scatter(
            x=group["error"], y=names, mode="markers", name=str(tier), marker={"size": 8, "color": COLOURS[number]},
            error_x=whiskers(group["error"], group["error_low"], group["error_high"]),
            hovertemplate="%{y}: %{x:.2f} layers<extra></extra>",
        )  # fmt: skip
    lines = (table["kind"] + ": " + table["method"]).nunique()
    finish(figure, x="mean distance from the truth in layers (larger of the two ends)", y="", height=140 + 22 * lines)
    figure.update_yaxes(
        autorange="reversed", categoryorder="array", categoryarray=sorted(set(table["kind"] + ": " + table["method"]))
    )
    return figure.update_layout(margin_l=260)


def false_positives(tables: Tables) -> go.Figure:
    """Draw how often each method names something where there is nothing, and misses what there is."""
    table = tables["summary"]
    table = table[table["false_positive"].notna() | table["miss"].notna()]
    figure = go.Figure()
    names = table["kind"] + ": " + table["method"] + " (" + table["tier"] + ")"
    for number, (column, label) in enumerate(
        {"false_positive": "names something where there is nothing", "miss": "misses what there is"}.items()
    ):
        figure.add_scatter(
            x=table[column], y=names, mode="markers", name=label, marker={"size": 8, "color": COLOURS[number]},
            error_x=whiskers(table[column], table[f"{column}_low"], table[f"{column}_high"]),
        )  # fmt: skip
    finish(figure, x="share of questions", y="", height=140 + 20 * len(table), left=320)
    return figure.update_yaxes(autorange="reversed")


READ_OR_USED = {"H": "readable and not used", "I": "used and not linearly readable"}


def read_or_used(tables: Tables) -> go.Figure:
    """Draw, on tasks H and I, the share of questions in which each method says that there is something, by kind."""
    rows = _of_families(tables["rows"], READ_OR_USED)
    rows = rows[rows["kind"].isin(["readable", "necessary", "nodes"])]
    rows = rows.assign(says=(rows["decision"] == "answered").astype(float), case=rows["family"].map(READ_OR_USED))
    table = rows.groupby(["method", "kind", "case", "nothing"])["says"].agg(["mean", "size"]).reset_index()
    table["label"] = (
        table["kind"]
        + ": "
        + table["method"]
        + np.where(table["nothing"], " (nothing is there)", " (something is there)")
    )
    grid = table.pivot_table(index="label", columns="case", values="mean")
    return _heat(grid, "share of questions answered with something")


def redundancy(tables: Tables) -> go.Figure:
    """Draw, on tasks G, how well methods rank the nodes that take part, of which one alone is not missed."""
    return _nodes(tables["rows"], "G")


def gates(tables: Tables) -> go.Figure:
    """Draw, on tasks K, how well methods rank the heads of an induction pair."""
    return _nodes(tables["rows"], "K")


def _nodes(rows: pd.DataFrame, family: str) -> go.Figure:
    table = rows[(rows["family"] == family) & (rows["kind"] == "nodes") & rows["auroc"].notna()]
    grid = table.pivot_table(index="method", columns="task", values="auroc")
    return _heat(grid, "AUROC over nodes")


def _heat(grid: pd.DataFrame, name: str) -> go.Figure:
    figure = go.Figure(
        go.Heatmap(
            z=grid.to_numpy(), x=list(grid.columns), y=list(grid.index), zmin=0, zmax=1, colorscale="Viridis",
            texttemplate="%{z:.2f}", colorbar={"title": name},
        )
    )  # fmt: skip
    return finish(figure, x="", y="", height=160 + 26 * len(grid), left=300)


def _of_families(rows: pd.DataFrame, families: object) -> pd.DataFrame:
    return rows[rows["family"].isin(list(families)) & ~rows["method"].str.startswith(CONTROL)]  # type: ignore[call-overload]


def _has(*families: str, kind: str = ""):  # type: ignore[no-untyped-def]
    def applies(tables: Tables) -> bool:
        rows = tables["rows"]
        return all(((rows["family"] == family) & rows["kind"].str.startswith(kind)).any() for family in families)

    return applies


FIGURES = {
    "errors": FigureSpec(
        "How many layers off",
        "Mean over questions of the larger distance of the two ends, with 95 % intervals from resampling tasks of one family and "
        "seed; no bar where there are fewer than six. Only questions that a method answers count.",
        errors, lambda tables: bool(tables["summary"]["error"].notna().any()),
    ),
    "false_positives": FigureSpec(
        "What is named where there is nothing",
        "Share of questions without an answer to which a method gives one, and of those with an answer to which it gives none.",
        false_positives,
    ),
    "read_or_used": FigureSpec(
        "Readable is not used",
        "In H a concept can be read and changes nothing; in I a code changes the answer and no linear probe reads it. A probe should "
        "say something in H and nothing in I before its consumer; a causal method the other way round.",
        read_or_used, _has("H", "I"),
    ),
    "redundancy": FigureSpec(
        "Nodes that replace one another",
        "In G no single ablation changes the answer, though the nodes make it together. 1 ranks all of them above every other node; "
        "0.5 is chance.",
        redundancy, _has("G", kind="nodes"),
    ),
    "gates": FigureSpec(
        "The heads of an induction pair",
        "In K the first head only tells the second where to look. Rules that hold the attention pattern constant cannot see it.",
        gates, _has("K", kind="nodes"),
    ),
}  # fmt: skip
