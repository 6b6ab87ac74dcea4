"""Saving over what is there: what is refused, what stays, and what a kill or a full disk leaves."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import analyses.results.exchange
from analyses.results.exchange import swap
from analyses.results.result import Result, check_output
from analyses.studies.study_folder import StudyFolder
from probes.errors import OptionError

STEPS = ((Path, "rename"), (Path, "unlink"), (Path, "mkdir"), (Path, "rmdir"), (shutil, "rmtree"))
STEPS = (*STEPS, (shutil, "copymode"), (analyses.results.exchange, "swap"))
"""What saving changes on the disk besides writing files."""


KILLS = int(os.environ.get("BATHYSCOPE_TEST_KILLS", "25"))
PROVENANCE = {
    "model": {"ref": "m", "layers": 3},
    **dict.fromkeys(("backend", "dtype", "attention", "device"), "x"),
    "seconds": 1.0,
    "counts": {"prompts": 1, "tokens": 2, "forwards": 1, "held_before": 0},
    "faithfulness": {"holds": True, "identities": []},
}


@pytest.fixture
def result(monkeypatch: pytest.MonkeyPatch) -> Result:
    """A result with tables and no figures, which is quick to save."""
    for name in ("figures", "profiles"):
        monkeypatch.setattr(Result, name, property(lambda self: {}))
    tables = {name: pd.DataFrame({"x": range(4000)}) for name in ("rows", "more")}
    return Result("logit_lens", {}, tables, PROVENANCE)


def noted(result: Result, note: str) -> Result:
    """The same result, told apart by a note."""
    return Result(result.analysis, result.options, result.tables, result.provenance, (note,))


def workspaces(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.fixture(params=["one step", "two renames"])
def exchanged(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Saves with and without an exchange in one step."""
    if request.param == "two renames":
        monkeypatch.setattr(analyses.results.exchange, "swap", lambda *_: False)
    return request.param


def device(path: Path) -> None:
    os.mknod(path, 0o600 | 0o020000, os.makedev(1, 3))


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def link_to_folder(path: Path) -> None:
    (path.parent / "elsewhere").mkdir()
    path.symlink_to("elsewhere")


NODES: dict[str, Callable[[Path], None]] = {
    "a file": lambda path: path.write_text("x") and None,
    "a named pipe": lambda path: os.mkfifo(path),
    "a socket": unix_socket,
    "a symbolic link": link_to_folder,
    "a symbolic link ": lambda path: path.symlink_to("nowhere"),
    "a symbolic link  ": lambda path: path.symlink_to(path.name),
}
if os.geteuid() == 0:
    NODES["a device"] = device


