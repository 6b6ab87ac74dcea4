"""Prompts run as one tree: streams are those of each prompt run alone, whatever order the blocks run in."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, shared

from probes.blocks.cached_prompt import CachedPrompt
from probes.blocks.prompt_tree import PromptTree
from probes.blocks.rerouting import Caller, call_blocks
from probes.errors import PointError
from probes.models.backends.native import NativeModel

CAUSAL = tuple(family for family in FAMILIES if family != "bert")
PROMPTS = ([5, 6, 7, 8, 2, 9], [5, 6, 7, 3], [5, 6, 4, 4], [5, 6, 7], [9, 6, 7, 8], [5, 6, 7, 8, 2, 9, 9, 1])
ORDER = (2, 0, 0, 1)


def native(family: str) -> NativeModel:
    return NativeModel(shared(family), ref="tiny", weights="digest")


def run_whole(model: NativeModel, tokens: list[int], order: tuple[int, ...]) -> torch.Tensor:
    def work(hidden: torch.Tensor, call: Caller) -> torch.Tensor:
        for layer in order:
            hidden = call(layer, hidden)
        return hidden[0]

    with torch.no_grad():
        return call_blocks(model, torch.tensor([tokens]), work, use_cache=False)


@pytest.mark.parametrize("family", CAUSAL)
def test_every_prompt_ends_in_what_it_ends_in_alone(family: str) -> None:
    model = native(family)
    tree = PromptTree(model, PROMPTS, [0] * len(PROMPTS))
    assert tree.nodes == 15
    rows = torch.stack([tree.entering[0], tree.entering[0] * 0.5])
    for layer in ORDER:
        rows = tree.through(layer, rows)
    for tokens, path in zip(PROMPTS, tree.paths, strict=True):
        for end, alone in (
            (tree.entering[-1], run_whole(model, tokens, (0, 1, 2))),
            (rows[0], run_whole(model, tokens, ORDER)),
        ):
            assert (end[path] - alone).abs().max() <= 1e-5 * max(1.0, float(alone.abs().max()))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_what_is_before_the_start_stays_as_it_is(family: str) -> None:
    model = native(family)
    starts = [len(tokens) - 1 for tokens in PROMPTS[:-1]] + [3]
    tree = PromptTree(model, PROMPTS, starts)
    assert [len(path) for path in tree.paths] == [1, 1, 1, 1, 1, 5]
    hidden = torch.randn(2, *tree.entering[0].shape, generator=torch.Generator().manual_seed(0))
    leaving = tree.through(1, hidden)
    for tokens, start, path in zip(PROMPTS, starts, tree.paths, strict=True):
        alone = CachedPrompt(model, tokens, start)
        torch.testing.assert_close(leaving[:, path], alone.through(1, hidden[:, path], {}), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(tree.entering[2][path], alone.entering[2], atol=1e-5, rtol=1e-5)


def test_one_prompt_is_bitwise_its_plain_run() -> None:
    model = native("llama")
    tree = PromptTree(model, PROMPTS[:1], [0])
    for own, plain in zip(tree.entering, CachedPrompt(model, PROMPTS[0], 0).entering, strict=True):
        assert torch.equal(own, plain)


def test_a_model_that_reads_both_ways_is_refused() -> None:
    with pytest.raises(PointError, match="both ways"):
        PromptTree(native("bert"), PROMPTS, [0] * len(PROMPTS))
