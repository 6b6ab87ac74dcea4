"""Running studies: each cell once, shared captures, failures apart, and processes that die at any moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import psutil
import pytest
import torch
from forked import ended, start
from study_makers import BASE, model_folder, prompt_file, study_file

from analyses.base import Analysis, Clock, as_prompts, make_result
from analyses.cli import main
from analyses.options import option
from analyses.registry import ANALYSES
from analyses.results.card import FigureSpec
from analyses.results.result import Result
from analyses.studies import StudyFolder, expand, local_engine, read_study, run_local, run_study
from analyses.studies.local_engine import processors
from analyses.studies.run_cells import Captured, ModelHolder, Outcome, Started, run_unit
from analyses.studies.scheduling import Unit, take, units
from analyses.studies.shared_captures import captures_of, joined, shared_plans
from analyses.voids import Voids
from probes.capture.needs import Need
from probes.capture.run import capture
from probes.prompts import Field
from probes.store import ActivationStore

LENS = '[[analyses]]\nanalysis = "logit_lens"\n'
VOIDS = '[[analyses]]\nanalysis = "voids"\noptions.readout_positions = "all"\nvary.alpha = [0.2, 0.8]\n'
DEEP = '[[analyses]]\nanalysis = "voids"\nname = "mask"\noptions = { mode = "skip" }\n'
WHOLE = BASE + VOIDS + DEEP + LENS


@dataclass(frozen=True)
class Fails(Analysis):
    """Captures, then fails."""

    how: str = option("", "What it does instead of returning a result.")
    name: ClassVar[str] = "fails"
    title: ClassVar[str] = "Fails"
    reference: ClassVar[str] = ""
    prompt_fields: ClassVar[Mapping[str, Field]] = {}
    figures: ClassVar[Mapping[str, FigureSpec]] = {}

    def needs(self, model: Any) -> list[Need]:
        if self.how == "needs":
            raise ValueError("no needs today")
        return [Need("resid_post.99" if self.how == "layer" else "resid_mid.*")]

    def run(self, model: Any, prompts: Any, *, store: Any = None, progress: Any = None) -> Result:
        prompts = as_prompts(prompts, model, {})
        capture(model, [p.tokens for p in prompts], self.needs(model), store)
        if self.how:
            raise ZeroDivisionError("a fault of its own")
        return make_result(self, model, prompts, {"t": pd.DataFrame({"a": [1]})}, None, Clock())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model_folder(tmp_path / "model")
    prompt_file(tmp_path / "ids.jsonl")
    return tmp_path


def batch(folder: Path, text: str, *flags: str, out: str = "out", store: str = "store") -> int:
    path = study_file(folder, text)
    places = ["--out", str(folder / out), "--store", str(folder / store)]
    return main(["batch", str(path), *places, *(flags or ("--workers", "0"))])


def tables_of(root: Path) -> dict[str, pd.DataFrame]:
    """Every table of every cell, by cell and name."""
    return {
        f"{file.parents[1].name}/{file.stem}": pd.read_parquet(file)
        for file in root.glob("cells/[!.]*/tables/*.parquet")
    }


def same(one: Path, other: Path) -> None:
    left, right = tables_of(one), tables_of(other)
    assert left
    assert left.keys() == right.keys()
    for name, table in left.items():
        pd.testing.assert_frame_equal(table, right[name], rtol=1e-4, atol=1e-5)


def test_a_second_run_does_nothing_and_a_changed_option_runs_its_cells_alone(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert batch(folder, BASE + VOIDS + LENS) == 0
    assert "study small: 3 cells run, 3 forward passes" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*") if path.is_file()}
    with monkeypatch.context() as context:
        context.delattr("probes.models.load.load_model")
        assert batch(folder, BASE + VOIDS + LENS) == 0
    assert "3 cells, all done; nothing to run" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*") if path.is_file()} == before
    assert batch(folder, BASE + VOIDS.replace("0.2", "0.3") + LENS) == 0
    said = capsys.readouterr()
    assert "study small: 1 cell run, 0 forward passes" in said.out
    assert "alpha=0.3" in said.err
    index = pd.read_parquet(folder / "out" / "index.parquet")
    assert sorted(index["option.alpha"].dropna()) == ["0.3", "0.8"]


def test_a_changed_label_runs_nothing_and_renames_the_report(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batch(folder, BASE + LENS)
    capsys.readouterr()
    batch(folder, BASE + LENS + 'name = "the lens"\n')
    assert "nothing to run" in capsys.readouterr().out
    assert list(pd.read_parquet(folder / "out" / "index.parquet")["entry"]) == ["the lens"]
    assert "the lens" in (folder / "out" / "report.html").read_text()


def test_shared_captures_hold_what_every_cell_wants(folder: Path) -> None:
    """The joined captures leave no forward to any cell, and cost no sequence twice."""
    cells = expand(read_study(study_file(folder, BASE + VOIDS + LENS)))
    (unit,) = units(cells)
    model, store = ModelHolder()(unit.model), ActivationStore(folder / "store")
    captures = captures_of(cells, model)
    assert sum(one.plan(model, store).forwards for one in captures) == 9
    assert [len(shared.sequences) for shared in joined(captures)] == [3]
    events = list(run_unit(unit, lambda _: model, store, _ready(folder, cells)))
    assert [e.forwards for e in events if isinstance(e, Captured)] == [3]
    assert [e.forwards for e in events if isinstance(e, Outcome)] == [0, 0, 0]
    assert sum(plan.forwards for plan in shared_plans(model, captures, store)) == 0


def _ready(folder: Path, cells: Any) -> StudyFolder:
    out = StudyFolder(folder / "out")
    out.prepare(read_study(folder / "study.toml"), cells)
    return out


def test_prompts_shared_by_some_cells_alone_get_the_union_of_their_needs(folder: Path) -> None:
    text = BASE + '[[prompts]]\nname = "more"\ntokens = [[9, 10], [3, 4]]\n' + VOIDS + LENS + 'prompts = ["more"]\n'
    cells = expand(read_study(study_file(folder, text)))
    model = ModelHolder()(cells[0].model)
    needs = {s: shared.needs for shared in joined(captures_of(cells, model)) for s in shared.sequences}
    of_voids = {need.reducer for need in Voids(readout_positions="all").needs(model)}
    assert {need.reducer for need in needs[5, 6, 7, 8]} == of_voids
    assert len(needs[9, 10]) > len(needs[5, 6, 7, 8]), "two entries of voids and the lens ask for this one"


def test_cells_that_write_come_first_so_that_their_rows_serve_the_others(folder: Path) -> None:
    text = (
        BASE + LENS + '[[analyses]]\nanalysis = "voids"\noptions = { max_new_tokens = 3, readout_positions = "all" }\n'
    )
    cells = expand(read_study(study_file(folder, text)))
    (unit,) = units(cells)
    events = list(run_unit(unit, ModelHolder(), ActivationStore(folder / "store"), _ready(folder, cells)))
    ended = [event for event in events if isinstance(event, Outcome)]
    assert [event.cell.split("-")[0] for event in ended] == ["voids", "logit_lens"]
    assert [event.forwards for event in ended] == [3, 0]


def test_a_failing_cell_is_recorded_and_the_others_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("analyses.registry.ANALYSES", {**ANALYSES, Fails.name: f"{__name__}:Fails"})
    fails = '[[analyses]]\nanalysis = "fails"\nvary.how = ["run", "layer", "needs", ""]\n'
    assert batch(folder, BASE + fails + LENS) == 3
    said = capsys.readouterr()
    assert "2 cells run, 3 forward passes, 3 failed" in said.out
    assert "a fault of its own" in said.err
    out = StudyFolder(folder / "out")
    index = pd.read_parquet(out.index).set_index("option.how", drop=False)
    assert list(index["state"]) == ["failed", "failed", "failed", "done", "done"]
    assert "layer 99" in index.loc["layer", "error"]
    assert "ZeroDivisionError" in out.why(index.loc["run", "cell"])["traceback"]  # type: ignore[index]
    assert out.why(index.loc["layer", "cell"])["traceback"] == ""  # type: ignore[index]
    assert "a fault of its own" in out.report.read_text()
    monkeypatch.setattr(Fails, "run", lambda self, model, prompts, store=None, **_: _fine(self, model, prompts))
    monkeypatch.setattr(Fails, "needs", lambda self, model: [])
    assert batch(folder, BASE + fails + LENS) == 0
    assert "3 cells run" in capsys.readouterr().out
    assert set(pd.read_parquet(out.index)["state"]) == {"done"}
    assert not list((folder / "out" / "failed").glob("*.json"))


def _fine(analysis: Any, model: Any, prompts: Any) -> Result:
    return make_result(analysis, model, as_prompts(prompts, model, {}), {"t": pd.DataFrame({"a": [1]})}, None, Clock())


def test_a_model_that_cannot_be_loaded_fails_its_cells_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = model_folder(folder / "broken", seed=1)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    assert batch(folder, BASE + '[[models]]\nref = "broken"\n' + VOIDS) == 3
    index = pd.read_parquet(folder / "out" / "index.parquet")
    assert dict(zip(index["model"], index["state"], strict=True)) == {"model": "done", "broken": "failed"}
    assert "2 cells run" in capsys.readouterr().out


def test_the_largest_model_comes_first_and_workers_keep_theirs(folder: Path) -> None:
    model_folder(folder / "big", layers=5)
    text = BASE + '[[models]]\nref = "big"\n[[prompts]]\nname = "more"\ntokens = [[3]]\n' + LENS
    waiting = list(units(expand(read_study(study_file(folder, text)))))
    assert [unit.label for unit in waiting] == ["big · ids", "big · more", "model · ids", "model · more"]
    big, small = waiting[0].model, waiting[2].model
    assert take(waiting, None, [None]).label == "big · ids"
    assert take(waiting, None, [big]).label == "model · ids", "a second worker loads another model"
    assert take(waiting, big, [small]).label == "big · more"
    assert take(waiting, big, [small]).label == "model · more", "nothing of its own is left: it helps"


def test_what_another_process_is_running_is_left_to_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = expand(read_study(study_file(folder, BASE + VOIDS)))
    out = _ready(folder, cells)
    with out.claim(cells[0].name) as claimed:
        assert claimed
        assert batch(folder, BASE + VOIDS) == 0
    assert "1 cell run" in capsys.readouterr().out
    assert not out.done(cells[0].name)
    assert batch(folder, BASE + VOIDS) == 0
    assert out.done(cells[0].name)


def test_a_unit_of_a_slurm_array_runs_its_cells_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model_folder(folder / "big", layers=5)
    text = BASE + '[[models]]\nref = "big"\n' + LENS
    assert batch(folder, text, "--slurm") == 0
    script = capsys.readouterr().out
    assert "#SBATCH --array=0-1\n" in script
    assert f"--cpus-per-task={processors()}\n" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert batch(folder, text, "--workers", "0", "--unit", "1") == 0
    assert not (folder / "out" / "index.parquet").exists()
    assert batch(folder, text, "--workers", "0", "--unit", "0") == 0
    capsys.readouterr()
    assert batch(folder, text) == 0
    assert "nothing to run" in capsys.readouterr().out
    assert list(pd.read_parquet(folder / "out" / "index.parquet")["layers"]) == [3, 5]
    assert batch(folder, text, "--unit", "2") == 2


def test_a_dry_run_prints_what_sharing_saves_and_runs_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert batch(folder, BASE + VOIDS + LENS, "--dry-run") == 0
    lines = capsys.readouterr().out.split("\n")
    assert lines[0].split() == ["cell", "forwards", "captured", "seconds", "peak", "memory"]
    assert [line.split()[-6] for line in lines[1:4]] == ["3", "3", "3"]
    assert "forwards  3 shared, in place of 9 cell by cell: 6 saved" in lines
    assert "cells     3 to run, 0 already done" in lines
    assert not (folder / "out").exists()
    assert ActivationStore(folder / "store").bytes_held() == 0
    batch(folder, BASE + LENS)
    capsys.readouterr()
    batch(folder, BASE + VOIDS + LENS, "--dry-run")
    after = capsys.readouterr().out
    assert "2 to run, 1 already done" in after


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model, prompts, study, and in `whole` its uninterrupted run."""
    folder = tmp_path_factory.mktemp("reference")
    model_folder(folder / "model", layers=4)
    prompt_file(folder / "ids.jsonl", [[3 + (7 * i + j) % 90 for j in range(4 + i % 5)] for i in range(16)])
    assert batch(folder, WHOLE, "--workers", "0", out="whole", store="whole-store") == 0
    return folder


