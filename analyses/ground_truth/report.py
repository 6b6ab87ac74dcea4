"""The page of a run: its claims in words, its figures, its table, and the answers that are farthest off."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from analyses.ground_truth.figures import FIGURES
from analyses.ground_truth.score import KEYS, Scored
from analyses.ground_truth.words import sentences
from analyses.results.page import figure_html, page, table_cells
from probes.planted.record import Record

SHOWN = (
    "error", "within_1", "bias_first", "covered", "width", "skill", "auroc", "average_precision", "f1", "jaccard",
    "false_positive", "miss", "declined",
)  # fmt: skip
"""Columns of the summary on the page; the table file has all."""
WORST = 20
"""Answers listed."""
WARNING = (
    "These models are small, sparse and do not repair themselves. A method that fails here fails; one that does well here "
    "need not do well on a model that was trained: good scores are necessary, not sufficient."
)


def render(records: Sequence[Record], scored: Scored, *, digest: str, seconds: float, notes: Sequence[str] = ()) -> str:
    """Return the page of a run as text.

    Args:
        digest: of all answers.
        notes: of runs that were refused.
    """
    tables = {"rows": scored.rows, "summary": scored.summary}
    claims = scored.summary[~scored.summary["method"].str.startswith("control")]
    return page(
        "ground_truth.html",
        title="How far off each method is",
        warning=WARNING,
        digest=digest,
        tasks=len(records),
        questions=sum(len(record.questions) for record in records),
        uncertified=[record.task for record in records if not record.certificate.get("agrees")],
        tiers=sorted({record.tier for record in records}),
        seconds=f"{seconds:.0f}",
        words=sentences(claims),
        figures=[_figure(name, tables) for name, spec in FIGURES.items() if spec.applies(tables)],
        summary=table_cells(scored.summary[[*KEYS, "n", "n_nothing", *SHOWN, "forwards"]], ".2f"),
        worst=table_cells(worst(scored.rows), ".2f"),
        notes=notes,
    )


def worst(rows: pd.DataFrame, n: int = WORST) -> pd.DataFrame:
    """Return the answers that are farthest off, in layers or by their set, controls left out."""
    own = rows[~rows["method"].str.startswith("control")]
    badness = (
        own["error_share"].fillna(0)
        + (1 - own["f1"]).fillna(0)
        + own["false_positive"].fillna(0)
        + own["miss"].fillna(0)
    )
    columns = ["method", "task", "question", "decision", "error", "bias_first", "bias_last", "auroc", "f1"]
    return own.assign(badness=badness).nlargest(n, "badness")[columns]


def _figure(name: str, tables: dict[str, pd.DataFrame]) -> dict[str, str]:
    spec = FIGURES[name]
    return {"title": spec.title, "caption": spec.caption, "html": figure_html(str(spec.drawn(tables).to_json()), name)}
