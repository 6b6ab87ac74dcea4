"""Figures of the logit lens."""

from __future__ import annotations

import plotly.graph_objects as go

from analyses.figures.theme import COLOURS, SCALE, finish, visible
from analyses.result import FigureSpec, Tables


def lens_table(tables: Tables) -> go.Figure:
    """Top token by layer and position, coloured by its probability; one prompt at a time."""
    top = tables["top"][tables["top"]["rank"] == 0]
    prompts = list(dict.fromkeys(top["prompt"]))[:40]
    figure, buttons = go.Figure(), []
    widest = 1
    for shown, prompt in enumerate(prompts):
        one = top[top["prompt"] == prompt]
        probability = one.pivot(index="layer", columns="position", values="probability")
        tokens = one.pivot(index="layer", columns="position", values="token").map(visible)
        widest = max(widest, probability.shape[1])
        figure.add_heatmap(
            z=probability, x=[f"position {p}" for p in probability.columns], y=probability.index,
            text=tokens.map(lambda t: t[:9]), texttemplate="%{text}", customdata=tokens, visible=shown == 0,
            zmin=0, zmax=1, colorscale=SCALE, colorbar={"title": "probability"}, textfont={"size": 10},
            hovertemplate="%{x}, layer %{y}<br>%{customdata}<br>probability %{z:.3f}<extra></extra>",
        )  # fmt: skip
        buttons.append(
            {"label": f"prompt {prompt}", "method": "update", "args": [{"visible": [p == prompt for p in prompts]}]}
        )
    finish(figure, x="position whose next token is predicted", y="layer", height=760)
    figure.update_layout(width=max(900, 74 * widest + 160))
    if len(prompts) > 1:
        figure.update_layout(
            updatemenus=[{"buttons": buttons, "x": 1, "xanchor": "right", "y": 1.03, "yanchor": "bottom"}]
        )
    return figure


def convergence(tables: Tables) -> go.Figure:
    """Entropy, distance to the final prediction, and agreement, by layer."""
    read = tables["read"].groupby("layer")[["entropy_bits", "kl_to_final", "agrees"]]
    mean = read.mean()
    figure = go.Figure()
    figure.add_scatter(
        x=mean["entropy_bits"], y=mean.index, name="entropy (bits)", mode="lines+markers", line={"color": COLOURS[0]}
    )
    figure.add_scatter(
        x=mean["kl_to_final"],
        y=mean.index,
        name="KL to the final prediction (nats)",
        mode="lines+markers",
        line={"color": COLOURS[1]},
    )
    figure.add_scatter(
        x=mean["agrees"],
        y=mean.index,
        name="share of positions that agree",
        mode="lines+markers",
        line={"color": COLOURS[2]},
        xaxis="x2",
    )
    finish(figure, x="bits or nats", y="layer", height=520)
    figure.update_layout(
        xaxis2={"overlaying": "x", "side": "top", "range": [0, 1.02], "title": "share", "showgrid": False}
    )
    figure.update_layout(legend={"y": -0.25, "yanchor": "top"}, margin={"t": 70})
    return figure


FIGURES = {
    "lens": FigureSpec(
        "Lens table: top token by layer and position",
        "Each cell is the token that the residual stream leaving this layer would predict, through the model's own final norm and "
        "unembedding, coloured by its probability. The top row is the model's own prediction. Early layers are not calibrated for this "
        "read-out, so read them as a hint.",
        lens_table,
    ),
    "convergence": FigureSpec(
        "Convergence along depth",
        "Averages over all positions read: the entropy of the lens's distribution, its divergence from the final prediction (both on the lower "
        "axis), and the share of positions whose top token is already the final one (upper axis).",
        convergence,
    ),
}
