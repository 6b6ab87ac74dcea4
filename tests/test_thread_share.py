"""Threads of a capture on a busy machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from probes import ActivationStore
from probes.capture import thread_share
from probes.capture.run import capture
from probes.capture.thread_share import ThreadShare, Usage, threads_between
from probes.models.backends.native import NativeModel


@pytest.mark.parametrize(
    ("busy", "own", "processors", "most", "threads"),
    [
        (2.0, 2.0, 2, 2, 2),  # alone
        (2.0, 1.0, 2, 2, 1),  # half is another's
        (2.0, 0.0, 2, 2, 1),  # never none
        (1.0, 0.7, 2, 2, 2),  # 0.3 of a processor is no reason
        (8.0, 2.0, 8, 8, 2),
        (60.0, 2.0, 64, 2, 2),  # a container's two processors of a large machine that has more left
    ],
)
def test_what_others_leave(busy: float, own: float, processors: int, most: int, threads: int) -> None:
    before = Usage(100.0, 50.0, 20.0)
    for seconds in (0.2, 1.0, 5.0):
        after = Usage(100.0 + seconds, 50.0 + busy * seconds, 20.0 + own * seconds)
        assert threads_between(before, after, processors, most) == threads


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two threads of torch, and no time to wait between two looks."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(thread_share, "PERIOD", 0.0)
    monkeypatch.setattr(thread_share.os, "cpu_count", lambda: 2)
    yield
    torch.set_num_threads(before)


def usage(monkeypatch: pytest.MonkeyPatch, others: float) -> None:
    """Let others use so many processors from now on."""
    moments = iter(range(10**6))

    def now() -> Usage:
        seconds = float(next(moments))
        return Usage(seconds, (1 + others) * seconds, seconds)

    monkeypatch.setattr(thread_share.Usage, "now", staticmethod(now))


def test_a_capture_leaves_a_processor_to_who_uses_it_and_takes_it_back(
    two_threads: None, monkeypatch: pytest.MonkeyPatch, tiny: NativeModel, tmp_path: Path
) -> None:
    counts: list[int] = []
    set_threads = torch.set_num_threads
    monkeypatch.setattr(torch, "set_num_threads", lambda n: (counts.append(n), set_threads(n)))
    prompts = [(5, 6, 7), (8, 9)]
    usage(monkeypatch, others=1.0)
    busy = capture(tiny, prompts, ["resid_post.*"], ActivationStore(tmp_path / "busy"))
    assert set(counts[:-1]) == {1}
    assert counts[-1] == 2
    assert torch.get_num_threads() == 2
    counts.clear()
    usage(monkeypatch, others=0.0)
    alone = capture(tiny, prompts, ["resid_post.*"], ActivationStore(tmp_path / "alone"))
    assert set(counts) == {2}
    for point in (f"resid_post.{layer}" for layer in range(3)):
        for left, right in zip(busy.get(point), alone.get(point), strict=True):
            torch.testing.assert_close(left, right)


def test_a_machine_that_counts_nothing_keeps_all_threads(
    two_threads: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(thread_share, "COUNTERS", tmp_path / "none")
    with ThreadShare() as share:
        share.adapt()
        assert torch.get_num_threads() == 2
    assert Usage.now() is None


def test_one_thread_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.get_num_threads() == 1
    usage(monkeypatch, others=0.0)
    with ThreadShare() as share:
        share.adapt()
        assert torch.get_num_threads() == 1
