"""Texts of different lengths continued together from their own keys and values, each without its own parts of blocks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from probes.blocks.batch import Part, left_out
from probes.hooks.forward_hooks import Stop
from probes.models.protocol import BlockAccess, Write
from probes.models.unembedding import logits_of
from probes.points import Address

KeyValues = Sequence[tuple[Float[Tensor, "kv_head _pos d_head"], Float[Tensor, "kv_head _pos d_head"]]]
"""Per layer, the keys and values of a text."""
Place = tuple[Part, int]
"""A part of a block, by its layer."""
HALVES: dict[Part, tuple[Part, ...]] = {"block": ("attn", "mlp"), "attn": ("attn",), "mlp": ("mlp",)}


def end_tokens(module: nn.Module) -> set[int]:
    """Return the tokens after which a model writes no more."""
    for holder in (getattr(module, "generation_config", None), module.config.get_text_config()):  # type: ignore[union-attr,operator]
        ids = getattr(holder, "eos_token_id", None)
        if ids is not None:
            return {ids} if isinstance(ids, int) else set(ids)
    return set()


class Continuation:
    """Texts that were read up to their last token but one; each forward reads the next tokens of all.

    Shorter texts are padded on the left, where nothing attends. A part is left out by writing zero where it adds to the
    stream, which keeps the keys and values of its block in step with the text; for blocks that add what their parts give,
    that is the block's absence.

    Args:
        model: the model, in memory.
        read: per text, the keys and values of what was read of it: at least one token.
        removed: per text, the part that is left out at every token that follows; None is nothing.
    """

    def __init__(self, model: BlockAccess, read: Sequence[KeyValues], removed: Sequence[Place | None]) -> None:
        from transformers import DynamicCache

        self.model, self._removed = model, list(removed)
        lengths = torch.tensor([text[0][0].shape[1] for text in read])
        longest = int(lengths.max())
        self._cache: Any = DynamicCache()
        for layer in range(model.shape.n_layers):
            keys, values = (torch.stack([_padded(text[layer][side], longest) for text in read]) for side in (0, 1))
            self._cache.update(keys, values, layer)
        self._real = (torch.arange(longest) >= longest - lengths[:, None]).to(model.device)

    @torch.no_grad()
    def run(self, tokens: Int[Tensor, "text new"]) -> Float[Tensor, "text new d_model"]:
        """Read the next tokens of every text; return what leaves the last block at them.

        Tokens that only fill up a row on the right change nothing before them.
        """
        rows, new = tokens.shape
        self._real = torch.cat([self._real, self._real.new_ones(rows, new)], dim=1)
        positions = (self._real.cumsum(1)[:, -new:] - 1).clamp_max(self.model.shape.n_ctx - 1)
        leaving: list[Tensor] = []

        def end(stream: Tensor) -> None:
            leaving.append(stream.clone())
            raise Stop

        last = Address("resid_post", self.model.shape.n_layers - 1)
        with self.model.exclusive(), suppress(Stop), self.model.hooked({last: end}, self._writes(), (rows, new)):
            self.model.module(
                input_ids=tokens.to(self.model.device), attention_mask=self._real.long(), position_ids=positions,
                past_key_values=self._cache, use_cache=True,
            )  # fmt: skip
        return leaving[0]

    def _writes(self) -> dict[Address, Write]:
        rows: dict[Place, list[int]] = {}
        for row, place in enumerate(self._removed):
            for part in HALVES[place[0]] if place else ():
                rows.setdefault((part, place[1]), []).append(row)  # type: ignore[index]
        writes: dict[Address, Write] = {}
        for place, members in rows.items():
            where = torch.zeros(len(self._removed), 1, dtype=torch.bool)
            where[members] = True
            writes |= left_out([place], where)
        return writes

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some of the texts alone."""
        index = torch.tensor(rows, device=self.model.device)
        self._cache.batch_select_indices(index)
        self._real = self._real[index]
        self._removed = [self._removed[row] for row in rows]

    def write(
        self, first: Sequence[int], most: Sequence[int], ends: Collection[int], tick: Any = lambda _: None
    ) -> list[list[int]]:
        """Write each text's most probable continuation.

        Args:
            first: the token that each text goes on with.
            most: how many tokens each text gets, the first among them.
            ends: tokens after which a text is finished.
            tick: is told how many tokens were read.
        """
        written, unembedding = [[token] for token in first], self.model.unembedding()
        rows = list(range(len(written)))
        while True:
            going = [i for i, row in enumerate(rows) if len(written[row]) < most[row] and written[row][-1] not in ends]
            if not going:
                return written
            if len(going) < len(rows):
                self.keep(going)
                rows = [rows[i] for i in going]
            leaving = self.run(torch.tensor([[written[row][-1]] for row in rows]))
            for row, token in zip(rows, logits_of(unembedding, leaving[:, -1]).argmax(-1).tolist(), strict=True):
                written[row].append(token)
            tick(len(rows))


def _padded(rows: Float[Tensor, "kv_head pos d_head"], length: int) -> Float[Tensor, "kv_head longer d_head"]:
    return nn.functional.pad(rows, (0, 0, length - rows.shape[1], 0))
