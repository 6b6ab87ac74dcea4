"""Figures and depth profiles of concept depth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analyses.results.card import FigureSpec, ProfileSpec, Tables
from analyses.results.theme import COLOURS, band, coloured, finish, whiskers

RELATIVE = "relative depth (layer / number of layers)"
GREY = "#777777"
CONTROL = COLOURS[4]
"""The control task's."""
STATISTICS = {
    "jump": "jump: first rise of 10 %",
    "converging_first": "converging, first",
    "converging_stable": "converging, stable (ours)",
    "converging_literal": "converging, literal",
    "depth_90": "90 % of the way up",
}
MARKS = ("triangle-up", "circle-open", "circle", "x-thin-open", "diamond")


def overlay(tables: Tables) -> go.Figure:
    """Accuracy of every data set over relative depth, by the first probe."""
    scores = _plain(tables["scores"])
    scores = scores[scores["probe"] == scores["probe"].iloc[0]]
    figure = go.Figure()
    for colour, (name, one) in zip(
        _cycle(scores["dataset"].nunique()), scores.groupby("dataset", sort=False), strict=True
    ):
        band(figure, one["depth"], one["ci_low"], one["ci_high"], colour)
        figure.add_scatter(
            x=one["depth"], y=one["accuracy"], name=str(name), mode="lines+markers", line={"color": colour}, marker={"size": 5},
            customdata=one[["layer", "auc", "f1"]],
            hovertemplate=f"{name}, layer %{{customdata[0]}}<br>accuracy %{{y:.3f}}, AUC %{{customdata[1]:.3f}}, F1 %{{customdata[2]:.3f}}<extra></extra>",
        )  # fmt: skip
    chance = scores["majority"].mean()
    figure.add_hline(
        y=chance,
        line={"color": GREY, "dash": "dot"},
        annotation_text="majority class",
        annotation_position="bottom right",
    )
    return finish(figure, x=RELATIVE, y="test accuracy", height=460)


def curves(tables: Tables) -> go.Figure:
    """One panel a data set: the probes, the shuffled-label control, the control task and the majority class."""
    scores = _plain(tables["scores"])
    names = list(dict.fromkeys(scores["dataset"]))
    figure = _panels(names)
    for panel, name in enumerate(names):
        where, rows = _place(panel), scores[scores["dataset"] == name]
        for colour, (probe, one) in coloured(rows, "probe"):
            _banded(
                figure, one, ("accuracy", "ci_low", "ci_high"), str(probe).replace("_", " "), colour, where, panel == 0
            )
        one = rows[rows["probe"] == rows["probe"].iloc[0]]
        _banded(
            figure, one, ("control_accuracy", "control_low", "control_high"), "shuffled labels", GREY, where, panel == 0
        )
        if one["type_control_accuracy"].notna().any():
            control = ("type_control_accuracy", "type_control_low", "type_control_high")
            _banded(figure, one, control, "one random label per token type", CONTROL, where, panel == 0)
        figure.add_scatter(
            x=one["depth"], y=one["majority"], name="majority class", legendgroup="majority class", showlegend=panel == 0,
            mode="lines", line={"color": "#000000", "dash": "dot", "width": 1}, **where,
        )  # fmt: skip
    _finish_panels(figure, names, "test accuracy")
    return figure.update_yaxes(range=[0.3, 1.02])


def changes(tables: Tables) -> go.Figure:
    """One panel a data set: accuracy under noise or rounding minus accuracy of the plain model, by layer."""
    scores = tables["scores"]
    scores = scores[scores["probe"] == scores["probe"].iloc[0]]
    names, keys = list(dict.fromkeys(scores["dataset"])), ["dataset", "layer"]
    plain = scores[scores["variant"] == "plain"].set_index(keys)
    figure = _panels(names)
    variants = [v for v in dict.fromkeys(scores["variant"]) if v != "plain"]
    for panel, name in enumerate(names):
        where = _place(panel)
        for colour, variant in zip(COLOURS, variants, strict=False):
            one = scores[(scores["dataset"] == name) & (scores["variant"] == variant)].set_index(keys)
            delta = one["accuracy"] - plain["accuracy"].loc[one.index]
            figure.add_scatter(
                x=one["depth"], y=delta, name=_spaced(variant), legendgroup=variant, showlegend=panel == 0, mode="lines+markers",
                line={"color": colour}, marker={"size": 5}, **where,
            )  # fmt: skip
        base = plain.loc[[name]]
        for bound in ("ci_low", "ci_high"):
            figure.add_scatter(
                x=base["depth"], y=base[bound] - base["accuracy"], mode="lines", line={"color": GREY, "dash": "dot", "width": 1},
                name="95 % interval of the plain accuracy", legendgroup="interval", showlegend=panel == 0 and bound == "ci_low", **where,
            )  # fmt: skip
    return _finish_panels(figure, names, "change of accuracy")


