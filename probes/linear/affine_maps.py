"""Affine maps between the streams of two models, in closed form from sums that are streamed over rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from probes.errors import OptionError

RANK_TOLERANCE = 1e-10
"""Directions whose variance is below this share of the largest are taken as absent when no ridge is given."""


@dataclass(frozen=True)
class LinearMap:
    """y = x @ weight + bias."""

    weight: Tensor
    """[d_in, d_out], float64."""
    bias: Tensor
    """[d_out], float64."""

    def __call__(self, rows: Float[Tensor, "row d_in"]) -> Float64[Tensor, "row d_out"]:
        """Map rows from one space to the other."""
        return rows.to(self.weight) @ self.weight + self.bias


class CrossMoments:
    """Sums over paired rows from which the best affine map follows; memory independent of the number of rows."""

    def __init__(self, d_in: int, d_out: int) -> None:
        self.n = 0
        self.x = torch.zeros(d_in, dtype=torch.float64)
        self.y = torch.zeros(d_out, dtype=torch.float64)
        self.xx = torch.zeros(d_in, d_in, dtype=torch.float64)
        self.xy = torch.zeros(d_in, d_out, dtype=torch.float64)

    def add(self, x: Float[Tensor, "row d_in"], y: Float[Tensor, "other_row d_out"]) -> None:
        """Add paired rows to the sums.

        Raises:
            OptionError: the rows are not paired, or hold NaN.
        """
        if len(x) != len(y):
            raise OptionError(f"{len(x)} source rows for {len(y)} target rows: rows must be pairs")
        x, y = x.double(), y.double()
        if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
            raise OptionError("rows of a linear map hold NaN or infinite values: leave those tokens out")
        self.n += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx += x.T @ x
        self.xy += x.T @ y

    @property
    def mean_target(self) -> Float64[Tensor, " d_out"]:
        """Return the mean target row, which predicts the target best without the source."""
        return self.y / self.n

    def solve(self, ridge: float = 0.0) -> LinearMap:
        """Return the affine map of least squared error.

        Args:
            ridge: added to the covariance, as a share of its mean variance; 0 gives least squares, of least norm where
                the source rows do not span their space.

        Raises:
            OptionError: fewer than two rows, or a negative ridge.
        """
        if self.n < 2 or not ridge >= 0:
            raise OptionError(f"a linear map needs at least 2 rows and a ridge of 0 or more, not {self.n} and {ridge}")
        mean_x, mean_y = self.x / self.n, self.y / self.n
        covariance = self.xx / self.n - torch.outer(mean_x, mean_x)
        cross = self.xy / self.n - torch.outer(mean_x, mean_y)
        values, vectors = torch.linalg.eigh(covariance)
        values = values.clamp_min(0)
        inverse = 1 / (values + ridge * values.mean())
        inverse[values <= RANK_TOLERANCE * values.max()] = 0
        weight = vectors @ (inverse[:, None] * (vectors.T @ cross))
        return LinearMap(weight, mean_y - mean_x @ weight)


def relative_error(
    predicted: Float[Tensor, "*row d_out"], target: Float[Tensor, "*row d_out"]
) -> Float64[Tensor, "*row"]:
    """Return ||predicted - target|| / ||target|| of each row."""
    target = target.double()
    size = torch.linalg.vector_norm(target, dim=-1).clamp_min(1e-12)
    return torch.linalg.vector_norm(predicted.double() - target, dim=-1) / size
