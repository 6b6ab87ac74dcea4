"""Probing all layers of stored rows, beside a plain loop of scikit-learn fits that gives the same scores.

bathyscope bench probing [--model smollm2-135m] [--rows 1500] [--layers 30] [--preset sound|released]
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, log_loss, roc_auc_score
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from analyses.base import as_prompts
from analyses.concept_depth.datasets import load_set
from analyses.concept_depth.token_types import token_types
from probes.capture.needs import Need
from probes.capture.run import capture
from probes.linear.probing import RELEASED, SOUND, Recipe, probe_layers
from probes.linear.splits import check_groups, group_split, type_labels
from probes.models import load_model
from probes.reducers import Reducer
from probes.store import ActivationStore

LAST = Reducer(positions="last")
Scores = np.ndarray
"""[layers, 5]: accuracy, F1, AUC, accuracy of the shuffled-label control and of the control task."""


@dataclass(frozen=True)
class Data:
    """Stored rows of every layer, [n, d] each, with labels, groups and token types [n]."""

    layers: list[np.ndarray]
    labels: np.ndarray
    groups: np.ndarray
    types: np.ndarray


def stored(ref: str, n: int, n_layers: int, folder: Path) -> Data:
    """City statements captured into a store, and read back layer by layer."""
    model = load_model(ref)
    prompts = as_prompts(load_set("city_country", limit=n), model, {})
    layers = range(min(n_layers, model.shape.n_layers))
    needs = [Need(tuple(f"resid_post.{layer}" for layer in layers), LAST)]
    activations = capture(model, [prompt.tokens for prompt in prompts], needs, ActivationStore(folder))
    started = time.perf_counter()
    rows = [activations.packed(f"resid_post.{layer}", LAST).float().numpy() for layer in layers]
    say(
        f"{len(prompts)} rows x {len(rows)} layers x {rows[0].shape[1]}: read from the store in {time.perf_counter() - started:.2f} s"
    )
    groups = check_groups([prompt.fields["group"] for prompt in prompts], len(prompts))
    types = token_types([prompt.tokens for prompt in prompts], list(groups))
    assert types is not None, "city statements share their countries"
    labels = np.array([prompt.fields["label"] for prompt in prompts])
    return Data(rows, labels, groups, check_groups(types.of, len(prompts)))


def ours(data: Data, recipe: Recipe) -> Scores:
    """`probe_layers`, with both controls."""
    evaluations = probe_layers(data.layers, data.labels, groups=data.groups, types=data.types, recipe=recipe)
    return np.array([[e.accuracy, e.f1, e.auc, e.shuffled.mean(), np.nanmean(e.typed)] for e in evaluations])


def plain_released(data: Data, recipe: Recipe) -> Scores:
    """The released procedure as a loop over layers, and its two controls."""
    rng = np.random.default_rng(42)
    control = type_labels(data.types, rng)
    tasks = (data.labels, rng.permutation(data.labels), control)
    table = []
    for rows in data.layers:
        row: list[float] = []
        for labels in tasks:
            train, test = train_test_split(np.arange(len(rows)), test_size=0.4, random_state=42)
            if labels is control:
                test = test[np.isin(data.types[test], data.types[train])]
            row += scores(LogisticRegression().fit(rows[train], labels[train]), rows[test], labels[test])
        table.append([*row[:3], row[3], row[6]])
    return np.array(table)


def plain_sound(data: Data, recipe: Recipe) -> Scores:
    """The sound preset as a loop over layers, seeds and C, each fit from nothing."""
    table = []
    for rows in data.layers:
        seeds = [_plain_seed(rows.astype(np.float64), data, recipe, seed) for seed in recipe.seeds]
        table.append(np.mean(seeds, axis=0))
    return np.array(table)


def _plain_seed(rows: np.ndarray, data: Data, recipe: Recipe, seed: int) -> list[float]:
    split = group_split(data.labels, data.groups, seed)
    rng = np.random.default_rng(seed)
    control = type_labels(data.types, rng)
    shuffled = rng.permutation(data.labels)

    def fitted(part: np.ndarray, labels: np.ndarray, cost: float) -> object:
        classifier = LogisticRegression(C=cost, max_iter=recipe.max_iter, tol=recipe.tolerance)
        return make_pipeline(StandardScaler(), classifier).fit(rows[part], labels[part])

    losses = [
        log_loss(
            data.labels[split.validation], fitted(split.train, data.labels, cost).predict_proba(rows[split.validation])
        )
        for cost in recipe.costs
    ]
    best = recipe.costs[int(np.argmin(losses))]
    row: list[float] = []
    for labels in (data.labels, shuffled, control):
        test = split.test
        if labels is control:
            test = test[np.isin(data.types[test], data.types[split.fitted])]
        row += scores(fitted(split.fitted, labels, best), rows[test], labels[test])
    return [*row[:3], row[3], row[6]]


def scores(classifier: object, rows: np.ndarray, labels: np.ndarray) -> list[float]:
    """Accuracy, F1 and AUC on a test part."""
    said = classifier.predict(rows)
    return [
        float((said == labels).mean()),
        f1_score(labels, said),
        roc_auc_score(labels, classifier.predict_proba(rows)[:, 1]),
    ]


def timed(name: str, work: Callable[[Data, Recipe], Scores], data: Data, recipe: Recipe) -> tuple[float, Scores]:
    """Seconds and scores of one way."""
    wall, cpu = time.perf_counter(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        scores = work(data, recipe)
    seconds = time.perf_counter() - wall
    say(f"  {name:<38} {seconds:8.2f} s   {time.process_time() - cpu:8.2f} processor seconds")
    return seconds, scores


def compare(preset: str, data: Data, threaded: bool) -> None:
    """One preset: ours, then the plain loop on one processor, and as it comes where `threaded`."""
    recipe, loop = (RELEASED, plain_released) if preset == "released" else (SOUND, plain_sound)
    say(f"{preset} preset, both controls:")
    fast, scores = timed("probe_layers", ours, data, recipe)
    with threadpool_limits(1):
        slow, theirs = timed("plain loop, one BLAS thread", loop, data, recipe)
    difference = np.abs(scores - theirs).max(axis=0)
    say(f"  ratio {slow / fast:.2f}; largest difference: accuracy {difference[0]:.1e}, F1 {difference[1]:.1e}, AUC {difference[2]:.1e}, "
        f"controls {difference[3:].max():.1e}")  # fmt: skip
    if threaded:
        slow, _ = timed("plain loop, BLAS threads as they come", loop, data, recipe)
        say(f"  ratio {slow / fast:.2f}")


def say(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--preset", choices=("sound", "released"), action="append")
    parser.add_argument("--store", type=Path, help="keep the captured rows in this store")
    parser.add_argument(
        "--threaded", action="store_true", help="also run the plain loop with BLAS threads as they come"
    )
    options = parser.parse_args()
    with TemporaryDirectory() as scratch:
        data = stored(options.model, options.rows, options.layers, options.store or Path(scratch))
        say(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
        for preset in options.preset or ("released", "sound"):
            compare(preset, data, options.threaded)


if __name__ == "__main__":
    main()
