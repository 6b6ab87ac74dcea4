"""The lens equals the model's own softmax, and tiles never change it."""

from __future__ import annotations

import pytest
import torch
from tiny import PROMPTS, native

from probes.capture.run import capture
from probes.lenses import logit as lens
from probes.models.protocol import Unembedding
from probes.store import ActivationStore

torch.manual_seed(3)
READ_OUT = Unembedding(lambda x: x, torch.randn(50, 8), torch.randn(50))
ROWS = torch.randn(700, 8) * 2


def probabilities(rows: torch.Tensor, read_out: Unembedding = READ_OUT) -> torch.Tensor:
    logits = rows @ read_out.weight.T + (0 if read_out.bias is None else read_out.bias)
    if read_out.softcap:
        logits = read_out.softcap * torch.tanh(logits / read_out.softcap)
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize("tile", [1, 7, 50, 4096])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_tiles_change_nothing(tile: int, softcap: float | None) -> None:
    read_out = Unembedding(READ_OUT.norm, READ_OUT.weight, READ_OUT.bias, softcap)
    logprobs_of_rows = probabilities(ROWS, read_out)
    read = lens.read(ROWS, read_out, ids=torch.tensor([0, 49]), top_k=3, tile=tile)
    torch.testing.assert_close(read.logprobs, logprobs_of_rows[:, [0, 49]].float(), atol=1e-5, rtol=1e-5)
    best = logprobs_of_rows.topk(3)
    torch.testing.assert_close(read.top_logprobs, best.values.float(), atol=1e-5, rtol=1e-5)
    assert torch.equal(read.top_ids, best.indices)
    entropy = -(logprobs_of_rows.exp() * logprobs_of_rows).sum(-1) / torch.log(torch.tensor(2.0))
    torch.testing.assert_close(read.entropy_bits, entropy.float(), atol=1e-4, rtol=1e-4)


def test_ids_per_row_and_shared_ids_agree() -> None:
    shared = lens.read(ROWS, READ_OUT, ids=torch.tensor([4, 5])).logprobs
    own = lens.read(ROWS, READ_OUT, ids=torch.tensor([[4, 5]]).repeat(len(ROWS), 1)).logprobs
    torch.testing.assert_close(shared, own, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tile", [7, 4096])
def test_divergence_from_references(tile: int) -> None:
    reference, of = ROWS[:600], torch.arange(700).remainder(600).flip(0)
    read = lens.read(ROWS, READ_OUT, reference=reference, reference_of=of, tile=tile).kl
    p, q = probabilities(reference)[of], probabilities(ROWS)
    torch.testing.assert_close(read, (p.exp() * (p - q)).sum(-1).float(), atol=1e-4, rtol=1e-4)
    same = lens.read(reference, READ_OUT, reference=reference, tile=tile).kl
    assert same.abs().max() < 1e-5


def test_a_zero_residual_has_the_entropy_of_a_uniform_guess() -> None:
    read_out = Unembedding(lambda x: x, torch.randn(64, 8))
    assert lens.read(torch.zeros(1, 8), read_out).entropy_bits.item() == pytest.approx(6.0, abs=1e-5)


@pytest.mark.parametrize("tile", [1, 7, 4096])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_ranks_are_places_in_the_order_of_all_logits(tile: int, softcap: float | None) -> None:
    read_out = Unembedding(READ_OUT.norm, READ_OUT.weight, READ_OUT.bias, softcap)
    ids = torch.tensor([0, 17, 49])
    ranks = lens.read(ROWS, read_out, ids=ids, ranks=True, top_k=1, tile=tile).ranks
    logprobs = probabilities(ROWS, read_out)
    assert torch.equal(ranks, (logprobs[:, None] > logprobs[:, ids, None]).sum(-1))
    own = lens.read(ROWS, read_out, ids=ids.repeat(len(ROWS), 1), ranks=True, tile=tile).ranks
    assert torch.equal(ranks, own)


def test_tied_tokens_share_a_rank() -> None:
    twins = Unembedding(lambda x: x, torch.randn(10, 8)[[0, 1, 2, 1, 4, 5, 6, 7, 8, 9]])
    ranks = lens.read(ROWS, twins, ids=torch.tensor([1, 3]), ranks=True, tile=2).ranks
    assert torch.equal(ranks[:, 0], ranks[:, 1])


def test_permuting_the_vocabulary_permutes_the_ids() -> None:
    order = torch.randperm(50)
    moved = Unembedding(READ_OUT.norm, READ_OUT.weight[order], READ_OUT.bias[order])
    before, after = lens.read(ROWS, READ_OUT, top_k=1), lens.read(ROWS, moved, top_k=1)
    torch.testing.assert_close(before.log_z, after.log_z)
    assert torch.equal(before.top_ids, order[after.top_ids])


def test_no_rows_are_read_as_no_rows() -> None:
    read = lens.read(torch.empty(0, 8), READ_OUT, top_k=2)
    assert read.log_z.shape == (0,)
    assert read.top_ids.shape == (0, 2)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "phi", "olmo2"])
def test_the_last_layer_reads_the_models_own_softmax(family: str, store: ActivationStore) -> None:
    model = native(family)
    last = f"resid_post.{model.shape.n_layers - 1}"
    from probes.capture.needs import Need

    rows = capture(model, PROMPTS, [Need((last, "logits"))], store)
    read = lens.read(rows.packed(last), model.unembedding(), ids=torch.arange(model.shape.d_vocab))
    torch.testing.assert_close(read.logprobs.exp(), rows.packed("logits").softmax(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("width", [64, 320, 1000, 4096])
def test_the_largest_by_chunks_are_those_of_topk(width: int) -> None:
    from probes.lenses.row_sums import largest_of

    logits = torch.randn(7, width, generator=torch.Generator().manual_seed(width))
    values, places = largest_of(logits, 5)
    assert torch.equal(values, logits.topk(5, dim=-1).values)
    assert torch.equal(places, logits.topk(5, dim=-1).indices)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_what_is_read_whole_reads_as_by_tiles_and_compares_as_rows_do(softcap: float | None) -> None:
    from probes.lenses import logit

    generator = torch.Generator().manual_seed(0)
    rows, others = torch.randn(2, 37, 8, generator=generator)
    unembedding = Unembedding(torch.nn.Identity(), torch.randn(130, 8, generator=generator), None, softcap)
    ids, of = torch.tensor([3, 77]), torch.arange(37).flip(0)
    tiled = logit.read(rows, unembedding, ids=ids, top_k=3, ranks=True, tile=50)
    whole, known = logit.read_whole(rows, unembedding, ids=ids, top_k=3, ranks=True)
    for name in ("log_z", "entropy_bits", "logprobs", "top_ids", "ranks"):
        torch.testing.assert_close(getattr(whole, name), getattr(tiled, name))
    for order in (None, of):
        expected = logit.read(others, unembedding, reference=rows, reference_of=order, tile=50).kl
        torch.testing.assert_close(
            logit.read(others, unembedding, reference=known, reference_of=order, tile=50).kl, expected
        )
    assert (logit.read(rows, unembedding, reference=known).kl < 1e-5).all()
