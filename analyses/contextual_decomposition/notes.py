"""What is said of a run as a whole."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analyses.contextual_decomposition.prepared_cases import PreparedCases, Scored
from probes.models.protocol import Model

PAPER = (
    "The paper's rules keep the model's own epsilons: the released code puts 1e-8 in place of each norm's, so that its parts "
    "sum to the logits of another model; here they sum to this one's."
)


def coverage_note(model: Model, n_heads: int) -> list[str]:
    """Say so where only some heads were scored."""
    every = model.shape.n_layers * model.shape.n_heads
    if n_heads == every:
        return []
    return [
        f"{n_heads} of {every} heads were scored and ablated; in every circuit the others stay as they are, and shares and "
        "agreement are over those heads alone."
    ]


def form_note(prepared: PreparedCases, scored: Scored) -> str:
    """Say how many prompts have positions that mean the same."""
    return (
        f"Positions mean the same only in prompts of one form and length: heads at single positions, the circuit and its "
        f"faithfulness use {len(scored.prompts)} of {len(prepared.cases)} prompts."
    )


def span_notes(cases: pd.DataFrame) -> list[str]:
    """Say so where ablating every head moves the metric little, or up."""
    span = float(np.mean(cases["metric"] - cases["metric_ablated"]))
    size = float(np.mean(np.abs(cases["metric"])))
    if abs(span) < 0.1 * size or span < 0:
        return [
            f"Ablating every head moves the metric from {cases['metric'].mean():.2f} to {cases['metric_ablated'].mean():.2f} "
            "on average: with so small or negative a span, faithfulness says little."
        ]
    return []
