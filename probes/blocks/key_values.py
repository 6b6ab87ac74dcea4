"""Stands for a key-value cache, for blocks that are called one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from probes.hooks.forward_hooks import Stop

Pair = tuple[Tensor, Tensor]
"""Keys and values [row, kv_head, pos, d_head]."""


@dataclass(eq=False)
class KeyValues:
    """Stands for a key-value cache: the prompt's own keys and values before the suffix, for any number of rows."""

    prefix: Callable[[int], Pair] | None
    """By layer, of one row for all or of each; None where nothing is before the suffix."""
    suffix: dict[int, Pair] = field(default_factory=dict)
    """Per layer, the keys and values of the rows that ran last, without the prefix."""
    start: int = 0
    """The number of positions before the suffix."""
    keeps: bool = False
    """Whether `whole` is kept, which holds the memory of it until the next block."""
    stops: bool = False
    """Whether a block ends as soon as its keys and values are known."""
    whole: Pair | None = None
    """Keys and values of all positions, of the rows that ran last."""

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> Pair:
        """Keep the rows' keys and values of a layer; return those that the rows attend to, with the prompt's before them."""
        self.suffix[layer_idx] = (key, value)
        keys, values = key, value
        if self.prefix is not None:
            before = self.prefix(layer_idx)
            keys, values = (
                torch.cat((b.expand(len(key), -1, -1, -1), new), dim=2)
                for b, new in zip(before, (key, value), strict=True)
            )
        if self.keeps:
            self.whole = keys, values
        if self.stops:
            raise Stop
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of positions before the suffix."""
        return self.start


def cache_of(length: int, n_layers: int) -> Any:
    """A key-value cache that says it holds `length` positions; for a model that only asks how many there are."""
    from transformers import DynamicCache

    cache = DynamicCache()
    if length:
        for layer in range(n_layers):
            cache.update(torch.zeros(1, 1, length, 1), torch.zeros(1, 1, length, 1), layer)
    return cache
