"""A device made of threads: copies end late and in their own time, as on a GPU; the compute queue is the caller."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

from probes.device_to_host import Event


class _Flag:
    def __init__(self) -> None:
        self._set = threading.Event()

    def wait(self) -> None:
        assert self._set.wait(timeout=30), "a copy never ended"

    def pass_(self) -> None:
        self._set.set()

    @property
    def passed(self) -> bool:
        return self._set.is_set()


class ThreadEngine:
    """An engine whose copy queue is a thread.

    Args:
        delay: the longest pause before a copy, in seconds; each is drawn at random.
        barrier: whether events wait at all; False breaks every barrier, as a test of the tests.
    """

    def __init__(self, delay: float = 0.0, seed: int = 0, barrier: bool = True) -> None:
        self.delay, self.barrier = delay, barrier
        self.copied = self.unfinished = 0
        self._random = random.Random(seed)
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def device_buffer(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.uint8)

    host_buffer = device_buffer

    def mark(self) -> Event:
        event = _Flag()
        event.pass_()
        return event

    def hold(self, event: Event) -> None:
        assert isinstance(event, _Flag)
        self.unfinished += not event.passed
        if self.barrier:
            event.wait()

    def copy(self, source: Tensor, target: Tensor, after: Event) -> Event:
        ended = _Flag()
        pause = self._random.random() * self.delay

        def job() -> None:
            time.sleep(pause)
            target.copy_(source)
            self.copied += 1
            ended.pass_()

        self._jobs.put(job)
        if self.barrier:
            return ended
        broken = _Flag()
        broken.pass_()
        return broken

    def finish(self) -> None:
        last = _Flag()
        self._jobs.put(last.pass_)
        last.wait()

    def _work(self) -> None:
        while True:
            self._jobs.get()()