def finished(out: Path) -> set[str]:
    """Cells with a whole result."""
    return {path.parent.name for path in out.glob("cells/[!.]*/result.json")}


def when_a_cell_is_done(out: Path, act: Callable[[], None]) -> threading.Thread:
    """A thread that acts once the first result is there."""

    def wait() -> None:
        while not finished(out):
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def workers_of(pid: int) -> list[int]:
    """The worker processes of a study's parent: children of its fork server."""
    children = psutil.Process(pid).children(recursive=True)
    return [child.pid for child in children if child.ppid() != pid and "forkserver" in " ".join(child.cmdline())]


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_sigkill_in_the_middle_resumes_to_the_same_tables(reference: Path) -> None:
    """The parent is killed; its worker dies with it, and another run ends with the uninterrupted run's tables."""
    out = reference / "killed"

    def run() -> None:
        forkserver._forkserver.__init__()  # type: ignore[attr-defined,misc]  # this process's own server is not the child's
        batch(reference, WHOLE, "--workers", "1", out="killed", store="killed-store")

    parent = start(run)
    while not finished(out):
        assert alive(parent)
        time.sleep(0.01)
    (worker,) = workers_of(parent)
    os.kill(parent, signal.SIGKILL)
    assert ended(parent) == -signal.SIGKILL
    deadline = time.time() + 10
    while alive(worker) and time.time() < deadline:
        time.sleep(0.01)
    assert not alive(worker), "a worker must not outlive its parent"
    kept = {name: (out / "cells" / name / "result.json").stat().st_mtime_ns for name in finished(out)}
    assert 0 < len(kept) < 4
    assert batch(reference, WHOLE, "--workers", "0", out="killed", store="killed-store") == 0
    assert {n: (out / "cells" / n / "result.json").stat().st_mtime_ns for n in kept} == kept, "done stays done"
    assert not list(out.glob("cells/.*")), "no draft is left"
    same(out, reference / "whole")
    assert ActivationStore(reference / "killed-store").verify().damaged == ()


