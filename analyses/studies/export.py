"""Tables of a study for other tools: CSV, and LaTeX to paste into a paper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from analyses.registry import get_analysis
from analyses.studies.tidy_tables import gather, summary
from probes.errors import OptionError

DIGITS = 3
"""Digits after the point in LaTeX; CSV keeps every one."""


def write_tables(folder: Path, index: pd.DataFrame, profiles: pd.DataFrame, curve: pd.DataFrame) -> None:
    """`index`, `profiles` and `curves` as CSV; `summary` as CSV and LaTeX."""
    folder.mkdir(exist_ok=True)
    short = summary(curve)
    for name, table in (("index", index), ("profiles", profiles), ("curves", curve), ("summary", short)):
        table.to_csv(folder / f"{name}.csv", index=False)
    # Columns that say the same on every line belong into the caption, not the table.
    kept = [
        c
        for c in short.columns
        if c not in ("profile", "analysis") and (short[c].nunique(dropna=False) > 1 or c == "peak_depth")
    ]
    (folder / "summary.tex").write_text(
        latex(short[kept], "Where along relative depth each profile peaks."), encoding="utf-8"
    )


def latex(table: pd.DataFrame, caption: str) -> str:
    """The table as LaTeX with booktabs rules."""
    text = table.to_latex(
        index=False, escape=True, float_format=f"%.{DIGITS}f", caption=caption, na_rep="--", longtable=len(table) > 40
    )
    return str(text)


def export_table(root: Path, index: pd.DataFrame, asked: str) -> list[Path]:
    """One table of one analysis, `ANALYSIS.TABLE`, from all cells; CSV and LaTeX.

    Raises:
        OptionError: an unknown analysis, or no finished cell that has the table; names the tables there are.
    """
    analysis, _, table = asked.partition(".")
    get_analysis(analysis)
    found = gather(index, root, analysis, table)
    if not len(found.columns):
        results = index[(index["analysis"] == analysis) & (index["state"] == "done")]["result"]
        held = sorted({file.stem for path in results for file in (root / path / "tables").glob("*.parquet")})
        legal = ", ".join(f"{analysis}.{name}" for name in held) or f"none: no cell of {analysis} is done"
        raise OptionError(f"no table {asked!r} in this study. Legal: {legal}.")
    (root / "tables").mkdir(exist_ok=True)
    csv, tex = (root / "tables" / f"{asked}.{ending}" for ending in ("csv", "tex"))
    found.to_csv(csv, index=False)
    tex.write_text(latex(found, f"Table {table} of {analysis}."), encoding="utf-8")
    return [csv, tex]


def export_tables(root: Path, index: pd.DataFrame, asked: Sequence[str]) -> list[Path]:
    """Several tables; see `export_table`."""
    return [path for one in asked for path in export_table(root, index, one)]
