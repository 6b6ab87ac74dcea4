"""Continuations from any block and position: run together they end where each alone does."""

from __future__ import annotations

import pytest
import torch
from tiny import native
from torch.nn import functional

from probes.blocks import from_anywhere, ragged_run
from probes.blocks.cached_prompt import CachedPrompt
from probes.blocks.ragged_attention import ragged_attention, with_prompt
from probes.blocks.ragged_run import NotRagged, RaggedRun

TOKENS = (5, 6, 7, 8, 9, 10)
RAGGED = ("llama", "gpt2", "falcon_grouped", "mixtral", "opt")
OTHERS = ("mistral", "gemma2", "gemma3")
"""Their attention looks back over a few positions only, or bounds its scores."""
PLACES = [(first, position) for position in (4, 1, 5, 2, 0) for first in (2, 0, 3, 1, 1)]
"""First block (3 is behind the last) and position."""
FIRSTS, POSITIONS = ([place[side] for place in PLACES] for side in (0, 1))


def changes(base: CachedPrompt) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    width = base.entering[0].shape[-1]
    return [torch.randn(1 + row % min(2, 6 - place[1]), width, generator=generator) for row, place in enumerate(PLACES)]


def check_last_rows(base: CachedPrompt) -> None:
    changed = changes(base)
    together = from_anywhere.last_rows(base, FIRSTS, POSITIONS, changed)
    for row, ((first, position), rows) in enumerate(zip(PLACES, changed, strict=True)):
        hidden = base.entering[first].clone()
        hidden[position : position + len(rows)] = rows
        alone = base.resume([first], hidden[None]).last[0]
        torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [*RAGGED, *OTHERS])
@pytest.mark.parametrize(("rows", "kept"), [(2048, 2**15), (7, 60), (1, 1)])
def test_they_end_where_each_alone_does(family: str, rows: int, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ragged_run, "ROWS", rows)
    monkeypatch.setattr(from_anywhere, "KEPT", kept)
    check_last_rows(CachedPrompt(native(family), TOKENS, 0))


@pytest.mark.parametrize("family", RAGGED)
def test_rows_of_most_families_run_apart(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(from_anywhere, "_by_position", None)
    check_last_rows(CachedPrompt(native(family), TOKENS, 0))


@pytest.mark.parametrize("family", OTHERS)
@torch.no_grad()
def test_the_prompt_among_them_shows_another_attention(family: str) -> None:
    base = CachedPrompt(native(family), TOKENS, 0)
    with pytest.raises(NotRagged):
        RaggedRun(base, FIRSTS, POSITIONS, changes(base)).last()


@torch.no_grad()
def test_coarse_numbers_prove_nothing() -> None:
    base = CachedPrompt(native(), TOKENS, 0)
    with pytest.raises(NotRagged):
        RaggedRun(base, FIRSTS, POSITIONS, [rows.bfloat16() for rows in changes(base)])


def test_a_prompt_open_later_keeps_what_is_before() -> None:
    base = CachedPrompt(native(), TOKENS, 2)
    width = base.entering[0].shape[-1]
    changed = list(torch.randn(3, 1, width, generator=torch.Generator().manual_seed(0)))
    together = from_anywhere.last_rows(base, [0, 1, 0], [3, 2, 5], changed)
    whole = CachedPrompt(native(), TOKENS, 0)
    expected = from_anywhere.last_rows(whole, [0, 1, 0], [3, 2, 5], changed)
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5)


def test_blocks_run_what_follows_the_prompt_and_no_more() -> None:
    model = native()
    base = CachedPrompt(model, TOKENS, 0)
    ran = dict.fromkeys(range(3), 0)

    def count(layer: int) -> object:
        return model.component("block", layer).register_forward_pre_hook(
            lambda _, args, kwargs: ran.__setitem__(layer, ran[layer] + (args or (kwargs["hidden_states"],))[0][..., 0].numel()),
            with_kwargs=True,
        )  # fmt: skip

    hooks = [count(layer) for layer in range(3)]
    try:
        from_anywhere.last_rows(base, [0, 1, 1, 3], [0, 4, 5, 2], [base.entering[0][:1]] * 4)
    finally:
        for hook in hooks:
            hook.remove()  # type: ignore[attr-defined]
    # The prompt and positions 0 to 5, then also 4 to 5 and 5; of the last block the keys of all these, and a last position of each.
    assert ran == {0: 6 + 6, 1: 6 + 9, 2: 6 + 9 + 4}


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_is_each_continuation_s_own(kv_heads: int, scale: float | None) -> None:
    generator = torch.Generator().manual_seed(kv_heads)
    begins, length = (1, 4, 0), 5
    owner = torch.tensor([i for i, begin in enumerate(begins) for _ in range(begin, length)])
    at = torch.tensor([position for begin in begins for position in range(begin, length)])
    query = torch.randn(len(at), 4, 8, generator=generator)
    prompt, own = (torch.randn(2, n, kv_heads, 8, generator=generator).transpose(0, 1) for n in (length, len(at)))
    keys, values = (with_prompt(own[:, side], prompt[:, side].transpose(0, 1), owner, at) for side in (0, 1))
    mixed = ragged_attention(query, keys, values, owner, at, scale)
    for i, begin in enumerate(begins):
        whole = torch.cat((prompt[:begin], own[owner == i])).permute(1, 2, 0, 3)
        queries = torch.cat((torch.zeros(begin, 4, 8), query[owner == i])).transpose(0, 1)
        expected = functional.scaled_dot_product_attention(
            queries[None], whole[None, 0], whole[None, 1], is_causal=True, scale=scale, enable_gqa=True
        )[0].transpose(0, 1)
        torch.testing.assert_close(mixed[owner == i], expected[begin:], rtol=1e-5, atol=1e-6)
