"""The commands of `bathyscope`."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer
from typer.core import TyperGroup

from analyses.cli import capture, models, run, store
from analyses.cli.app import open_app
from analyses.cli.batch import batch
from analyses.cli.bench import bench
from analyses.cli.console import say
from analyses.cli.demo import demo
from analyses.cli.exits import UsageError
from analyses.cli.report import report
from analyses.registry import ANALYSES
from probes.errors import unknown


class _Analyses(TyperGroup):
    """Names the legal analyses when an unknown one is asked for."""

    def resolve_command(self, ctx: typer.Context, args: list[str]):  # type: ignore[no-untyped-def, override]
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            raise UsageError(unknown("analysis", args[0], [analysis.name for analysis in ANALYSES]))
        return super().resolve_command(ctx, args)


def _version(asked: bool) -> None:
    if asked:
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
run.register(analyses_group)
app.add_typer(analyses_group, name="run")
app.add_typer(store.group, name="store")
app.add_typer(models.group, name="models")
app.command("capture")(capture.capture)
app.command("check")(models.check)
app.command("report")(report)
app.command("demo")(demo)
app.command("app")(open_app)
app.command("batch")(batch)
app.command("bench", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(bench)
