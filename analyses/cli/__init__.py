"""The command line, `bathyscope`; nothing but its tests imports it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from analyses.cli.exits import call


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0 done, 2 bad input (one line), 1 a fault of ours, 130 interrupted."""
    given = list(sys.argv[1:] if args is None else args)
    if given[:1] == ["app"]:
        # The dashboard opens before torch is imported; the other commands need it at once.
        from analyses.cli.app import alone

        return call(alone, given[1:])
    from analyses.cli.commands import app

    return call(app, given)
