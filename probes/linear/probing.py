"""Linear probes: one classifier per layer over stored rows, with its control tasks.

"Probe" is meant in the classifier sense of the word (Alain and Bengio 2016, arXiv 1610.01644).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import f1_score, log_loss, roc_auc_score
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from probes.errors import ProbeError
from probes.linear.fit import RELEASED, SOUND, Fitter, Floats, Kind, Labels, LinearProbe, Recipe, unwarned
from probes.linear.splits import Index, Split, check_groups, check_labels, group_split, row_split, type_labels

__all__ = [
    "RELEASED",
    "SOUND",
    "Evaluation",
    "Kind",
    "LinearProbe",
    "Recipe",
    "fit_probe",
    "in_order",
    "probe_layers",
]

Task = TypeVar("Task")
Done = TypeVar("Done")


@dataclass(frozen=True)
class Evaluation:
    """Decisions of one layer's probes on their test rows; arrays are [tests], all seeds one after the other."""

    row: Index
    seed: NDArray[np.int64]
    label: Labels
    decision: Floats
    majority: Floats
    """Whether the training part's majority class is right."""
    shuffled: Floats
    """Whether a probe fitted to shuffled labels gives the shuffled label."""
    typed: Floats
    """Whether a probe fitted to one random label per type gives that label (a control task, Hewitt and Liang 2019); NaN
    where no row it was fitted to has the type, so that nothing could be known."""
    memorised: float
    """Share of the shuffled labels that a probe gives back on the very rows it was fitted to."""
    probes: tuple[LinearProbe, ...]
    """One per seed."""
    n_train: int

    @property
    def correct(self) -> Floats:
        """Return 1.0 where the probe is right; [tests]."""
        return ((self.decision > 0) == self.label).astype(np.float64)

    @property
    def accuracy(self) -> float:
        """Return the share of test rows on which the probe is right."""
        return float(self.correct.mean())

    @property
    def f1(self) -> float:
        """Return the F1 score, mean over seeds; label 1 is the positive class."""
        return self._over_seeds(lambda label, decision: f1_score(label, decision > 0, zero_division=0))

    @property
    def auc(self) -> float:
        """Return the area under the ROC curve of the decision values, mean over seeds."""
        return self._over_seeds(roc_auc_score)

    def _over_seeds(self, score: Callable[[Labels, Floats], float]) -> float:
        seeds = [self.seed == seed for seed in dict.fromkeys(self.seed.tolist())]
        return float(np.mean([score(self.label[rows], self.decision[rows]) for rows in seeds]))


def fit_probe(rows: ArrayLike, labels: ArrayLike, recipe: Recipe = SOUND, cost: float | None = None) -> LinearProbe:
    """Fit a probe to all rows [n, d] with labels [n], at the recipe's first C unless `cost` is given.

    Raises:
        ProbeError: labels that are not two classes of 0 and 1, or rows that are not finite numbers.
    """
    values, classes = _checked(rows, check_labels(labels), recipe, "the data")
    with unwarned():
        return Fitter(values, recipe).fit(classes, recipe.costs[0] if cost is None else cost)


def probe_layers(
    layers: Iterable[ArrayLike],
    labels: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    types: ArrayLike | None = None,
    recipe: Recipe = SOUND,
    jobs: int | None = None,
) -> Iterator[Evaluation]:
    """Yield one evaluation per layer, in order; every layer has the same splits and control labels.

    Args:
        layers: rows [n, d] of each layer, read one by one as work proceeds.
        groups: [n], rows that must not be divided between training and test, such as statements on one city.
        types: [n], what the control task deals its random labels to, such as a token of the prompt; the groups unless
            given. Only types that occur in training and in test say anything.
        jobs: layers fitted at a time; as many as torch has threads unless given.

    Raises:
        ProbeError: labels, groups or rows that cannot be probed; the first fault, by name.
    """
    classes = check_labels(labels)
    of = check_groups(groups, len(classes))
    kinds = of if types is None else check_groups(types, len(classes))
    plans = [_plan(classes, of, kinds, recipe, seed) for seed in recipe.seeds]

    def work(task: tuple[int, ArrayLike]) -> Evaluation:
        values, _ = _checked(task[1], classes, recipe, f"layer {task[0]}")
        return _evaluate(values, classes, plans, recipe)

    return in_order(enumerate(layers), work, jobs or torch.get_num_threads())


