"""`bathyscope report`: one page of several saved runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from analyses.cli.console import say
from analyses.cli.imports import importing
from analyses.results.record import read_record, readable
from probes.errors import OptionError
from probes.html_card import count
from probes.locked_files import write_whole

MARK = "· Bathyscope</title>"
"""Stands near the beginning of every page that may be replaced."""
START = 4096


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of saved runs.")],
    out: Annotated[Path, typer.Option("--out", help="The page to write; an earlier one is replaced.")] = Path(
        "report.html"
    ),
    title: Annotated[str | None, typer.Option(help="The page's heading; default the analyses and models.")] = None,
) -> None:
    """Write one report of several runs."""
    check_page(out)
    for run in runs:
        with readable(run):
            read_record(run)
    with importing():
        from analyses.results.report import render
        from analyses.results.result import Result
    results = [Result.load(run) for run in runs]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, render(results, title))
    except OSError as error:
        raise OptionError(f"--out {str(out)!r} cannot be written: {error.strerror or error}") from None
    say(f"report of {count(len(results), 'run')}: {out}")


def check_page(out: Path) -> None:
    """Refuse to replace anything but an earlier page.

    Raises:
        OptionError: a folder, a device, or a file that is no report.
    """
    try:
        if not out.exists() and not out.is_symlink():
            return
        if out.is_file() and not out.is_symlink() and MARK.encode() in out.read_bytes()[:START]:
            return
    except OSError as error:
        raise OptionError(f"--out {str(out)!r} cannot be used: {error.strerror or error}") from None
    raise OptionError(f"--out {str(out)!r} is there and is no report: give a new file, such as report.html")
