"""Two trees of saved results compared table by table."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.compare_results import compare_tables, main

TABLE = pd.DataFrame(
    {"layer": [0, 1], "token": ["a", "b"], "value": [1.0, np.nan], "ids": [np.array([1, 2]), np.array([3])]}
)


@pytest.fixture
def trees(tmp_path: Path) -> tuple[Path, Path]:
    old = tmp_path / "old"
    for result in ("voids", "deep/lens"):
        (old / result / "tables").mkdir(parents=True)
        (old / result / "result.json").write_text("{}")
        TABLE.to_parquet(old / result / "tables" / "usage.parquet", index=False)
    shutil.copytree(old, tmp_path / "new")
    return old, tmp_path / "new"


def run(trees: tuple[Path, Path], *flags: str) -> int:
    return main([*map(str, trees), *flags])


def test_equal_trees_and_equal_results_pass(trees: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(trees) == 0
    assert "2 tables compared, 0 differ" in capsys.readouterr().out
    assert run((trees[0] / "voids", trees[1] / "voids")) == 0


def test_a_difference_within_the_tolerance_is_said_and_passes(
    trees: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    TABLE.assign(value=[1.0 + 1e-7, np.nan]).to_parquet(trees[1] / "voids/tables/usage.parquet", index=False)
    assert run(trees) == 0
    assert "voids/tables/usage: 2 rows, largest difference 1e-07 in value" in capsys.readouterr().out
    assert run(trees, "--rtol", "1e-8") == 1


@pytest.mark.parametrize(
    "new",
    [
        TABLE.assign(value=[1.1, np.nan]),
        TABLE.assign(value=[1.0, 0.0]),
        TABLE.assign(layer=[0, 2]),
        TABLE.assign(token=["a", "c"]),
        TABLE.assign(ids=[np.array([1, 2]), np.array([4])]),
        TABLE.rename(columns={"token": "word"}),
        TABLE[["token", "layer", "value", "ids"]],
        TABLE.iloc[:1],
    ],
    ids=range(8),
)
def test_every_kind_of_difference_is_found(new: pd.DataFrame) -> None:
    assert not compare_tables("t", TABLE, TABLE, 1e-6).fault
    assert compare_tables("t", TABLE, new, 1e-6).fault


def test_a_table_that_one_tree_lacks_and_no_table_at_all(trees: tuple[Path, Path], tmp_path: Path) -> None:
    (trees[1] / "voids/tables/usage.parquet").unlink()
    assert run(trees) == 1
    assert run((tmp_path / "nothing", tmp_path / "nothing")) == 2
