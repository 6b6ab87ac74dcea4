"""Figures of the comparison of lenses."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analyses.reading.token_grid import token_grid
from analyses.results.card import FigureSpec, Tables
from analyses.results.theme import COLOURS, band, coloured, finish, menu, plain, shorten, side_by_side, whiskers
from analyses.tokens import joined

SHOWN = 12
"""Prompts offered in a figure's menu, for every lens."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")


def lens_table(tables: Tables) -> go.Figure:
    """Top token by layer and position, one lens and prompt at a time."""
    top = tables["top"][tables["top"]["rank"] == 0]
    figure = go.Figure()
    labels: list[str] = []
    widths: list[int] = []
    names = list(dict.fromkeys(top["lens"]))
    for prompt in list(dict.fromkeys(top["prompt"]))[:SHOWN]:
        for name in names:
            one = top[(top["prompt"] == prompt) & (top["lens"] == name)]
            widths.append(token_grid(figure, one, visible=not labels))
            inputs = one.drop_duplicates("position").sort_values("position")["input_token"]
            labels.append(shorten(f"{name} · {prompt}: {joined(inputs)}"))
    finish(figure, x="position and token whose continuation is predicted", y="layer", height=780)
    figure.update_xaxes(tickangle=-45)
    return menu(figure, labels, widths)


def _quality(tables: Tables, measure: str) -> go.Figure:
    table = tables["quality"][tables["quality"]["measure"] == measure]
    figure = go.Figure()
    colours = dict(zip(dict.fromkeys(table["lens"]), COLOURS, strict=False))
    for key, rows in table.groupby(["lens", "control"], sort=False):
        lens, control = map(str, key)
        dash = "solid" if not control else DASHES[1 + ["unigram", "shuffled", "bias_only", "rotated"].index(control)]
        label = plain(lens if not control else "token frequencies" if control == "unigram" else f"{lens}, {control}")
        line = {"color": "#777777" if control == "unigram" else colours[lens], "dash": dash}
        if not control:
            band(figure, rows["layer"], rows["ci_low"], rows["ci_high"], colours[lens])
        figure.add_scatter(x=rows["layer"], y=rows["value"], name=label, mode="lines", line=line)
    return figure


def divergence(tables: Tables) -> go.Figure:
    """Divergence from the model's output by layer, each lens beside its controls."""
    return finish(_quality(tables, "kl_to_final"), x="layer", y="KL from the model (nats)", height=480)


def agreement(tables: Tables) -> go.Figure:
    """Share of positions at which a lens's first token is the model's."""
    figure = finish(_quality(tables, "top1_agreement"), x="layer", y="share of positions", height=480)
    return figure.update_yaxes(range=[0, 1.02])


def rank(tables: Tables) -> go.Figure:
    """Median rank of the watched tokens over depth, one line a lens."""
    watched = tables["watched"]
    panels = _panels(watched)
    figure = side_by_side([plain(f"{name} at {place}") for name, place in panels])
    for colour, (lens, own) in coloured(watched, "lens"):
        for column, (name, place) in enumerate(panels, 1):
            rows = own[(own["name"] == name) & (own["position_name"] == place)]
            middle = rows.groupby("layer")["rank"].median() + 1
            figure.add_scatter(
                x=middle.index, y=middle, name=plain(lens), line={"color": colour}, mode="lines", legendgroup=lens,
                showlegend=column == 1, row=1, col=column,
            )  # fmt: skip
    finish(figure, x="layer", y=("place among all tokens",), height=440, legend=1.12, top=90)
    return figure.update_yaxes(type="log", autorange="reversed")


def _panels(table: pd.DataFrame) -> list[tuple[str, str]]:
    """Name and position of each panel, in the table's order."""
    pairs = table.drop_duplicates(["name", "position_name"])
    return list(zip(pairs["name"], pairs["position_name"], strict=True))


def passes(tables: Tables) -> go.Figure:
    """How often a watched name is among the first k, by layer, with chance."""
    table = tables["pass_at_k"]
    table = table[(table["chosen"] == "") & (table["k"] == table["k"].max())]
    panels = _panels(table)
    figure = side_by_side([plain(f"{name} at {place}") for name, place in panels])
    for colour, (lens, own) in coloured(table, "lens"):
        for column, (name, place) in enumerate(panels, 1):
            rows = own[(own["name"] == name) & (own["position_name"] == place)]
            style = {"legendgroup": lens, "row": 1, "col": column, "mode": "lines"}
            figure.add_scatter(
                x=rows["layer"], y=rows["value"], name=plain(lens), line={"color": colour}, showlegend=column == 1,
                error_y=whiskers(rows["value"], rows["ci_low"], rows["ci_high"]), **style,
            )  # fmt: skip
            figure.add_scatter(
                x=rows["layer"], y=rows["chance"], name=plain(f"{lens}, other prompts' tokens"),
                line={"color": colour, "dash": "dot"}, showlegend=column == 1, **style,
            )  # fmt: skip
    titles = (f"share among the first {int(table['k'].max())}",)
    return finish(figure, x="layer", y=titles, height=440, legend=1.12, top=110).update_yaxes(rangemode="tozero")


def similar(tables: Tables) -> go.Figure:
    """Overlap of the first ten tokens of every two lenses, by layer."""
    figure = go.Figure()
    for (a, b), rows in tables["similarity"].groupby(["lens_a", "lens_b"], sort=False):
        figure.add_scatter(x=rows["layer"], y=rows["top10_overlap"], name=plain(f"{a} and {b}"), mode="lines")
    finish(figure, x="layer", y="shared of the first ten tokens")
    return figure.update_yaxes(range=[0, 1.02])


