"""Figures of contextual decomposition."""

from __future__ import annotations

from itertools import product

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analyses.contextual_decomposition.agreement import KINDS, STATISTICS, TOP
from analyses.contextual_decomposition.figures_circuit import circuit, faithfulness
from analyses.contextual_decomposition.figures_relevance import curves, has_curves, routed, tokens
from analyses.contextual_decomposition.methods import COLOUR, NAMES
from analyses.contextual_decomposition.tables import layer_profile
from analyses.results.card import FigureSpec, ProfileSpec, Tables
from analyses.results.theme import finish, menu, side_by_side, token_label, whiskers

DIVERGING = "RdBu"
PANELS = {
    "pearson": "Pearson", "spearman": "ranks (Spearman)", "pearson_without_top10": f"Pearson without the top {TOP}",
}  # fmt: skip
"""Column of agreement, and the title of its panel."""


def _bound(values: np.ndarray) -> float:
    largest = np.nanmax(np.abs(values)) if values.size else 1.0
    return float(largest) or 1.0


def head_maps(tables: Tables) -> go.Figure:
    """Draw, layer by head, relevance beside the measured effect of ablation."""
    heads = tables["heads"]
    shown = [("score", "CD-T relevance")]
    if "ablation" in heads:
        shown.append(("ablation", "fall of the metric on ablation"))
    figure = side_by_side([title for _, title in shown], horizontal_spacing=0.06)
    top = _bound(heads[[column for column, _ in shown]].to_numpy())
    for at, (column, _) in enumerate(shown, 1):
        grid = heads.pivot_table(index="layer", columns="head", values=column)
        figure.add_heatmap(
            x=grid.columns, y=grid.index, z=grid.to_numpy(), colorscale=DIVERGING, zmid=0, zmin=-top, zmax=top,
            reversescale=False, showscale=at == len(shown), colorbar={"title": "logits"},
            hovertemplate="head %{y}.%{x}: %{z:.3f}<extra></extra>", row=1, col=at,
        )  # fmt: skip
    finish(figure, x="head", y="", height=max(360, 15 * heads["layer"].nunique() + 140))
    figure.update_yaxes(title="layer", row=1, col=1)
    figure.update_yaxes(dtick=1 if heads["layer"].nunique() <= 16 else 5)
    return figure.update_xaxes(dtick=1 if heads["head"].nunique() <= 16 else 4)


def position_maps(tables: Tables) -> go.Figure:
    """Draw relevance, layer by head, at one position, with a menu of positions."""
    table = tables["relevance"].query("kind == 'head' and position >= 0")
    means = table.groupby(["position", "layer", "head"])["score"].mean()
    top = _bound(means.to_numpy())
    sizes = means.abs().groupby(level="position").sum()
    positions = [int(p) for p in sizes.sort_values(ascending=False).index]
    figure = go.Figure()
    for number, position in enumerate(positions):
        grid = means.loc[position].unstack("head")
        figure.add_heatmap(
            x=grid.columns, y=grid.index, z=grid.to_numpy(), colorscale=DIVERGING, zmid=0, zmin=-top, zmax=top,
            visible=number == 0, colorbar={"title": "logits"},
            hovertemplate=f"head %{{y}}.%{{x}} at position {position}: %{{z:.3f}}<extra></extra>",
        )  # fmt: skip
    finish(figure, x="head", y="layer", height=max(380, 15 * table["layer"].nunique() + 160))
    figure.update_xaxes(dtick=1 if table["head"].nunique() <= 16 else 4)
    figure.update_yaxes(dtick=1 if table["layer"].nunique() <= 16 else 5)
    return menu(figure, [f"position {p} (Σ|score| {sizes[p]:.2f})" for p in positions])


COLUMNS = 4
"""Panels side by side."""


