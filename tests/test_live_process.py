"""The resident process of the Live page: killed and started again, several windows at once, and hundreds of edits."""

from __future__ import annotations

import gc
import importlib
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import ForkedWorker

from app.jobs import progress, worker
from app.jobs.models import drop
from app.jobs.protocol import Request
from app.jobs.queue import JobQueue
from app.live import ahead, answering, client, imports, kept, server
from app.live.protocol import Action, Answer, Question
from app.offered import FIRST
from app.ui.live_desk import Desk
from probes.session import Session, State

EDITS = 500


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Iterator[JobQueue]:
    monkeypatch.setattr(JobQueue, "_start", lambda self: ForkedWorker(lambda: worker.main(self.folder)))
    queue = JobQueue()
    yield queue
    queue.close()


def text(folder: Path, edit: str) -> str:
    return f"model {folder} --device cpu\ntext 'w5 w6 w7'\nother 'w8 w6 w7'\nwatch 'w9'\nedit {edit}"


def test_a_killed_worker_is_replaced_and_the_session_goes_on(jobs: JobQueue, word_folder: Path) -> None:
    question = Question("view", text(word_folder, "zero z.1.2"))
    first = client.ask(jobs, question)
    assert not first.refusal
    killed = jobs._worker
    assert killed is not None
    os.kill(killed.pid, signal.SIGKILL)
    again = client.ask(jobs, Question("view", first.session, (Action("add", value="skip 1"),)))
    assert jobs._worker is not killed
    assert not again.refusal
    assert again.session == f"{first.session}\nedit skip 1"
    back = client.ask(jobs, Question("view", again.session, (Action("remove", 1),)))
    assert back.session == first.session
    assert back.data["comparison"] == first.data["comparison"]


def test_a_worker_that_dies_over_every_answer_is_said_and_the_session_kept(
    monkeypatch: pytest.MonkeyPatch, word_folder: Path
) -> None:
    class Dying:
        def __enter__(self) -> Dying:
            return self

        def __exit__(self, *_: object) -> None: ...

        def send(self, _: object) -> None: ...

        def recv(self) -> Answer:
            raise EOFError

    desk = Desk([Answer(text(word_folder, "skip 1"), {})], ["opened"], 0)
    monkeypatch.setattr(client, "_connection", lambda _: Dying())
    monkeypatch.setattr("app.ui.live_desk.queue", lambda: None)
    monkeypatch.setattr("app.ui.live_desk.st.session_state", {})
    desk.act("added", Action("add", value="skip 0"))
    assert "ended while it answered" in desk.refusal
    assert "session is kept" in desk.refusal
    assert (len(desk.history), desk.at) == (1, 0)


def test_a_live_request_after_a_kill_does_not_leave_a_job_running_for_ever(
    monkeypatch: pytest.MonkeyPatch, jobs: JobQueue, tmp_path: Path
) -> None:
    def deaf(_: JobQueue) -> subprocess.Popen[str]:
        code = "import sys; sys.stdin.read()"
        return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True)

    monkeypatch.setattr(JobQueue, "_start", deaf)
    lost, behind = (jobs.submit(Request("check", {}, out=str(tmp_path / name))) for name in "ab")
    killed = jobs._worker
    assert killed is not None
    killed.kill()
    killed.wait()
    jobs.ensure()
    assert jobs.status(lost).state == "failed"
    assert jobs.active() == [behind]


def test_windows_have_their_own_sessions_in_one_process(word_folder: Path) -> None:
    drop()
    lines = [f"scale mlp_out.{i % 3} x{0.1 * (i + 1):.1f}" for i in range(8)]

    def window(line: str) -> Answer:
        state = text(word_folder, line)
        answers = [
            server._answer(Question("view", state, (Action("add", value=more),))) for more in ("skip 1", "zero z.0.1")
        ]
        assert [a.session for a in answers] == [f"{state}\nedit skip 1", f"{state}\nedit zero z.0.1"]
        return answers[-1]

    with ThreadPoolExecutor(8) as windows:
        answers = list(windows.map(window, lines))
    model = answering.opened(State.parse(answers[0].session)).model
    for answer in answers:
        alone = Session.parse(answer.session, model).compare(layers=False)
        assert answer.data["comparison"]["kl"] == pytest.approx(alone.kl, abs=1e-9)
        assert answer.data["comparison"]["after"]["top"][0]["token_id"] == alone.after.top[0].token_id