def depths(tables: Tables) -> go.Figure:
    """Depth statistics of every data set on one axis of relative depth."""
    table = _plain(tables["depths"])
    table = table[table["probe"] == table["probe"].iloc[0]]
    figure = go.Figure()
    labels = [
        f"{name}{'' if ok else ' (not decodable)'}"
        for name, ok in zip(table["dataset"], table["decodable"], strict=True)
    ]
    for place, ((name, title), mark) in enumerate(zip(STATISTICS.items(), MARKS, strict=True)):
        figure.add_scatter(
            x=table[name], y=[i + 0.14 * (2 - place) for i in range(len(table))], name=title, mode="markers",
            marker={"symbol": mark, "size": 11, "color": COLOURS[place], "line": {"width": 2, "color": COLOURS[place]}},
            error_x=whiskers(table[name], table[f"{name}_low"], table[f"{name}_high"], color=COLOURS[place]),
            customdata=labels, hovertemplate=f"%{{customdata}}<br>{title}: %{{x:.2f}}<extra></extra>",
        )  # fmt: skip
    finish(figure, x=RELATIVE, y="", height=140 + 90 * len(table))
    figure.update_yaxes(tickvals=list(range(len(table))), ticktext=labels, range=[len(table) - 0.5, -0.5])
    return figure.update_xaxes(range=[-0.02, 1.02])


def causal(tables: Tables) -> go.Figure:
    """Change of the right answer's margin when the probe's direction, or a random one, is projected out."""
    table = tables["causal"]
    answered = bool(table["margin_change"].notna().any())
    mean, low, high = ("margin_change", "ci_low", "ci_high") if answered else ("kl", "kl_low", "kl_high")
    names = list(dict.fromkeys(table["dataset"]))
    figure = _panels(names)
    for panel, name in enumerate(names):
        rows = table[table["dataset"] == name]
        for colour, (direction, one) in zip((COLOURS[1], GREY), rows.groupby("direction", sort=False), strict=False):
            shift = -0.12 if direction == "probe" else 0.12
            figure.add_scatter(
                x=one["layer"] + shift, y=one[mean], name=f"{direction} direction", legendgroup=str(direction), showlegend=panel == 0,
                mode="markers", marker={"color": colour, "size": 9},
                error_y=whiskers(one[mean], one[low], one[high], 4),
                **_place(panel),
            )  # fmt: skip
    title = "change of margin (nats)" if answered else "KL (nats)"
    _finish_panels(figure, names, title)
    figure.update_yaxes(zeroline=True, zerolinecolor=GREY)
    return figure.update_xaxes(title="layer at which it is removed")


def _plain(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["variant"] == "plain"]


