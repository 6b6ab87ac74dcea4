"""Three analyses over one prompt set: as a study against three separate runs, each with an empty store.

    bathyscope bench study --prompts 8 --tokens 64

Forwards are sequences run through the model for captures. The tables of both ways are compared before anything is said.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from analyses.base import Analysis
from analyses.registry import get_analysis
from analyses.results.result import Result
from analyses.running.model_spec import ModelSpec
from analyses.studies import AnalysisSpec, PromptSet, Study, StudyModel, run_local, run_study
from analyses.studies.cell_options import Setting, make
from probes.models import load_model
from probes.store import ActivationStore

ENTRIES = (
    AnalysisSpec("voids", options={"semantics": "trace"}),
    AnalysisSpec("logit_lens", options={"positions": "last"}),
    AnalysisSpec("depth_use", options={
        "parts": ["block"], "skip_prompts": 0, "erasure_prompts": 0, "gradient_prompts": 0, "bits": [4], "windows": [2],
        "greedy_steps": 0, "drop_blocks": 0,
    }),
)  # fmt: skip


@dataclass(frozen=True)
class Way:
    """One way of doing the work."""

    name: str
    forwards: int
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--analyses", nargs="+", default=[spec.analysis for spec in ENTRIES])
    flags = parser.parse_args()
    draw = random.Random(0)
    ids = tuple(tuple(draw.randrange(1000, 40000) for _ in range(flags.tokens)) for _ in range(flags.prompts))
    entries = tuple(spec for spec in ENTRIES if spec.analysis in flags.analyses)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        load_model(flags.model)  # Once, so that neither way pays for first imports.
        separate = _separately(flags.model, ids, entries, root)
        study = _as_study(flags.model, ids, entries, root)
        _compare(root, entries)
    print(
        f"{len(entries)} analyses, {flags.prompts} prompts of {flags.tokens} tokens on {flags.model}, same tables both ways"
    )
    print("| way | forwards | seconds | forwards, ratio | seconds, ratio |\n|---|---|---|---|---|")
    for way in (separate, study):
        ratios = f"{separate.forwards / max(1, way.forwards):.2f}x fewer | {separate.seconds / way.seconds:.2f}x faster"
        print(f"| {way.name} | {way.forwards:,} | {way.seconds:.1f} | {ratios} |")


def _separately(ref: str, ids: tuple[tuple[int, ...], ...], entries: tuple[AnalysisSpec, ...], root: Path) -> Way:
    """A run per analysis: the model loaded anew and a store of its own, as three commands would."""
    forwards, started = 0, time.perf_counter()
    for spec in entries:
        analysis: Analysis = make(
            get_analysis(spec.analysis), {name: Setting(value) for name, value in spec.options.items()}, None
        )
        result = analysis.run(load_model(ref), ids, store=ActivationStore(root / f"store-{spec.analysis}"))
        result.save(root / "separate" / spec.analysis)
        forwards += result.provenance["counts"]["forwards"]
    return Way("three runs, empty stores", forwards, time.perf_counter() - started)


def _as_study(ref: str, ids: tuple[tuple[int, ...], ...], entries: tuple[AnalysisSpec, ...], root: Path) -> Way:
    """The study in this process; its index, tables and page are part of the time."""
    study = Study("bench", (StudyModel(ModelSpec(ref)),), entries, (PromptSet("ids", tokens=ids),))
    started = time.perf_counter()
    run = run_study(study, root / "study", lambda units, out: run_local(units, out, root / "store", 0))
    assert not run.failed
    return Way("one study", run.forwards, time.perf_counter() - started)


def _compare(root: Path, entries: tuple[AnalysisSpec, ...]) -> None:
    index = pd.read_parquet(root / "study" / "index.parquet").set_index("analysis")
    for spec in entries:
        one = Result.load(root / "separate" / spec.analysis)
        other = Result.load(root / "study" / index.loc[spec.analysis, "result"])
        assert one.tables.keys() == other.tables.keys()
        for name, table in one.tables.items():
            pd.testing.assert_frame_equal(table, other.tables[name], rtol=1e-3, atol=1e-4)


if __name__ == "__main__":
    main()
