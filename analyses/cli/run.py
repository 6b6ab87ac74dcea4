"""`bathyscope run ANALYSIS`, one command per analysis, its flags drawn from the dataclass."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Annotated, Any

import typer

from analyses.base import Analysis
from analyses.cli.console import ConsoleProgress, say
from analyses.cli.option_flags import build, flags
from analyses.registry import get_analysis
from analyses.results.output_folder import check_output
from analyses.running.reproduce import with_source
from probes.capture.dry_run import estimate
from probes.capture.run import plan_capture
from probes.errors import OptionError
from probes.html_card import count
from probes.input_files import make_folder
from probes.models import Model, load_model
from probes.models.placement import parse_max_memory
from probes.prompts import PromptLine, read_prompts
from probes.store import ActivationStore

ModelRef = Annotated[str, typer.Option("--model", help="A named model, a folder, a .gguf file, or a hub id.")]
PromptFile = Annotated[Path, typer.Option("--prompts", help='JSON lines: {"text": …} or {"tokens": […]}.')]
GivenPrompts = Annotated[
    Path | None,
    typer.Option("--prompts", help="JSON lines; may be left out where the analysis is given data sets by name."),
]
StoreDir = Annotated[
    Path | None, typer.Option("--store", help="The activation store's folder; default in the user cache.")
]
OutDir = Annotated[Path | None, typer.Option("--out", help="Folder of the result; default runs/ANALYSIS.")]
Backend = Annotated[str, typer.Option("--backend", help="What runs the model.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
DType = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Attention = Annotated[str, typer.Option("--attention", help="The attention implementation.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub id.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")]
Streamed = Annotated[
    bool,
    typer.Option(
        "--streamed", help="For a model larger than memory: read its blocks one at a time, each for all prompts."
    ),
]
Spread = Annotated[
    str | None, typer.Option("--device-map", help="Spread the model: auto, balanced, balanced_low_0 or sequential.")
]
MaxMemory = Annotated[
    str | None, typer.Option("--max-memory", help="What each device may hold, such as 0=20GiB,cpu=60GiB.")
]
Offload = Annotated[Path | None, typer.Option("--offload", help="Folder for weights that fit on no device of the map.")]
Remote = Annotated[
    bool,
    typer.Option("--remote", help="With --backend nnsight: run the model on an NDIF server (key in NDIF_API_KEY)."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print what would be captured and what it would cost, and stop.")
]


MAKING = {"sets": "--sets NAME", "task": "another --task"}
"""Options that let some analyses make their own prompts, and the flag to name."""


@dataclass(frozen=True)
class Loading:
    """The model options every command shares."""

    model: str
    backend: str = "native"
    device: str = "auto"
    dtype: str = "auto"
    attention: str = "sdpa"
    revision: str | None = None
    trust_remote_code: bool = False
    streamed: bool = False
    device_map: str | None = None
    max_memory: str | None = None
    offload: Path | None = None
    remote: bool = False

    def load(self) -> Model:
        """The loaded model."""
        return load_model(
            self.model,
            backend=self.backend,
            device=self.device,
            dtype=self.dtype,
            attention=self.attention,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            streamed=self.streamed,
            device_map=self.device_map,
            max_memory=None if self.max_memory is None else parse_max_memory(self.max_memory),
            offload=self.offload,
            remote=self.remote,
        )


def _shared(
    model: ModelRef,
    prompts: GivenPrompts = None,
    store: StoreDir = None,
    out: OutDir = None,
    backend: Backend = "native",
    device: Device = "auto",
    dtype: DType = "auto",
    attention: Attention = "sdpa",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    streamed: Streamed = False,
    device_map: Spread = None,
    max_memory: MaxMemory = None,
    offload: Offload = None,
    remote: Remote = False,
    dry_run: DryRun = False,
) -> None:
    """The flags every analysis has; only its signature is used."""


def command_for(analysis: type[Analysis]) -> Callable[..., None]:
    """The command of one analysis."""
    shared = list(inspect.signature(_shared, eval_str=True).parameters.values())

    def command(**values: Any) -> None:
        made = build(analysis, values)
        given = {p.name: values[p.name] for p in shared}
        loading = Loading(**{name: given[name] for name in Loading.__dataclass_fields__})
        run_analysis(made, loading, given["prompts"], given["store"], given["out"], given["dry_run"])

    shared = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in shared]
    parameters = [*shared, *flags(analysis)]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = f"{analysis.title}. {(analysis.__doc__ or '').splitlines()[0]}"
    return command


def run_analysis(
    analysis: Analysis, loading: Loading, prompts: Path | None, store: Path | None, out: Path | None, dry_run: bool
) -> None:
    """Checks everything that needs no model, then runs (or, dry, prints the cost) and saves."""
    lines = lines_of(analysis, prompts)
    out = out or Path("runs") / analysis.name
    check_output(out)
    if not dry_run:
        make_folder(out.parent, "the folder of --out", OptionError)
    activations = ActivationStore(store)
    progress = ConsoleProgress()
    model = loading.load()
    try:
        if dry_run:
            for line in cost(analysis, model, lines, activations):
                say(line)
            return
        result = with_source(analysis.run(model, lines, store=activations, progress=progress), prompts)
    finally:
        progress.stop()
    folder = result.save(out)
    for name, table in result.tables.items():
        say(f"{name}: {count(len(table), 'row')}")
    say(f"report: {folder / 'report.html'}")


def cost(analysis: Analysis, model: Model, lines: list[PromptLine], store: ActivationStore) -> list[str]:
    """What a run would capture and take, line by line."""
    asked = analysis.collect(model, lines)
    plan = plan_capture(model, [prompt.tokens for prompt in asked], analysis.needs(model), store)
    more = []
    if not analysis.needs(model):
        more.append("and nothing is read from the activation store or added to it")
    if analysis.max_new_tokens:
        more.append(
            f"and up to {count(analysis.max_new_tokens, 'new token')} for each of {count(len(asked), 'prompt')}"
        )
    if line := analysis.interventions(model, asked).line():
        more.append(line)
    return [*estimate(model, [plan]).lines(), *more]


def lines_of(analysis: Analysis, prompts: Path | None) -> list[PromptLine]:
    """The validated lines of the prompt file, or none where the analysis makes its own.

    Raises:
        OptionError: it makes none, and no file was given.
        PromptError: a fault in the file.
    """
    if prompts is not None:
        return read_prompts(prompts, analysis.prompt_fields)
    if not analysis.makes_prompts:
        made = next((f" or {flag}" for name, flag in MAKING.items() if hasattr(analysis, name)), "")
        raise OptionError(f"{analysis.name} needs prompts: give --prompts FILE.jsonl{made}")
    return []


def command_of(name: str) -> Any:
    """The command that runs the analysis of that name."""
    cls = get_analysis(name)
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    single.command(name, epilog=fields_help(cls))(command_for(cls))
    return typer.main.get_command(single)


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