def test_five_hundred_edits_keep_no_more_than_the_first_hundred(word_folder: Path) -> None:
    drop()
    state, sizes = text(word_folder, "scale z.1.2 x0.5"), []
    for i in range(EDITS):
        answer = answering.answer(Question("view", state, (Action("strength", 0, i / EDITS),)))
        assert not answer.refusal
        if i % 10 == 0:
            elsewhere = (Action("text", value=f"w{i // 10} w6 w7"),)
            assert not answering.answer(Question("everywhere", answer.session, elsewhere)).refusal
        if i % 100 == 99:
            model = answering.opened(State.parse(state)).model
            sizes.append(_bytes_of_tensors() - sum(p.nbytes for p in model.module.parameters()))  # type: ignore[attr-defined]
    assert sizes[-1] <= 1.05 * sizes[0], sizes


@pytest.fixture
def first(monkeypatch: pytest.MonkeyPatch, jobs: JobQueue, word_folder: Path, tmp_path: Path) -> Iterator[str]:
    """The text of a first example on a tiny model, which stands for a model with a name."""
    session = text(word_folder, "zero z.1.2")
    monkeypatch.setenv("BATHYSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ahead, "EXAMPLES", {"A": session})
    monkeypatch.setattr(ahead, "PAGE", "json")
    monkeypatch.setattr(ahead, "NEXT", "json")
    monkeypatch.setattr(ahead, "queue", lambda: jobs)
    monkeypatch.setattr(kept, "_weights", lambda _: word_folder)
    monkeypatch.setattr("app.ui.live_desk.queue", lambda: jobs)
    monkeypatch.setattr("app.ui.live_desk.st.session_state", {})
    yield session
    FIRST.clear()


def test_the_first_example_is_shown_from_last_time_until_the_model_answers(first: str) -> None:
    before = Desk()
    ahead.import_page()
    assert not before.recall(first)
    ahead.answer_first()
    before.open(first, "opened")
    assert before.now is not None
    again = Desk()
    assert not again.recall(first), "the model is there: it is asked"
    ahead.import_page()
    assert again.recall(first)
    assert again.now is not None
    assert again.now.session == before.now.session
    assert again.now.data["comparison"] == before.now.data["comparison"]
    right, shown = before.grids(0), again.grids(0)
    assert right is not None
    assert shown is not None
    assert all(np.array_equal(right["after"][name], shown["after"][name]) for name in ("top_logprobs", "kl", "ranks"))
    assert not again.settle()
    ahead.answer_first()
    again.act("added", Action("add", value="skip 1"))
    assert again.settle()
    assert again.history[0].data is not again.kept
    assert (again.at, again.kept) == (1, None)


def test_other_weights_or_a_damaged_file_recall_nothing(first: str, word_folder: Path, tmp_path: Path) -> None:
    kept.keep(first, first, {"norms": np.array([1.5, np.inf], np.float32)})
    recalled = kept.recall(first)
    assert recalled is not None
    assert recalled.data["norms"].dtype == np.float32
    assert recalled.data["norms"].tolist() == [1.5, np.inf]
    assert kept.recall(first + " ") is None
    (file,) = (tmp_path / "cache" / "live").iterdir()
    file.write_text(file.read_text()[:-3])
    assert kept.recall(first) is None


def test_nothing_is_loaded_ahead_where_that_is_switched_off_or_the_model_is_not_here(
    first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ahead.SWITCH, "0")
    ahead.import_page()
    assert not FIRST.is_set()
    monkeypatch.delenv(ahead.SWITCH)
    monkeypatch.setattr(kept, "_weights", lambda _: None)
    ahead.import_page()
    assert not FIRST.is_set()


def test_every_module_to_import_ahead_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ahead, an error is passed over, so that a module of another name would only make answering slow."""
    for name in imports.AHEAD:
        importlib.import_module(name)
    named = list[str]()
    monkeypatch.setattr(imports, "import_all", named.extend)
    monkeypatch.setattr(gc, "freeze", lambda: None)
    imports.import_ahead()
    imports.imported()
    assert named == list(imports.AHEAD)


def _bytes_of_tensors() -> int:
    gc.collect()
    alive = (one for one in gc.get_objects() if issubclass(type(one), torch.Tensor))
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}.values())


def test_a_job_takes_short_forwards_while_somebody_works_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_asked_at", -math.inf)
    job = progress.JobProgress(tmp_path, threading.Event())
    assert job.batch_tokens is None
    monkeypatch.setattr(server, "_asked_at", time.monotonic())
    assert job.batch_tokens == progress.SHORT
