"""From what a command raises to an exit code and a line."""

from __future__ import annotations

import traceback
from collections.abc import Sequence

import typer

from analyses.cli.console import warn
from probes.errors import UserError

# Typer carries its own copy of click; the base of its usage errors is reached through a public subclass.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]

# It carries the help text of a command that was given nothing, in its lines.
NoArguments: type[Exception] = next(c for c in UsageError.__subclasses__() if c.__name__ == "NoArgsIsHelpError")

INTERRUPTED = 130
"""Exit code after Ctrl-C, which Typer may also return by itself."""


def call(app: typer.Typer, args: Sequence[str]) -> int:
    """Runs a command of `app`; returns the exit code."""
    try:
        code = app(args=list(args), standalone_mode=False)
    except UserError as error:
        return _bad(str(error))
    except NoArguments as error:
        warn(str(error))
        return 2
    except UsageError as error:
        return _bad(str(getattr(error, "format_message", error.__str__)()))
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception:
        warn(traceback.format_exc())
        warn("this is a fault of Bathyscope, not of your input; please report the lines above")
        return 1
    if code == INTERRUPTED:
        warn("interrupted; what was committed stays, and the same command goes on from there")
    return code if isinstance(code, int) else 0


def _bad(message: str) -> int:
    warn("error: " + " ".join(message.split()))
    return 2
