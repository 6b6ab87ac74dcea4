"""Fitting one linear probe: scikit-learn's logistic regression, or the difference of the class means."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

Kind = Literal["logistic", "mean_difference", "nearest_centroid"]
Floats = NDArray[Any]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Recipe:
    """How a probe is fitted and judged."""

    kind: Kind = "logistic"
    split: Literal["rows", "groups"] = "groups"
    """`rows` divides 60/40 over rows as they stand; `groups` keeps groups whole, with a validation part."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One split each."""
    standardise: bool = True
    """Whether columns are centred and scaled by the training part's mean and standard deviation."""
    costs: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    """Values of C, scikit-learn's inverse L2 penalty; of several, the first minimum of the validation log-loss is kept."""
    max_iter: int = 5000
    tolerance: float = 1e-5
    """Gradient at which a fit counts as converged."""
    dtype: Literal["float32", "float64"] = "float64"


RELEASED = Recipe(
    split="rows", seeds=(42,), standardise=False, costs=(1.0,), max_iter=100, tolerance=1e-4, dtype="float32"
)
"""As the authors of concept depth released it: no scaling, C = 1, at most 100 iterations, one 60/40 split, seed 42."""
SOUND = Recipe()
"""Standardised on the training part, C chosen on validation, groups kept whole, three seeds, run to convergence."""


@dataclass(frozen=True)
class LinearProbe:
    """A fitted probe: label 1 where `rows @ weight + bias` is positive, in the rows' own units."""

    weight: Floats
    """[d]."""
    bias: float
    cost: float
    """The C of the fit; nan for probes without one."""
    n_iter: int
    converged: bool

    def decide(self, rows: ArrayLike) -> Floats:
        """Return the signed decision values [n] of rows [n, d]."""
        return np.asarray(np.asarray(rows) @ self.weight + self.bias)

    @property
    def direction(self) -> Floats:
        """Return the weight at unit length, [d]."""
        return self.weight / np.linalg.norm(self.weight)


@contextmanager
def unwarned() -> Iterator[None]:
    """Silence scikit-learn's warnings of fits that stop early, which `converged` tells; warnings are global to a process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


RESOLUTION = float(np.finfo(np.float32).eps)
"""Of captured rows, relative to their size."""


class Fitter:
    """Rows prepared once and fitted to several sets of labels."""

    def __init__(self, rows: Floats, recipe: Recipe) -> None:
        self.recipe = recipe
        width = rows.shape[1]
        self.mean, self.scale = np.zeros(width, rows.dtype), np.ones(width, rows.dtype)
        if recipe.standardise:
            self.mean, self.scale = rows.mean(axis=0), rows.std(axis=0)
            # What is below the resolution of the rows is rounding, which scaling would make as large as all else.
            self.scale[self.scale <= RESOLUTION * np.sqrt(np.mean(np.square(rows)))] = 1
        self.rows = (rows - self.mean) / self.scale if recipe.standardise else rows
        self.basis: Floats | None = None
        if recipe.standardise and recipe.kind == "logistic" and width > len(rows):
            # An L2 penalty sees only angles and lengths, so rows may be given in a basis of their own span.
            self.basis, corner = np.linalg.qr(self.rows.T)
            self.rows = np.ascontiguousarray(corner.T)

    def fit(self, labels: Labels, cost: float) -> LinearProbe:
        """Fit the probe of these labels at one C."""
        recipe = self.recipe
        if recipe.kind != "logistic":
            weight, bias = _between(self.rows, labels, recipe.kind)
            return self._probe(weight, bias, float("nan"), 0, True)
        classifier = LogisticRegression(C=cost, max_iter=recipe.max_iter, tol=recipe.tolerance)
        classifier.fit(self.rows, labels)
        n_iter = int(classifier.n_iter_[0])
        return self._probe(classifier.coef_[0], float(classifier.intercept_[0]), cost, n_iter, n_iter < recipe.max_iter)

    def _probe(self, weight: Floats, bias: float, cost: float, n_iter: int, converged: bool) -> LinearProbe:
        whole = weight if self.basis is None else self.basis @ weight
        if not self.recipe.standardise:
            return LinearProbe(whole, bias, cost, n_iter, converged)
        raw = whole / self.scale
        return LinearProbe(raw, bias - float(raw @ self.mean), cost, n_iter, converged)


def _between(rows: Floats, labels: Labels, kind: Kind) -> tuple[Floats, float]:
    """Return weight [d] and bias of a probe along the difference of the class means.

    The nearest centroid decides half way between the means; the mean difference where a point is as many standard
    deviations of one class away from its mean as of the other.
    """
    zeros, ones = rows[labels == 0], rows[labels == 1]
    weight = ones.mean(axis=0) - zeros.mean(axis=0)
    low, high = zeros @ weight, ones @ weight
    spread = (1.0, 1.0) if kind == "nearest_centroid" else (float(low.std()), float(high.std()))
    total = sum(spread)
    share = spread[0] / total if total > 0 else 0.5
    return weight, -float(low.mean() + share * (high.mean() - low.mean()))
