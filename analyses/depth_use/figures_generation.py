"""Figures of what is written without a block, beside what the block's absence costs on the plain model's own text."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from analyses.results.card import FigureSpec, Tables
from analyses.results.theme import COLOURS, coloured, finish, side_by_side, whiskers

_PANELS = (
    ("delta_ce_forced", "loss on the plain text", "nats per token"),
    ("diverged", "texts that change", "share of prompts"),
    ("changed", "tokens that change", "share of tokens"),
)


def _losses(table: pd.DataFrame) -> pd.DataFrame:
    """The shares that are lost, from those that are kept."""
    table = table.copy()
    for lost, kept in (("diverged", "intact"), ("changed", "agreement"), ("forced", "top1_agreement"), ("predicted", "predicted_intact")):  # fmt: skip
        table[lost], table[f"{lost}_low"], table[f"{lost}_high"] = (1 - table[f"{kept}{edge}"] for edge in ("", "_high", "_low"))  # fmt: skip
    return table


def generation_loss(tables: Tables) -> go.Figure:
    """Forced loss beside what changes in writing, per block; numbers are ranks, 1 the largest."""
    table = _losses(tables["generation_layers"])
    figure = side_by_side([title for _, title, _ in _PANELS])
    for colour, (part, rows) in coloured(table, "part"):
        for column, (name, _, _) in enumerate(_PANELS, 1):
            rank = rows[name].rank(ascending=False, method="min").astype(int)
            figure.add_scatter(
                x=rows[name], y=rows["layer"], mode="markers+text", text=rank, textposition="middle right", name=f"without {part}",
                legendgroup=part, showlegend=column == 1, marker={"color": colour, "size": 7}, textfont={"size": 9},
                error_x=whiskers(rows[name], rows[f"{name}_low"], rows[f"{name}_high"]), row=1, col=column,
            )  # fmt: skip
        for column, name, label in ((2, "predicted", "if tokens differed independently"), (3, "forced", "when the plain text is read")):  # fmt: skip
            figure.add_scatter(
                x=rows[name], y=rows["layer"], mode="markers", name=label, legendgroup=label, showlegend=bool(colour == COLOURS[0]),
                marker={"color": "black", "symbol": "line-ns-open", "size": 10}, row=1, col=column,
            )  # fmt: skip
    units = [unit for _, _, unit in _PANELS]
    return finish(figure, x=units, y=("layer left out",), height=640, legend=1.08, top=90)


def answers(tables: Tables) -> go.Figure:
    """Accuracy by the logits and by what is written, per block left out."""
    table, figure = tables["generation_layers"], go.Figure()
    plain = tables["generation"].query("part == 'none'")
    for colour, (name, label, own) in zip(
        COLOURS, (("accuracy_logits", "by the logits", "right_logits"), ("accuracy_generated", "by what is written", "right_generated")), strict=False
    ):  # fmt: skip
        for part, rows in table.groupby("part", sort=False):
            figure.add_scatter(
                x=rows[name], y=rows["layer"], mode="markers", name=f"{label}, without {part}", marker={"color": colour, "size": 8},
                error_x=whiskers(rows[name], rows[f"{name}_low"], rows[f"{name}_high"]),
            )  # fmt: skip
        figure.add_vline(x=float(plain[own].mean()), line={"color": colour, "dash": "dot"})
    x = "share of right answers (dotted: nothing left out)"
    return finish(figure, x=x, y="layer left out", height=600, legend=1.06, top=90)


GENERATION_FIGURES = {
    "generation": FigureSpec(
        "What likelihood hides: the text that is written without a block",
        "Left: the rise of the loss on the plain model's own text when one block is left out, the text being read, not written. Middle: the share of prompts after which the "
        "greedy text changes anywhere; black: what the share of tokens that differ on the plain text would give if they fell independently. Right: the share of tokens that change at their index; "
        "black: the same while the plain text is read. Colour to the right of black means that differences feed on themselves. Numbers are ranks, 1 the largest. "
        "Whiskers are 95 % intervals over prompts (Wilson in the middle), none below six prompts.",
        generation_loss,
        lambda tables: "generation_layers" in tables,
    ),
    "generation_answers": FigureSpec(
        "Right answers without a block, by logits and in writing",
        "For each block left out: how often the right answer has the highest logit right after the prompt, and how often the greedy text says it. Whiskers are 95 % Wilson intervals; "
        "dotted lines are the plain model's two accuracies on the same prompts.",
        answers,
        lambda tables: "generation_layers" in tables and bool(tables["generation"]["right_generated"].notna().any()),
    ),
}