def _cycle(n: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(n)]


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def _panels(names: list[str]) -> go.Figure:
    columns = 1 if len(names) == 1 else 2
    rows = -(-len(names) // columns)
    return make_subplots(
        rows=rows, cols=columns, subplot_titles=[_spaced(name) for name in names], vertical_spacing=0.3 / rows
    )


def _place(panel: int) -> dict[str, Any]:
    return {"row": panel // 2 + 1, "col": panel % 2 + 1}


def _finish_panels(figure: go.Figure, names: list[str], y: str) -> go.Figure:
    """The shared layout, with the legend above the panels' titles."""
    height = 460 if len(names) == 1 else 120 + 330 * -(-len(names) // 2)
    return finish(figure, x=RELATIVE, y=y, height=height, top=95, legend=1 + 34 / (height - 155))


def _banded(
    figure: go.Figure,
    one: pd.DataFrame,
    columns: tuple[str, str, str],
    label: str,
    colour: str,
    where: dict[str, Any],
    legend: bool,
) -> None:
    """A curve with its interval, in one panel."""
    mean, low, high = columns
    band(figure, one["depth"], one[low], one[high], colour, **where)
    figure.add_scatter(
        x=one["depth"], y=one[mean], name=label, legendgroup=label, showlegend=legend, mode="lines",
        line={"color": colour}, **where,
    )  # fmt: skip


FIGURES = {
    "overlay": FigureSpec(
        "From which depth on a concept can be read",
        "Test accuracy of a linear probe on one stored row per prompt, for each data set, against relative depth (0 is the first block). Bands "
        "are 95 % intervals from resampling whole groups of test rows. The dotted line is the share of the majority class: a curve "
        "means something where its band leaves it.",
        overlay,
    ),
    "curves": FigureSpec(
        "Each data set beside its controls",
        "The same curves, one panel a data set and one line a kind of probe. Grey with a band: a probe of the same kind fitted to shuffled "
        "labels. Orange with a band: the control task of Hewitt and Liang, a probe of the same kind fitted to one random label per token "
        "type, at a position whose tokens occur in training and in test alike. Where it is as high as the concept, the layer names the "
        "token and the probe can look any label up; the distance between the two is the selectivity. It is not drawn where too few "
        "tokens recur. Black dotted: the majority class.",
        curves,
    ),
    "depths": FigureSpec(
        "Depth statistics",
        "Where each curve rises and settles, as relative depth, with 95 % intervals from resampling the test groups. `jump` is missing where no "
        "layer gains 10 % on the one before. The literal converging point is the published formula as we read it and is nearly always "
        "the last layer; the stable one is ours. For data sets marked not decodable the statistics mean nothing.",
        depths,
    ),
    "changes": FigureSpec(
        "Change under text noise and rounded weights",
        "Accuracy under each variant minus that of the plain model, by layer. Below zero early and near zero late means that the concept "
        "appears later. Dotted grey: the 95 % interval of the plain accuracy, within which a change is not to be told from chance.",
        changes,
        lambda tables: tables["scores"]["variant"].nunique() > 1,
    ),
    "causal": FigureSpec(
        "Does the model use what the probe reads?",
        "The probe's direction is projected out of the row it reads, at a few layers, on held-out prompts; the point shows how the "
        "model's margin for the right answer, log p(right) - log p(wrong), changes (without known answers: how far its prediction moves). Grey: a random direction with the rows' own covariance. Where orange and grey "
        "agree, the model does not depend on that direction there. Whiskers are 95 % intervals over groups.",
        causal,
        lambda tables: "causal" in tables,
    ),
}


def _mean(tables: Tables, value: str, low: str, high: str) -> pd.DataFrame:
    """Mean over data sets, of the plain model and the first probe; their intervals combined as of independent sets."""
    scores = tables["scores"]
    selected = scores[(scores["variant"] == "plain") & (scores["probe"] == scores["probe"].iloc[0])]
    selected = selected[selected[value].notna()]  # a data set without a control task says nothing of selectivity
    rows = []
    for layer, group in selected.groupby("layer"):
        below = np.sqrt(((group[value] - group[low]) ** 2).sum(skipna=False)) / len(group)
        above = np.sqrt(((group[high] - group[value]) ** 2).sum(skipna=False)) / len(group)
        mean = group[value].mean()
        rows.append((layer, mean, mean - below, mean + above))
    return pd.DataFrame(rows, columns=["layer", "value", "ci_low", "ci_high"])


def selectivity(tables: Tables) -> pd.DataFrame:
    """Accuracy of the probe minus that of the same probe on the control task."""
    return _mean(tables, "selectivity", "selectivity_low", "selectivity_high")


def accuracy(tables: Tables) -> pd.DataFrame:
    """Test accuracy of the probe."""
    return _mean(tables, "accuracy", "ci_low", "ci_high")


PROFILES = {
    "selectivity": ProfileSpec(
        "Probe over its control",
        "accuracy minus control",
        "Test accuracy of a linear probe minus that of the same probe trained on one random label per token type (the control task of "
        "Hewitt and Liang), averaged over the data sets that have one. Near 0 the layer names the token, and any label could be looked up "
        "from it; above 0 the concept itself is laid out along a direction.",
        selectivity,
    ),
    "accuracy": ProfileSpec(
        "Probe accuracy",
        "accuracy",
        "Test accuracy of a linear probe on each layer, averaged over data sets. Chance is the majority class.",
        accuracy,
    ),
}
