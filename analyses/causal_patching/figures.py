"""Figures and depth profiles of causal patching."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analyses.causal_patching.captions import DIRECTIONS, captioned
from analyses.causal_patching.figure_graph import GRAPH
from analyses.causal_patching.figures_estimates import ESTIMATES
from analyses.causal_patching.patched import ALL
from analyses.results.card import FigureSpec, ProfileSpec, Tables
from analyses.results.profiles import columns
from analyses.results.theme import COLOURS, band, finish, plain, shorten, side_by_side

SHARE = {"denoise": "share of the gap brought back", "noise": "share of the gap taken away"}
DIVERGING = "RdBu_r"
GREY = "#d0d0d0"


def first_metric(tables: Tables) -> pd.DataFrame:
    """Return the map's rows of the first metric."""
    table = tables["map"]
    return table[table["metric"] == tables["pairs"]["metric"].iloc[0]]


def roles_in_order(tables: Tables, table: pd.DataFrame) -> list[str]:
    """Return the roles of a map in the order in which they stand in the prompts."""
    places = tables["cells"].drop_duplicates(["pair", "role"]).groupby("role")["position"].mean()
    return [role for role in places.sort_values(kind="stable").index if role in set(table["role"])]


def _has_streams(tables: Tables) -> bool:
    table = first_metric(tables)
    return bool((table["head"] < 0).any())


def _has_heads(tables: Tables) -> bool:
    return bool((first_metric(tables)["head"] >= 0).any())


def _panels(rows: Sequence[str], directions: Sequence[str]) -> go.Figure:
    titles = [f"{row}, {DIRECTIONS[direction].split(':')[0]}" for row in rows for direction in directions]
    return make_subplots(
        rows=len(rows), cols=len(directions), subplot_titles=titles, horizontal_spacing=0.1,
        vertical_spacing=0.28 / max(1, len(rows)),
    )  # fmt: skip


def _heat(figure: go.Figure, values: pd.DataFrame, drawn: pd.DataFrame, limit: float, row: int, col: int) -> None:
    """Draw a table [layer, column]; cells that are not `drawn` in grey, with their value at hand."""
    x, y = list(values.columns), list(values.index)
    grey = np.where(drawn.to_numpy(dtype=bool) | values.isna().to_numpy(), np.nan, 0.0)
    figure.add_heatmap(
        x=x, y=y, z=grey, customdata=values.to_numpy(), colorscale=[[0, GREY], [1, GREY]], showscale=False,
        hovertemplate="layer %{y}, %{x}: %{customdata:.2f}, not told from its null<extra></extra>", row=row, col=col,
    )  # fmt: skip
    figure.add_heatmap(
        x=x, y=y, z=values.where(drawn.astype(bool)).to_numpy(), colorscale=DIVERGING, zmin=-limit, zmax=limit,
        showscale=(row, col) == (1, 1), colorbar={"title": "share of<br>the gap"},
        hovertemplate="layer %{y}, %{x}: %{z:.2f}<extra></extra>", row=row, col=col,
    )  # fmt: skip


def _maps(tables: Tables, table: pd.DataFrame, column: str, columns: Sequence[object], x: str) -> go.Figure:
    components, directions = list(dict.fromkeys(table["component"])), list(dict.fromkeys(table["direction"]))
    figure = _panels(components, directions)
    limit = max(1e-6, float(np.nanquantile(table["recovery"].abs(), 1.0)))
    tested = table["p_fwe"].notna().any()
    for i, component in enumerate(components, 1):
        for j, direction in enumerate(directions, 1):
            part = table[(table["component"] == component) & (table["direction"] == direction)]
            values = part.pivot_table(index="layer", columns=column, values="recovery")
            values = values.reindex(columns=[c for c in columns if c in values.columns])
            drawn = part.assign(shown=part["found"] | ~tested).pivot_table(
                index="layer", columns=column, values="shown"
            )
            _heat(figure, values, drawn.reindex(index=values.index, columns=values.columns) > 0, limit, i, j)
    finish(figure, x=x, y="layer", height=180 + 240 * len(components), top=80)
    return captioned(figure, tables, directions)


