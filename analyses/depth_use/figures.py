"""Figures and depth profiles of depth use: contributions, skips, tokens and maps; proxies, and comparisons of groups and layers, have files of their own."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from analyses.depth_use.figures_effective_depth import EFFECTIVE_DEPTH_FIGURES
from analyses.depth_use.figures_generation import GENERATION_FIGURES
from analyses.depth_use.figures_proxies import PROXY_FIGURES
from analyses.depth_use.figures_removal import REMOVAL_FIGURES
from analyses.depth_use.figures_streams import STREAM_FIGURES
from analyses.results.card import FigureSpec, ProfileSpec, Tables
from analyses.results.profiles import named_rows
from analyses.results.theme import COLOURS, SCALE, coloured, finish, menu, side_by_side, token_label, whiskers

PART_NAMES = {"block": "whole block", "attn": "attention", "mlp": "MLP"}
_VARIANT_NAMES = {
    "current": "left out",
    "future": "left out before a split, effect after it",
    "local": "subtracted from one later block's input",
}
_RULES = {"released": "at all tokens but the first", "everywhere": "at all tokens"}


def _variant(name: str, table: pd.DataFrame) -> str:
    """A kind of skip and where in a prompt it happens."""
    return f"{_VARIANT_NAMES[name]}, {_RULES[table['rule'].iloc[0]]}"


def contributions(tables: Tables) -> go.Figure:
    """Relative norm and cosine of what each part adds, by layer."""
    table = tables["contributions"]
    table = table[table["tokens"] == ("not_first" if "not_first" in set(table["tokens"]) else "all")]
    figure = side_by_side(("size, relative to the stream", "cosine with the stream"))
    for colour, (part, group) in coloured(table, "part"):
        for column, (value, low, high) in enumerate(
            [("relative_norm", "ci_low", "ci_high"), ("cosine", "cosine_low", "cosine_high")], 1
        ):
            figure.add_scatter(
                x=group[value], y=group["layer"], name=PART_NAMES[str(part)], mode="lines+markers",
                line={"color": colour}, marker={"size": 5}, legendgroup=part, showlegend=column == 1,
                error_x=whiskers(group[value], group[low], group[high]), row=1, col=column,
            )  # fmt: skip
    titles = ("||what is added|| / ||stream||", "cosine (negative erases, positive amplifies)")
    finish(figure, x=titles, y=("layer",), height=620, legend=1.06, top=80)
    figure.update_xaxes(type="log", row=1, col=1)
    return figure.update_xaxes(zeroline=True, zerolinecolor="#444", row=1, col=2)


def skip_maps(tables: Tables) -> go.Figure:
    """Skipped layer by affected layer, one variant and part at a time."""
    table = tables["skip_effect"]
    layers = sorted(set(table["affected"]) | set(table["skipped"]))
    figure, labels = go.Figure(), list[str]()
    order = [(v, p) for v in ("future", "current", "local") for p in dict.fromkeys(table["part"])]
    groups = dict(iter(table.groupby(["variant", "part"], sort=False)))
    for key in [key for key in order if key in groups]:
        one = groups[key][groups[key]["affected"] > groups[key]["skipped"]]
        grids = [
            one.pivot(index="skipped", columns="affected", values=name).reindex(index=layers, columns=layers)
            for name in ("mean", "effect")
        ]
        figure.add_heatmap(
            z=grids[0], x=layers, y=layers, customdata=grids[1], visible=not labels, zmin=0, zmax=1, colorscale=SCALE,
            hoverongaps=False, colorbar={"title": "change", "len": 0.6},
            hovertemplate="block %{y} left out<br>block %{x} changes by %{z:.3f} (largest %{customdata:.2f})<extra></extra>",
        )  # fmt: skip
        labels.append(f"{PART_NAMES[key[1]]}, {_variant(key[0], one)}")
    menu(figure, labels)
    return finish(figure, x="later block whose contribution changes", y="block left out", height=660, top=90)


def output_effect(tables: Tables) -> go.Figure:
    """How much leaving a part out changes later predictions, and what each layer would already predict."""
    effect, proxies = tables["output_effect"], tables["proxy_intervals"]
    figure = side_by_side(("change of the output", "distance to the final prediction", "top 5 shared with the final"))
    for colour, ((variant, part), group) in coloured(effect, ["variant", "part"]):
        figure.add_scatter(
            x=group["mean"], y=group["skipped"], mode="lines+markers",
            name=f"{PART_NAMES[str(part)]}, {_variant(str(variant), group)}", line={"color": colour}, marker={"size": 5},
            error_x=whiskers(group["mean"], group["ci_low"], group["ci_high"]), row=1, col=1,
        )  # fmt: skip
    for column, name in ((2, "lens_kl"), (3, "lens_overlap")):
        rows = proxies[proxies["proxy"] == name]
        figure.add_scatter(
            x=rows["mean"], y=rows["layer"], mode="lines+markers", showlegend=False, line={"color": COLOURS[6]},
            marker={"size": 5}, error_x=whiskers(rows["mean"], rows["ci_low"], rows["ci_high"]), row=1, col=column,
        )  # fmt: skip
    titles = ("distance of probabilities", "KL(layer || final), nats", "share")
    return finish(figure, x=titles, y=("layer",), height=600, legend=1.08, top=90).update_xaxes(rangemode="tozero")


def depth_scores(tables: Tables) -> go.Figure:
    """Depth score per variant, part and group of prompts, with intervals."""
    table = tables["depth_score"][tables["depth_score"]["by"] == "mean"]
    figure = go.Figure()
    for colour, (group, rows) in coloured(table, "group"):
        keys = zip(rows["variant"], rows["part"], strict=True)
        figure.add_scatter(
            x=rows["score"], y=[f"{variant}, {PART_NAMES[part]}, {group}" for variant, part in keys], mode="markers",
            marker={"color": colour, "size": 9}, error_x=whiskers(rows["score"], rows["ci_low"], rows["ci_high"]),
            name=f"{group} ({rows['prompts'].min()} to {rows['prompts'].max()} prompts)",
        )  # fmt: skip
    order = sorted({y for trace in figure.data for y in trace.y}, reverse=True)
    title = (
        f"depth score (layers); parts left out {_RULES[table['rule'].iloc[0]]}"
        if len(table)
        else "depth score (layers)"
    )
    finish(figure, x=title, y="", height=180 + 24 * len(order), left=190)
    figure.update_yaxes(categoryorder="array", categoryarray=order)
    return figure.update_xaxes(rangemode="tozero")


def erased_tokens(tables: Tables) -> go.Figure:
    """Layer by token: how much erasing the token there changes later predictions; one prompt at a time."""
    table = tables["erasure"]
    # The last token has no later one, so its own prediction stands there.
    table = table.assign(
        change=table["later_change"].fillna(table["answer_change"]), menu=table["prompt"].map("prompt {}".format)
    )
    return _token_map(table, "change", "change of the most changed later prediction", SCALE, zmin=0)


def attributed_tokens(tables: Tables) -> go.Figure:
    """Layer by token: integrated gradients of the answer's probability; one prompt and part at a time."""
    table = tables["attribution"]
    named = [f"prompt {i}, {PART_NAMES[p]}" for i, p in zip(table["prompt"], table["part"], strict=True)]
    return _token_map(table.assign(menu=named), "attribution", "attribution (probability)", "RdBu", zmid=0)


