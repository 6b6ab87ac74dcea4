"""Linear maps computed another way are those of `nn.Linear`, and shapes alone decide how they are computed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from probes import one_dnn
from probes.blocks.quick_linear import FEW_ROWS, QuickLinear
from probes.lenses.logit import VOCAB_TILE, read
from probes.models.protocol import Unembedding


@pytest.fixture(params=["MKL", "oneDNN"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of them computes, whatever the processor."""
    if request.param == "oneDNN" and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(one_dnn, "mkl_is_narrow", lambda: request.param == "oneDNN")
    return request.param


@pytest.mark.parametrize("rows", [1, FEW_ROWS.start - 1, FEW_ROWS.start, 20, FEW_ROWS.stop - 1, FEW_ROWS.stop])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_that_of_linear(rows: int, bias: bool, library: str) -> None:
    generator = torch.Generator().manual_seed(rows)
    module, x = nn.Linear(24, 40, bias=bias), torch.randn(1, rows, 24, generator=generator)
    with QuickLinear():
        turned = module(x)
        again = module(x.clone())
    torch.testing.assert_close(turned, module(x), atol=1e-6, rtol=1e-5)
    assert torch.equal(turned, again)
    assert turned.is_contiguous()


def test_gradients_are_those_of_linear(library: str) -> None:
    module, x = nn.Linear(6, 5), torch.randn(2, 7, 6, dtype=torch.float32, requires_grad=True)
    (plain,) = torch.autograd.grad(module(x).square().sum(), x)
    with QuickLinear():
        (turned,) = torch.autograd.grad(module(x).square().sum(), x)
    torch.testing.assert_close(turned, plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_left_to_torch(dtype: torch.dtype, library: str) -> None:
    x, weight = torch.ones(20, 4, dtype=dtype), torch.ones(3, 4, dtype=dtype)
    with QuickLinear():
        assert torch.equal(functional.linear(x, weight), torch.full((20, 3), 4, dtype=dtype))


def test_the_lens_reads_the_same_by_either_library(library: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(n, 16, generator=generator) for n in (30, VOCAB_TILE + 100))
    lens = Unembedding(nn.Identity(), weight, None, None)
    by_hand = (rows.double() @ weight.double().T).log_softmax(-1)
    reading = read(rows, lens, ids=torch.tensor([0, VOCAB_TILE + 99]), top_k=3)
    assert torch.equal(reading.top_ids, by_hand.topk(3).indices)
    torch.testing.assert_close(reading.logprobs.double(), by_hand[:, [0, -1]], atol=1e-5, rtol=0)


def test_one_row_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_dnn, "mkl_is_narrow", lambda: True)
    weight = torch.ones(3, 4)
    assert not one_dnn.quicker(torch.ones(1, 4), weight)
    assert one_dnn.quicker(torch.ones(1, 2, 4), weight)
