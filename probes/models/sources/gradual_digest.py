"""The weights digest of a model whose blocks pass through memory one at a time, each read once."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from probes.models.sources.digest import Digest, Fetch, distinct_tensors

KEPT_BYTES = 4 * 2**30
"""Weights kept in memory until their turn, at most; what does not fit is read once more."""


class GradualDigest:
    """Takes the tensors of a model in the order in which its blocks run, and digests them in the order of their names.

    By name, block 10 comes before block 2: what passes before its turn is kept, within `kept_bytes`.

    Args:
        module: a model whose blocks are on the meta device.
        fetch: reads a tensor that had to be let go before its turn.
        kept_bytes: the most that is kept.
    """

    def __init__(self, module: nn.Module, fetch: Fetch, kept_bytes: int = KEPT_BYTES) -> None:
        self._fetch, self._room = fetch, kept_bytes
        self._digest = Digest(module)
        self._queue = deque(distinct_tensors(module))
        self._kept: dict[str, Tensor] = {}
        self._dropped: set[str] = set()

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors by their full name; they may be let go afterwards."""
        arriving = dict(tensors)
        self._advance(arriving)
        for name in (name for name, _ in self._queue if name in arriving):
            kept = _narrowed(arriving[name])
            if kept.nbytes <= self._room:
                self._kept[name] = kept
                self._room -= kept.nbytes
            else:
                self._dropped.add(name)

    def finish(self) -> str:
        """Return the digest, after reading again what was let go."""
        self._advance({})
        return self._digest.finish()

    def _advance(self, arriving: Mapping[str, Tensor]) -> None:
        while self._queue:
            name, tensor = self._queue[0]
            if name in self._kept:
                kept = self._kept.pop(name)
                self._room += kept.nbytes
                tensor = kept.to(tensor.dtype)
            elif name in arriving:
                tensor = arriving[name]
            elif name in self._dropped:
                tensor = self._fetch(name)
            elif tensor.is_meta:
                return
            self._digest.add(name, tensor)
            self._queue.popleft()


def _narrowed(tensor: Tensor) -> Tensor:
    """The tensor in half precision where that loses nothing, as where a checkpoint of halves is run in float32."""
    if tensor.dtype != torch.float32:
        return tensor
    narrow = tensor.to(torch.bfloat16)
    return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor
