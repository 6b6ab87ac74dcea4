"""`bathyscope run ANALYSIS`, one command per analysis, its flags drawn from the dataclass."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from textwrap import wrap
from typing import Annotated, Any

import typer

from analyses.base import Analysis
from analyses.cli.console import ConsoleProgress, say
from analyses.cli.model_flags import with_model
from analyses.cli.option_flags import build, flags
from analyses.results.output_folder import check_output
from analyses.running.model_spec import ModelSpec
from analyses.running.runner import dry_run as cost_of
from analyses.running.runner import lines_of
from analyses.running.runner import run as run_analysis
from probes.errors import OptionError
from probes.html_card import count
from probes.input_files import make_folder
from probes.store import ActivationStore

PromptFile = Annotated[Path, typer.Option("--prompts", help='JSON lines: {"text": …} or {"tokens": […]}.')]
GivenPrompts = Annotated[
    Path | None,
    typer.Option("--prompts", help="JSON lines; may be left out where the analysis is given data sets by name."),
]
StoreDir = Annotated[
    Path | None, typer.Option("--store", help="The activation store's folder; default in the user cache.")
]
OutDir = Annotated[Path | None, typer.Option("--out", help="Folder of the result; default runs/ANALYSIS.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print what would be captured and what it would cost, and stop.")
]


def command_for(cls: type[Analysis]) -> Callable[..., None]:
    """The command of one analysis."""

    def command(
        spec: ModelSpec,
        prompts: GivenPrompts = None,
        store: StoreDir = None,
        out: OutDir = None,
        dry_run: DryRun = False,
        **options: Any,
    ) -> None:
        start(build(cls, options), spec, prompts, store, out, dry_run)

    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "options"]
    command.__signature__ = inspect.Signature([*own, *flags(cls)])  # type: ignore[attr-defined]
    command.__doc__ = f"{cls.title}. {(cls.__doc__ or '').splitlines()[0]}"
    return with_model(command)


def start(
    analysis: Analysis, spec: ModelSpec, prompts: Path | None, store: Path | None, out: Path | None, dry_run: bool
) -> None:
    """Checks everything that needs no model, then runs (or, dry, prints the cost) and saves."""
    lines = lines_of(analysis, prompts)
    out = out or Path("runs") / analysis.name
    check_output(out)
    if not dry_run:
        make_folder(out.parent, "the folder of --out", OptionError)
    activations = ActivationStore(store)
    if dry_run:
        for line in cost_of(spec, analysis, lines, activations):
            say(line)
        return
    progress = ConsoleProgress()
    try:
        result = run_analysis(spec, analysis, lines, activations, prompts_file=prompts, progress=progress)
    finally:
        progress.stop()
    folder = result.save(out)
    for name, table in result.tables.items():
        say(f"{name}: {count(len(table), 'row')}")
    say(f"report: {folder / 'report.html'}")


def fields_help(analysis: type[Analysis]) -> str:
    """What a prompt line may carry beside its text or tokens, in lines that a help text keeps."""
    if not analysis.prompt_fields:
        return "A prompt line carries its text or its tokens; other fields are kept and not used."
    width = max(map(len, analysis.prompt_fields)) + 2
    lines = [
        line
        for name, field in analysis.prompt_fields.items()
        for line in wrap(field.help, 78, initial_indent=f"  {name:{width}}", subsequent_indent=" " * (width + 2))
    ]
    return "\n".join(["\b", "A prompt line carries its text or its tokens, and may carry:", *lines])
