"""`bathyscope edit`: one prompt, a stack of edits, and what they change."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from analyses.cli.console import say
from analyses.cli.imports import importing
from analyses.cli.model_flags import with_model
from analyses.cli.run import AsJson, Edits
from analyses.running.model_spec import ModelSpec
from probes.edits import check_edits
from probes.edits.line import watched
from probes.errors import OptionError, PromptError
from probes.html_card import aligned

if TYPE_CHECKING:
    from probes.session import Comparison, State

MOST = 1000
"""Tokens written, at most."""


@with_model
def edit(
    spec: ModelSpec,
    text: Annotated[str, typer.Option("--text", help="The prompt.")],
    other: Annotated[str | None, typer.Option("--other", help="A second prompt, to patch from.")] = None,
    edits: Edits = None,
    watch: Annotated[str, typer.Option(help="Tokens to follow: Paris, Rome with a blank before each, or quoted.")] = "",
    generate: Annotated[int, typer.Option(min=0, max=MOST, help="Also write so many tokens, before and after.")] = 0,
    everywhere: Annotated[
        bool, typer.Option("--everywhere", help="Repeat the last edit at every layer and position, or every head.")
    ] = False,
    as_json: AsJson = False,
    save: Annotated[Path | None, typer.Option("--save", help="Also write the session's text to a file.")] = None,
) -> None:
    """Edit a model on one prompt, and compare what it says before and after."""
    if not text:
        raise PromptError("--text is empty: give a prompt")
    if save is not None and not save.parent.is_dir():
        raise OptionError(f"--save {str(save)!r} lies in no folder that is there: give another file")
    spec.check()
    tokens = watched(watch)
    check_edits(edits or ())
    with importing():
        from probes.session import Session
    model = spec.load()
    session = Session(model, text, other, tokens, ref=str(spec)).edit(*(edits or ()))
    comparison = session.compare(generate)
    effect = session.everywhere() if everywhere else None
    if save is not None:
        _write(save, session.state)
    if as_json:
        data = comparison.data()
        if effect is not None:
            data["everywhere"] = effect.data()
        say(dumps({"session": str(session), **data}))
        return
    say(*_lines(comparison))
    if effect is not None:
        say(*effect.lines(session.tokens))


def _lines(comparison: Comparison) -> list[str]:
    rows = [
        (row.block, str(before.top), str(row.top), f"{row.kl:.3g}")
        for before, row in zip(comparison.before.layers, comparison.after.layers, strict=False)
    ]
    return [str(comparison), "", *(aligned(("block", "lens before", "lens after", "KL, nats"), rows) if rows else [])]


def _write(path: Path, state: State) -> None:
    try:
        path.write_text(f"{state}\n", encoding="utf-8")
    except OSError as error:
        raise OptionError(f"--save {str(path)!r} cannot be written ({error.strerror}): give another file") from None
