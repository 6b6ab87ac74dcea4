"""Figures of the latent-language analysis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analyses.results.card import FigureSpec, Tables
from analyses.results.theme import COLOURS, SCALE, band, coloured, finish, side_by_side, whiskers

LANGUAGE_COLOURS = dict(zip(("en", "fr", "zh", "ja", "de", "es", "ru", "it"), COLOURS, strict=True))
CONTROL = "#8c8c8c"
MAX_ENTROPY = 14
"""Bits; the end of the colour scale of entropy strips, as in the paper."""


def _colour(language: str) -> str:
    return LANGUAGE_COLOURS.get(language, COLOURS[sum(map(ord, language)) % len(COLOURS)])


def _line(figure: go.Figure, x: object, y: object, name: str, colour: str, **place: object) -> None:
    shown = not any(trace.name == name for trace in figure.data)
    dash = place.pop("dash", "solid")
    figure.add_scatter(
        x=x, y=y, name=name, mode="lines", line={"color": colour, "dash": dash}, legendgroup=name, showlegend=shown,
        **place,
    )  # fmt: skip


def _panels(tables: Tables, prefix: str) -> go.Figure:
    curve, profile = tables["curve"], tables["profile"]
    if prefix:
        curve = curve[curve[f"{prefix}n"] > 0]
    pairs = list(dict.fromkeys(curve["pair"]))
    titles = [f"{pair} (n = {int(curve.loc[curve['pair'] == pair, prefix + 'n'].iloc[0])})" for pair in pairs]
    figure = make_subplots(
        rows=2, cols=len(pairs), row_heights=[0.09, 0.91], shared_xaxes=True, vertical_spacing=0.02,
        horizontal_spacing=0.05, subplot_titles=titles,
    )  # fmt: skip
    for column, pair in enumerate(pairs, 1):
        strip = profile[profile["pair"] == pair]
        figure.add_heatmap(
            z=[strip["entropy"]], x=strip["layer"], y=["entropy"], zmin=0, zmax=MAX_ENTROPY, colorscale="Greys_r",
            showscale=column == len(pairs), colorbar={"title": "bits", "len": 0.3, "y": 0.85}, row=1, col=column,
            hovertemplate="layer %{x}: %{z:.2f} bits<extra></extra>",
        )  # fmt: skip
        for language, group in curve[curve["pair"] == pair].groupby("language", sort=False):
            _curves(figure, str(language), group, prefix, column)
    finish(figure, x="layer", y="", height=440, top=90, legend=1.13)
    figure.update_xaxes(title=None, row=1)
    for column in range(2, len(pairs) + 1):
        figure.update_yaxes(showticklabels=False, row=1, col=column)
    figure.update_yaxes(title="probability", row=2, col=1)
    return figure.update_yaxes(rangemode="tozero", row=2)


def _curves(figure: go.Figure, language: str, group: pd.DataFrame, prefix: str, column: int) -> None:
    colour = _colour(language)
    place: dict[str, Any] = {"row": 2, "col": column}
    band(figure, group["layer"], group[f"{prefix}ci_low"], group[f"{prefix}ci_high"], colour, **place)
    role = group["role"].iloc[0]
    _line(
        figure,
        group["layer"],
        group[f"{prefix}mean"],
        f"{language}, {role}" if role == "latent" else language,
        colour,
        **place,
    )
    _line(figure, group["layer"], group["control_mean"], f"{language}, shuffled words", colour, dash="dot", **place)


def probability(tables: Tables) -> go.Figure:
    """Probability per language and layer, over all items."""
    return _panels(tables, "")


def probability_right(tables: Tables) -> go.Figure:
    """The same over items the model answers right."""
    return _panels(tables, "right_")


def energy(tables: Tables) -> go.Figure:
    """Token energy per layer, with the isotropic reference and the bounds."""
    figure = go.Figure()
    profile = tables["profile"]
    for colour, (pair, group) in coloured(profile, "pair"):
        band(figure, group["layer"], group["energy_low"], group["energy_high"], colour)
        _line(figure, group["layer"], group["energy"], str(pair), colour)
    first = profile[profile["pair"] == profile["pair"].iloc[0]]
    for column, name in (("energy_isotropic", "a latent without direction"), ("energy_greatest", "greatest possible")):
        _line(figure, first["layer"], first[column], name, CONTROL, dash="dash" if "iso" in column else "dot")
    figure.update_yaxes(type="log", dtick=1)
    return finish(figure, x="layer", y="token energy")


def lead(tables: Tables) -> go.Figure:
    """How far each latent language is ahead of the target."""
    figure = go.Figure()
    table = tables["lead"]
    for colour, ((pair, latent, target), group) in coloured(table, ["pair", "latent", "target"]):
        name = f"{pair}: {latent} - {target}"
        band(figure, group["layer"], group["ci_low"], group["ci_high"], colour)
        _line(figure, group["layer"], group["difference"], name, colour)
        ahead = group[group["leads"]]
        figure.add_scatter(
            x=ahead["layer"], y=ahead["difference"], mode="markers", marker={"color": colour, "size": 8},
            legendgroup=name, showlegend=False, hoverinfo="skip",
        )  # fmt: skip
        _line(
            figure,
            group["layer"],
            group["difference"] - group["over_control"],
            f"{name}, shuffled {latent}",
            colour,
            dash="dot",
        )
    figure.add_hline(y=0, line={"color": CONTROL, "width": 1})
    # Names are long: under the axis they leave the toolbar free.
    height = 440 + 22 * table["pair"].nunique()
    return finish(figure, x="layer", y="difference of probability", height=height, legend=-0.2)


def heatmap(tables: Tables) -> go.Figure:
    """Probability by language and relative depth, for every model and pair in the table."""
    return across_models([tables["curve"]])


def across_models(curves: Sequence[pd.DataFrame]) -> go.Figure:
    """One heat map of several models' `curve` tables on relative depth; beside each language its shuffled words."""
    curve = pd.concat(curves, ignore_index=True)
    rows, labels, depths = [], [], [step / 40 for step in range(41)]
    for (model, pair, language), group in curve.groupby(["model", "pair", "language"], sort=False):
        name = str(model).rsplit("/", 1)[-1]
        layers = len(group)
        nearest = [min(layers - 1, round(depth * (layers - 1))) for depth in depths]
        for column, note in (("mean", ""), ("control_mean", ", shuffled")):
            rows.append(group[column].to_numpy()[nearest])
            labels.append(f"{name} · {pair} · {language}{note}")
    figure = go.Figure()
    figure.add_heatmap(
        z=rows, x=depths, y=labels, zmin=0, zmax=1, colorscale=SCALE, colorbar={"title": "probability"},
        hovertemplate="%{y}<br>depth %{x:.2f}: %{z:.3f}<extra></extra>",
    )  # fmt: skip
    finish(figure, x="relative depth (0: first layer, 1: last)", y="", height=160 + 24 * len(rows), left=40)
    return figure.update_yaxes(automargin=True, autorange="reversed")


