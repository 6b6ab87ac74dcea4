"""`bathyscope capture`: fill the store ahead of time."""

from __future__ import annotations

from typing import Annotated

import typer

from analyses.cli.console import ConsoleProgress, say
from analyses.cli.imports import importing
from analyses.cli.model_flags import with_model
from analyses.cli.run import DryRun, PromptFile, Prompts, store_at
from analyses.cli.store_flag import StoreDir
from analyses.running.model_spec import ModelSpec
from probes.html_card import count, size
from probes.points import expand
from probes.reducers import Reducer

MOST_LAYERS = 10_000
"""More than any model has: points that name a layer beyond are refused before one is loaded."""


@with_model
def capture(
    spec: ModelSpec,
    prompts: PromptFile,
    points: Annotated[str, typer.Option(help="What to capture: patterns such as 'resid_post.*,z.0-3,final_norm'.")],
    reduce: Annotated[
        str, typer.Option(help="rows, int8, last, mean, mean_square, norm, moments, at:0,-1 or lens:10.")
    ] = "rows",
    store: StoreDir = None,
    dry_run: DryRun = False,
) -> None:
    """Capture points of every prompt into the store; only what is missing is run."""
    reducer = Reducer.parse(reduce)
    lines = Prompts(prompts).read()
    patterns = tuple(part.strip() for part in points.split(","))
    expand(patterns, MOST_LAYERS)
    spec.check()
    activations = store_at(store)
    with importing():
        from analyses.base import as_prompts
        from probes.capture.dry_run import estimate
        from probes.capture.needs import Need
        from probes.capture.run import capture as run_capture
        from probes.capture.run import plan_capture
    loaded = spec.load()
    sequences = [prompt.tokens for prompt in as_prompts(lines, loaded, {})]
    need = Need(tuple(str(address) for address in expand(patterns, loaded.shape.n_layers)), reducer)
    if dry_run:
        say(*estimate(loaded, [plan_capture(loaded, sequences, [need], activations)]).lines())
        return
    progress = ConsoleProgress()
    try:
        done = run_capture(loaded, sequences, [need], activations, progress=progress).done
    finally:
        progress.stop()
    say(
        f"{count(done.forwards, 'forward pass')}, {count(done.plan.rows, 'row')}, {size(done.bytes_written)} written to {activations.root}"
    )
