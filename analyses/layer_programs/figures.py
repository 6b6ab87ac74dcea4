"""Figures of the maps: jumps, exchanges and pairs of blocks."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analyses.layer_programs.figures_search import SEARCHES
from analyses.layer_programs.reading import LOWER_IS_BETTER, UNITS
from analyses.results.card import FigureSpec, Tables
from analyses.results.theme import COLOURS, band, finish, side_by_side, whiskers

BETTER = "RdBu"
"""Blue where the metric is better than plain, red where it is worse."""
GREY = "#d0d0d0"
SIGNIFICANT = 0.05


def _square(table: pd.DataFrame, value: str) -> pd.DataFrame:
    """Return a column as leave (rows) by enter (columns)."""
    return table.pivot(index="leave", columns="enter", values=value)


TICKS = np.array([0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100])


def _unit(values: np.ndarray) -> float:
    """Return the change from which on colours follow the logarithm, so that gains can be seen beside far larger losses."""
    sizes = np.abs(values[np.isfinite(values) & (values != 0)])
    return max(1e-6, float(np.quantile(sizes, 0.1))) if len(sizes) else 1.0


def _apart(ticks: np.ndarray, places: np.ndarray, least: float) -> np.ndarray:
    """Return ticks from the largest down that stand at least so far from one another and from 0."""
    kept: list[int] = []
    for at in range(len(ticks) - 1, -1, -1):
        if places[at] >= least and (not kept or places[kept[-1]] - places[at] >= least):
            kept.append(at)
    return ticks[kept[::-1]]


def jump_map(tables: Tables) -> go.Figure:
    """Draw leave by enter, a panel for each metric; cells that may be chance in grey, the best one ringed."""
    table, best = tables["jumps"], tables["best_jump"]
    metrics = list(dict.fromkeys(table["metric"]))
    figure = side_by_side([f"{m} ({UNITS[m]})" for m in metrics], shared_yaxes=False)
    for col, metric in enumerate(metrics, 1):
        part = table[table["metric"] == metric]
        mean, p = _square(part, "mean"), _square(part, "p_family")
        worse = metric in LOWER_IS_BETTER
        unit = _unit(part["mean"].to_numpy())
        limit = max(1.0, float(np.nanmax(np.arcsinh(np.abs(part["mean"]) / unit))))
        chance = (p > SIGNIFICANT).to_numpy()
        hover = np.dstack(
            [
                _square(part, name).to_numpy()
                for name in ("program", "mended", "broken", "n", "p_family", "norm_ratio", "mean")
            ]
        )
        says = (
            "leaves before %{y}, enters %{x}<br>%{customdata[0]}<br>change %{customdata[6]:.3g}, p %{customdata[4]:.3g}<br>"
            "mended %{customdata[1]}, broken %{customdata[2]} of %{customdata[3]}<br>norm x%{customdata[5]:.3g}<extra></extra>"
        )  # fmt: skip
        x, y = list(mean.columns), list(mean.index)
        grey = np.where(chance & np.isfinite(mean.to_numpy()), 0.0, np.nan)
        figure.add_heatmap(
            x=x,
            y=y,
            z=grey,
            customdata=hover,
            colorscale=[[0, GREY], [1, GREY]],
            showscale=False,
            hovertemplate=says,
            row=1,
            col=col,
        )
        ticks = TICKS[(unit <= TICKS) & (np.arcsinh(TICKS / unit) <= limit)]
        ticks = _apart(ticks, np.arcsinh(ticks / unit), limit / 7)
        ticks = np.concatenate((-ticks[::-1], [0], ticks))
        bar = {
            "title": "change", "len": 0.8, "x": (col - 0.2) / len(metrics), "thickness": 12, "tickvals": np.arcsinh(ticks / unit),
            "ticktext": [f"{tick:g}" for tick in ticks],
        }  # fmt: skip
        figure.add_heatmap(
            x=x, y=y, z=np.arcsinh(mean.mask(chance).to_numpy() / unit), customdata=hover, colorscale=BETTER, reversescale=worse, zmin=-limit,
            zmax=limit, colorbar=bar, hovertemplate=says, row=1, col=col,
        )  # fmt: skip
        ring = best[(best["metric"] == metric) & ~(best["p_family"] > SIGNIFICANT)]
        figure.add_scatter(
            x=ring["enter"], y=ring["leave"], mode="markers", showlegend=False, hoverinfo="skip", row=1, col=col,
            marker={"symbol": "circle-open", "size": 14, "color": "#000000", "line": {"width": 2}},
        )  # fmt: skip
        _clickable(figure, part, hover_text=says, col=col)
        last = max(x)
        figure.add_scatter(
            x=[0, last], y=[0, last], mode="lines", line={"color": "#8c8c8c", "width": 1, "dash": "dot"}, showlegend=False,
            hoverinfo="skip", row=1, col=col,
        )  # fmt: skip
        figure.update_xaxes(domain=[(col - 1) / len(metrics), (col - 0.22) / len(metrics)], row=1, col=col)
        figure.layout.annotations[col - 1].x = (col - 0.61) / len(metrics)
    # Colour bars stand where the titles of further panels would.
    return finish(figure, x="enters block", y=("leaves before block",), height=520)


def _clickable(figure: go.Figure, part: pd.DataFrame, hover_text: str, col: int) -> None:
    """Put a mark that can be clicked on every cell, named by its program: heat maps themselves cannot be selected from."""
    faint = {"opacity": 0}
    names = ["program", "mended", "broken", "n", "p_family", "norm_ratio", "mean"]
    figure.add_scatter(
        x=part["enter"], y=part["leave"], mode="markers", marker={"size": 11, "symbol": "square", **faint}, selected={"marker": faint},
        unselected={"marker": faint}, customdata=part[names].to_numpy(), hovertemplate=hover_text, showlegend=False, row=1, col=col,
    )  # fmt: skip


def live_session(tables: Tables, program: str) -> list[str]:
    """Return the lines of a Live session that runs a program on the first prompt; none where prompts have no text."""
    texts = tables["questions"]["text"].dropna()
    return [f"text {str(texts.iloc[0])!r}", f"edit order {program}"] if len(texts) else []


def swap_profile(tables: Tables) -> go.Figure:
    """Draw how far the prediction moves when neighbours change places, and when one runs in the other's place too."""
    table = tables["swaps"]
    figure = go.Figure()
    near = table[(table["i"] - table["j"]).abs() == table["width"]]
    for colour, (width, part) in zip(COLOURS, near.groupby("width"), strict=False):
        swapped = part[part["protocol"] == "interchange"].sort_values("i")
        name = "exchanged" if width == 1 else f"{width} and {width} blocks exchanged"
        _profile(figure, swapped, name, colour)
    # Of a replacement the larger of both directions stands, as where it was published.
    replaced = near[near["protocol"] == "replacement"].assign(first=lambda rows: rows[["i", "j"]].min(axis=1))
    if len(replaced):
        larger = (
            replaced.sort_values("kl")
            .drop_duplicates("first", keep="last")
            .assign(i=lambda rows: rows["first"])
            .sort_values("i")
        )
        _profile(figure, larger, "one in the other's place, the worse way", COLOURS[len(set(near["width"]))])
    finish(figure, x="lower block of the pair", y="nats from the plain prediction", height=420)
    return figure.update_yaxes(type="log", dtick=1, exponentformat="power")