def scatter(tables: Tables) -> go.Figure:
    """Draw each head's score against the measured effect, a panel a method."""
    heads = tables["heads"]
    methods = [name for name in NAMES if name != "ablation" and (name in heads or name == "cdt")]
    agreement = tables["agreement"].query("kind == 'heads'").set_index("method")
    correlations = agreement["pearson"].reindex(methods).tolist()
    titles = [f"{NAMES[method]}: Pearson {r:.2f}" for method, r in zip(methods, correlations, strict=True)]
    width, lines = min(COLUMNS, len(methods)), -(-len(methods) // COLUMNS)
    figure = make_subplots(
        rows=lines,
        cols=width,
        subplot_titles=titles,
        shared_yaxes=True,
        horizontal_spacing=0.05,
        vertical_spacing=0.28 / lines,
    )
    labels = [f"{int(layer)}.{int(head)}" for layer, head in heads[["layer", "head"]].to_numpy()]
    span = [float(heads["ablation"].min()), float(heads["ablation"].max())]
    for number, method in enumerate(methods):
        place = {"row": 1 + number // width, "col": 1 + number % width}
        figure.add_scatter(
            x=heads["score" if method == "cdt" else method], y=heads["ablation"], mode="markers", text=labels,
            showlegend=False, marker={"size": 6, "color": COLOUR[method], "opacity": 0.65},
            hovertemplate="head %{text}: score %{x:.3f}, effect %{y:.3f}<extra></extra>", **place,
        )  # fmt: skip
        figure.add_scatter(
            x=span, y=span, mode="lines", line={"color": "#888", "dash": "dot", "width": 1}, showlegend=False,
            hoverinfo="skip", **place,
        )  # fmt: skip
    finish(figure, x="", y="", height=130 + 300 * lines, top=80)
    for column in range(1, width + 1):
        figure.update_xaxes(title="score (logits)", row=lines, col=column)
    for line in range(1, lines + 1):
        figure.update_yaxes(title="fall of the metric on ablation", row=line, col=1)
    return figure


def agreement(tables: Tables) -> go.Figure:
    """Draw three correlations of each method's scores with measured effects, with their intervals, a row a kind of nodes."""
    table = tables["agreement"].iloc[::-1]
    kinds = [kind for kind in KINDS if kind in set(table["kind"])]
    shown = [name for name in STATISTICS if table[name].notna().any()]
    counts = [int((table["kind"] == kind).sum()) for kind in kinds]
    figure = make_subplots(
        rows=len(kinds), cols=len(shown) or 1, subplot_titles=[PANELS[name] for name in shown], shared_yaxes=True,
        horizontal_spacing=0.05, vertical_spacing=0.22 / max(2, len(kinds)), row_titles=[KINDS[kind] for kind in kinds],
        row_heights=counts,
    )  # fmt: skip
    for (line, kind), (column, name) in product(enumerate(kinds, 1), enumerate(shown, 1)):
        rows = table[table["kind"] == kind]
        figure.add_scatter(
            x=rows[name], y=[NAMES[m] for m in rows["method"]], mode="markers", showlegend=False,
            marker={"size": 10, "color": [COLOUR[m] for m in rows["method"]]},
            error_x=whiskers(rows[name], rows[f"{name}_low"], rows[f"{name}_high"], 4),
            hovertemplate="%{y}: %{x:.3f}<extra>" + f"{PANELS[name]}, {KINDS[kind]}" + "</extra>", row=line, col=column,
        )  # fmt: skip
    finish(figure, x="", y="", height=190 + 34 * sum(counts), top=80)
    ends = table[[name + end for name in shown for end in ("", "_low", "_high")]].to_numpy(dtype=float)
    figure.update_xaxes(range=[min(0.0, np.nanmin(ends, initial=0.0)) - 0.05, 1.02])
    for column in range(1, len(shown) + 1):
        figure.update_xaxes(title="correlation with mean ablation", row=len(kinds), col=column)
    return figure


def words(tables: Tables) -> go.Figure:
    """Draw each prompt as a line of words coloured by their relevance."""
    table = tables["words"]
    figure = go.Figure()
    prompts = list(dict.fromkeys(table["prompt"]))[:24]
    kept = table[table["prompt"].isin(prompts)]
    width = int(kept["word"].max()) + 1
    z, text, hover = (np.full((len(prompts), width), fill, dtype=object) for fill in (None, "", ""))
    for prompt, word, piece, score, share in kept[["prompt", "word", "text", "relevance", "share"]].to_numpy():
        at = prompts.index(prompt), int(word)
        z[at], text[at] = share, token_label(piece.strip(" "), 12)
        hover[at] = f"{token_label(piece)}: {score:+.3f} logits, {share:+.0%} of the metric"
    top = _bound(kept.loc[kept["first_position"] > 0, "share"].to_numpy())
    figure.add_heatmap(
        z=z, x=list(range(width)), y=[f"prompt {p}" for p in prompts], text=text, texttemplate="%{text}",
        hovertext=hover, hovertemplate="%{hovertext}<extra></extra>", colorscale=DIVERGING, zmid=0, zmin=-top, zmax=top,
        xgap=1, ygap=3, colorbar={"title": "share", "tickformat": ".0%"}, textfont={"size": 12},
    )  # fmt: skip
    finish(figure, x="word", y="", height=150 + 34 * len(prompts))
    figure.update_yaxes(autorange="reversed")
    figure.update_layout(width=max(700, 78 * width + 180), plot_bgcolor="#f4f4f4")
    figure.update_xaxes(showgrid=False)
    return figure.update_yaxes(showgrid=False)


def _positioned(tables: Tables) -> bool:
    return bool((tables["relevance"].query("kind == 'head'")["position"] >= 0).any())


FIGURES = {
    "heads": FigureSpec(
        "Which heads the answer comes from",
        "Left: the part of the metric (mean logit of the answers less that of the distractors, at the prompt's end) that "
        "contextual decomposition traces to each head, averaged over prompts; blue heads push towards the answer, red ones "
        "against it. Right: how far the metric really falls when that head alone is set to its mean over the reference "
        "prompts; the next figure says how far the two agree.",
        head_maps,
    ),
    "positions": FigureSpec(
        "Heads at single positions",
        "The part of the metric traced to each head at one position, averaged over the prompts of one form; the menu "
        "orders positions by how much relevance they hold in all.",
        position_maps,
        _positioned,
    ),
    "agreement": FigureSpec(
        "How well each method foretells ablation",
        "Correlation over heads, MLPs or stream positions between a method's score and the measured effect of mean ablation, of "
        "means over prompts; in grey scores that know nothing of the answer; "
        "95 % intervals resample prompts, and there are none below six. When to believe which: Pearson's (left) is made by "
        "the few nodes of largest effect; ranks (middle) count every node alike; on the right are the nodes that remain "
        "without the ten of largest effect. A method that is high on the left alone names the strongest heads and says "
        "little of the others' order; one that is high in all three can be used for every node. Table "
        "agreement_differences holds the paired differences between CD-T and each other method, and between RelP and attribution "
        "patching, with their intervals. Attribution patching, RelP and LRP cost one backward pass a prompt each, ablation one "
        "forward a node.",
        agreement,
        lambda tables: "agreement" in tables,
    ),
    "scatter": FigureSpec(
        "Scores against measured effects",
        "Each point is a head. On the dotted line the score equals the fall of the metric on ablating the head.",
        scatter,
        lambda tables: "agreement" in tables,
    ),
    "circuit": FigureSpec(
        "The circuit",
        "Heads found by searching back from the metric: the strongest sources of the metric become targets, then the "
        "strongest sources of those. Early layers are at the bottom, the metric at the top. An edge's width is the size of its "
        "score, blue for positive, red for negative; faint heads are those that pruning took out.",
        circuit,
        lambda tables: "edges" in tables and not tables["edges"].empty,
    ),
    "faithfulness": FigureSpec(
        "How much of the metric a circuit keeps",
        "Heads are kept in the order of each method's score while all others are at their means. 1 is the whole model, 0 is "
        "every head ablated. The grey band spans 5 to 95 % of random circuits of the same size, and is not drawn below six "
        "of them; the star's whisker is a 95 % interval over prompts, left out below six prompts. Above 1, the heads left out "
        "together work against the answer.",
        faithfulness,
        lambda tables: "faithfulness" in tables,
    ),
    "curves": FigureSpec(
        "What is left as the most, or the least, relevant is taken away",
        "The metric as heads go to their means, or tokens to the references' mean row, in each method's order: full lines take "
        "the most relevant first, dashed ones the least. A method that knows what matters has its two lines far apart; the area "
        "between them is `abpc` in table abpc, beside that of random orders. The grey band spans 95 % of random orders.",
        curves,
        has_curves,
    ),
    "tokens": FigureSpec(
        "Which tokens the answer comes from",
        "Relevance of each token's row of the first stream, from one backward pass: blue towards the answer, red against it. "
        "Beneath each prompt: its metric is the sum of what reaches the tokens, the biases, and what ends in the patterns of "
        "attention (softmax). A large last part means that attention chose, and by a wide margin. Colours saturate at the "
        "largest size after position 0.",
        tokens,
        lambda tables: "token_relevance" in tables and not tables["token_relevance"].empty,
    ),
    "routed": FigureSpec(
        "Relevance that passes each layer's attention and MLP",
        "Relevance of what attention and MLP add, by the chosen rule; mean over prompts with 95 % intervals (none below six). "
        "One share of relevance can pass several blocks, so layers overlap: the bars do not add up to the metric.",
        routed,
        lambda tables: "routed" in tables,
    ),
    "words": FigureSpec(
        "Which words the answer comes from",
        "The part of the metric traced to each word, as a share of the metric's size: blue towards the answer, red against "
        "it. A word of several tokens is one source; table `words` holds the interaction of its tokens. Colours saturate at "
        "the largest share after the first word, which often stands for all the rest.",
        words,
        lambda tables: "words" in tables,
    ),
}
PROFILES = {
    "relevance": ProfileSpec(
        "Relevance of heads (CD-T)",
        "logits",
        "Sum over a layer's heads of the size of each head's relevance to the answer's logits; mean over prompts with a "
        "95 % interval (none below six prompts).",
        layer_profile,
    ),
}
