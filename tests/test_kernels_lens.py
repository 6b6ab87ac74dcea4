"""The tiled lens kernel reads what the reference reads, without ever holding a row of logits."""

from __future__ import annotations

import os

import pytest
import torch
from tiny import native
from torch import Tensor

from probes.kernels import eager as reference
from probes.kernels import forced, lens_rows, reduce_rows
from probes.kernels.fused_lens import MAX_TOP, tiles_for
from probes.lenses import logit
from probes.reducers import Reducer

pytestmark = pytest.mark.skipif(not os.environ.get("TRITON_INTERPRET"), reason="the kernels are compiled here")
IDS = torch.tensor([299, 0, 64, 64])


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def compare(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, top_k: int) -> None:
    expected = reference.lens_rows(hidden, weight, bias, softcap, IDS, top_k)
    with forced("fused"):
        read = lens_rows(hidden, weight, bias, softcap, IDS, top_k)
    for name in ("log_z", "entropy_bits", "logprobs", "top_logprobs"):
        torch.testing.assert_close(getattr(read, name), getattr(expected, name), atol=3e-5, rtol=3e-5, msg=name)
    assert torch.equal(read.top_ids.long(), expected.top_ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("n", [1, 17])
def test_every_type(dtype: torch.dtype, n: int) -> None:
    compare(rand(n, 40, dtype=dtype), rand(300, 40, seed=1, dtype=dtype), None, None, 5)


def test_bias_and_softcap() -> None:
    hidden, weight, bias = rand(3, 40) * 3, rand(300, 40, seed=1), rand(300, seed=2) * 5
    compare(hidden, weight, bias, None, 1)
    compare(hidden, weight, bias, 20.0, 3)
    compare(hidden[:1] / 9, weight, None, 4.0, MAX_TOP)


def test_nothing_asked_for_but_the_distribution() -> None:
    with forced("fused"):
        read = lens_rows(rand(3, 40), rand(300, 40, seed=1))
    assert read.logprobs.shape == read.top_ids.shape == (3, 0)
    torch.testing.assert_close(read.log_z, (rand(3, 40) @ rand(300, 40, seed=1).T).logsumexp(-1))


def test_no_rows() -> None:
    with forced("fused"):
        read = lens_rows(rand(0, 40), rand(300, 40, seed=1), ids=IDS, top_k=2)
    assert (read.log_z.shape, read.logprobs.shape, read.top_ids.shape) == ((0,), (0, 4), (0, 2))


def test_shares_of_the_vocabulary_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best tokens and nearly all mass lie in one share, at a logit that would overflow unscaled."""
    weight = rand(300, 40, seed=1)
    weight[290:295] *= 40
    for programs in (1, 2, 100):
        monkeypatch.setattr("probes.kernels.fused_lens.PROGRAMS", programs)
        compare(rand(2, 40), weight, None, None, 6)


def test_strided_hidden_rows_and_weights() -> None:
    compare(rand(6, 80)[::2, :40], rand(300, 80, seed=1)[:, :40], None, None, 2)


def test_more_tokens_than_registers_hold_fall_back_to_the_reference() -> None:
    compare(rand(2, 40), rand(300, 40, seed=1), None, None, MAX_TOP + 1)


def test_tiles_grow_with_the_rows() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        assert [tiles_for(n, 0, dtype).rows for n in (1, 64, 9999)] == sorted(
            tiles_for(n, 0, dtype).rows for n in (1, 64, 9999)
        )


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
@pytest.mark.parametrize(
    "reducer", [Reducer("lens_ids", ids=(3, 50)), Reducer("lens_top", top_k=4)], ids=lambda r: r.kind
)
def test_the_lens_reducers_read_through_the_models_own_norm(family: str, reducer: Reducer) -> None:
    model, rows, index = native(family), rand(7, 32), torch.tensor([6, 2, 2, 0])
    expected = reference.reduce_rows(rows, index, [4], reducer, model.unembedding)
    with forced("fused"):
        read = reduce_rows(rows, index, [4], reducer, model.unembedding)
    torch.testing.assert_close(read, expected, atol=1e-4, rtol=1e-5)


def test_the_tie_to_the_models_own_logits() -> None:
    model = native("llama")
    final: list[Tensor] = []
    logits: list[Tensor] = []
    from probes.points import Address

    tokens = torch.tensor([[5, 6, 7, 8]])
    model.run(
        tokens,
        {
            Address("resid_post", 2): lambda t: final.append(t[0].clone()),
            Address.parse("logits"): lambda t: logits.append(t[0].clone()),
        },
    )
    with forced("fused"):
        read = reduce_rows(final[0], torch.arange(4), [4], Reducer("lens_ids", ids=(1, 2)), model.unembedding)
    torch.testing.assert_close(read, logits[0].log_softmax(-1)[:, [1, 2]], atol=1e-4, rtol=1e-4)
    assert logit.VOCAB_TILE > 97
