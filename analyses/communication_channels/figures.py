"""Figures and depth profiles of the communication-channels analysis."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analyses.results.card import FigureSpec, ProfileSpec, Tables
from analyses.results.profiles import counts
from analyses.results.theme import COLOURS, SCALE, band, coloured, finish, side_by_side, whiskers

PAIR = ["kind", "source_layer", "source_head", "target_layer", "target_head"]
KIND = {"q": "into queries", "k": "into keys", "v": "into values"}


def _name(pair: pd.Series) -> str:
    return f"{pair['source_layer']}.{pair['source_head']} → {pair['target_layer']}.{pair['target_head']} ({pair['kind'].upper()})"


def pair_heatmap(tables: Tables) -> go.Figure:
    """Draw the strongest component of any pair between two layers, per kind."""
    table = tables["composition"]
    kinds = list(dict.fromkeys(table["kind"]))
    figure = side_by_side([KIND[k] for k in kinds])
    top = float(table["z"].quantile(0.9995))
    for column, kind in enumerate(kinds, 1):
        pairs = table[table["kind"] == kind]
        best = pairs.loc[pairs.groupby(["source_layer", "target_layer"])["z"].idxmax()]
        z = best.pivot(index="target_layer", columns="source_layer", values="z")
        best = best.assign(
            label=[f"{_name(row)}: z {row['z']:.1f}, CS {row['component_score']:.3f}" for _, row in best.iterrows()]
        )
        label = best.pivot(index="target_layer", columns="source_layer", values="label")
        figure.add_heatmap(
            x=z.columns, y=z.index, z=z.to_numpy(), text=label.to_numpy(), colorscale=SCALE, zmin=3, zmax=max(top, 6),
            showscale=column == len(kinds), colorbar={"title": "robust z"}, hovertemplate="%{text}<extra></extra>",
            row=1, col=column,
        )  # fmt: skip
    finish(figure, x="writer's layer", y="", height=440, top=60)
    return figure.update_yaxes(title="reader's layer", row=1, col=1)


def component_bars(tables: Tables) -> go.Figure:
    """Draw every component of the strongest pairs over the null."""
    components = tables["components"]
    groups = [(_name(group.iloc[0]), group) for _, group in components.groupby(PAIR, sort=False)]
    edited = {_name(row) for _, row in tables["rank"].iterrows()} if "rank" in tables else set()
    groups = sorted(groups, key=lambda item: item[0] not in edited)[:4]
    figure = make_subplots(rows=len(groups), cols=1, subplot_titles=[name for name, _ in groups], vertical_spacing=0.09)
    for row, (_, group) in enumerate(groups, 1):
        colours = [COLOURS[1] if z == group["z"].max() else COLOURS[0] for z in group["z"]]
        figure.add_bar(
            x=group["component"], y=group["score"], marker_color=colours, showlegend=False,
            customdata=group[["z", "energy_share", "q_value"]],
            hovertemplate="component %{x}: CS %{y:.3f}, z %{customdata[0]:.1f}, share of energy %{customdata[1]:.3f}, "
            "q %{customdata[2]:.1e}<extra></extra>", row=row, col=1,
        )  # fmt: skip
        first = group.iloc[0]
        low = max(0.0, 2 * first["null_mean"] - first["null_high"])
        figure.add_hrect(y0=low, y1=first["null_high"], fillcolor="grey", opacity=0.25, line_width=0, row=row, col=1)
        figure.add_hline(y=first["pair_score"], line_dash="dot", line_color=COLOURS[2], line_width=1.5, row=row, col=1)
    finish(figure, x="", y="CS", height=150 * len(groups) + 90)
    return figure.update_xaxes(title="singular component of the writing head", row=len(groups), col=1)


def score_against_effect(tables: Tables) -> go.Figure:
    """Draw each component's score from weights against how much zeroing it changes the reading head's attention."""
    edits = tables["edits"]
    zero = edits[(edits["edit"] == "zero") & (edits["metric"] == "attention_change")]
    joined = zero.merge(tables["components"][[*PAIR, "component", "score"]], on=[*PAIR, "component"])
    groups = list(joined.groupby(PAIR, sort=False))
    titles = [f"{_name(g.iloc[0])}: Spearman {g['score'].corr(g['change'], method='spearman'):.2f}" for _, g in groups]
    figure = side_by_side(titles, shared_yaxes=False, horizontal_spacing=0.12)
    for column, (_, group) in enumerate(groups, 1):
        strongest = group["score"] == group["score"].max()
        figure.add_scatter(
            x=group["score"], y=group["change"], mode="markers", text=group["component"], showlegend=False,
            marker={"color": [COLOURS[1] if s else COLOURS[0] for s in strongest], "size": 7},
            error_y=whiskers(group["change"], group["ci_low"], group["ci_high"]),
            hovertemplate="component %{text}: CS %{x:.3f}, change %{y:.4f}<extra></extra>", row=1, col=column,
        )  # fmt: skip
    return finish(figure, x="component score CS", y=("change of attention (total variation)",), top=60)


def alpha_sweep(tables: Tables) -> go.Figure:
    """Draw the reading head's attention and the logit difference as the component is scaled."""
    edits = tables["edits"]
    chosen = edits.merge(tables["rank"][[*PAIR, "component"]], on=[*PAIR, "component"])
    sweep = chosen[chosen["edit"].str.startswith("scale:") | (chosen["edit"] == "zero")].copy()
    sweep["alpha"] = [0.0 if e == "zero" else float(e.split(":")[1]) for e in sweep["edit"]]
    metrics = (("inhibition", "attention to IO minus S"), ("logit_difference", "logit of IO minus S"))
    figure = side_by_side([title for _, title in metrics], shared_yaxes=False, horizontal_spacing=0.12)
    for column, (metric, _) in enumerate(metrics, 1):
        for colour, (_, group) in coloured(sweep[sweep["metric"] == metric], PAIR):
            one = group.iloc[:1].assign(alpha=1.0, change=0.0, ci_low=0.0, ci_high=0.0)
            group = pd.concat([group, one]).sort_values("alpha")
            x, base = group["alpha"].tolist(), group["before"]
            band(figure, x, base + group["ci_low"], base + group["ci_high"], colour, row=1, col=column)
            figure.add_scatter(
                x=x, y=base + group["change"], mode="lines+markers", line={"color": colour}, name=_name(group.iloc[0]),
                legendgroup=_name(group.iloc[0]), showlegend=column == 1, row=1, col=column,
            )  # fmt: skip
    return finish(figure, x="factor alpha of the component (1: as it is)", y="", top=90, legend=1.1)


