"""`bathyscope demo`: every analysis on the bundled default model and prompts, one report."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from analyses.back_patching import BackPatching
from analyses.base import Analysis
from analyses.causal_patching import CausalPatching
from analyses.cli.console import ConsoleProgress, say
from analyses.cli.run import StoreDir
from analyses.communication_channels import CommunicationChannels
from analyses.concept_depth import ConceptDepth
from analyses.contextual_decomposition import ContextualDecomposition
from analyses.depth_use import DepthUse
from analyses.latent_language import LatentLanguage
from analyses.logit_lens import LogitLens
from analyses.norm_removal import NormRemoval
from analyses.results.report import write_report
from analyses.results.result import Result
from analyses.running.model_spec import ModelSpec
from analyses.running.runner import run
from analyses.voids import Voids
from probes.html_card import count
from probes.prompts import read_prompts
from probes.store import ActivationStore

DEMO_MODEL = ModelSpec("smollm2-135m")
DEMO_PROMPTS = Path(str(files("analyses").joinpath("data", "demo.jsonl")))

DEMO: tuple[Analysis, ...] = (
    Voids(alpha=(0.8, 0.2, 0.4, 0.6, 1.0), max_new_tokens=16, readout_positions="all"),
    LogitLens(),
    ConceptDepth(
        sets=("city_country", "capital_negation", "sentiment"), limit=100, splits=2, causal_layers=1, causal_prompts=8
    ),
    DepthUse(
        parts=("block",),
        bits=(4,),
        windows=(2,),
        skip_prompts=4,
        erasure_prompts=1,
        gradient_prompts=0,
        greedy_steps=1,
        drop_blocks=3,
    ),
    LatentLanguage(
        source=("en", "fr"),
        target=("fr", "zh"),
        form="plain",
        set_rule="first_token",
        n_prompts=10,
        n_shot=3,
        extras=("similarity",),
    ),
    CommunicationChannels(n_prompts=24, laundry_items=(2, 3, 4)),
    BackPatching(task="two_hop", pool=60, n_prompts=8, stride=3),
    NormRemoval(split_paths=False, neurons=4),
    ContextualDecomposition(
        task="ioi", n_prompts=2, n_references=6, search_steps=2, shares=(0.02, 0.1, 0.3), random_circuits=4, mlps=False
    ),
    CausalPatching(task="facts", n_pairs=6, heads="none", nulls="none"),
)
"""What the demo runs, with the options of its report."""


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder of the results and of report.html.")] = Path("runs/demo"),
    store: StoreDir = None,
) -> None:
    """Run every analysis on the bundled default model and prompts, and write one report."""
    lines = read_prompts(DEMO_PROMPTS, Voids.prompt_fields)
    activations = ActivationStore(store)
    model = DEMO_MODEL.load(progress=say)
    results: list[Result] = []
    for analysis in DEMO:
        say(f"{analysis.title}: {count(len(lines), 'prompt')} on {model.ref}")
        progress = ConsoleProgress()
        try:
            result = run(
                DEMO_MODEL, analysis, lines, activations, model=model, prompts_file=DEMO_PROMPTS, progress=progress
            )
        finally:
            progress.stop()
        result.save(out / analysis.name)
        say(f"  {count(result.provenance['counts']['forwards'], 'forward pass')}, {result.provenance['seconds']:.1f} s")
        results.append(result)
    report = write_report(results, out / "report.html", title=f"Where in the depth of {model.ref}?")
    say(f"report: {report.resolve()}")
