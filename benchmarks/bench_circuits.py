"""Circuits of one task: what each way of ordering nodes and edges keeps, and how its ranks agree with exact effects.

bathyscope bench circuits [--pairs 12] [--random 4] [--ablations counterfactual mean] [--out FOLDER]

Every method orders the heads and MLPs, or the edges, on half of the pairs and is tried on the other. Relevance of contextual
decomposition is that of its faithful rules, against the same references that mean ablation takes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analyses.causal_patching import CausalPatching
from analyses.causal_patching.ablation import AblationKind
from analyses.causal_patching.circuit_plan import CircuitPlan
from analyses.causal_patching.circuit_tables import circuit_tables
from analyses.causal_patching.edge_tables import edge_tables
from analyses.causal_patching.edges import Line
from analyses.causal_patching.levels import level_of, supports
from analyses.causal_patching.running import Run
from analyses.causal_patching.selection import check_gaps, gauge
from analyses.contextual_decomposition.cases import Case, baseline_of
from analyses.contextual_decomposition.scores import PreparedCase, mlp_sources, to_metric
from analyses.interventions import Tally
from probes.decomposition import PRESETS, Decomposer, head
from probes.models import load_model
from probes.models.protocol import Model
from probes.progress import QUIET

Array = NDArray[np.float64]
NODES = ("exact", "mean", "atp", "atp_star")
EDGES = ("eap", "eap_ig")
LINE = Line(5, "gauss", "inputs")


def relevance(run: Run) -> Array:
    """Relevance of every head and MLP to the metric on every pair, [pair, node]."""
    shape, rows, rules = run.model.shape, [], PRESETS["faithful"]
    decomposer = Decomposer(run.model, run.pairs[0].clean)
    heads = [(head(layer, h),) for layer in range(shape.n_layers) for h in range(shape.n_heads)]
    sources = [*heads, *mlp_sources(range(shape.n_layers))]
    for pair in run.pairs:
        places = tuple(range(len(pair.clean)))
        case = Case(pair.index, pair.clean, pair.answers, pair.distractors, pair.references, places, pair.group)
        prompt = decomposer.prepare(pair.clean, joint=rules.attention != "frozen")
        prepared = PreparedCase(case, prompt, baseline_of(run.model, pair.references))
        scores = to_metric(decomposer, prepared, sources, rules).numpy()
        of_heads, of_mlps = np.split(scores, [len(heads)])
        rows.append(np.concatenate([of_heads.reshape(shape.n_layers, -1), of_mlps[:, None]], axis=1).ravel())
    return np.stack(rows)


def prepared_run(model: Model, task: str, n_pairs: int, seed: int) -> Run:
    """The pairs of the task that the model tells apart, with their references."""
    analysis = CausalPatching(task=task, n_pairs=n_pairs, seed=seed, circuit="nodes", ablation="mean")  # type: ignore[arg-type]
    pairs = analysis._pairs(analysis.collect(model))
    run = analysis._run(model, [pair for pair in pairs if not pair.reason], Tally(QUIET), None)
    ends, reasons = gauge(run, analysis.min_gap, False, QUIET)
    check_gaps(pairs, ends, reasons, analysis.min_pairs, "logit_diff")
    return replace(run, pairs=[pair for pair in run.pairs if pair.index not in reasons])


def tables_of(
    run: Run, ablations: Sequence[AblationKind], n_random: int, verify: int, seed: int
) -> dict[str, pd.DataFrame]:
    """The tables `faithfulness`, `circuit_area` and `verification`, of nodes and of edges under each ablation."""
    level, started = level_of(run, "nodes", LINE), time.process_time()
    scores: dict[str, Array] = {}
    for method in NODES:
        scores[method] = supports(run, level, method, QUIET)
        started = _said(method, started)
    scores["cdt"] = relevance(run)
    started = _said("cdt", started)
    tables: dict[str, list[pd.DataFrame]] = {"faithfulness": [], "circuit_area": []}
    plans: list[tuple[CircuitPlan, Mapping[str, Array]]] = []
    for kind in ablations:
        plan = CircuitPlan("nodes", (), CausalPatching().sizes, kind, n_random, 0, LINE, seed)
        plans += [(plan, scores), (replace(plan, level="edges", methods=EDGES), {})]
    for one, further in plans:
        for name, table in circuit_tables(run, one, QUIET, further).items():
            tables[name].append(table)
        started = _said(f"circuits of {one.level}, {one.ablation}", started)
    rows = [edge_tables(run, method, LINE, verify, seed, QUIET)[1] for method in EDGES]
    _said("edges verified", started)
    return {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()} | {
        "verification": pd.DataFrame(rows)
    }


def summary(tables: Mapping[str, pd.DataFrame]) -> str:
    """The rows that the README quotes, as a Markdown table: held-out areas, and rank correlations with exact effects."""
    area = tables["circuit_area"]
    verified = tables["verification"].set_index("method")
    pooled = area[area["split"] == "in_sample"]
    lines = [
        "| circuits of | ordered by | CPR | CMD | random per layer: CPR, CMD | f at 5 % | ranks against exact effects |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for _, row in area[area["split"] == "held_out"].iterrows():
        same = (pooled["level"] == row["level"]) & (pooled["ablation"] == row["ablation"])
        whole = pooled[same & (pooled["method"] == row["method"])].iloc[0]
        rank = verified.loc[row["method"]] if row["level"] == "edges" else whole
        cells = [
            f"{row['level']}, {row['ablation']}", row["method"], *(_interval(row, name) for name in ("cpr", "cmd")),
            f"{row['random_per_layer_cpr']:.2f}, {row['random_per_layer_cmd']:.2f}", f"{row['f_05']:.2f}",
            _interval(rank, "spearman") if np.isfinite(rank["spearman"]) else "",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _interval(row: pd.Series[Any], name: str) -> str:
    return f"{row[name]:.2f} [{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}]"


def _said(what: str, started: float) -> float:
    now = time.process_time()
    print(f"{what}: {now - started:.0f} processor s", file=sys.stderr, flush=True)
    return now


def main() -> None:
    """Prints the tables, and writes them as CSV where a folder is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", default="ioi", choices=("ioi", "greater_than"))
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument(
        "--random", type=int, default=4, help="random circuits of each size, and as many of each layer's"
    )
    parser.add_argument(
        "--ablations", nargs="+", default=["counterfactual"], choices=("counterfactual", "mean", "zero")
    )
    parser.add_argument("--verify", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    run = prepared_run(load_model(options.model), options.task, options.pairs, options.seed)
    print(f"{len(run.pairs)} of {options.pairs} pairs are told apart", flush=True)
    tables = tables_of(run, options.ablations, options.random, options.verify, options.seed)
    for name, table in tables.items():
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            table.to_csv(options.out / f"{name}.csv", index=False)
    print(f"\n{tables['verification'].round(3).to_string(index=False)}\n\n{summary(tables)}")


if __name__ == "__main__":
    main()
