"""The command line: `bathyscope`."""

from __future__ import annotations

import traceback
from collections.abc import Sequence

import typer
from typer.core import TyperGroup

from analyses.cli import capture, models, run, store
from analyses.cli.batch import batch
from analyses.cli.bench import bench
from analyses.cli.console import warn
from analyses.cli.demo import demo
from analyses.registry import ANALYSES
from probes.errors import UserError, unknown

# Typer carries its own copy of click; the base of its usage errors is reached through a public subclass.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]

INTERRUPTED = 130
"""Exit code after Ctrl-C, which Typer may also return by itself."""


class _Analyses(TyperGroup):
    """Names the legal analyses when an unknown one is asked for."""

    def resolve_command(self, ctx: typer.Context, args: list[str]):  # type: ignore[no-untyped-def, override]
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            raise UsageError(unknown("analysis", args[0], [analysis.name for analysis in ANALYSES]))
        return super().resolve_command(ctx, args)


app = typer.Typer(
    help="Where in the depth of a language model does it happen?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
analyses_group = typer.Typer(cls=_Analyses, help="Run an analysis and save its result.", no_args_is_help=True)
run.register(analyses_group)
app.add_typer(analyses_group, name="run")
app.add_typer(store.group, name="store")
app.add_typer(models.group, name="models")
app.command("capture")(capture.capture)
app.command("check")(models.check)
app.command("demo")(demo)
app.command("batch")(batch)
app.command("bench", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(bench)


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0 done, 2 bad input (one line), 1 a fault of ours, 130 interrupted."""
    try:
        code = app(args=None if args is None else list(args), standalone_mode=False)
    except UserError as error:
        return _bad(str(error))
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
