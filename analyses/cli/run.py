"""`bathyscope run ANALYSIS`, one command per analysis, its flags drawn from its options; torch is imported once they are legal."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from analyses.cli.console import ConsoleProgress, say
from analyses.cli.imports import importing
from analyses.cli.model_flags import with_model
from analyses.cli.option_flags import build, flags
from analyses.cli.outline import options_of
from analyses.cli.store_flag import StoreDir
from analyses.registry import get_analysis
from analyses.results.output_folder import check_output
from analyses.running.model_spec import ModelSpec
from probes.errors import OptionError
from probes.html_card import count
from probes.input_files import make_folder
from probes.progress import QUIET, Progress
from probes.prompts import PromptLine, as_line, read_prompts

if TYPE_CHECKING:
    from analyses.base import Analysis
    from probes.store import ActivationStore

PromptFile = Annotated[Path, typer.Option("--prompts", help='JSON lines: {"text": …} or {"tokens": […]}.')]
GivenPrompts = Annotated[
    Path | None,
    typer.Option("--prompts", help="JSON lines; may be left out where the analysis is given data sets by name."),
]
Texts = Annotated[
    list[str] | None, typer.Option("--text", help="A prompt, in place of a file; may be given several times.")
]
Edits = Annotated[
    list[str] | None,
    typer.Option(
        "--edit",
        metavar="EDIT",
        help="Read the model under an edit, such as 'zero z.5.3'; may be given several times, and acts in that order.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No lines of progress.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="A line of progress for every step.")]
OutDir = Annotated[Path | None, typer.Option("--out", help="Folder of the result; default runs/ANALYSIS.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print what would be captured and what it would cost, and stop.")
]


def command_for(name: str) -> Callable[..., None]:
    """The command of one analysis, which imports it when it is run."""
    outline = options_of(name)

    def command(
        spec: ModelSpec,
        prompts: GivenPrompts = None,
        texts: Texts = None,
        edits: Edits = None,
        store: StoreDir = None,
        out: OutDir = None,
        dry_run: DryRun = False,
        as_json: AsJson = False,
        quiet: Quiet = False,
        verbose: Verbose = False,
        **options: Any,
    ) -> None:
        given = Prompts(prompts, tuple(texts or ()))
        progress = progress_of(quiet, verbose)
        changes = tuple(edits or ())
        build(outline, options)
        lines = given.read()
        spec.check()
        if changes:
            from probes.edits import check_edits

            check_edits(changes)
        check_output(out or Path("runs") / name)
        activations = store_at(store)
        with importing():
            analysis = get_analysis(name)
        start(
            build(analysis, options),
            spec,
            given,
            lines,
            activations,
            out,
            progress,
            edits=changes,
            dry_run=dry_run,
            as_json=as_json,
        )

    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "options"]
    command.__signature__ = inspect.Signature([*own, *flags(outline)])  # type: ignore[attr-defined]
    about = (outline.__doc__ or "").partition("\n")[0]
    command.__doc__ = f"{outline.title}. {about}"
    return with_model(command)


@dataclass(frozen=True)
class Prompts:
    """Prompts as a command line gives them: a file, or texts."""

    file: Path | None
    texts: tuple[str, ...] = ()

    def read(self) -> list[PromptLine]:
        """Return the lines; no analysis has seen their fields.

        Raises:
            OptionError: both a file and texts.
            PromptError: a file that cannot be read, or the first fault in it.
        """
        if self.texts and self.file is not None:
            raise OptionError("--text and --prompts are both given: give one of them")
        if self.file is not None:
            return read_prompts(self.file)
        return [as_line(text, number) for number, text in enumerate(self.texts)]


def store_at(root: Path | None) -> ActivationStore:
    """Return the store in a folder; the one in the user cache by default.

    Raises:
        StoreError: a folder that cannot be used.
    """
    from probes.store import ActivationStore

    return ActivationStore(root)


def progress_of(quiet: bool, verbose: bool) -> Progress:
    """Return the progress that the flags ask for."""
    return QUIET if quiet else ConsoleProgress(every_step=verbose)


def start(
    analysis: Analysis,
    spec: ModelSpec,
    prompts: Prompts,
    lines: Sequence[PromptLine],
    activations: ActivationStore,
    out: Path | None,
    progress: Progress,
    *,
    edits: tuple[str, ...] = (),
    dry_run: bool = False,
    as_json: bool = False,
) -> None:
    """Check everything that needs no model, then run (or, dry, print the cost) and save."""
    from analyses.running.runner import dry_run as cost_of
    from analyses.running.runner import lines_of
    from analyses.running.runner import run as run_analysis

    lines = lines_of(analysis, lines)
    out = out or Path("runs") / analysis.name
    if not dry_run:
        make_folder(out.parent, "the folder of --out", OptionError)
    if dry_run:
        cost = cost_of(spec, analysis, lines, activations, edits=edits)
        say(dumps({"cost": cost}) if as_json else "\n".join(cost))
        return
    try:
        result = run_analysis(
            spec,
            analysis,
            lines,
            activations,
            prompts_file=prompts.file,
            texts=prompts.texts,
            edits=edits,
            progress=progress,
        )
    finally:
        progress.stop()
    folder = result.save(out)
    rows = {name: len(table) for name, table in result.tables.items()}
    report = folder / "report.html"
    if as_json:
        counts, notes = result.provenance["counts"], list(result.notes)
        say(dumps({"folder": str(folder), "report": str(report), "tables": rows, "counts": counts, "notes": notes}))
        return
    for name, n_rows in rows.items():
        say(f"{name}: {count(n_rows, 'row')}")
    say(f"report: {report}")


class AnalysisCommand(TyperCommand):
    """The command of an analysis, whose help also says what a prompt line may carry; for that the analysis is imported."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write what a prompt line may carry."""
        self.epilog = fields_help(get_analysis(str(self.name)))
        super().format_epilog(ctx, formatter)


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