def culture(tables: Tables) -> go.Figure:
    """The four curves of the culture questions, one row per group of items, one column per framing."""
    table = tables["culture"]
    framings, groups = list(dict.fromkeys(table["framing"])), list(dict.fromkeys(table["items"]))
    names = {"all": "all questions", "words": "answers that are words"}
    titles = [
        f"{framing}, {names[g]} (n = {int(table[(table['framing'] == framing) & (table['items'] == g)]['n'].iloc[0])})"
        for g in groups for framing in framings
    ]  # fmt: skip
    figure = make_subplots(
        rows=len(groups), cols=len(framings), subplot_titles=titles, shared_yaxes=True, vertical_spacing=0.14
    )
    for (group, framing, culture_, language), part in table.groupby(
        ["items", "framing", "culture", "language"], sort=False
    ):
        place: dict[str, Any] = {"row": groups.index(group) + 1, "col": framings.index(framing) + 1}
        colour = COLOURS[0] if culture_ == "us" else COLOURS[1]
        dash = "solid" if language == "ja" else "dash"
        band(figure, part["layer"], part["ci_low"], part["ci_high"], colour, **place)
        name = f"{'American' if culture_ == 'us' else 'Japanese'} answer, in {language}"
        _line(figure, part["layer"], part["mean"], name, colour, dash=dash, **place)
        _line(figure, part["layer"], part["control_mean"], "shuffled answers", CONTROL, dash="dot", **place)
    return finish(figure, x="layer", y="probability", height=330 * len(groups) + 90, legend=1.07, top=90)


def similarity(tables: Tables) -> go.Figure:
    """Cosine of translations beside that of other sentences, and retrieval, averaged over language pairs."""
    table = tables["similarity"].assign(pair=lambda t: t["language_a"] + " and " + t["language_b"])
    figure = side_by_side(
        ["aligned less unaligned cosine", "share whose nearest is the translation"], shared_yaxes=False
    )
    styles = [(colour, dash) for dash in ("solid", "dash", "dot", "dashdot") for colour in COLOURS]
    for (colour, dash), (pair, group) in zip(styles, table.groupby("pair", sort=False), strict=False):
        band(figure, group["layer"], group["ci_low"], group["ci_high"], colour, row=1, col=1)
        _line(figure, group["layer"], group["gap"], str(pair), colour, dash=dash, row=1, col=1)
        _line(figure, group["layer"], group["retrieval"], str(pair), colour, dash=dash, row=1, col=2)
    one = table[table["pair"] == table["pair"].iloc[0]]
    _line(figure, one["layer"], one["chance"], "chance", CONTROL, dash="dot", row=1, col=2)
    return finish(figure, x="layer", y=("difference of cosines", "share"), height=470, legend=-0.2, top=70)


