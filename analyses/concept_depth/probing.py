"""Probes of every layer on one data set, and the tables they make."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analyses.concept_depth.depth_of_curve import depth_row
from analyses.concept_depth.labelled_prompts import LabelledSet
from analyses.results.statistics import RESAMPLES, cluster_bootstrap, cluster_means, percentiles
from probes.capture.activations import Activations
from probes.errors import ProbeError
from probes.linear.probing import RELEASED, SOUND, Evaluation, Kind, Recipe, probe_layers
from probes.points import Address
from probes.reducers import Reducer

Variant = Literal["plain", "text_noise", "int8", "int4"]
Preset = Literal["sound", "released"]


@dataclass(frozen=True)
class Probed:
    """The evaluations of one data set under one variant by one kind of probe, a layer each."""

    data: LabelledSet
    variant: Variant
    kind: Kind
    numbers: tuple[int, ...]
    """The layers probed."""
    n_layers: int
    """How many the model has."""
    layers: tuple[Evaluation, ...]
    """The evaluation of each layer probed."""

    @property
    def key(self) -> dict[str, str]:
        """The columns that name it."""
        return {"dataset": self.data.name, "variant": self.variant, "probe": self.kind}

    @property
    def test_groups(self) -> NDArray[Any]:
        """The group of each test row, [tests]; rows, seeds and groups are the same at every layer."""
        return np.asarray(self.data.groups)[self.layers[0].row]

    @property
    def chance(self) -> float:
        """Accuracy of always giving the training part's majority class."""
        return float(self.layers[0].majority.mean())

    @property
    def curve(self) -> NDArray[np.float64]:
        """Accuracy by layer."""
        return np.array([evaluation.accuracy for evaluation in self.layers])


def recipe_of(preset: Preset, kind: Kind, splits: int, seed: int) -> Recipe:
    """The recipe of a preset; the released one has its own split and seed."""
    if preset == "released":
        return replace(RELEASED, kind=kind)
    return replace(SOUND, kind=kind, seeds=tuple(range(seed, seed + splits)))


def layer_rows(
    activations: Activations, data: LabelledSet, representation: str, reducer: Reducer, layer: int
) -> NDArray[np.float32]:
    """The rows [prompts, d_model] of one layer."""
    rows = activations.get(Address(representation, layer), reducer)
    return np.stack([rows[i][0].float().numpy() for i in data.index])


def probe_set(
    activations: Activations,
    data: LabelledSet,
    variant: Variant,
    recipe: Recipe,
    representation: str,
    reducer: Reducer,
    jobs: int,
    numbers: Sequence[int],
) -> Probed:
    """Probes of the layers `numbers`.

    Raises:
        ProbeError: labels, groups or rows that cannot be probed; names the data set.
    """
    rows = (layer_rows(activations, data, representation, reducer, layer) for layer in numbers)
    # Of a row that is a type of its own nothing can be known, so that without types the control task is empty.
    types = data.types.of if data.types else np.arange(len(data.prompts))
    try:
        evaluations = tuple(
            probe_layers(rows, data.labels, groups=data.groups, types=types, recipe=recipe, jobs=jobs or None)
        )
    except ProbeError as error:
        raise ProbeError(f"data set {data.name!r}: {error}") from None
    return Probed(data, variant, recipe.kind, tuple(numbers), activations.model.shape.n_layers, evaluations)


def scores_table(probed: list[Probed], seed: int) -> pd.DataFrame:
    """A row per data set, variant, probe and layer."""
    return pd.DataFrame([row for one in probed for row in _scores(one, seed)])


def _scores(one: Probed, seed: int) -> Iterator[dict[str, Any]]:
    groups = one.test_groups
    for layer, evaluation in zip(one.numbers, one.layers, strict=True):
        interval = cluster_bootstrap(np.stack([evaluation.correct, evaluation.shuffled], axis=1), groups, seed=seed)
        typed = np.isfinite(evaluation.typed)
        control = np.stack([evaluation.typed, evaluation.correct - evaluation.typed], axis=1)[typed]
        selective = cluster_bootstrap(control, groups[typed], seed=seed)
        drawn = evaluation.seed == evaluation.seed[0]
        ones, n = int(evaluation.label[drawn].sum()), int(drawn.sum())
        yield {
            **one.key,
            "layer": layer,
            "depth": layer / one.n_layers,
            "accuracy": evaluation.accuracy,
            "f1": evaluation.f1,
            "auc": evaluation.auc,
            "ci_low": interval.low[0],
            "ci_high": interval.high[0],
            **interval.columns("control_accuracy", "control_", 1),
            **selective.columns("type_control_accuracy", "type_control_"),
            "type_control_rows": int(typed.sum()),
            **selective.columns("selectivity", column=1),
            "memorised": evaluation.memorised,
            "majority": one.chance,
            "auc_null_half_width": 1.96 * np.sqrt((n + 1) / (12 * ones * (n - ones))),
            "n_train": evaluation.n_train,
            "n_test": n,
            "n_iter": max(probe.n_iter for probe in evaluation.probes),
            "converged": all(probe.converged for probe in evaluation.probes),
            "cost": float(np.median([probe.cost for probe in evaluation.probes])),
        }


def depths_table(probed: list[Probed], seed: int) -> pd.DataFrame:
    """Depth statistics of each curve, with intervals from resampling the groups of the test rows."""
    rows = []
    for one in probed:
        correct = np.stack([evaluation.correct for evaluation in one.layers], axis=1)
        draws = cluster_means(correct, one.test_groups, seed=seed, resamples=RESAMPLES)
        clusters = len(np.unique(one.test_groups))
        row = depth_row(one.curve, draws, one.chance, clusters, one.numbers, one.n_layers)
        low, high = percentiles(draws[:, int(one.curve.argmax())], clusters)
        row["peak_accuracy_low"], row["peak_accuracy_high"] = float(low), float(high)
        # The best of many layers looks good by chance; the control's best layer is what it has to pass.
        control = max((evaluation.shuffled for evaluation in one.layers), key=lambda rows: float(rows.mean()))
        gap = cluster_bootstrap(correct[:, int(one.curve.argmax())] - control, one.test_groups, seed=seed)
        row |= {"majority": one.chance, "best_control_accuracy": float(control.mean())}
        row |= {"peak_gain_low": float(gap.low[0]), "peak_gain_high": float(gap.high[0])}
        row["decodable"] = bool(row["peak_accuracy_low"] > one.chance and gap.low[0] > 0)
        rows.append({**one.key, **row})
    return pd.DataFrame(rows)
