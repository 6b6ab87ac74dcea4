"""The commands of `bathyscope`, each imported when it is called: a list of them imports none."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from analyses.cli.console import PLAIN, say
from analyses.cli.exits import UsageError
from analyses.cli.imports import importing
from analyses.registry import titles
from probes.errors import unknown

COMMANDS = {
    "run": ("analyses.cli.commands:analyses_group", "Run an analysis and save its result."),
    "edit": ("analyses.cli.edit:edit", "Edit a model on one prompt, and compare what it says before and after."),
    "demo": ("analyses.cli.demo:demo", "Run every analysis on the bundled default model and prompts."),
    "app": ("analyses.cli.app:open_app", "Open the dashboard on the saved runs of a folder."),
    "report": ("analyses.cli.report:report", "Write one report of several runs."),
    "batch": ("analyses.cli.batch:batch", "Run the cells of a study that have no result yet."),
    "capture": ("analyses.cli.capture:capture", "Capture points of every prompt into the store."),
    "store": ("analyses.cli.store:group", "The activation store."),
    "lens": ("analyses.cli.lens:group", "Lenses: fitted on a model's text, kept as files, read by analyses."),
    "models": ("analyses.cli.models:group", "Models at hand."),
    "check": ("analyses.cli.check:check", "Check a model's identities on every backend."),
    "bench": ("analyses.cli.bench:command", "Measure side by side with other tools."),
}
"""Command to where its function or group lies, and what a list of commands says of it."""


class _LazyGroup(TyperGroup):
    """Commands that are known by name and one line, and imported when they are called."""

    kind: str

    def lines(self) -> Mapping[str, str]:
        """Return what a list says of every command."""
        raise NotImplementedError

    def load(self, name: str) -> Any:
        """Import the command of that name."""
        raise NotImplementedError

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands."""
        return list(self.lines())

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of commands."""
        with formatter.section("Commands"):
            formatter.write_dl(list(self.lines().items()))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return one command; None for an unknown name."""
        return self.load(cmd_name) if cmd_name in self.lines() else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that `args` name first; an unknown one is refused with the legal names."""
        if args and not args[0].startswith("-") and args[0] not in self.lines():
            raise UsageError(unknown(self.kind, args[0], self.lines()))
        return super().resolve_command(ctx, args)


class _Commands(_LazyGroup):
    kind = "command"

    def lines(self) -> Mapping[str, str]:
        return {name: line for name, (_, line) in COMMANDS.items()}

    def load(self, name: str) -> Any:
        module, _, attribute = COMMANDS[name][0].partition(":")
        with importing():
            command = getattr(import_module(module), attribute)
        if isinstance(command, typer.Typer):
            alone = len(command.registered_commands) == 1
            return typer.main.get_command(command) if alone else typer.main.get_group(command)
        return command_named(name, command)


class _Analyses(_LazyGroup):
    kind = "analysis"

    def lines(self) -> Mapping[str, str]:
        return titles()

    def load(self, name: str) -> Any:
        from analyses.cli.run import AnalysisCommand, command_for

        return command_named(name, command_for(name), cls=AnalysisCommand)


def command_named(name: str, function: Any, **settings: Any) -> Any:
    """Return a function as a command of its own."""
    single = typer.Typer(**PLAIN)
    single.command(name, **settings)(function)
    return typer.main.get_command(single)


def _version(given: bool) -> None:
    if given:
        from importlib.metadata import version

        say(f"bathyscope {version('bathyscope')}")
        raise typer.Exit()


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Where in the depth of a language model does it happen?"""


bathyscope = typer.Typer(cls=_Commands, callback=_root, no_args_is_help=True, **{**PLAIN, "add_completion": True})
analyses_group = typer.Typer(cls=_Analyses, help=COMMANDS["run"][1], no_args_is_help=True, **PLAIN)
