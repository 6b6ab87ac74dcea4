"""Names that a library imports lazily are what they stand for as soon as they are used, for that library alone."""

from __future__ import annotations

import builtins
import subprocess
import sys
import types
from importlib import import_module
from pathlib import Path

import pytest

from probes.models import lazy_imports

LIBRARY = """
import bulky as whole
from bulky import Table, load
from bulky.inner import depth

class Empty: pass

MARK = load("mark")

def rows(table: whole.Table | None, other: Empty | Table) -> whole.Table:
    return load(table) if isinstance(table, Table) else whole.NOTHING
"""
PACKAGE = """
NOTHING = object()
class Table: pass
def load(table): return [table]
"""
LOAD = """
import sys
from probes.models.imported import import_all
import_all()
heavy = {"datasets", "pandas", "pyarrow", "pytest", "scipy"} & sys.modules.keys()
assert not heavy, heavy
from transformer_lens.utilities.hf_utils import keep_single_column
from transformers.loss.loss_for_object_detection import linear_sum_assignment
from datasets import Dataset
table = keep_single_column(Dataset.from_dict({"text": ["a"], "other": [1]}), "text")
assert table.column_names == ["text"]
assert linear_sum_assignment([[1, 0], [0, 1]])[1].tolist() == [1, 0]
"""


def test_a_lazy_name_is_imported_when_used_and_only_by_the_library_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bulky").mkdir()
    (tmp_path / "bulky" / "__init__.py").write_text(PACKAGE)
    (tmp_path / "bulky" / "inner.py").write_text("depth = [3]")
    for name in ("reader", "stranger"):
        (tmp_path / f"{name}.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(lazy_imports, "LAZY", {"reader": frozenset({"bulky"})})
    ordinary = builtins.__import__
    with lazy_imports.lazy_imports():
        reader = import_module("reader")
        assert "bulky" not in sys.modules
        stranger = import_module("stranger")
        bulky = sys.modules["bulky"]
        assert stranger.whole is bulky
        assert stranger.Table is bulky.Table
    assert builtins.__import__ is ordinary
    table = bulky.Table()
    assert reader.rows(table, None) == [table]
    assert reader.rows(None, None) is bulky.NOTHING
    assert reader.depth.index(3) == 0
    assert reader.MARK.count("mark") == 1
    assert issubclass(bulky.Table, reader.Table)
    assert not issubclass(int, reader.Table)
    assert types.new_class("Own", (reader.Table,)).__mro__[1] is bulky.Table
    assert isinstance(table, reader.whole.Table)


def test_loading_a_model_imports_no_package_of_the_table_and_its_functions_still_work() -> None:
    subprocess.run([sys.executable, "-c", LOAD], check=True, cwd=Path(__file__).parents[1])