def laundry(tables: Tables) -> go.Figure:
    """Draw the accuracy on lists against their length."""
    table = tables["laundry"]
    figure = go.Figure()
    styles = {"plain": "solid", "weight edit": "solid", "held out, channel": "dash", "oracle, channel": "dot",
              "held out, random": "dash", "oracle, random": "dot"}  # fmt: skip
    colours = {
        "plain": 6,
        "weight edit": 2,
        "held out, channel": 1,
        "oracle, channel": 1,
        "held out, random": 0,
        "oracle, random": 0,
    }
    for variant, dash in styles.items():
        rows = table[(table["variant"] == variant) & (table["scoring"] == "items")].dropna(subset=["accuracy"])
        figure.add_scatter(
            x=rows["n_items"], y=rows["accuracy"], name=variant, mode="lines+markers",
            line={"color": COLOURS[colours[variant]], "dash": dash},
            error_y=whiskers(rows["accuracy"], rows["ci_low"], rows["ci_high"], 2),
        )  # fmt: skip
    lengths = sorted(set(table["n_items"]))
    figure.add_scatter(
        x=lengths,
        y=[1 / n for n in lengths],
        mode="lines",
        name="chance",
        line={"color": "grey", "dash": "longdash", "width": 1},
    )
    finish(figure, x="items in the list", y="accuracy among the list's items")
    figure.update_yaxes(range=[0, 1.03], tickformat=".0%")
    return figure.update_xaxes(tickvals=lengths)


