"""Products of few rows are those of `nn.Linear`, and shapes alone decide how they are computed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from probes.blocks.few_rows import ROWS, FewRows


@pytest.mark.parametrize("rows", [1, ROWS.start - 1, ROWS.start, 20, ROWS.stop - 1, ROWS.stop])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_that_of_linear(rows: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    module, x = nn.Linear(24, 40, bias=bias), torch.randn(1, rows, 24, generator=generator)
    with FewRows():
        turned = module(x)
        again = module(x.clone())
    torch.testing.assert_close(turned, module(x), atol=1e-6, rtol=1e-5)
    assert torch.equal(turned, again)
    assert turned.is_contiguous()


def test_gradients_are_those_of_linear() -> None:
    module, x = nn.Linear(6, 5), torch.randn(2, 7, 6, dtype=torch.float32, requires_grad=True)
    (plain,) = torch.autograd.grad(module(x).square().sum(), x)
    with FewRows():
        (turned,) = torch.autograd.grad(module(x).square().sum(), x)
    torch.testing.assert_close(turned, plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_left_to_the_library(dtype: torch.dtype) -> None:
    x, weight = torch.ones(20, 4, dtype=dtype), torch.ones(3, 4, dtype=dtype)
    with FewRows():
        assert torch.equal(functional.linear(x, weight), torch.full((20, 3), 4, dtype=dtype))
