"""Attribution compared: how methods agree with measured ablation, and what circuits in their order keep, on IOI and on planted models.

    bathyscope bench attribution [--model smollm2-135m] [--n-prompts 24] [--tasks A1,K1] [--out DIR] [--write]
    bathyscope bench attribution --ioi DIR      takes a saved run of contextual decomposition in place of running IOI

On IOI, intervals are over prompts; on planted models over families, one task of each, where a method's number is a mean over
tasks. `--write` puts both tables between the markers of README.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parent))

import marked

from analyses.contextual_decomposition import ContextualDecomposition
from analyses.contextual_decomposition.methods import NAMES
from analyses.ground_truth.contestants import runs_of
from analyses.ground_truth.score import family_of
from analyses.results.result import Result
from analyses.results.statistics import cluster_bootstrap
from probes import ActivationStore, from_hf, load_model, planted

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("cdt", "attribution", "relp", "lrp", "ig", "direct")
TASKS = "A1,B1,D1,E1,F1,G1,H1,I1,J1,K1,L1,M1"
"""A task of every planted family that is asked which nodes take part."""
KINDS = {"heads": "heads", "mlps": "MLPs", "streams": "stream"}
STATISTICS = {"pearson": "Pearson", "spearman": "ranks", "pearson_without_top10": "without the ten largest"}
AREAS = ("cpr", "cmd")
LEAST = 0.1
"""Share of the metric that heads must carry for circuits of heads to be judged."""
Tables = Mapping[str, pd.DataFrame]


def numbers_of(tables: Tables) -> pd.DataFrame:
    """Return one row a method and number: method, column, value, low, high."""
    rows = []
    for record in tables["agreement"].to_dict("records"):
        # Few nodes are left of MLPs without the ten largest.
        names = [name for name in STATISTICS if record["kind"] == "heads" or name != "pearson_without_top10"]
        rows += [
            (record["method"], f"{KINDS[record['kind']]}: {STATISTICS[name]}", *_bounds(record, name)) for name in names
        ]
    for record in tables["areas"].to_dict("records") if _heads_matter(tables["cases"]) else ():
        rows += [(record["method"], name.upper(), *_bounds(record, name)) for name in AREAS]
    return pd.DataFrame(rows, columns=["method", "column", "value", "low", "high"])


def _heads_matter(cases: pd.DataFrame) -> bool:
    """Whether the metric falls by a tenth and more without all heads: else what a circuit keeps is a share of nothing."""
    fall = (cases["metric"] - cases["metric_ablated"]).mean()
    return bool(abs(fall) >= LEAST * abs(cases["metric"].mean()))


def _bounds(record: Mapping[str, float], name: str) -> tuple[float, float, float]:
    return record[name], record[f"{name}_low"], record[f"{name}_high"]


def over_tasks(numbers: Iterable[tuple[str, pd.DataFrame]]) -> pd.DataFrame:
    """Return the means over tasks, given with what `numbers_of` says of each, and their 95 % intervals over families.

    A method that scores all nodes of a task alike agrees by 0 with effects that differ.
    """
    every = pd.concat([table.assign(task=task) for task, table in numbers], ignore_index=True)
    known = every.groupby(["task", "column"])["value"].transform(lambda values: values.notna().any())
    every = every[known].fillna({"value": 0.0})
    rows = []
    for (method, column), group in every.groupby(["method", "column"], sort=False):
        interval = cluster_bootstrap(group["value"].to_numpy(np.float64), group["task"].map(family_of).to_numpy())
        rows.append((method, column, interval.mean[0], interval.low[0], interval.high[0]))
    return pd.DataFrame(rows, columns=["method", "column", "value", "low", "high"])


def markdown(numbers: pd.DataFrame) -> str:
    """Return the numbers as a table: a line a method, in the order of every figure."""
    agreement = [f"{kind}: {name}" for kind in KINDS.values() for name in STATISTICS.values()]
    columns = [column for column in (*agreement, *map(str.upper, AREAS)) if column in set(numbers["column"])]
    lines = [f"| score | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    cells = {(method, column): _cell(*values) for method, column, *values in numbers.itertuples(index=False)}
    for method, name in NAMES.items():
        own = [cells.get((method, column), "") for column in columns]
        if any(own):
            lines.append(f"| {name} | {' | '.join(own)} |")
    return "\n".join(lines)


def _cell(value: float, low: float, high: float) -> str:
    if not isfinite(value):
        return ""
    return f"{value:.2f} [{low:.2f}, {high:.2f}]" if isfinite(low) and isfinite(high) else f"{value:.2f}"


def of_planted(names: Sequence[str]) -> pd.DataFrame:
    """Run every task, by the prompts and baselines that contextual decomposition takes part in DepthBench with."""
    numbers = []
    for name in names:
        task = planted.task(name)
        model = from_hf(task.module, tokenizer=task.tokenizer, ref=task.ref)
        run = runs_of("contextual_decomposition", task)[0]
        assert isinstance(run.analysis, ContextualDecomposition)
        analysis = replace(run.analysis, methods=METHODS, random_circuits=10)
        with tempfile.TemporaryDirectory() as folder:
            numbers.append(
                (name, numbers_of(analysis.run(model, list(run.prompts), store=ActivationStore(folder)).tables))
            )
    return over_tasks(numbers)


def of_ioi(options: argparse.Namespace) -> Result:
    """Run IOI, or read the run that is given."""
    if options.ioi:
        return Result.load(options.ioi)
    analysis = ContextualDecomposition(
        task="ioi",
        n_prompts=options.n_prompts,
        methods=METHODS,
        other_preset=True,
        streams=True,
        search_steps=0,
        words="none",
    )
    return analysis.run(load_model(options.model))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--n-prompts", type=int, default=24)
    parser.add_argument("--ioi", help="a saved run of contextual decomposition")
    parser.add_argument("--tasks", default=TASKS, help="planted tasks, one family each; none runs none")
    parser.add_argument("--out", help="folder for the run on IOI and both tables")
    parser.add_argument("--write", action="store_true", help="put both tables into README.md")
    options = parser.parse_args()
    by_task = of_planted([name for name in options.tasks.split(",") if name])
    result = of_ioi(options)
    tables = {"planted": by_task, "ioi": numbers_of(result.tables)}
    texts = {name: markdown(numbers) for name, numbers in tables.items()}
    prompts, seconds = len(result.tables["cases"]), time.process_time()
    about = f"IOI: {prompts} prompts; planted models: {options.tasks}; {seconds:.0f} processor seconds in all."
    page = f"{texts['ioi']}\n\nThe same on {len(options.tasks.split(','))} planted models, one of each family, means over them:\n\n{texts['planted']}\n\n{about}"
    print(page)
    if options.out:
        folder = Path(options.out)
        result.save(folder / "ioi")
        for name, numbers in tables.items():
            numbers.to_csv(folder / f"{name}.csv", index=False)
    if options.write:
        marked.write_between("attribution", ROOT / "README.md", page)


if __name__ == "__main__":
    main()