def swap(tables: Tables) -> go.Figure:
    """What follows when a few dimensions are taken from another language and another word."""
    table = tables["swap"]
    layers = sorted(set(table["layer"]))
    figure = side_by_side([f"after layer {layer}" for layer in layers])
    named = {"switched": "other language", "meaning_kept": "own meaning", "meaning_moved": "donor's meaning"}
    for column, layer in enumerate(layers, 1):
        for colour, (measure, name) in zip(COLOURS, named.items(), strict=False):
            for variant, dash in (("top", "solid"), ("random", "dot")):
                part = table[(table["layer"] == layer) & (table["variant"] == variant)].sort_values("percent")
                label = f"{name}, {'language' if variant == 'top' else 'random'} dimensions"
                error = whiskers(part[measure], part[f"{measure}_low"], part[f"{measure}_high"], 2)
                _line(
                    figure, part["percent"], part[measure], label, colour, dash=dash, error_y=error, row=1, col=column
                )
            shifted = table[(table["layer"] == layer) & (table["variant"] == "shift")]
            figure.add_hline(
                y=float(shifted[measure].iloc[0]),
                line={"color": colour, "width": 1, "dash": "dashdot"},
                row=1,
                col=column,
            )
    finish(figure, x="dimensions swapped (%)", y="", height=460, legend=1.13, top=120)
    figure.update_yaxes(title="share of tested words", row=1, col=1)
    return figure.update_xaxes(type="log", tickvals=sorted(set(table.loc[table["variant"] == "top", "percent"])))


def tuned(tables: Tables) -> go.Figure:
    """Held-out divergence from the model's own prediction."""
    table = tables["tuned_lens"]
    figure = go.Figure()
    _line(figure, table["layer"], table["logit_kl"], "logit lens", COLOURS[0])
    _line(figure, table["layer"], table["tuned_kl"], "tuned lens", COLOURS[1])
    figure.update_yaxes(rangemode="tozero")
    return finish(figure, x="layer", y="KL from the model (nats)")


_SHADE = "Shaded bands are 95 % intervals over items; dotted lines are the same sums over other items' words (as many tokens)."

FIGURES = {
    "probability": FigureSpec(
        "Probability of the word, language by language",
        "What the residual stream after each layer, read through the final norm and the unembedding at the last prompt position, gives to the "
        f"tokens of the right word in each language. {_SHADE} The strip above is the entropy of the whole distribution.",
        probability,
    ),
    "probability_right": FigureSpec(
        "The same, over items answered right",
        "Only the items whose answer the model itself gets right: here the last layers hold the right word, so what comes before is the way to it. "
        f"{_SHADE} (The control is over all items.)",
        probability_right,
        lambda tables: bool((tables["curve"]["right_n"] > 0).any()),
    ),
    "lead": FigureSpec(
        "Is the latent language ahead?",
        "Probability of the latent language's word less that of the target's, item by item. Dots mark layers where both this difference and the "
        "latent's lead over its own shuffled words lie above zero with their whole 95 % interval. Dotted: shuffled words of the latent language less the target.",
        lead,
        lambda tables: len(tables["lead"]) > 0,
    ),
    "heatmap": FigureSpec(
        "Language by depth",
        "Mean probability of each language's word at relative depth, and of the shuffled words under it. Several models' curves can be drawn into one such map.",
        heatmap,
    ),
    "energy": FigureSpec(
        "Token energy",
        "How much of the latent lies in directions that tokens are read from: the root mean square of its cosine with the rows of the unembedding, "
        "relative to that of the rows among themselves (logarithmic). The dashed line is what a latent of random direction would have, the dotted one the most that any could.",
        energy,
    ),
    "culture": FigureSpec(
        "Whose answer, in which language",
        "Questions asked in Japanese whose usual answer differs between Japan and the United States: the probability of both answers in both "
        "languages at each layer. `plain` names no country, `japan` asks about Japan. Answers written as digits count in both languages, so the "
        f"lower row keeps those that are words. {_SHADE}",
        culture,
        lambda tables: "culture" in tables,
    ),
    "similarity": FigureSpec(
        "Alike across languages",
        "Left: cosine between the mean states of a sentence and its translation, less that with other sentences of the other language, each language's "
        "mean taken off; bands are 95 % intervals over sentences. Right: how often the translation is the nearest of all, beside chance.",
        similarity,
        lambda tables: "similarity" in tables,
    ),
    "swap": FigureSpec(
        "Language against meaning",
        "Some dimensions of the last prompt position are replaced by those of a prompt that asks for another word in another language. Solid: the dimensions that "
        "tell the two languages apart most surely; dotted: as many at random; thin dash-dot lines: the mean difference added instead. Blue: the other language's share of the "
        "probability of the tested words; orange and green: the most probable meaning is the prompt's own, or the donor's. Whiskers are 95 % intervals over words.",
        swap,
        lambda tables: "swap" in tables,
    ),
    "tuned_lens": FigureSpec(
        "How well the tuned lens reads",
        "Divergence of each layer's read-out from the model's own prediction on sentences that neither the maps nor their strength were fitted on; lower is better.",
        tuned,
        lambda tables: "tuned_lens" in tables,
    ),
}  # fmt: skip
