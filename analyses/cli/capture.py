"""`bathyscope capture`: fill the store ahead of time."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from analyses.base import as_prompts
from analyses.cli.console import ConsoleProgress, say
from analyses.cli.run import (
    Attention,
    Backend,
    Device,
    DryRun,
    DType,
    Loading,
    MaxMemory,
    ModelRef,
    Offload,
    PromptFile,
    Remote,
    Revision,
    Spread,
    StoreDir,
    Streamed,
    Trust,
)
from probes.capture.dry_run import estimate, human
from probes.capture.needs import Need
from probes.capture.run import capture as run_capture
from probes.capture.run import plan_capture
from probes.html_card import count
from probes.points import expand
from probes.prompts import read_prompts
from probes.reducers import Reducer
from probes.store import ActivationStore


def capture(
    model: ModelRef,
    prompts: PromptFile,
    points: Annotated[str, typer.Option(help="What to capture: patterns such as 'resid_post.*,z.0-3,final_norm'.")],
    reduce: Annotated[str, typer.Option(help="rows, int8, last, mean, norm, moments, at:0,-1 or lens:10.")] = "rows",
    store: StoreDir = None,
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
    """Capture points of every prompt into the store; only what is missing is run."""
    patterns = tuple(part.strip() for part in points.split(","))
    reducer = Reducer.parse(reduce)
    lines = read_prompts(prompts)
    held = ActivationStore(store)
    how = Loading(model, backend, device, dtype, attention, revision, trust_remote_code, streamed, device_map)
    loaded = replace(how, max_memory=max_memory, offload=offload, remote=remote).load()
    sequences = [prompt.tokens for prompt in as_prompts(lines, loaded, {})]
    need = Need(tuple(str(address) for address in expand(patterns, loaded.shape.n_layers)), reducer)
    if dry_run:
        for line in estimate(loaded, [plan_capture(loaded, sequences, [need], held)]).lines():
            say(line)
        return
    progress = ConsoleProgress()
    try:
        done = run_capture(loaded, sequences, [need], held, progress=progress).done
    finally:
        progress.stop()
    say(
        f"{count(done.forwards, 'forward pass')}, {count(done.plan.rows, 'row')}, {human(done.bytes_written)} written to {held.root}"
    )
