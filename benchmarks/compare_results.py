"""Compare two saved results, or two trees of them, table by table; exit with 1 where they differ.

    python benchmarks/compare_results.py runs/before runs/after --rtol 1e-6

Columns, their order, rows and everything that is no fraction must be equal; fractions may differ by `rtol` of the old value
plus `atol`. The largest difference of each table is printed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class Comparison:
    """How two tables of the same name compare."""

    name: str
    rows: int = 0
    largest: float = 0.0
    """The largest absolute difference of two fractions."""
    column: str = ""
    """Where it is."""
    fault: str = ""
    """In what the tables differ beyond the tolerance; empty where in nothing."""

    def __str__(self) -> str:
        largest = f"largest difference {self.largest:.3g}" + (f" in {self.column}" if self.column else "")
        return f"{self.name}: " + (f"DIFFERS: {self.fault}" if self.fault else f"{self.rows} rows, {largest}")


def tables_of(folder: Path) -> dict[str, Path]:
    """Return the tables of every result in `folder` or below it, by result and name."""
    return {
        (path.parent.relative_to(folder) / "tables" / table.stem).as_posix(): table
        for path in sorted(folder.rglob("result.json"))
        for table in sorted(path.parent.glob("tables/*.parquet"))
    }


def compare_trees(old: Path, new: Path, rtol: float, atol: float = 0.0) -> list[Comparison]:
    """Compare every table below two folders; one that only one of them has is a difference."""
    before, after = tables_of(old), tables_of(new)
    comparisons = []
    for name in sorted(before | after):
        if name not in before or name not in after:
            comparisons.append(Comparison(name, fault=f"only in {old if name in before else new}"))
        else:
            tables = pd.read_parquet(before[name]), pd.read_parquet(after[name])
            comparisons.append(compare_tables(name, *tables, rtol, atol))
    return comparisons


def compare_tables(name: str, old: pd.DataFrame, new: pd.DataFrame, rtol: float, atol: float = 0.0) -> Comparison:
    """Compare two tables."""
    if list(old.columns) != list(new.columns):
        return Comparison(name, fault=f"columns {list(old.columns)} and {list(new.columns)}")
    if len(old) != len(new):
        return Comparison(name, fault=f"{len(old)} and {len(new)} rows")
    largest, where, faults = 0.0, "", []
    for column in old.columns:
        difference, unequal = _compare_columns(old[column], new[column], rtol, atol)
        if unequal.any():
            row = int(np.argmax(unequal))
            values = f"{old[column].iloc[row]!r} and {new[column].iloc[row]!r}"
            faults.append(f"{column} in {int(unequal.sum())} rows, first in row {row}: {values}")
        if difference > largest:
            largest, where = difference, str(column)
    return Comparison(name, len(old), largest, where, "; ".join(faults))


def _compare_columns(old: pd.Series[Any], new: pd.Series[Any], rtol: float, atol: float) -> tuple[float, np.ndarray]:
    """(largest difference of two fractions, which rows differ beyond the tolerance)."""
    if not (pd.api.types.is_float_dtype(old) and pd.api.types.is_float_dtype(new)):
        return 0.0, np.array([_text(a) != _text(b) for a, b in zip(old, new, strict=True)], dtype=bool)
    before, after = old.to_numpy(float), new.to_numpy(float)
    differences = np.abs(before - after)[np.isfinite(before) & np.isfinite(after)]
    unequal = ~np.isclose(after, before, rtol=rtol, atol=atol, equal_nan=True)
    return float(differences.max(initial=0.0)), unequal


def _text(value: Any) -> str:
    return repr(value.tolist() if isinstance(value, np.ndarray | np.generic) else value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print how two folders compare; return 1 where they differ, and 2 where there is nothing to compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--rtol", type=float, default=1e-6)
    parser.add_argument("--atol", type=float, default=1e-9)
    options = parser.parse_args(arguments)
    comparisons = compare_trees(options.old, options.new, options.rtol, options.atol)
    for comparison in comparisons:
        print(comparison)
    differing = sum(bool(comparison.fault) for comparison in comparisons)
    print(f"{len(comparisons)} tables compared, {differing} differ")
    return 2 if not comparisons else int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
