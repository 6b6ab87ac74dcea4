"""Jobs of the dashboard's worker, and how a saved run is made again."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path

import pandas as pd
import pytest
from forked import ForkedWorker
from tiny import PROMPTS

from analyses.cli import main
from analyses.logit_lens import LogitLens
from analyses.results.result import Result
from analyses.running import reproduce
from analyses.running.model_spec import ModelSpec
from app import places, prompt_sets
from app.jobs import execute, models, worker
from app.jobs import queue as queue_module
from app.jobs.interrupt import Interrupt
from app.jobs.progress import Cancelled, JobProgress
from app.jobs.protocol import CANCEL, Request, Status, ask_to_cancel, read_status, write_request
from app.jobs.queue import JobQueue
from probes.errors import OptionError
from probes.models.backends.native import NativeModel
from probes.store import ActivationStore


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATHYSCOPE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("BATHYSCOPE_STORE", str(tmp_path / "store"))


@pytest.fixture
def result(tiny: NativeModel, store: ActivationStore) -> Result:
    return LogitLens().run(tiny, PROMPTS, store=store)


def request(folder: Path, tmp_path: Path, **changes: object) -> Request:
    prompts = prompt_sets.typed('{"tokens": [5, 6, 7]}\n{"tokens": [8, 9]}', {}).save()
    base = Request(
        "run",
        ModelSpec(str(folder)),
        "voids",
        {"alpha": [0.5]},
        str(prompts),
        str(tmp_path / "store"),
        str(tmp_path / "runs" / "a"),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def did(folder: Path, job: Request, closing: threading.Event | None = None) -> Status:
    write_request(folder, job)
    worker.work(folder, closing or threading.Event())
    return read_status(folder)


def test_a_job_saves_what_the_command_line_would(llama_folder: Path, tmp_path: Path) -> None:
    job = request(llama_folder, tmp_path)
    status = did(tmp_path / "j1", job)
    assert (status.state, status.answer["counts"]["forwards"]) == ("done", 2)
    assert [note.split(";")[0] for note in status.notes if note.startswith("plan:")] == [
        "plan: 2 of 2 prompts to run (5 tokens)"
    ]
    flags = ["--model", str(llama_folder), "--prompts", str(job.prompts), "--store", str(tmp_path / "store")]
    assert main(["run", "voids", *flags, "--alpha", "0.5", "--out", str(tmp_path / "cli")]) == 0
    ours, theirs = Result.load(tmp_path / "runs" / "a"), Result.load(tmp_path / "cli")
    assert ours.options == theirs.options
    for name, table in ours.tables.items():
        pd.testing.assert_frame_equal(table, theirs.tables[name])
    assert ours.provenance["prompts_file"] == theirs.provenance["prompts_file"] == job.prompts
    assert theirs.provenance["counts"]["forwards"] == 0


def test_a_cost_is_told_and_nothing_is_run(llama_folder: Path, tmp_path: Path) -> None:
    status = did(tmp_path / "j", request(llama_folder, tmp_path, kind="estimate"))
    assert status.state == "done"
    assert status.lines[0].startswith("measured device")
    assert status.lines[1].split()[1:3] == ["2", "prompts,"]
    assert not (tmp_path / "runs" / "a").exists()
    assert ActivationStore(tmp_path / "store").bytes_held() == 0


def test_a_check_tells_the_identities(llama_folder: Path, tmp_path: Path) -> None:
    status = did(tmp_path / "j", request(llama_folder, tmp_path, kind="check"))
    assert status.answer["layers"] == 3
    assert all(identity["holds"] for identity in status.answer["identities"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": ModelSpec("nowhere/at all")}, "no such model"),
        ({"options": {"alpha": [7.0]}}, "option alpha is 7.0"),
        ({"analysis": "viods"}, "Did you mean 'voids'"),
        ({"prompts": None}, "needs prompts"),
        ({"prompts": "/nowhere.jsonl"}, "does not exist"),
    ],
)
def test_bad_input_is_refused_in_a_line(
    llama_folder: Path, tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    status = did(tmp_path / "j", request(llama_folder, tmp_path, **changes))
    assert status.state == "refused"
    assert said in status.message
    assert not (tmp_path / "runs" / "a").exists()


def test_other_peoples_folders_are_not_overwritten(llama_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "thesis.tex").write_text("x")
    assert did(tmp_path / "j", request(llama_folder, tmp_path)).state == "refused"
    assert (tmp_path / "runs" / "a" / "thesis.tex").read_text() == "x"


def test_a_cancelled_job_keeps_what_was_captured(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = "\n".join(json.dumps({"tokens": [3 + i % 90] * (i // 90 + 2)}) for i in range(540))
    prompts = str(prompt_sets.typed(many, {}).save())
    advance = JobProgress.advance

    def cancel_once(self: JobProgress, done: int = 1) -> None:
        ask_to_cancel(self.folder)
        advance(self, done)

    with monkeypatch.context() as patch:
        patch.setattr(JobProgress, "advance", cancel_once)
        status = did(
            tmp_path / "j1", request(llama_folder, tmp_path, prompts=prompts, analysis="logit_lens", options={})
        )
    assert status.state == "cancelled"
    assert not (tmp_path / "runs" / "a").exists()
    assert ActivationStore(tmp_path / "store").bytes_held() > 0
    again = did(tmp_path / "j2", request(llama_folder, tmp_path, prompts=prompts, analysis="logit_lens", options={}))
    assert again.state == "done"
    assert 0 < again.answer["counts"]["forwards"] < 540


def test_a_job_cancelled_while_it_waits_never_starts(llama_folder: Path, tmp_path: Path) -> None:
    write_request(tmp_path / "j", request(llama_folder, tmp_path, model=ModelSpec("nowhere/at all")))
    ask_to_cancel(tmp_path / "j")
    worker.work(tmp_path / "j", threading.Event())
    assert read_status(tmp_path / "j").state == "cancelled"


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Iterator[JobQueue]:
    """A queue whose workers never answer."""

    def start(self: JobQueue) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, text=True
        )

    monkeypatch.setattr(JobQueue, "_start", start)
    jobs = JobQueue()
    yield jobs
    jobs.close()


def test_a_job_that_does_not_stop_when_asked_is_stopped_with_its_process(
    line: JobQueue, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = line.submit(request(llama_folder, tmp_path))
    behind = line.submit(request(llama_folder, tmp_path, out=str(tmp_path / "runs" / "b")))
    first = line._worker
    line.cancel(stuck)
    assert not line.status(stuck).ended
    monkeypatch.setattr(queue_module, "GRACE", -1.0)
    status = line.status(stuck)
    assert (status.state, "Stopped with its process" in status.message) == ("cancelled", True)
    assert first is not None
    assert first.poll() is not None
    assert line._worker is not None
    assert line._worker is not first
    assert line.active() == [behind]


def test_a_run_whose_name_is_taken_gets_a_number(line: JobQueue, llama_folder: Path, tmp_path: Path) -> None:
    """By a folder, a dangling link, or a job that has not saved yet; an estimate takes no name."""
    job = request(llama_folder, tmp_path)
    outs = [line.request(line.submit(job)).out for _ in range(3)]
    assert [Path(out).name for out in outs] == ["a", "a-2", "a-3"]
    assert line.request(line.submit(replace(job, kind="estimate"))).out == job.out
    (tmp_path / "runs").mkdir(exist_ok=True)
    (tmp_path / "runs" / "b").mkdir()
    (tmp_path / "runs" / "b-2").symlink_to("nowhere")
    assert line.free(tmp_path / "runs" / "b").name == "b-3"


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("smollm2-135m", "voids-smollm2-135m"),
        ("meta-llama/Llama-3.1-8B", "voids-Llama-3.1-8B"),
        ("/some where/tiny model.gguf", "voids-tiny-model.gguf"),
        ("", "voids"),
        ("/", "voids"),
        ("x" * 900, "voids-" + "x" * 40),
        ("..", "voids"),
        ("modèle", "voids-mod-le"),
    ],
)
def test_a_run_that_nobody_named_is_named_by_analysis_and_model(model: str, name: str) -> None:
    assert places.run_name("voids", model) == name
    assert places.run_folder(name)


def slow_worker(folder: Path) -> None:
    """A worker whose forward of the analysis `slow` never ends."""

    def slow(request: Request, progress: JobProgress) -> dict[str, object]:
        progress.enter("running")
        progress.start(1, "forward")
        if request.analysis == "slow":
            models._LOADED["model"] = "half a forward"  # type: ignore[index,assignment]
            while True:
                time.sleep(0.05)
        return {"counts": {}, "seconds": 0.0, "held": len(models._LOADED)}

    execute.do = slow  # type: ignore[assignment]
    worker.main(folder)


def test_a_job_cancelled_within_its_first_batch_ends_and_its_worker_goes_on(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.drop()
    monkeypatch.setattr(JobQueue, "_start", lambda self: ForkedWorker(lambda: slow_worker(self.folder)))
    line = JobQueue()
    try:
        stuck = line.submit(request(llama_folder, tmp_path, analysis="slow"))
        behind = line.submit(request(llama_folder, tmp_path))
        first = line._worker
        assert first is not None
        until(lambda: line.status(stuck).what == "forward")
        line.cancel(stuck)
        assert line.cancelling(stuck)
        until(lambda: line.status(behind).ended)
        assert (line.status(stuck).state, line.status(behind).state) == ("cancelled", "done")
        assert "goes on from there" in line.status(stuck).message
        assert line.status(behind).answer["held"] == 0  # a model stopped in mid-forward is not used again
        assert line._worker is first
        assert first.poll() is None
    finally:
        line.close()


def until(true: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_job_is_interrupted_only_while_it_runs_and_never_within_an_import(tmp_path: Path) -> None:
    interrupt, folder = Interrupt(), tmp_path / "j"
    write_request(folder, Request("check", {}))
    ask_to_cancel(folder)
    os.utime(folder / CANCEL, (0, 0))
    interrupt._strike(0, None)  # no job
    (tmp_path / "lazily.py").write_text("import builtins; builtins.strike()")
    with interrupt.during(folder), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        patch.setattr("builtins.strike", lambda: interrupt._strike(0, sys._getframe()), raising=False)
        import lazily  # noqa: F401

        assert not interrupt.struck
        with pytest.raises(Cancelled):
            interrupt._strike(0, sys._getframe())
        interrupt._strike(0, sys._getframe())  # once is enough
    assert interrupt.struck


def test_a_job_whose_worker_died_has_failed_and_the_next_goes_on(
    line: JobQueue, llama_folder: Path, tmp_path: Path
) -> None:
    lost = line.submit(request(llama_folder, tmp_path))
    behind = line.submit(request(llama_folder, tmp_path, out=str(tmp_path / "runs" / "b")))
    first = line._worker
    assert first is not None
    first.kill()
    first.wait()
    assert (line.status(lost).state, "exit code -9" in line.status(lost).message) == ("failed", True)
    assert line.active() == [behind]
    assert line._worker is not first


def test_progress_stops_when_the_dashboard_is_gone(tmp_path: Path) -> None:
    closing = threading.Event()
    write_request(tmp_path / "j", Request("check", {}))
    progress = JobProgress(tmp_path / "j", closing)
    progress.start(4, "forward")
    progress.advance(2)
    closing.set()
    with pytest.raises(Cancelled):
        progress.advance()


def test_what_remains_follows_from_the_pace() -> None:
    status = Status("running", "running", "forward", done=5, total=20, began=100.0)
    assert status.remaining(now=110.0) == pytest.approx(30.0)
    assert replace(status, done=0).remaining() is None
    assert asdict(status)["notes"] == ()


@pytest.mark.parametrize("text", ["command", "python"])
def test_a_run_can_be_made_again_from_its_text(llama_folder: Path, tmp_path: Path, text: str) -> None:
    job = request(llama_folder, tmp_path, options={"alpha": [0.5, 0.25], "first_token": False, "mode": "measure"})
    assert did(tmp_path / "j", job).state == "done"
    result, store = Result.load(tmp_path / "runs" / "a"), tmp_path / "store"
    code = getattr(reproduce, text)(result, tmp_path / "again", store)
    if text == "command":
        assert main(shlex.split(code)[1:]) == 0
    else:
        exec(compile(code, "again", "exec"), {})
    again = Result.load(tmp_path / "again")
    assert again.options == result.options
    assert again.provenance["counts"]["forwards"] == 0
    for name, table in result.tables.items():
        pd.testing.assert_frame_equal(again.tables[name], table)


def test_a_text_says_only_what_differs_from_the_defaults(result: Result) -> None:
    line = reproduce.command(result, "runs/x")
    assert line.startswith("bathyscope run logit_lens --model tiny-llama --dtype float32 --prompts PROMPTS.jsonl")
    assert "--top-k" not in line
    named = replace(result, provenance={**result.provenance, "prompts_file": str(Path("p.jsonl").absolute())})
    assert str(Path("p.jsonl").absolute()) in reproduce.command(named, "runs/x")
    negative = replace(result, options={**result.options, "top_k": -1})
    assert "--top-k=-1" in reproduce.command(negative, "runs/x")


SPECS = [
    ModelSpec("m"),
    ModelSpec("org/m", revision="main", trust_remote_code=True, backend="nnsight", remote=True, attention="eager"),
    ModelSpec("./a folder", streamed=True, stream_memory="4GiB", dtype="bfloat16", device="cuda:1"),
    ModelSpec("-m", device_map="auto", max_memory="0=20GiB,cpu=60GiB", offload="spare disk"),
]


def test_the_specs_above_choose_every_loading_option() -> None:
    assert {name for spec in SPECS for name in spec.chosen()} == {field.name for field in fields(ModelSpec)} - {"ref"}


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_model_as_text_is_read_back(spec: ModelSpec) -> None:
    assert ModelSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no model is named"),
        ("a folder", "unrecognized arguments: folder: write a model's name, in quotes"),
        ("m --dtype", "argument --dtype: expected one argument"),
        ("m --zap 3", "after it any of --backend, --device, --dtype"),
        ("m 'b", "No closing quotation"),
        ("m --dtype float8", "Did you mean 'float32'?"),
    ],
)
def test_what_is_no_model_as_text_is_refused_with_the_legal_flags(text: str, said: str) -> None:
    with pytest.raises(OptionError, match=re.escape(said)):
        ModelSpec.parse(text)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_texts_of_a_run_load_its_model_as_it_was_loaded(
    spec: ModelSpec, result: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = replace(result, provenance={**result.provenance, "loaded": asdict(spec), "prompts_file": None})
    specs: list[ModelSpec] = []
    monkeypatch.setattr(ModelSpec, "check", lambda _: None)
    monkeypatch.setattr("analyses.running.runner.lines_of", lambda *_: [])
    monkeypatch.setattr("analyses.running.runner.dry_run", lambda spec, *_, **__: specs.append(spec) or [])
    assert main([*shlex.split(reproduce.command(ran, "runs/x"))[1:], "--text", "a", "--dry-run"]) == 0
    assert specs == [spec]
    loading = next(line for line in reproduce.python(ran, "runs/x").splitlines() if "load_model(" in line)
    calls: list[dict[str, object]] = []
    load = lambda ref, **options: calls.append({"ref": ref, **options})  # noqa: E731
    monkeypatch.setattr("probes.models.load.load_model", load)
    exec(loading, {"load_model": load})
    spec.load()
    written, loaded = calls
    assert written == {name: value for name, value in loaded.items() if name in written}
    assert set(written) == {"ref", *spec.chosen()}


def test_a_device_that_nobody_chose_is_not_named_and_the_revision_that_was_loaded_is(result: Result) -> None:
    model = {**result.provenance["model"], "revision": "0123abc"}
    provenance = {**result.provenance, "loaded": asdict(ModelSpec("org/m")), "model": model}
    assert ModelSpec.of(provenance) == ModelSpec("org/m", revision="0123abc")
    assert ModelSpec.of({**provenance, "loaded": None}).device == "auto"
    with pytest.raises(OptionError, match="option streamed"):
        ModelSpec.of({**provenance, "loaded": {"ref": "m", "streamed": "yes"}})