def test_a_worker_killed_in_the_middle_takes_its_cell_alone(
    reference: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, killed, note = reference / "worker", [], local_engine._Worker.note

    def kill_in_the_second_cell(worker: Any, event: Any) -> None:
        note(worker, event)
        if isinstance(event, Started) and worker._ended and not killed:
            killed.append(worker._process.pid)
            os.kill(worker._process.pid, signal.SIGKILL)

    monkeypatch.setattr(local_engine._Worker, "note", kill_in_the_second_cell)
    assert batch(reference, WHOLE, "--workers", "1", out="worker", store="worker-store") == 3
    said = capsys.readouterr().out
    assert "3 cells run" in said
    assert "1 failed" in said
    (failure,) = out.glob("failed/*.json")
    assert "ended by SIGKILL while running this cell" in json.loads(failure.read_text())["error"]
    assert batch(reference, WHOLE, "--workers", "0", out="worker", store="worker-store") == 0
    same(out, reference / "whole")


def test_ctrl_c_stops_every_worker_and_leaves_a_resumable_study(
    reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model_folder(reference / "big", layers=5)
    text, before = WHOLE + '[[models]]\nref = "big"\n', set(workers_of(os.getpid()))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in its background deaf to it
    when_a_cell_is_done(reference / "stopped", lambda: os.kill(os.getpid(), signal.SIGINT))
    assert batch(reference, text, "--workers", "2", out="stopped", store="stopped-store") == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    assert not [pid for pid in workers_of(os.getpid()) if pid not in before and alive(pid)]
    assert batch(reference, WHOLE, "--workers", "0", out="stopped", store="stopped-store") == 0
    whole = {name.split("/")[0] for name in tables_of(reference / "whole")}
    assert whole <= finished(reference / "stopped")


def test_workers_share_the_processors_and_say_what_one_process_says(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_folder(folder / "big", layers=5)
    monkeypatch.setattr("analyses.studies.local_engine.processors", lambda: 6)
    text, seen = BASE + '[[models]]\nref = "big"\n' + LENS, []

    def watch(self: Any, unit: Unit) -> None:
        give(self, unit)
        seen.append(self._arguments[1])

    give = local_engine._Worker.give
    monkeypatch.setattr(local_engine._Worker, "give", watch)
    assert batch(folder, text, "--workers", "0", out="one") == 0
    assert batch(folder, text, "--workers", "2", out="two", store="two-store") == 0
    assert seen == [3, 3]
    same(folder / "one", folder / "two")


def test_in_python_a_study_is_run_by_any_engine(folder: Path) -> None:
    study = read_study(study_file(folder, BASE + LENS))
    run = run_study(study, folder / "out", lambda work, out: run_local(work, out, folder / "store", 0))
    assert (run.cells, len(run.ran), run.failed, run.forwards) == (1, 1, (), 3)
    result = Result.load(run.folder.cell(run.ran[0]))
    assert torch.tensor(result.tables["read"]["entropy_bits"].to_numpy()).isfinite().all()
    assert isinstance(units(expand(study))[0], Unit)


def test_a_streamed_model_says_what_a_plain_one_says_from_the_same_rows(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lens = BASE + LENS
    assert batch(folder, lens, out="plain", store="plain-store") == 0
    streamed = lens.replace('ref = "model"', 'ref = "model"\nstreamed = true')
    assert batch(folder, streamed, out="streamed", store="streamed-store") == 0
    same(folder / "plain", folder / "streamed")
    capsys.readouterr()
    assert batch(folder, streamed, out="shared", store="plain-store") == 0
    assert "1 cell run, 0 forward passes" in capsys.readouterr().out, "rows of the plain model serve the streamed one"
    same(folder / "plain", folder / "shared")
    (result,) = (Result.load(path.parent) for path in (folder / "streamed").glob("cells/*/result.json"))
    assert result.provenance["loaded"]["streamed"] is True


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_model_spread_over_devices_says_what_a_whole_one_says(folder: Path, workers: str) -> None:
    lens = BASE + LENS
    assert batch(folder, lens, out="plain", store="plain-store") == 0
    options = f'device_map = "auto"\nmax_memory = "cpu=1GiB"\noffload = "{folder / "offload"}"\n'
    spread = lens.replace('ref = "model"\n', f'ref = "model"\n{options}')
    assert batch(folder, spread, "--workers", workers, out="spread", store="spread-store") == 0
    same(folder / "plain", folder / "spread")
    (result,) = (Result.load(path.parent) for path in (folder / "spread").glob("cells/*/result.json"))
    assert {name: result.provenance["loaded"][name] for name in ("device_map", "max_memory")} == {
        "device_map": "auto",
        "max_memory": "cpu=1GiB",
    }


def test_a_remote_model_that_no_server_can_run_fails_its_cells(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NDIF_API_KEY", raising=False)
    remote = BASE.replace('ref = "model"', 'ref = "model"\nbackend = "nnsight"\nremote = true')
    assert batch(folder, remote + LENS) == 3
    index = pd.read_parquet(folder / "out" / "index.parquet")
    assert list(index["state"]) == ["failed"]
    assert "NDIF_API_KEY" in index["error"].iloc[0]