def stream_map(tables: Tables) -> go.Figure:
    """Draw layer by role, each component and direction."""
    table = first_metric(tables)
    table = table[table["head"] < 0]
    roles = roles_in_order(tables, table)
    figure = _maps(tables, table, "role", roles, "role of the position")
    return figure.update_xaxes(type="category")


def head_map(tables: Tables) -> go.Figure:
    """Draw layer by head: at all positions, or the position of the largest share where heads stand at each."""
    table = first_metric(tables)
    table = table[table["head"] >= 0]
    largest = table.assign(size=table["recovery"].abs()).sort_values("size", ascending=False)
    table = largest.drop_duplicates(["direction", "component", "layer", "head"]).sort_index()
    return _maps(tables, table, "head", sorted(table["head"].unique()), "head")


def curves(tables: Tables) -> go.Figure:
    """Draw the share over depth for the stream, a curve for each role, beside its null, and the decision window."""
    table = first_metric(tables)
    table = table[table["component"] == "resid_post"]
    directions = list(dict.fromkeys(table["direction"]))
    figure = side_by_side([DIRECTIONS[d] for d in directions])
    roles = roles_in_order(tables, table)
    strongest = table.groupby("role")["recovery"].max().reindex(roles).nlargest(len(COLOURS) - 1).index
    for j, direction in enumerate(directions, 1):
        for colour, role in zip(COLOURS, [r for r in roles if r in set(strongest)], strict=False):
            part = table[(table["direction"] == direction) & (table["role"] == role)].sort_values("layer")
            if j == 1:
                band(figure, part["layer"], part["ci_low"], part["ci_high"], colour)
            figure.add_scatter(
                x=part["layer"], y=part["recovery"], mode="lines", name=plain(role), line={"color": colour},
                legendgroup=role, showlegend=j == 1, row=1, col=j,
            )  # fmt: skip
            if part["null"].notna().any():
                figure.add_scatter(
                    x=part["layer"], y=part["null"], mode="lines", line={"color": colour, "dash": "dot", "width": 1},
                    name=f"{plain(role)}, null", legendgroup=role, showlegend=False, row=1, col=j,
                )  # fmt: skip
    finish(figure, x="layer", y=("share of the gap",), height=440, legend=1.12, top=120)
    window = decision_window(tables["window"])
    if window is not None:
        figure.add_vrect(x0=window[0], x1=window[1], fillcolor=GREY, opacity=0.35, line_width=0)
    return captioned(figure, tables, directions)


def decision_window(window: pd.DataFrame) -> tuple[float, float] | None:
    """Return (the earliest departure of a row that is not the last, the arrival at the last one); None where either is missing."""
    streams = window[window["component"] == "resid_post"]
    arrival = streams[(streams["bound"] == "arrival") & streams["role"].isin(["end", "-1"])]["layer"].dropna()
    departure = streams[(streams["bound"] == "departure") & ~streams["role"].isin(["end", "-1"])]["layer"].dropna()
    if arrival.empty or departure.empty:
        return None
    return float(departure.max()), float(arrival.min())


def dots(tables: Tables) -> go.Figure:
    """Draw the share of each pair in the cells of the largest share, one of each component and direction."""
    table = first_metric(tables)
    inner = table[~((table["component"] == "resid_post") & (table["recovery"].between(0.98, 1.02)))]
    best = inner.assign(size=inner["recovery"].abs()).sort_values("size", ascending=False)
    best = best.drop_duplicates(["direction", "component"]).sort_values(["direction", "component"])
    cells = tables["cells"]
    figure = go.Figure()
    for place in best.itertuples():
        part = cells[
            (cells["source"] == "pair") & (cells["metric"] == place.metric) & (cells["direction"] == place.direction)
            & (cells["component"] == place.component) & (cells["layer"] == place.layer) & (cells["head"] == place.head)
            & (cells["role"] == place.role)
        ]  # fmt: skip
        head = "" if place.head == -1 else f".{place.head}"
        role = "" if place.role == ALL else f" at {shorten(str(place.role), 20)}"
        figure.add_box(
            y=part["recovery"], name=plain(f"{place.component}.{place.layer}{head}{role}, {place.direction}"), boxpoints="all",
            pointpos=0, jitter=0.5, marker={"size": 5}, line={"width": 1}, showlegend=False,
        )  # fmt: skip
    finish(figure, x="", y="share of the gap, pair by pair", height=460, bottom=120)
    return captioned(figure, tables, best["direction"])


