"""Tables of a study for other tools: CSV, and LaTeX to paste into a paper."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from analyses.registry import get_analysis
from analyses.studies.tidy_tables import gather, summary
from probes.errors import OptionError

DIGITS = 3
"""Digits after the point in LaTeX; CSV keeps every one."""


def write_tables(folder: Path, index: pd.DataFrame, profiles: pd.DataFrame, curve: pd.DataFrame) -> None:
    """Write `index`, `profiles` and `curves` as CSV, `summary` as CSV and LaTeX."""
    folder.mkdir(exist_ok=True)
    short = summary(curve)
    for name, table in (("index", index), ("profiles", profiles), ("curves", curve), ("summary", short)):
        table.to_csv(folder / f"{name}.csv", index=False)
    # Columns that say the same on every line belong into the caption, not the table.
    same = {name for name in short.columns if short[name].nunique(dropna=False) <= 1} - {"peak_depth"}
    text = latex(
        short.drop(columns=list(same | {"profile", "analysis"})), "Where along relative depth each profile peaks."
    )
    (folder / "summary.tex").write_text(text, encoding="utf-8")


def latex(table: pd.DataFrame, caption: str) -> str:
    """Return the table as LaTeX with booktabs rules."""
    text = table.to_latex(
        index=False, escape=True, float_format=f"%.{DIGITS}f", caption=caption, na_rep="--", longtable=len(table) > 40
    )
    return str(text)


def export_table(root: Path, index: pd.DataFrame, name: str) -> list[Path]:
    """Write one table of one analysis, `ANALYSIS.TABLE`, from all cells, as CSV and LaTeX; return the files.

    Raises:
        OptionError: an unknown analysis, or no finished cell that has the table; names the tables there are.
    """
    analysis, _, table = name.partition(".")
    get_analysis(analysis)
    rows = gather(index, root, analysis, table)
    if not len(rows.columns):
        results = index[(index["analysis"] == analysis) & (index["state"] == "done")]["result"]
        tables = sorted({file.stem for path in results for file in (root / path / "tables").glob("*.parquet")})
        legal = ", ".join(f"{analysis}.{table}" for table in tables) or f"none: no cell of {analysis} is done"
        raise OptionError(f"no table {name!r} in this study. Legal: {legal}.")
    (root / "tables").mkdir(exist_ok=True)
    csv, tex = (root / "tables" / f"{name}.{ending}" for ending in ("csv", "tex"))
    rows.to_csv(csv, index=False)
    tex.write_text(latex(rows, f"Table {table} of {analysis}."), encoding="utf-8")
    return [csv, tex]
