"""`bathyscope demo`: every analysis on the bundled default model and prompts, and one report that grows."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from analyses.cli.console import ConsoleProgress, say
from analyses.cli.imports import importing
from analyses.cli.report import check_page
from analyses.cli.store_flag import StoreDir
from analyses.running.model_spec import ModelSpec
from probes.errors import OptionError
from probes.html_card import count
from probes.input_files import make_folder
from probes.store import ActivationStore

if TYPE_CHECKING:
    from collections.abc import Sequence

    from analyses.cli.demo_steps import Step

DEMO_MODEL = ModelSpec("smollm2-135m")

SIZE = (
    "This is the quick demo: few prompts, and most analyses look at every third to sixth block alone, so that "
    "intervals are wide and a block between may stand out more. `bathyscope demo --full` looks at more of both."
)
"""What the report says of the quick demo."""


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder of the results and of report.html.")] = Path("runs/demo"),
    store: StoreDir = None,
    full: Annotated[
        bool, typer.Option("--full/--quick", help="More prompts, layers and controls; several times as long.")
    ] = False,
) -> None:
    """Run every analysis on the bundled default model and prompts; the report is there after the first and grows."""
    started = time.perf_counter()
    path = out / "report.html"
    make_folder(out, "the folder of --out", OptionError)
    check_page(path)
    activations = ActivationStore(store)
    with importing():
        from analyses.cli.demo_steps import DEMO
        from analyses.results.report import GrowingReport
        from analyses.running.runner import run
    model = DEMO_MODEL.load(progress=say)
    report = GrowingReport(path, f"Where in the depth of {model.ref}?", "" if full else SIZE)
    loaded = time.perf_counter()
    for number, step in enumerate(DEMO, 1):
        analysis = step.analysis(full)
        place = f"{number} of {len(DEMO)}"
        say(f"{place} · {analysis.title}{_left(DEMO, number - 1, time.perf_counter() - loaded)}")
        progress = ConsoleProgress(place)
        try:
            result = run(DEMO_MODEL, analysis, step.prompts(full), activations, model=model, progress=progress)
        finally:
            progress.stop()
        result.save(out / analysis.name)
        report.add(result)
        said = (
            f"  {count(result.provenance['counts']['forwards'], 'forward pass')}, {result.provenance['seconds']:.1f} s"
        )
        say(f"{said}; the report is there and grows: {path.resolve()}" if number == 1 else said)
    say(f"report: {path.resolve()} ({time.perf_counter() - started:.0f} s)")


def _left(steps: Sequence[Step], done: int, seconds: float) -> str:
    """How long the rest will take if it goes on as it went; nothing before the first analysis is done."""
    weights = [step.weight for step in steps]
    return f" · about {seconds * sum(weights[done:]) / sum(weights[:done]):.0f} s left" if done else ""