FIGURES = {
    "stream_map": FigureSpec(
        "Where copying a row moves the answer",
        "Each cell copies one component at one layer and position. Left (denoising), from the clean run into the corrupted one: the share of the "
        "gap that comes back, what is enough. Right (noising), the other way: the share that is lost, what is needed. The two are not mirror "
        "images. 0 is nothing, 1 the whole gap, below 0 works against the answer; cells that do not stand out from their null are grey.",
        stream_map,
        _has_streams,
    ),
    "head_map": FigureSpec(
        "Heads that move the answer",
        "The same share for heads: z is what a head writes, q what it looks for, k what is found, v what is moved; keys and values belong to a "
        "group of query heads. At all positions from the first difference on, or, where heads stand at each position, at the one of the "
        "largest share. A head whose loss does little may have others that step in, so a small share in noising does not show that it is unused.",
        head_map,
        _has_heads,
    ),
    "curves": FigureSpec(
        "From the changed token to the end",
        "The share of the gap over depth when the stream is copied at one position; bands are 95 % intervals over pairs, dotted lines the null. "
        "The grey bar is the decision window: from the last layer at which a changed position is still needed, to the one from which the "
        "last position carries the answer.",
        curves,
        lambda tables: bool((first_metric(tables)["component"] == "resid_post").any()),
    ),
    "pairs": FigureSpec(
        "One pair, or all of them?",
        "The share of each pair in the cell of the largest share, for each component and direction. The cell was chosen on these pairs, so its "
        "level is flattering; what to read is how far pairs agree. Cells of the stream that hold the whole answer are left out.",
        dots,
    ),
    **ESTIMATES,
    **GRAPH,
}


END = ("end", "-1")


def _streams(tables: Tables, direction: str) -> pd.DataFrame:
    table = first_metric(tables)
    return table[(table["component"] == "resid_post") & (table["direction"] == direction)]


def denoise_end(tables: Tables) -> pd.DataFrame:
    """Return the share that the last position's stream brings back."""
    table = _streams(tables, "denoise")
    return columns(table[table["role"].isin(END)], "recovery", "ci_low", "ci_high")


def noise_source(tables: Tables) -> pd.DataFrame:
    """Return the share that is lost with the stream of the position that matters most before the last."""
    table = _streams(tables, "noise")
    table = table[~table["role"].isin(END)]
    strongest = table.groupby("role")["recovery"].sum().idxmax()
    return columns(table[table["role"] == strongest], "recovery", "ci_low", "ci_high")


def window_profile(tables: Tables) -> pd.DataFrame:
    """Return 1 inside the decision window and 0 outside, of each layer."""
    layers = np.sort(first_metric(tables)["layer"].unique())
    window = decision_window(tables["window"])
    assert window is not None
    inside = (layers >= min(window)) & (layers <= max(window))
    return pd.DataFrame({"layer": layers, "value": inside.astype(float)})


def _several(tables: Tables, direction: str) -> bool:
    table = _streams(tables, direction)
    return len(table) > 0 and bool(
        table["role"].isin(END).any() if direction == "denoise" else (~table["role"].isin(END)).any()
    )


PROFILES = {
    "denoise_end": ProfileSpec(
        "Answer at the last position",
        "share of the gap",
        "Share of the gap between corrupted and clean run that comes back when the last position's stream after this layer is copied from the "
        "clean run; from where it is near 1 on, the answer is carried there.",
        denoise_end,
        lambda tables: _several(tables, "denoise"),
    ),
    "noise_source": ProfileSpec(
        "Need of the source position",
        "share of the gap",
        "Share of the gap that is lost when the stream after this layer is copied from the corrupted run, at the position before the last whose "
        "loss costs most; where it falls to 0, the answer no longer needs that row.",
        noise_source,
        lambda tables: _several(tables, "noise"),
    ),
    "decision_window": ProfileSpec(
        "Decision window",
        "inside or not",
        "1 from the last layer at which a changed position is still needed to the layer from which the last position carries the answer, 0 "
        "elsewhere.",
        window_profile,
        lambda tables: decision_window(tables["window"]) is not None,
    ),
}