def steering(tables: Tables) -> go.Figure:
    """Draw the item chosen at each point of the three-dimensional grid, for the longest list."""
    table = tables["steering"]
    grid = table[table["n_items"] == table["n_items"].max()]
    figure = go.Figure()
    figure.add_scatter3d(
        x=grid["beta_1"], y=grid["beta_2"], z=grid["beta_3"], mode="markers",
        marker={"color": grid["item"], "colorscale": SCALE, "size": 6 + 10 * grid["share"], "cmin": 0,
                "cmax": int(grid["n_items"].iloc[0]) - 1, "colorbar": {"title": "item"}},
        text=[f"item {i} in {s:.0%} of the lists" for i, s in zip(grid["item"], grid["share"], strict=True)],
        hovertemplate="%{text}<extra></extra>",
    )  # fmt: skip
    finish(figure, x="", y="", height=520)
    axes = {f"{axis}axis": {"title": f"coefficient {i}"} for i, axis in enumerate("xyz", 1)}
    return figure.update_layout(
        scene={**axes, "camera": {"eye": {"x": 1.5, "y": 1.5, "z": 0.9}}}, margin={"t": 10, "b": 10}
    )


FIGURES = {
    "pairs": FigureSpec(
        "Which layers talk to which",
        "For every pair of layers, the pair of heads with the most outstanding component. A writing head's output matrix is split into singular components; "
        "the colour is the robust z of the best one's composition score among its own head's components. Hover for the heads. From weights alone.",
        pair_heatmap,
        data="weights",
    ),
    "components": FigureSpec(
        "Component scores of the strongest pairs",
        "One bar is one singular component of the writing head: how much of its write direction the reading head's matrix passes on. The grey band is three "
        "standard deviations around what a random direction scores; the dotted line is the score of the whole head, in which one component is averaged away.",
        component_bars,
        data="weights",
    ),
    "effect": FigureSpec(
        "Scores from weights against measured effect",
        "Each point is one component of the writing head, set to zero at the last token of generated indirect-object prompts. Upwards: how far the reading "
        "head's attention at that token moves (total variation distance), with 95 % intervals over prompts. Orange: the component the scan names.",
        score_against_effect,
        lambda tables: "edits" in tables,
    ),
    "alpha": FigureSpec(
        "Scaling a channel",
        "The scan's component is multiplied by alpha at the last token. Left: the reading head's attention to the right name (IO) minus the repeated one (S). "
        "Right: the model's logit difference. Bands are 95 % intervals of the change, over prompts.",
        alpha_sweep,
        lambda tables: "edits" in tables,
    ),
    "laundry": FigureSpec(
        "Recall from lists",
        "Which of N items was not used up, by the largest logit among the items. `Weight edit` removes the first channel from the weights. Steering sets three "
        "coefficients at the last token: `held out` uses, for each place of the answer, the grid point that was best on other lists; `oracle` counts a list when any "
        "point is right, and so grows with the grid. `Random` steers random directions of the same heads. Whiskers are 95 % Wilson intervals.",
        laundry,
        lambda tables: "laundry" in tables,
        data="own",
    ),
    "steering": FigureSpec(
        "The steered space",
        "Each point is one setting of the three coefficients; its colour is the place in the list of the item chosen most often there, its size how often. Longest lists only.",
        steering,
        lambda tables: "steering" in tables,
        data="own",
    ),
}


def _ends(tables: Tables, side: str) -> pd.DataFrame:
    table = tables["composition"]
    flagged = table[table["flagged"]]
    return counts(flagged[side], int(table["target_layer"].max()) + 1)


def writers(tables: Tables) -> pd.DataFrame:
    """Count the flagged channels that begin in the layer."""
    return _ends(tables, "source_layer")


def readers(tables: Tables) -> pd.DataFrame:
    """Count the flagged channels that end in the layer."""
    return _ends(tables, "target_layer")


PROFILES = {
    "writers": ProfileSpec(
        "Channels written",
        "flagged channels",
        "How many pairs of heads, flagged for a component that stands out of its null, have their writing head in this layer.",
        writers,
    ),
    "readers": ProfileSpec(
        "Channels read",
        "flagged channels",
        "How many pairs of heads, flagged for a component that stands out of its null, have their reading head in this layer.",
        readers,
    ),
}