def _profile(figure: go.Figure, rows: pd.DataFrame, name: str, colour: str) -> None:
    band(figure, rows["i"], rows["kl_low"].clip(lower=1e-9), rows["kl_high"].clip(lower=1e-9), colour)
    figure.add_scatter(
        x=rows["i"], y=rows["kl"].clip(lower=1e-9), mode="lines+markers", name=name, line={"color": colour}
    )


def skip_pairs(tables: Tables) -> go.Figure:
    """Draw, for every two blocks, how far leaving out both is from the sum of leaving out each; harm in red."""
    table = tables["skips"]
    metric = table["metric"].iloc[0]
    certain = (table["excess_low"] > 0) | (table["excess_high"] < 0) | table["excess_low"].isna()
    limit = max(1e-9, float(np.nanmax(np.abs(table["excess"]))))
    figure = go.Figure()
    square = {
        name: table.pivot(index="j", columns="i", values=name) for name in ("excess", "delta_i", "delta_j", "delta")
    }
    told = table.assign(excess=table["excess"].where(certain)).pivot(index="j", columns="i", values="excess")
    for values, colours, bar in (
        (square["excess"], [[0, GREY], [1, GREY]], None),
        (told, BETTER, {"title": UNITS[metric], "thickness": 12}),
    ):
        figure.add_heatmap(
            x=values.columns, y=values.index, z=values,
            customdata=np.dstack([square[name].to_numpy() for name in ("delta_i", "delta_j", "delta", "excess")]),
            colorscale=colours, reversescale=metric in LOWER_IS_BETTER, zmin=-limit, zmax=limit, showscale=bar is not None, colorbar=bar,
            hovertemplate="without %{x} and %{y}: %{customdata[2]:.3g}<br>without %{x} %{customdata[0]:.3g}, without %{y} %{customdata[1]:.3g}"
            "<br>beyond their sum %{customdata[3]:.3g}<extra></extra>",
        )  # fmt: skip
    finish(figure, x="block left out", y="other block left out", height=520)
    figure.update_yaxes(scaleanchor="x", constrain="domain")
    return figure.update_xaxes(constrain="domain")