def _token_map(table: pd.DataFrame, value: str, title: str, scale: str, **limits: float) -> go.Figure:
    figure, labels = go.Figure(), list[str]()
    for label, one in list(table.groupby("menu", sort=False))[:40]:
        grid = one.pivot(index="layer", columns="position", values=value)
        tokens = one.drop_duplicates("position").set_index("position")["token"]
        names = [f"{position} {token_label(tokens[position])}" for position in grid.columns]
        figure.add_heatmap(
            z=grid, x=names, y=grid.index, visible=not labels, colorscale=scale, colorbar={"title": "", "len": 0.6}, **limits,
            hovertemplate="token %{x}<br>layer %{y}<br>" + title + " %{z:.4f}<extra></extra>",
        )  # fmt: skip
        labels.append(str(label))
    menu(figure, labels)
    finish(figure, x="position and token", y="layer", height=600, top=90, bottom=110)
    return figure.update_xaxes(tickangle=-60)


def linear_maps(tables: Tables) -> go.Figure:
    """Source layer by target layer: error of the best affine map, and the best source of each target."""
    table = tables["linear_maps"]
    grid = table.pivot(index="target_layer", columns="source_layer", values="error")
    best = grid.idxmin(axis=1)
    figure = go.Figure()
    figure.add_heatmap(
        z=grid, x=grid.columns, y=grid.index, colorscale=SCALE, zmin=0, zmax=min(1.0, float(grid.to_numpy().max())),
        colorbar={"title": "error"},
        hovertemplate="source layer %{x}<br>target layer %{y}<br>relative error %{z:.3f}<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(x=best, y=best.index, mode="markers", marker={"color": "white", "size": 7, "line": {"width": 1}}, name="source layer of lowest error")  # fmt: skip
    return finish(figure, x="source layer", y="target layer", height=620)


FIGURES = {
    **PROXY_FIGURES,
    **REMOVAL_FIGURES,
    **EFFECTIVE_DEPTH_FIGURES,
    **GENERATION_FIGURES,
    "contributions": FigureSpec(
        "What each block adds to the stream",
        "Left: the length of what a whole block, its attention and its MLP add, relative to the stream they add to (logarithmic). Right: the "
        "cosine of what is added with that stream: negative erases, positive amplifies, zero writes a new direction. Means over tokens with 95 % "
        "intervals over prompts; each prompt's first token is left out.",
        contributions,
    ),
    "skip_maps": FigureSpec(
        "Which later blocks miss a block that is left out",
        "Row: the block (or its attention or MLP) that is left out, at the tokens that the menu names; column: a later block. Colour: how much that later block's contribution changes, "
        "relative to its length, as a mean over tokens and prompts (the largest is in the hover). `Before a split` leaves it out at earlier positions only and "
        "measures later ones, so it shows what is passed between tokens; `subtracted` does not let the change propagate. Colours stop at 1.",
        skip_maps,
    ),
    "output_effect": FigureSpec(
        "When the output is decided",
        "Left: the largest Euclidean change of a next-token distribution in a prompt when a part is left out, averaged over prompts (the legend says at which tokens). Middle: how far the "
        "prediction read from each layer (final norm and unembedding) is from the final one. Right: how many of its five most probable tokens are among the final five. "
        "Whiskers are 95 % intervals over prompts.",
        output_effect,
        lambda tables: len(tables["output_effect"]) > 0,
    ),
    "depth_score": FigureSpec(
        "Depth score",
        "The centre of mass, in layers, of the effects of leaving blocks out: the larger, the deeper the blocks that later ones rely on. Whiskers are 95 % "
        "intervals over prompts. Groups are the prompts' `group` field; where two intervals overlap, that one group uses more depth is not shown; below six prompts there is none.",
        depth_scores,
    ),
    "erasure": FigureSpec(
        "Until which layer a token matters",
        "Each cell overwrites one token's stream entering one layer by the mean stream, and shows how much the most affected later prediction changes "
        "(Euclidean distance of probabilities; for the last token, its own prediction). Dark cells: hardly any change. One prompt at a time, so no intervals.",
        erased_tokens,
        lambda tables: "erasure" in tables,
    ),
    "attribution": FigureSpec(
        "Integrated gradients of the answer",
        "The probability of the answer, attributed to what each layer writes at each token, along a straight path from the mean over positions. Blue adds to the "
        "answer's probability, red takes away. The table gives each layer's completeness error. One prompt at a time, so no intervals.",
        attributed_tokens,
        lambda tables: "attribution" in tables,
    ),
    **STREAM_FIGURES,
    "linear_maps": FigureSpec(
        "Layers of one model predicted from another's",
        "The relative error, on held-out prompts, of the best affine map from each source layer's stream to each target layer's. White dots mark the source "
        "layer with the lowest error for each target layer, which neighbours may share within their intervals; dots along the diagonal agree with stages that both models pass at the same relative depth. The table "
        "holds the intervals, the training error and the error of always predicting the mean.",
        linear_maps,
        lambda tables: "linear_maps" in tables,
    ),
}


PROFILES = {
    "removal": ProfileSpec(
        "Loss without the block",
        "nats per token",
        "Rise of the next-token loss when this block alone is left out: what the model really loses without it.",
        *named_rows("proxy_intervals", "proxy", "delta_ce_block"),
    ),
    "frozen_norm": ProfileSpec(
        "Loss with frozen norm",
        "nats per token",
        "Rise of the next-token loss when this block's normalisation divides by its average instead of each token's own norm.",
        *named_rows("proxy_intervals", "proxy", "delta_ce_frozen_norm"),
    ),
    "generation": ProfileSpec(
        "Text changed without the block",
        "share of tokens",
        "Share of the tokens of the model's own greedy text that are others when it writes without this block.",
        *named_rows("proxy_intervals", "proxy", "text_lost_block"),
    ),
    "contribution": ProfileSpec(
        "Size of the contribution",
        "norm added / norm of the stream",
        "How large what the block adds is beside the stream it is added to, averaged over tokens.",
        *named_rows("proxy_intervals", "proxy", "relative_norm_block"),
    ),
}
