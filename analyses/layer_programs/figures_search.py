"""Figures of searches: what a program costs and gains, what a budget buys, menus, questions and small changes."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from analyses.layer_programs.reading import UNITS
from analyses.results.card import FigureSpec, Tables
from analyses.results.theme import COLOURS, band, coloured, finish, plain, side_by_side, whiskers

HUES = {"random": "#8c8c8c", "exhaustive": COLOURS[0], "beam": COLOURS[1], "mcts": COLOURS[2], "given": COLOURS[3]}
"""Colour of each method; random programs, with which the others are compared, in grey."""


def front(table: pd.DataFrame) -> pd.DataFrame:
    """Return the programs than which no shorter one gains as much, by length."""
    ordered = table.sort_values(["runs", "gain"], ascending=[True, False])
    return ordered[ordered["gain"] > ordered["gain"].cummax().shift(fill_value=-float("inf"))]


def cost(tables: Tables) -> go.Figure:
    """Draw the gain of each program against its length, with the front of those that no shorter one beats."""
    table = tables["measured"]
    figure = go.Figure()
    for method, part in table.groupby("method", sort=False):
        figure.add_scatter(
            x=part["share"], y=part["gain"], mode="markers", name=plain(method), text=part["program"],
            marker={"color": HUES[str(method)], "size": 4 if method == "random" else 5, "opacity": 0.6},
            hovertemplate="%{text}<br>%{x:.2f} of the plain run, gain %{y:.3g}<extra></extra>",
        )  # fmt: skip
    best = front(table)
    figure.add_scatter(
        x=best["share"], y=best["gain"], mode="lines", name="best up to this length", line={"color": "#000000", "shape": "hv", "width": 1},
        hoverinfo="skip",
    )  # fmt: skip
    figure.add_scatter(
        x=[1], y=[0], mode="markers", name="the model itself", marker={"symbol": "x", "size": 10, "color": "#000000"}
    )
    finish(figure, x="block-runs, as a share of the plain run", y=f"mean gain, {_unit(tables)}", height=460)
    # A few programs that destroy the model would flatten all others.
    low, high = table["gain"].quantile(0.25), max(0.0, float(table["gain"].max()))
    return figure.update_yaxes(range=[low - 0.1 * (high - low), high + 0.15 * (high - low)])


def _unit(tables: Tables) -> str:
    return UNITS[tables["programs"]["metric"].iloc[0]]


def budget(tables: Tables) -> go.Figure:
    """Draw what the best program so far gains on the other questions, as block-runs are spent; means over splits."""
    table = tables["budget"]
    figure = side_by_side(["on the questions that choose", "on the other questions"], horizontal_spacing=0.04)
    for method, part in table.groupby("method", sort=False):
        mean = part.groupby("programs")[["block_runs", "best_train", "best_test"]].mean()
        if method == "mcts":
            mean = part[["block_runs", "best_train", "best_test"]].mean().to_frame().T
        dash = "dash" if method == "random" else "solid"
        for col, name in ((1, "best_train"), (2, "best_test")):
            figure.add_scatter(
                x=mean["block_runs"], y=mean[name], name=plain(method), legendgroup=str(method), showlegend=col == 1,
                mode="lines+markers", line={"color": HUES[str(method)], "dash": dash}, row=1, col=col,
            )  # fmt: skip
    finish(figure, x="block-runs a question", y=(f"gain of the best program, {_unit(tables)}",), legend=1.1, top=90)
    figure.add_hline(y=0, line={"color": "#8c8c8c", "width": 1})
    return figure.update_xaxes(type="log")


def menus(tables: Tables) -> go.Figure:
    """Draw how many test questions a menu of k programs covers, with the answer at hand and without, beside random menus."""
    table = tables["menu"]
    methods = list(dict.fromkeys(table["method"]))
    figure = side_by_side([plain(method) for method in methods])
    for col, method in enumerate(methods, 1):
        mean = table[table["method"] == method].groupby("k").mean(numeric_only=True)
        band(figure, mean.index, mean["random_low"], mean["random_high"], "#8c8c8c", row=1, col=col)
        for colour, (name, label) in zip(
            COLOURS,
            {
                "coverage_test": "any of them is right",
                "unlabelled_test": "the surest of them is right",
                "plain_test": "the model itself",
            }.items(),
            strict=False,
        ):
            figure.add_scatter(
                x=mean.index, y=mean[name], name=label, legendgroup=name, showlegend=col == 1, mode="lines+markers", row=1, col=col,
                line={"color": colour if name != "plain_test" else "#000000", "dash": "dot" if name == "plain_test" else "solid"},
            )  # fmt: skip
    return finish(figure, x="programs on the menu", y=("share of test questions",), height=400, legend=1.12, top=100)


def items(tables: Tables) -> go.Figure:
    """Draw how many wrong questions some program mends, beside a wrong answer and what chance predicts."""
    table = tables["rates"]
    figure = go.Figure()
    names = [plain(method) for method in table["method"]]
    bar = whiskers(table["mended"], table["mended_low"], table["mended_high"])
    figure.add_bar(
        x=names, y=table["mended"], error_y=bar, name="some program gives the right answer", marker_color=COLOURS[0]
    )
    figure.add_bar(
        x=names, y=table["wrong_answer"], name="some program gives another question's answer", marker_color=COLOURS[1]
    )
    figure.add_bar(x=names, y=table["predicted"], name="expected of as many random programs", marker_color="#8c8c8c")
    finish(figure, x="search", y="share of wrong questions", height=420)
    return figure.update_layout(barmode="group")


def fragility(tables: Tables) -> go.Figure:
    """Draw how many answers survive a small change of the program."""
    table = tables["fragility"]
    figure = go.Figure()
    for colour, (name, part) in coloured(table, "program"):
        bar = whiskers(part["survived"], part["ci_low"], part["ci_high"])
        figure.add_bar(x=part["change"], y=part["survived"], error_y=bar, name=plain(name), marker_color=colour)
    finish(figure, x="", y="share of questions still right", height=420)
    figure.update_layout(barmode="group")
    return figure.update_yaxes(range=[0, 1.05])


SEARCHES = {
    "cost": FigureSpec(
        "What a program costs and gains",
        "Each point is a program, by how many blocks run and by its mean gain over all questions; 0 is the model itself, at 1. The line is "
        "the best program up to each length, chosen on these questions, so its level is flattering: the next figure has questions that did not "
        "choose. Programs far below are not shown.",
        cost,
        lambda tables: "measured" in tables and len(tables["measured"]) > 0,
    ),
    "budget": FigureSpec(
        "What a search finds, and keeps",
        "The gain of the best program so far, on the half of the questions that chose it and on the other half, as block-runs are spent; means over "
        "random halves. What a search gains on the left and not on the right was chance; what random programs (dashed) gain as well needs no search.",
        budget,
        lambda tables: "budget" in tables,
    ),
    "menu": FigureSpec(
        "A menu of programs",
        "Programs chosen on one half of the questions so that together they answer as many as possible, and how many of the other half any of them "
        "answers, which takes somebody who knows the answer; how many are answered where the program that is surest of what it says is taken; and "
        "the model itself. The grey band is the coverage of random menus of such lengths.",
        menus,
        lambda tables: "menu" in tables,
    ),
    "items": FigureSpec(
        "A program for each question",
        "Of the questions that the model gets wrong, the share for which some program that was tried gives the right answer. Whoever tries many "
        "programs with the answer at hand succeeds by luck: so beside it stands how often the same search gives another question's answer, and how "
        "often as many random programs would succeed. Only what rises above both says something of programs.",
        items,
        lambda tables: "rates" in tables and len(tables["rates"]) > 0,
    ),
    "fragility": FigureSpec(
        "Small changes of a program that mends",
        "Of the questions that a program mends, the share still answered when one of its changes is undone, when a span is one block longer, shorter or "
        "shifted, and when one random change is added; beside it, what such a change does to questions that the model answers by itself. A program "
        "that survives only as it is was an accident of its question.",
        fragility,
        lambda tables: "fragility" in tables and len(tables["fragility"]) > 0,
    ),
}
