"""Nodes that the rules do not see: ablating them costs a good part of the metric, and they have no relevance."""

from __future__ import annotations

import pandas as pd

from analyses.results.card import Tables

SHARE = 0.1
"""Part of the metric that a node's ablation must cost, by the whole of its interval, for its lack of relevance to be said."""
NAMED = 6
"""Nodes that the note names; more are counted."""


def unseen(tables: Tables) -> list[str]:
    """Return heads (`7.2`) and MLPs (`mlp 4`) whose ablation costs at least `SHARE` and whose relevance is not told from zero."""
    limit = SHARE * abs(float(tables["cases"]["metric"].mean()))
    names: list[str] = []
    for kind in ("heads", "mlps"):
        table = tables.get(kind)
        if table is None or "ablation" not in table:
            continue
        costly = (table["ablation_low"] > limit) | (table["ablation_high"] < -limit)
        silent = (table["ci_low"] <= 0) & (table["ci_high"] >= 0)
        names += [_name(kind, row) for _, row in table[costly & silent].iterrows()]
    return names


def _name(kind: str, row: pd.Series) -> str:
    return f"{int(row['layer'])}.{int(row['head'])}" if kind == "heads" else f"mlp {int(row['layer'])}"


def unseen_note(tables: Tables, frozen_gate: bool) -> list[str]:
    """Return what to say of such nodes; nothing where there are none, or too few prompts for intervals.

    Args:
        frozen_gate: whether the model's MLPs have gates and the rules hold them constant.
    """
    names = unseen(tables)
    if not names:
        return []
    listed = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
    said = f"Ablating any of these changes the metric by more than {SHARE:.0%}, and none has relevance under these rules: {listed}."
    if frozen_gate:
        said += (
            " Rule gate frozen holds each MLP's gate constant, so what acts only through a gate has no relevance; "
            "--gate joint sees it, where its scores stay finite."
        )
    return [said]