def lift(tables: Tables) -> go.Figure:
    """Mean lift of watched tokens over the controls, by layer that rows leave and, where there are several, are put at."""
    table = tables["patchscope"]
    table = table.assign(where=table["name"] + " at " + table["position_name"])
    several = table.groupby("source_layer")["target_layer"].nunique().max() > 1
    figure = go.Figure()
    means = table.groupby(["where", "source_layer", "target_layer"], sort=False)["lift"].mean().reset_index()
    limit = float(means["lift"].abs().max())
    style = {
        "colorscale": "RdBu", "zmid": 0, "zmin": -limit, "zmax": limit, "colorbar": {"title": "lift (nats)"},
        "hovertemplate": "%{y}, layer %{x}<br>lift %{z:.2f} nats<extra></extra>",
    }  # fmt: skip
    if not several:
        wide = means.pivot(index="where", columns="source_layer", values="lift")
        figure.add_heatmap(z=wide, x=wide.columns, y=[plain(name) for name in wide.index], **style)
        return finish(figure, x="layer that the row leaves, and is put back at", y="", height=260)
    labels = list(dict.fromkeys(means["where"]))
    for label in labels:
        wide = means[means["where"] == label].pivot(index="target_layer", columns="source_layer", values="lift")
        figure.add_heatmap(z=wide, x=wide.columns, y=wide.index, visible=label == labels[0], **style)
    finish(figure, x="layer that the row leaves", y="layer that it is put at", height=480)
    return menu(figure, labels)


def workspace(tables: Tables) -> go.Figure:
    """The four curves of the band, beside controls."""
    table = tables["band"]
    titles = ("next token first", "kurtosis of the logits", "neighbours agree, less shuffled", "effective dimension")
    figure = make_subplots(rows=2, cols=2, subplot_titles=titles)
    for at, curve in enumerate(("accuracy", "kurtosis", "autocorrelation", "dimension")):
        place = {"row": at // 2 + 1, "col": at % 2 + 1}
        for colour, (name, rows) in zip(COLOURS, _by_control(table, curve), strict=False):
            figure.add_scatter(
                x=rows["layer"], y=rows["value"], name=name, line={"color": colour}, mode="lines", legendgroup=name,
                showlegend=at == 0, **place,
            )  # fmt: skip
    for layer in table.loc[table["in_band"], "layer"].unique():
        figure.add_vrect(x0=layer - 0.5, x1=layer + 0.5, fillcolor="#999999", opacity=0.15, line_width=0)
    return finish(figure, x="layer", y="", height=620, legend=1.06, top=90)


def _by_control(table: pd.DataFrame, curve: str) -> list[tuple[str, pd.DataFrame]]:
    own = table[table["curve"] == curve]
    return [(name, own[own["lens_or_control"] == name]) for name in ("lens", "shuffled", "rotated")]


FIGURES = {
    "lens": FigureSpec(
        "Lens table: top token by layer and position, lens by lens",
        "Each cell is the token that a lens reads from the residual stream leaving this layer, coloured by its probability. The menu "
        "switches lens and prompt; the top row is the model's own prediction for all of them. Lenses answer different questions, so "
        "a difference between two of them is no fault of either.",
        lens_table,
    ),
    "divergence": FigureSpec(
        "Divergence from the output, with controls",
        "Mean KL divergence of the model's own prediction from each lens's, on texts that no lens was fitted on; bands are 95 % "
        "intervals over texts. This judges the tuned lens, which is fitted towards the output, and not the Jacobian lens or a "
        "Patchscope. Controls: maps of other layers (shuffled), the mean shift alone (bias_only), a random rotation after the maps "
        "(rotated), and the frequencies of tokens in the other texts.",
        divergence,
        lambda tables: "quality" in tables,
        data="own",
    ),
    "agreement": FigureSpec(
        "Agreement with the output, with controls",
        "The share of positions at which a lens's first token is the model's, on texts that no lens was fitted on; bands are 95 % "
        "intervals over texts.",
        agreement,
        lambda tables: "quality" in tables,
        data="own",
    ),
    "rank": FigureSpec(
        "Place of the watched tokens",
        "Median place of the watched tokens among all tokens, by layer: 1, at the top, is the most probable. A name is read by its best "
        "spelling, and a word of several tokens by its first.",
        rank,
        lambda tables: "watched" in tables,
    ),
    "pass_at_k": FigureSpec(
        "Known tokens among the first",
        "How often a watched token is among the first k that a lens reads, by layer; whiskers are 95 % intervals over prompts. Dotted: the "
        "same for the tokens watched in other prompts, which is what naming likely words gives.",
        passes,
        lambda tables: "pass_at_k" in tables,
    ),
    "similarity": FigureSpec(
        "How alike two lenses read",
        "How many of the first ten tokens two lenses share at each layer, on held-out text. At the last layer every lens is the model's own output.",
        similar,
        lambda tables: "similarity" in tables,
        data="own",
    ),
    "lift": FigureSpec(
        "Lift of a Patchscope",
        "Mean log-probability of the watched tokens when a row stands in the Patchscope's prompt, less the greatest of its controls: the "
        "prompt without a patch, another prompt's row, noise of the same norm, the mean row, and the token's own embedding. Where the lift "
        "is not above zero, nothing was read from the row.",
        lift,
        lambda tables: "patchscope" in tables,
    ),
    "band": FigureSpec(
        "Do some layers read as a workspace?",
        "Four curves of the Jacobian lens by layer, on held-out text, beside its maps at other layers (shuffled) and turned at random "
        "(rotated). Shaded: the longest run of three or more layers in which kurtosis and agreement of neighbours lie above both controls, "
        "intervals apart, while the next token is read less than half as often as at the end.",
        workspace,
        lambda tables: "band" in tables,
        data="own",
    ),
}