PARTS = {
    "contribution_i": "the lower block adds", "contribution_j": "the upper block adds", "interaction": "upper changed by lower",
    "interaction_reversed": "lower changed by upper", "commutator": "order matters (difference of the two)",
    "interaction_scale": "mere rescaling of the upper",
}  # fmt: skip


def pair_anatomy(tables: Tables) -> go.Figure:
    """Draw the sizes of contributions and interactions of neighbours, and what the prediction loses."""
    table = tables["pairs"]
    table = table[~table["first_token"]]
    figure = make_subplots(
        rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.12,
        subplot_titles=["median size, as a share of what the pair adds", f"change of {table['metric'].iloc[0]}"],
    )  # fmt: skip
    for colour, (name, label) in zip(COLOURS, PARTS.items(), strict=False):
        figure.add_scatter(
            x=table["layer"], y=table[f"{name}_median"], name=label, mode="lines+markers", marker={"size": 4}, row=1, col=1,
            line={"color": colour, "dash": "dot" if name == "interaction_scale" else "solid"},
        )  # fmt: skip
    for shift, symbol, name, label in (
        (-0.12, "circle", "parallel", "side by side"),
        (0.12, "diamond", "exchanged", "exchanged"),
    ):
        bar = whiskers(table[f"delta_{name}"], table[f"delta_{name}_low"], table[f"delta_{name}_high"])
        figure.add_scatter(
            x=table["layer"] + shift, y=table[f"delta_{name}"], error_y=bar, name=label, mode="markers",
            marker={"symbol": symbol, "size": 6, "color": "#8c8c8c" if shift < 0 else "#882255"}, row=2, col=1,
        )  # fmt: skip
    finish(figure, x="", y="", height=620, top=110, legend=1.1)
    figure.update_xaxes(title="lower block of the pair", row=2, col=1)
    figure.update_yaxes(title="share", row=1, col=1)
    return figure.update_yaxes(title=UNITS[table["metric"].iloc[0]], row=2, col=1)


FIGURES = {
    "jump_map": FigureSpec(
        "Every skip and every repeat",
        "Each cell is one program: blocks run in order up to the row, then from the column on. Above the diagonal blocks run twice, below it they "
        "are left out; the diagonal is the model itself. Blue is better than plain, red worse, on a scale that grows with the "
        "logarithm. Grey cells may be chance: with this many cells, one as far from 0 turns up in more than 5 % of draws of the prompts' signs. "
        "The ring is the best cell, where it is none of these; what it gains on prompts that did not choose it stands in the notes.",
        jump_map,
        lambda tables: "jumps" in tables,
        live=live_session,
    ),
    "swap_profile": FigureSpec(
        "May neighbours change places?",
        "How far the prediction moves, in nats, when two neighbouring blocks are exchanged, and when one of them runs in both places (the worse of "
        "the two ways). The two are different questions and may rank blocks differently: neither by itself says that a block is redundant. "
        "Bands are 95 % intervals over prompts.",
        swap_profile,
        lambda tables: "swaps" in tables,
    ),
    "pair_anatomy": FigureSpec(
        "Why a pair does or does not commute",
        "What two neighbours add to the stream, how much each changes when it reads what the other wrote, and the difference of the two, which is "
        "exactly the error of exchanging them. The dotted line is the part of the upper block's change that only rescales it. Below, what the "
        "prediction loses when the two run side by side or exchanged, with 95 % intervals over prompts. First tokens are left out above.",
        pair_anatomy,
        lambda tables: "pairs" in tables,
    ),
    "skip_pairs": FigureSpec(
        "Do blocks replace one another?",
        "What leaving out two blocks does beyond the sum of leaving out each. Two that replace one another cost little alone and much together: red. "
        "Blue pairs cost less together than their sum, as where one only serves the other. Where the 95 % interval over prompts holds 0, grey.",
        skip_pairs,
        lambda tables: "skips" in tables,
    ),
    **SEARCHES,
}
