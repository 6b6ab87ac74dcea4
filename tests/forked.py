"""Children that have what this process has imported, for tests in which a process dies: a new interpreter takes seconds.

They must run on the CPU without gradients, which torch does not take across a fork where there is a GPU.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable


def start(act: Callable[[], object]) -> int:
    """Do `act` in a child; return its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        act()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(child: int) -> int:
    """Wait for a child; return its exit code, 1 for an error, or minus the number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def forked(act: Callable[[], object]) -> int:
    """Do `act` in a child; return its exit code, as `ended`."""
    return ended(start(act))


class ForkedWorker:
    """A child with what is asked of a `subprocess.Popen`, such as the dashboard's worker.

    Args:
        act: what the child does; its standard input is what is written to `stdin`.
    """

    def __init__(self, act: Callable[[], object]) -> None:
        reading, writing = os.pipe()

        def listening() -> None:
            os.close(writing)
            sys.stdin = os.fdopen(reading)
            act()

        self.pid = start(listening)
        os.close(reading)
        self.stdin = os.fdopen(writing, "w")
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None and (done := os.waitpid(self.pid, os.WNOHANG))[0]:
            self._code = os.waitstatus_to_exitcode(done[1])
        return self._code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(0.01)
        return code
