"""Continuations from any block and position: run together they end where each alone does."""

from __future__ import annotations

import pytest
import torch
from tiny import native

from probes.blocks import from_anywhere
from probes.blocks.cached_prompt import CachedPrompt

TOKENS = (5, 6, 7, 8, 9, 10)
FAMILIES = ("llama", "gpt2", "mistral", "gemma3", "falcon_grouped", "mixtral")
PLACES = [(first, position) for position in (4, 1, 5, 2, 0) for first in (2, 0, 3, 1, 1)]
"""First block (3 is behind the last) and position."""


def changes(base: CachedPrompt) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    width = base.entering[0].shape[-1]
    return [torch.randn(1 + row % min(2, 6 - place[1]), width, generator=generator) for row, place in enumerate(PLACES)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("call", "batch", "kept"), [(40, 1024, 2**15), (0, 1, 1), (4, 20, 60)])
def test_they_end_where_each_alone_does(
    family: str, call: int, batch: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("CALL", call), ("BATCH", batch), ("KEPT", kept)):
        monkeypatch.setattr(from_anywhere, name, value)
    base = CachedPrompt(native(family), TOKENS, 0)
    changed = changes(base)
    together = from_anywhere.last_rows(base, [f for f, _ in PLACES], [p for _, p in PLACES], changed)
    for row, ((first, position), rows) in enumerate(zip(PLACES, changed, strict=True)):
        hidden = base.entering[first].clone()
        hidden[position : position + len(rows)] = rows
        alone = base.resume([first], hidden[None]).last[0]
        torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-5)


def test_blocks_run_what_follows_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(from_anywhere, "CALL", 0)
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
    # Positions 0 to 5, then also 4 to 5 and 5; of the last block the keys of all these, and three last positions.
    assert ran == {0: 6, 1: 9, 2: 9 + 3}
