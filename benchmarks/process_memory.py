"""Work in a process of its own, and what the kernel says of a process: peaks of its memory, and bytes read from disk."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PARTS = ("VmHWM", "VmRSS", "RssAnon", "RssFile", "RssShmem")


class Memory:
    """Bytes of this process's resident memory and of its parts, at the start and, sampled, at their peak."""

    def __enter__(self) -> Memory:
        self.start = self.peaks = _resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self._look()

    def _look(self) -> None:
        now = _resident()
        self.peaks = {name: max(self.peaks[name], now[name]) for name in PARTS}


def apart(work: Callable[..., Any], threads: int, *given: Any) -> tuple[Any, dict[str, int]]:
    """(what some work returns in a process of its own, the peaks of that process's memory)."""
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_in_process, args=(work, threads, send, *given))
    process.start()
    send.close()
    result: tuple[Any, dict[str, int]] = receive.recv()
    process.join()
    return result


def _in_process(work: Callable[..., Any], threads: int, out: Any, *given: Any) -> None:
    torch.set_num_threads(threads)
    with Memory() as memory:
        result = work(*given)
    out.send((result, memory.peaks))


def kernel(file: str) -> dict[str, int]:
    """The numbers that the kernel keeps of this process in a file of /proc."""
    lines = (line.partition(":") for line in Path(f"/proc/self/{file}").read_text().splitlines())
    return {name: int(value.split()[0]) for name, _, value in lines if value.split()[:1] and value.split()[0].isdigit()}


def _resident() -> dict[str, int]:
    status = kernel("status")
    return {name: 1024 * status.get(name, 0) for name in PARTS}