@pytest.mark.parametrize("kind", NODES)
def test_what_is_no_folder_is_refused_and_stays(result: Result, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "out"
    NODES[kind](path)
    before = os.lstat(path)
    for refuse in (check_output, result.save, lambda folder: StudyFolder(folder).check()):
        with pytest.raises(OptionError, match=rf"out' is {kind.strip()}: give a new or empty folder"):
            refuse(path)
    assert os.path.samestat(os.lstat(path), before)
    assert workspaces(tmp_path) == []


@pytest.mark.parametrize("out", ["x" * 300, "a\0b", "file/inside", "/"])
def test_folders_that_cannot_be_made_are_refused(result: Result, tmp_path: Path, out: str) -> None:
    (tmp_path / "file").touch()
    for refuse in (check_output, result.save):
        with pytest.raises(OptionError, match=r"give another folder|give a new or empty folder|give a folder inside"):
            refuse(tmp_path / out)


def test_a_system_that_refuses_is_quoted(result: Result) -> None:
    with pytest.raises(OptionError, match=r"/proc/none/run.*what stood there stands"):
        result.save("/proc/none/run")


@pytest.mark.parametrize("content", ["{}", "[]", "not json", '{"format": 1}', '{"format": 9, "analysis": "voids"}'])
def test_a_result_json_of_someone_else_is_refused(result: Result, tmp_path: Path, content: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text(content)
    with pytest.raises(OptionError, match=r"not a result|of format 9"):
        result.save(tmp_path / "run")
    assert (tmp_path / "run" / "result.json").read_text() == content


def test_what_comes_to_the_place_during_the_save_is_refused_too(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def come(*_: object) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "thesis.tex").write_text("x")

    monkeypatch.setattr("analyses.results.result.write_report", come)
    with pytest.raises(OptionError, match="not a result"):
        result.save(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]
    assert workspaces(tmp_path) == []


def test_what_comes_between_the_check_and_the_exchange_is_given_back(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanged: str
) -> None:
    folder = result.save(tmp_path / "run")
    exchange = analyses.results.exchange.swap

    def late(one: Path, other: Path) -> bool:
        if not (tmp_path / "was").exists():
            folder.rename(tmp_path / "was")
            folder.mkdir()
            (folder / "thesis.tex").write_text("x")
        return exchange(one, other)

    monkeypatch.setattr(analyses.results.exchange, "swap", late)
    with pytest.raises(OptionError, match="not a result"):
        result.save(folder)
    assert Result.load(tmp_path / "was").notes == result.notes
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]
    assert workspaces(tmp_path) == []


def test_only_its_own_files_are_replaced(result: Result, tmp_path: Path, exchanged: str) -> None:
    folder = noted(result, "first").save(tmp_path / "run")
    (folder / "notes.md").write_text("mine")
    (folder / "tables" / "mine.csv").write_text("1,2")
    (folder / "paper" / "figures").mkdir(parents=True)
    (folder / "paper" / "figures" / "one.pdf").write_text("%")
    (folder / "link").symlink_to("nowhere")
    noted(result, "nested").save(folder / "again")
    open_file = (folder / "notes.md").open("a")
    stale = folder / "tables" / "stale.parquet"
    shutil.copy(folder / "tables" / "rows.parquet", stale)
    record = json.loads((folder / "result.json").read_text())
    record["files"].append("tables/stale.parquet")
    (folder / "result.json").write_text(json.dumps(record))
    noted(result, "second").save(folder)
    with open_file:
        open_file.write(" still")
    assert Result.load(folder).notes == ("second",)
    assert Result.load(folder / "again").notes == ("nested",)
    assert (folder / "notes.md").read_text() == "mine still"
    assert (folder / "tables" / "mine.csv").read_text() == "1,2"
    assert (folder / "paper" / "figures" / "one.pdf").read_text() == "%"
    assert (folder / "link").is_symlink()
    assert not stale.exists()
    assert workspaces(tmp_path) == []


def test_results_that_do_not_list_their_files_are_replaced_whole(result: Result, tmp_path: Path) -> None:
    """As the first release wrote them."""
    folder = result.save(tmp_path / "run")
    record = json.loads((folder / "result.json").read_text())
    listed = record.pop("files")
    (folder / "result.json").write_text(json.dumps(record))
    (folder / "notes.md").write_text("mine")
    assert check_output(folder) >= set(listed)
    noted(result, "second").save(folder)
    assert Result.load(folder).notes == ("second",)
    assert (folder / "notes.md").read_text() == "mine"
    assert not list(folder.rglob("*.kept*"))


def test_a_file_in_the_way_is_named_and_stays(result: Result, tmp_path: Path) -> None:
    folder = result.save(tmp_path / "run")
    record = json.loads((folder / "result.json").read_text())
    record["files"].remove("tables/rows.parquet")
    (folder / "result.json").write_text(json.dumps(record))
    (folder / "tables" / "rows.parquet").write_text("mine")
    with pytest.raises(OptionError, match=r"tables/rows.parquet' was not written by the result.*move it away"):
        noted(result, "second").save(folder)
    assert (folder / "tables" / "rows.parquet").read_text() == "mine"
    assert workspaces(tmp_path) == []


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.sets(
        st.lists(st.sampled_from(["tables", "figures", "a", "b", "result.json", "x.parquet"]), min_size=1, max_size=4)
        .map("/".join)
        .filter(lambda name: name != "result.json"),
        max_size=8,
    ),
    two_renames=st.booleans(),
)
def test_every_file_that_is_not_the_result_s_stays(
    result: Result, tmp_path_factory: pytest.TempPathFactory, names: set[str], two_renames: bool
) -> None:
    folder = result.save(tmp_path_factory.mktemp("runs") / "run")
    kept = {}
    for name in sorted(names):
        path = folder / name
        if not path.exists() and not any((folder / parent).is_file() for parent in Path(name).parents):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
            kept[name] = name
    with pytest.MonkeyPatch.context() as patch:
        if two_renames:
            patch.setattr(analyses.results.exchange, "swap", lambda *_: False)
        try:
            noted(result, "second").save(folder)
        except OptionError:
            # `tables` or `figures` themselves cannot be taken: they are folders of the result by now.
            raise AssertionError("nothing here is in the way") from None
    assert Result.load(folder).notes == ("second",)
    assert {name: (folder / name).read_text() for name in kept} == kept
    written = set(json.loads((folder / "result.json").read_text())["files"])
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == written | set(kept)


