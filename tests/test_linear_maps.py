"""Affine maps in closed form."""

from __future__ import annotations

import pytest
import torch

from probes.errors import OptionError
from probes.linear.affine_maps import CrossMoments, relative_error


def rows(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def fitted(x: torch.Tensor, y: torch.Tensor, ridge: float = 0.0, parts: int = 1) -> object:
    moments = CrossMoments(x.shape[1], y.shape[1])
    for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
        moments.add(a, b)
    return moments.solve(ridge)


def test_the_identity_is_found_exactly() -> None:
    x = rows(200, 12, 0) * 50 + 7
    linear_map = fitted(x, x)
    assert float(relative_error(linear_map(x), x).max()) < 1e-9
    assert torch.allclose(linear_map.weight, torch.eye(12, dtype=torch.float64), atol=1e-9)


def test_a_known_affine_map_is_recovered_and_equals_least_squares() -> None:
    x, weight, bias = rows(300, 6, 0), rows(6, 4, 1), rows(1, 4, 2)
    y = x @ weight + bias + 0.1 * rows(300, 4, 3)
    linear_map = fitted(x, y)
    ones = torch.cat([x, torch.ones(300, 1)], 1).double()
    expected = torch.linalg.lstsq(ones, y.double()).solution
    assert torch.allclose(linear_map.weight, expected[:-1], atol=1e-9)
    assert torch.allclose(linear_map.bias, expected[-1], atol=1e-9)
    assert float((linear_map.weight - weight).abs().max()) < 0.05


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_streaming_equals_whole(ridge: float) -> None:
    x, y = rows(90, 5, 0), rows(90, 3, 1)
    whole, streamed = fitted(x, y, ridge), fitted(x, y, ridge, parts=9)
    assert torch.allclose(whole.weight, streamed.weight, atol=1e-12)


def test_a_ridge_is_a_share_of_the_variance() -> None:
    x = rows(5000, 4, 0)
    x = torch.linalg.qr(x - x.mean(0)).Q * 5000**0.5  # covariance exactly the identity
    linear_map = fitted(x, x, ridge=0.25)
    assert torch.allclose(linear_map.weight, torch.eye(4, dtype=torch.float64) / 1.25, atol=1e-4)
    assert torch.allclose(fitted(9 * x, 9 * x, ridge=0.25).weight, linear_map.weight, atol=1e-9)


def test_source_rows_that_do_not_span_give_the_least_map() -> None:
    x = rows(50, 3, 0) @ rows(3, 8, 1)
    y = x @ rows(8, 2, 2)
    linear_map = fitted(x, y)
    assert float(relative_error(linear_map(x), y).max()) < 1e-6
    expected = torch.linalg.lstsq(
        (x - x.mean(0)).double(), (y - y.mean(0)).double(), driver="gelsd", rcond=1e-6
    ).solution
    assert torch.allclose(linear_map.weight, expected, atol=1e-5)


def test_a_constant_source_predicts_the_mean() -> None:
    y = rows(10, 2, 0)
    moments = CrossMoments(3, 2)
    moments.add(torch.full((10, 3), 0.5), y)
    linear_map = moments.solve()
    assert torch.allclose(linear_map(torch.full((1, 3), 0.5))[0], y.double().mean(0))
    assert torch.allclose(moments.mean_target, y.double().mean(0))


def test_relative_error_by_hand() -> None:
    error = relative_error(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[0.0, 4.0], [1.0, 0.0]]))
    assert error.tolist() == [0.75, 0.0]


def test_refusals() -> None:
    moments = CrossMoments(2, 2)
    with pytest.raises(OptionError, match="3 source rows for 2 target rows"):
        moments.add(rows(3, 2, 0), rows(2, 2, 0))
    with pytest.raises(OptionError, match="NaN"):
        moments.add(torch.tensor([[1.0, torch.nan]]), rows(1, 2, 0))
    with pytest.raises(OptionError, match="at least 2 rows"):
        moments.solve()
    moments.add(rows(5, 2, 0), rows(5, 2, 1))
    with pytest.raises(OptionError, match="ridge"):
        moments.solve(-1.0)
