"""Figures and depth profiles of the back-patching analysis."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from analyses.results.card import FigureSpec, ProfileSpec, Tables
from analyses.results.profiles import mean_by_layer
from analyses.results.theme import COLOURS, SCALE, finish, side_by_side, whiskers

POSITIONS = {"t1": "t1: the entity's last token", "t2": "t2: the prompt's last token"}
STAGES = {
    "first_hop_resolved": "first hop resolved", "propagation": "bridge propagates",
    "second_hop_resolved": "second hop resolved", "prediction_extracted": "prediction extracted",
}  # fmt: skip
VARIANTS = {
    "oracle": "best of all cells", "held_out": "cell chosen on the others", "forward": "forward patch",
    "other_query": "another question's source", "noise": "noise of equal norm", "wrong_answer": "another question's answer",
}  # fmt: skip


def _main_set(table: pd.DataFrame) -> str:
    """Return the set to draw: incorrect questions, which back-patching is to mend, where there are any."""
    return "incorrect" if (table["set"] == "incorrect").any() else str(table["set"].iloc[0])


def heatmap(tables: Tables) -> go.Figure:
    """Draw the share of questions answered under each (source, target) cell."""
    grid = tables["grid"]
    kept = grid[grid["set"] == _main_set(grid)]
    names = list(dict.fromkeys(kept["position_name"]))
    figure = side_by_side(([POSITIONS.get(name, name) for name in names]), shared_yaxes=False, horizontal_spacing=0.12)
    top = max(0.05, kept.groupby(["position_name", "source_layer", "target_layer"])["success"].mean().max())
    for column, name in enumerate(names, 1):
        cells = kept[kept["position_name"] == name]
        shares = cells.groupby(["source_layer", "target_layer"])["success"].mean().unstack("target_layer")
        figure.add_heatmap(
            x=shares.columns, y=shares.index, z=shares.to_numpy(), colorscale=SCALE, zmin=0, zmax=top,
            showscale=column == len(names), colorbar={"title": "share", "tickformat": ".0%"},
            hovertemplate="source %{y}, target %{x}: %{z:.1%}<extra></extra>", row=1, col=column,
        )  # fmt: skip
    return finish(figure, x="target layer, whose output is replaced", y="source layer", height=480, top=60)


def rates(tables: Tables) -> go.Figure:
    """Draw oracle, held-out and control rates, with intervals."""
    summary, controls = tables["summary"], tables["control_rates"]
    chosen = _main_set(summary)
    figure = go.Figure()
    for colour, position in zip(COLOURS, dict.fromkeys(summary["position"]), strict=False):
        rows = summary[(summary["position"] == position) & (summary["set"] == chosen)]
        if rows.empty:
            continue
        row = rows.iloc[0]
        bars = [(VARIANTS[n], row[f"{n}_rate"], row[f"{n}_low"], row[f"{n}_high"]) for n in ("oracle", "held_out")]
        other = controls[(controls["position_name"] == position) & (controls["set"] == chosen)]
        for control in ("forward", "other_query", "noise", "wrong_answer"):
            for control_row in other[other["variant"] == control].itertuples():
                bars.append(
                    (VARIANTS[control], control_row.oracle_rate, control_row.oracle_low, control_row.oracle_high)
                )
        drawn = pd.DataFrame(bars, columns=["name", "rate", "low", "high"])
        figure.add_bar(
            x=drawn["name"], y=drawn["rate"], name=f"{POSITIONS.get(position, position)} (n = {row['n']})",
            marker_color=colour, error_y=whiskers(drawn["rate"], drawn["low"], drawn["high"], 3),
        )  # fmt: skip
    finish(figure, x="", y=f"share of {chosen} questions")
    return figure.update_yaxes(range=[0, 1.02], tickformat=".0%")


def stage_boxes(tables: Tables) -> go.Figure:
    """Draw the layer of each stage, correct beside incorrect questions."""
    stages = tables["stages"].dropna(subset=["layer"])
    figure = go.Figure()
    counted = tables["stages"].assign(seen=tables["stages"]["layer"].notna())
    counts = counted.groupby(["set", "stage"])["seen"].agg(["sum", "size"]).reset_index()
    for colour, name in zip(COLOURS, ("correct", "incorrect", "other"), strict=False):
        rows = stages[stages["set"] == name]
        if rows.empty:
            continue
        figure.add_box(
            x=rows["stage"].map(STAGES), y=rows["layer"], name=name, marker_color=colour, boxpoints="all", jitter=0.4,
            pointpos=0, marker_size=4, line_width=1.5,
        )  # fmt: skip
    finish(figure, x="", y="layer")
    for row in counts.itertuples():
        index, stage = ("correct", "incorrect", "other").index(row.set), str(row.stage)
        figure.add_annotation(
            x=STAGES[stage], y=1.0, yref="paper", yshift=-14 * index, text=f"{row.set}: {row.sum} of {row.size}",
            showarrow=False, font={"size": 10, "color": COLOURS[index]},
        )  # fmt: skip
    present = [label for stage, label in STAGES.items() if stage in set(tables["stages"]["stage"])]
    figure.update_xaxes(categoryorder="array", categoryarray=present, range=[-0.5, len(present) - 0.5])
    figure.update_layout(boxmode="group")
    top = float(tables["projection"]["layer"].max())
    return figure.update_yaxes(range=[-1, top * 1.3])


def resolution(tables: Tables) -> go.Figure:
    """Draw a histogram of the earliest layer from which the naming prompt recovers an entity."""
    table = tables["resolution"]
    figure = side_by_side(("bridge, from t1", "answer, from t2"))
    for column, (position, entity) in enumerate((("t1", "bridge"), ("t2", "answer")), 1):
        rows = table[(table["position"] == position) & (table["entity"] == entity)]
        for colour, name in zip(COLOURS, ("correct", "incorrect", "other"), strict=False):
            group = rows[rows["set"] == name]
            if len(group):
                label = f"{name} ({group['layer'].notna().sum()} of {len(group)} resolved)"
                figure.add_histogram(
                    x=group["layer"].dropna(), name=label, marker_color=colour, nbinsx=30,
                    xbins={"start": -0.5, "end": float(tables["projection"]["layer"].max()) + 0.5, "size": 1}, row=1, col=column,
                )  # fmt: skip
    finish(figure, x="earliest source layer", y=("questions",), legend=1.1, top=90)
    figure.update_xaxes(range=[-0.5, float(tables["projection"]["layer"].max()) + 0.5])
    return figure.update_layout(barmode="stack", legend_font_size=11)


def knockout(tables: Tables) -> go.Figure:
    """Draw how often the next token changes when the last token cannot see the entity around a layer."""
    figure = go.Figure()
    first = tables["knockout"][tables["knockout"]["position_name"] == "t1"]
    cut = first.merge(tables["stages"][["prompt", "set"]].drop_duplicates(), on="prompt")
    for colour, name in zip(COLOURS, ("correct", "incorrect", "other"), strict=False):
        shares = cut[cut["set"] == name].groupby("layer")["critical"].mean()
        if len(shares):
            figure.add_scatter(x=shares, y=shares.index, name=name, mode="lines+markers", line={"color": colour})
    finish(figure, x="share of questions whose next token changes", y="layer (centre of the window)")
    return figure.update_xaxes(range=[0, 1.02], tickformat=".0%")


FIGURES = {
    "heatmap": FigureSpec(
        "Back-patches that give the answer",
        "Each cell puts the output of the source block, at one position, in the place of the target block's output at that position, "
        "and lets the rest of the model run on. The colour is the share of incorrect questions (both hops known, composition wrong) "
        "that are then answered. Below the diagonal nothing is patched.",
        heatmap,
    ),
    "rates": FigureSpec(
        "Rates beside controls",
        "`Best of all cells` counts a question when any cell answers it, and so grows with the number of cells; the controls on the right have "
        "the same number of tries. `Cell chosen on the others` uses one cell picked on all other questions. Whiskers are 95 % Wilson intervals over questions.",
        rates,
    ),
    "stages": FigureSpec(
        "Stages of a two-hop answer",
        "The earliest layer at which the bridge can be named from the entity's token, at which it reaches the last token, at which the answer can be "
        "named from the last token, and at which an MLP puts the prediction on top. Small print: the questions in which the stage was seen at all.",
        stage_boxes,
        lambda tables: "stages" in tables and bool(tables["stages"]["layer"].notna().any()),
    ),
    "resolution": FigureSpec(
        "Where entities are resolved",
        "A prompt that repeats names (`Syria: Syria …`) receives the representation of a source layer at its placeholder; the histogram counts the earliest "
        "source layer from which it then names the bridge, or the answer.",
        resolution,
        lambda tables: "resolution" in tables and bool(tables["resolution"]["layer"].notna().any()),
    ),
    "knockout": FigureSpec(
        "Attention from the last token to the entity",
        "In a window of layers around each layer, the last token's attention scores to the entity's last token are set to minus infinity; "
        "the curve is the share of questions whose next token changes.",
        knockout,
        lambda tables: "knockout" in tables and len(tables["knockout"]) > 0,
    ),
}


ROWS = ["prompt", "position_name"]


def _gain(tables: Tables, layer: str) -> pd.DataFrame:
    grid = tables["grid"]
    gained = grid.assign(gain=grid["answer_logprob"] - grid["baseline_logprob"])
    return mean_by_layer(gained[gained[layer] >= 0], "gain", ROWS, layer)  # -1 is the embedding


def target_gain(tables: Tables) -> pd.DataFrame:
    """Return the mean gain of the answer's log-probability by the layer that a later state is put into."""
    return _gain(tables, "target_layer")


def source_gain(tables: Tables) -> pd.DataFrame:
    """Return the mean gain of the answer's log-probability by the layer that the state is taken from."""
    return _gain(tables, "source_layer")


PROFILES = {
    "target_gain": ProfileSpec(
        "Back-patching gain, by target",
        "nats of the answer",
        "Change of the answer's log-probability when a later layer's state replaces this layer's output, averaged over the source layers "
        "and questions tried. Above 0 the answer becomes more probable.",
        target_gain,
    ),
    "source_gain": ProfileSpec(
        "Back-patching gain, by source",
        "nats of the answer",
        "Change of the answer's log-probability when this layer's state is put back into an earlier one, averaged over the target layers "
        "and questions tried.",
        source_gain,
    ),
}