def in_order(tasks: Iterable[Task], work: Callable[[Task], Done], jobs: int) -> Iterator[Done]:
    """Yield `work(task)` for every task, in order, `jobs` at a time, each on one processor."""
    # Rows are small, so that one fit on several processors is slower than several fits on one each.
    with threadpool_limits(1), unwarned(), ThreadPoolExecutor(jobs) as pool:
        waiting: deque[Future[Done]] = deque()
        for task in tasks:
            waiting.append(pool.submit(work, task))
            if len(waiting) > jobs:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@dataclass(frozen=True)
class _Plan:
    """One seed: its split and the labels of its control tasks, [n]."""

    seed: int
    split: Split
    shuffled: Labels
    typed: Labels
    known: NDArray[np.bool_]
    """[tests], whether the type of a test row occurs among the fitted rows."""


def _plan(labels: Labels, groups: Index, types: Index, recipe: Recipe, seed: int) -> _Plan:
    split = row_split(labels, seed) if recipe.split == "rows" else group_split(labels, groups, seed)
    rng = np.random.default_rng(seed)
    typed = type_labels(types, rng)
    known = np.isin(types[split.test], types[split.fitted])
    return _Plan(seed, split, rng.permutation(labels), typed, known)


def _checked(rows: ArrayLike, labels: Labels, recipe: Recipe, what: str) -> tuple[Floats, Labels]:
    values = np.asarray(rows, dtype=recipe.dtype)
    if values.ndim != 2 or len(values) != len(labels):
        raise ProbeError(f"{what} has rows of shape {values.shape} for {len(labels)} labels: give one row per label")
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        raise ProbeError(
            f"{what}: row {int(np.argmin(finite))} holds NaN or infinite values; capture it again, in float32 if the model "
            "overflows in half precision"
        )
    return values, labels


def _evaluate(values: Floats, labels: Labels, plans: Sequence[_Plan], recipe: Recipe) -> Evaluation:
    parts, probes, memorised = [], [], []
    for plan in plans:
        test, fitted = plan.split.test, plan.split.fitted
        cost = _choose_cost(values, labels, plan.split, recipe)
        fitter = Fitter(values[fitted], recipe)
        probe = fitter.fit(labels[fitted], cost)
        majority = float(labels[fitted].mean() > 0.5)
        shuffled = _control(fitter, values, plan.shuffled, fitted, cost)
        typed = np.full(len(test), np.nan)
        if plan.known.any():
            typed = np.where(plan.known, _control(fitter, values, plan.typed, fitted, cost)[test], np.nan)
        memorised.append(float(shuffled[fitted].mean()))
        probes.append(probe)
        parts.append(
            (test, np.full(len(test), plan.seed), labels[test], probe.decide(values[test]), labels[test] == majority, shuffled[test], typed)
        )  # fmt: skip
    row, seed, label, decision, majority_right, shuffled_right, typed_right = (
        np.concatenate(column) for column in zip(*parts, strict=True)
    )
    return Evaluation(
        row, seed, label, decision, majority_right.astype(np.float64), shuffled_right, typed_right, float(np.mean(memorised)), tuple(probes),
        len(plans[0].split.fitted),
    )  # fmt: skip


def _control(fitter: Fitter, values: Floats, labels: Labels, fitted: Index, cost: float) -> Floats:
    """Return whether a probe fitted to a control task's labels is right, [n]; one class only is answered with that class."""
    known = labels[fitted]
    if known.min() == known.max():
        return (labels == known[0]).astype(np.float64)
    decided = fitter.fit(known, cost).decide(values) > 0
    return (decided == labels).astype(np.float64)


def _choose_cost(values: Floats, labels: Labels, split: Split, recipe: Recipe) -> float:
    """Return the C of least validation log-loss, going from the strongest penalty until the loss rises."""
    if recipe.kind != "logistic" or len(recipe.costs) == 1 or not len(split.validation):
        return recipe.costs[0]
    fitter, known = Fitter(values[split.train], recipe), labels[split.validation]
    best, least = recipe.costs[0], np.inf
    for cost in sorted(recipe.costs):
        decision = fitter.fit(labels[split.train], cost).decide(values[split.validation])
        loss = log_loss(known, 1 / (1 + np.exp(-np.clip(decision, -30, 30))), labels=[0, 1])
        if loss > least:
            # Weaker penalties take ever longer to fit and only overfit further.
            break
        best, least = cost, loss
    return best