def dies_at(step: int, act: Callable[[], object]) -> bool:
    """Whether a child that is killed before the given change of the disk was killed at all."""
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL)
        return status != 0
    count = 0

    def counted(original: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal count
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return original(*args, **kwargs)

        return call

    for owner, name in STEPS:
        setattr(owner, name, counted(getattr(owner, name)))
    try:
        act()
        os._exit(0)
    finally:
        os._exit(1)


def test_killed_before_any_step_the_old_or_the_new_result_stands(
    result: Result, tmp_path: Path, exchanged: str
) -> None:
    """Between two renames only the next who opens the folder can mend it; with an exchange nothing needs mending."""
    folder, step, seen = tmp_path / "run", 0, []
    noted(result, "old").save(folder)
    (folder / "notes.md").write_text("mine")
    (folder / "figures" / "mine.png").write_text("mine")
    while dies_at(step, lambda: noted(result, "new").save(folder)):
        if exchanged == "one step":
            assert (folder / "result.json").is_file(), "before anyone mends"
        seen.append(Result.load(folder).notes[0])
        assert (folder / "notes.md").read_text() == "mine"
        assert (folder / "figures" / "mine.png").read_text() == "mine"
        assert workspaces(tmp_path) == [], "who opens it sweeps"
        noted(result, "old").save(folder)
        assert workspaces(tmp_path) == []
        step += 1
    assert seen == sorted(seen, reverse=True)
    assert set(seen) == {"old", "new"}
    assert step > 10


def save_for_ever(result: Result, folder: Path) -> None:
    number = 0
    while True:
        number += 1
        noted(result, str(number)).save(folder)


def test_sigkill_at_random_moments(result: Result, tmp_path: Path) -> None:
    folder, rng = tmp_path / "run", random.Random(0)
    noted(result, "0").save(folder)
    (folder / "notes.md").write_text("mine")
    whole = {name: len(table) for name, table in result.tables.items()}
    for _ in range(KILLS):
        child = os.fork()
        if not child:
            save_for_ever(result, folder)
        time.sleep(rng.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert (folder / "result.json").is_file()
        loaded = Result.load(folder)
        assert {name: len(table) for name, table in loaded.tables.items()} == whole
        assert (folder / "notes.md").read_text() == "mine"
        noted(result, "0").save(folder)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_drafts_of_living_processes_and_of_others_are_left_alone(result: Result, tmp_path: Path) -> None:
    stranger = tmp_path / ".bathyscope-notes"
    stranger.mkdir()
    with analyses.results.exchange.replacing(tmp_path / "other", check_output) as draft:
        (draft / "half").write_text("x")
        result.save(tmp_path / "run")
        Result.load(tmp_path / "run")
        assert (draft / "half").read_text() == "x"
    assert (tmp_path / "other" / "half").exists()
    assert workspaces(tmp_path) == [stranger]


@pytest.mark.parametrize("limit", [0, 3000, 60_000])
def test_a_full_disk_says_so_and_the_old_result_stands(result: Result, tmp_path: Path, limit: int) -> None:
    folder = noted(result, "old").save(tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            noted(result, "new").save(folder)
        except OptionError as error:
            os._exit(0 if "what stood there stands; make room" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert workspaces(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_fails_at_the_last_moment(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    folder = noted(result, "old").save(tmp_path / "run")

    def fail(_: int) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OptionError, match=os.strerror(code)):
            noted(result, "new").save(folder)
    assert Result.load(folder).notes == ("old",)
    assert workspaces(tmp_path) == []


def test_two_folders_are_exchanged(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if swap(tmp_path / "a", tmp_path / "b"):
        assert (tmp_path / "a" / "b").exists()
        assert (tmp_path / "b" / "a").exists()
    with pytest.raises(FileNotFoundError):
        swap(tmp_path / "a", tmp_path / "none")
