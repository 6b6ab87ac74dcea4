"""A saved result that was damaged or changed is refused in one line, whatever is wrong with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from malformed import cases
from tiny import PROMPTS, native

from analyses.logit_lens import LogitLens
from analyses.results.report import write_report
from analyses.results.result import Result
from probes.errors import OptionError
from probes.store import ActivationStore

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from([10**30, "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    return LogitLens().run(native(), PROMPTS[:1], store=ActivationStore(root / "store")).save(root / "run")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    (tmp_path / "tables").mkdir()
    restore(saved, tmp_path)
    return tmp_path


def restore(saved: Path, folder: Path) -> None:
    for path in [saved / "result.json", *saved.glob("tables/*.parquet")]:
        shutil.copy(path, folder / path.relative_to(saved))


def use(folder: Path, drawn: bool = True) -> None:
    """Everything a user does with a saved result; it works, or an OptionError says why not."""
    with suppress(OptionError):
        result = Result.load(folder)
        repr(result)
        result._repr_html_()
        for name in result.profiles:
            result.profile(name)
        for name in result.figures if drawn else ():
            result.figure(name)
        if drawn:
            write_report([result], folder / "page.html")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield from places(inner, (*path, key))


def put(record: Any, path: tuple[Any, ...], value: Any, remove: bool) -> Any:
    if not path:
        return value
    inside = record
    for key in path[:-1]:
        inside = inside[key]
    if remove:
        del inside[path[-1]]
    else:
        inside[path[-1]] = value
    return record


@cases(60)
@given(data=st.data())
def test_any_entry_of_the_record_may_say_anything(saved: Path, folder: Path, data: st.DataObject) -> None:
    restore(saved, folder)
    record = json.loads((saved / "result.json").read_text())
    path = data.draw(st.sampled_from(list(places(record))))
    changed = put(record, path, data.draw(JSON), data.draw(st.booleans()))
    (folder / "result.json").write_text(json.dumps(changed))
    use(folder, drawn=len(path) > 1)


@cases(150)
@given(data=st.data())
def test_any_bytes_may_be_cut_or_changed(saved: Path, folder: Path, data: st.DataObject) -> None:
    restore(saved, folder)
    path = data.draw(st.sampled_from(sorted([folder / "result.json", *folder.glob("tables/*.parquet")])))
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        for _ in range(data.draw(st.integers(1, 5))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    use(folder, drawn=False)


COLUMNS = (
    st.lists(st.none() | st.text(max_size=3), min_size=2, max_size=2)
    | st.lists(st.floats(), min_size=2, max_size=2)
    | st.lists(st.integers(-(2**62), 2**62), min_size=2, max_size=2)
    | st.lists(st.binary(max_size=3), min_size=2, max_size=2)
)


@cases(24)
@given(data=st.data())
def test_tables_may_be_of_another_making(saved: Path, folder: Path, data: st.DataObject) -> None:
    """Columns missing, renamed or of another type, in agreement with the record."""
    restore(saved, folder)
    record = json.loads((saved / "result.json").read_text())
    name = data.draw(st.sampled_from(sorted(record["tables"])))
    names = data.draw(st.lists(st.sampled_from([*record["tables"][name], "other"]), unique=True))
    table = pd.DataFrame({column: data.draw(COLUMNS) for column in names})
    table.to_parquet(folder / "tables" / f"{name}.parquet", index=False)
    record["tables"][name] = names
    (folder / "result.json").write_text(json.dumps(record))
    use(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": ' + "9" * 5000 + "}", "null", '"x"', '{"format": []}'])
def test_json_that_no_record_is(folder: Path, text: str) -> None:
    (folder / "result.json").write_text(text)
    with pytest.raises(OptionError, match=r"holds no readable result|result format"):
        Result.load(folder)


def test_a_fault_of_ours_is_not_hidden(saved: Path) -> None:
    """Only what was loaded may be blamed on its tables."""
    loaded = Result.load(saved)
    fresh = Result(loaded.analysis, loaded.options, {}, loaded.provenance)
    with pytest.raises(KeyError):
        fresh.figure("lens")
