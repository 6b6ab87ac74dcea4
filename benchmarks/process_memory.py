"""What the kernel says of this process: peaks of its memory, and bytes read from disk."""

from __future__ import annotations

import threading
from pathlib import Path


class Memory:
    """Peaks of this process's resident memory, and of its parts, sampled."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self._look()

    def _look(self) -> None:
        for name in ("VmHWM", "RssAnon", "RssFile", "RssShmem"):
            self.peaks[name] = max(self.peaks.get(name, 0), kernel("status", name) * 1024)


def kernel(file: str, name: str) -> int:
    """A number the kernel keeps of this process."""
    for line in Path(f"/proc/self/{file}").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    return 0
