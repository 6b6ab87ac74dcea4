"""Back-patching: the resumed grid is the naive one, and planted models behave as they must."""

from __future__ import annotations

import itertools

import pytest
import torch
from families import FAMILIES, prompt, shared
from torch import Tensor, nn

from probes.edits import Replace, Values, generate, read
from probes.errors import PointError, PromptError
from probes.models.native import NativeModel
from probes.points import Address
from probes.resume import Resumable

CAUSAL = tuple(family for family in FAMILIES if family != "bert")


def native(module: nn.Module) -> NativeModel:
    return NativeModel(module, ref="tiny", weights="digest")


def grid(model: NativeModel, tokens: Tensor, position: int, include_embedding: bool = True) -> dict[tuple[int, int], Tensor]:
    """(source, target) -> what leaves the last block at the last position, resumed."""
    held = Resumable(model, tokens[0].tolist(), position)
    n = model.shape.n_layers
    cells = list(itertools.product(range(n), range(-1 if include_embedding else 0, n)))
    hidden = torch.stack([held.entering[t + 1] for _, t in cells])
    hidden[:, 0] = torch.stack([held.entering[s + 1][0] for s, _ in cells])
    return dict(zip(cells, held.resume([t + 1 for _, t in cells], hidden).last, strict=True))


def naive(model: NativeModel, tokens: Tensor, position: int, source: int, target: int) -> Tensor:
    n = model.shape.n_layers
    row = read(model, tokens, [Address("resid_post", source)])[Address("resid_post", source)][0, position]
    at = Address("resid_pre", 0) if target < 0 else Address("resid_post", target)
    edit = Replace(address=at, value=Values(row), positions=(position,))
    return read(model, tokens, [Address("resid_post", n - 1)], [edit])[Address("resid_post", n - 1)][0, -1]


@pytest.mark.parametrize("position", [8, 4, 0])
@pytest.mark.parametrize("family", CAUSAL)
def test_the_resumed_grid_is_the_naive_one(family: str, position: int) -> None:
    model, tokens = native(shared(family)), prompt()
    for (s, t), found in grid(model, tokens, position).items():
        expected = naive(model, tokens, position, s, t)
        assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max())), (s, t)
    assert torch.equal(read(model, tokens, [Address("logits")])[Address("logits")], model_logits(model, tokens))


def model_logits(model: NativeModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.module(tokens).logits  # type: ignore[operator]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "gpt_neox", "mistral"])
def test_continuations_are_the_naive_ones(family: str) -> None:
    model, tokens = native(shared(family)), prompt(6)
    n, unembed = model.shape.n_layers, model.unembedding()
    for position in (5, 2):
        held = Resumable(model, tokens[0].tolist(), position)
        cells = list(itertools.product(range(n), range(n - 1)))
        hidden = torch.stack([held.entering[t + 1] for _, t in cells])
        hidden[:, 0] = torch.stack([held.entering[s + 1][0] for s, _ in cells])
        resumed = held.resume([t + 1 for _, t in cells], hidden, keep=True)
        first = torch.nn.functional.linear(unembed.norm(resumed.last), unembed.weight, unembed.bias).argmax(-1)
        for (s, t), written in zip(cells, held.write(resumed, first, 5), strict=True):
            row = Values(held.entering[s + 1][0].clone())
            edit = Replace(address=Address("resid_post", t), value=row, positions=(position,))
            expected = generate(model, tokens[0].tolist(), 5, [edit])
            assert written[: len(expected)] == expected
