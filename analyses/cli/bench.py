"""`bathyscope bench`: the measurements of a source checkout."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Annotated

import typer

from analyses.cli.console import PLAIN
from probes.errors import OptionError, unknown


def benchmarks() -> dict[str, Path]:
    """The benchmark scripts of this checkout, by name."""
    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    return {path.stem.removeprefix("bench_"): path for path in sorted(folder.glob("bench_*.py"))}


command = typer.Typer(**PLAIN)
"""The command by itself, whose flags are those of the script."""


@command.command("bench", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Which benchmark; its own flags follow it.")] = "capture",
) -> None:
    """Measure side by side with other tools, in one run; needs a source checkout."""
    scripts = benchmarks()
    if not scripts:
        raise OptionError(
            "benchmarks are part of the source checkout, not of the wheel: clone the repository and run it there"
        )
    flags = list(context.args)
    if name.startswith("-"):
        name, flags = "capture", [name, *flags]
    if name not in scripts:
        raise OptionError(unknown("benchmark", name, scripts))
    argv, path = sys.argv, sys.path
    sys.argv = [str(scripts[name]), *flags]
    sys.path = [
        str(scripts[name].parent),
        *path,
    ]  # as for a script that is run by itself: its neighbours are importable
    try:
        runpy.run_path(str(scripts[name]), run_name="__main__")
    finally:
        sys.argv, sys.path = argv, path
