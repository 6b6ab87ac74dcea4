"""The commands of `bathyscope`."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from analyses.cli import capture, lens, models, run, store
from analyses.cli.app import open_app
from analyses.cli.batch import batch
from analyses.cli.bench import bench
from analyses.cli.console import say
from analyses.cli.demo import demo
from analyses.cli.exits import UsageError
from analyses.cli.model_flags import with_model
from analyses.cli.report import report
from analyses.registry import names
from probes.errors import unknown


class _Analyses(TyperGroup):
    """One command an analysis, made when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names of every analysis."""
        return list(names())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of one analysis; None for an unknown name."""
        return run.command_of(cmd_name) if cmd_name in names() else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that `args` name first; an unknown one is refused with the legal names."""
        if args and not args[0].startswith("-") and args[0] not in names():
            raise UsageError(unknown("analysis", args[0], names()))
        return super().resolve_command(ctx, args)


def _version(given: bool) -> None:
    if given:
        say(f"bathyscope {version('bathyscope')}")
        raise typer.Exit()


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Where in the depth of a language model does it happen?"""


app = typer.Typer(
    callback=_root,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
analyses_group = typer.Typer(cls=_Analyses, help="Run an analysis and save its result.", no_args_is_help=True)
app.add_typer(analyses_group, name="run")
app.add_typer(store.group, name="store")
app.add_typer(models.group, name="models")
app.add_typer(lens.group, name="lens")
app.command("capture")(capture.capture)
app.command("check")(with_model(models.check, ref=False))
app.command("report")(report)
app.command("demo")(demo)
app.command("app")(open_app)
app.command("batch")(batch)
app.command("bench", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(bench)
