"""The command line, `bathyscope`; nothing but its tests imports it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from analyses.cli.commands import bathyscope
from analyses.cli.exits import call


def main(args: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code: 0 done, 2 bad input (one line), 1 a fault of ours, 130 interrupted."""
    return call(bathyscope, list(sys.argv[1:] if args is None else args))
