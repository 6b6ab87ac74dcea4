"""Children that have what this process has imported, for tests in which a process dies: a new interpreter takes seconds.

They must run on the CPU without gradients, which torch does not take across a fork where there is a GPU.
"""

from __future__ import annotations

import os
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
