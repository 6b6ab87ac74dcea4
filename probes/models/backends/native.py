"""A Hugging Face model as it is, read and edited through forward hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from probes.blocks.rerouting import block_outputs
from probes.hooks.forward_hooks import ForwardHooks
from probes.models.backends.in_memory import LocalModel, evaluating
from probes.models.protocol import Read, Write
from probes.points import Address


class NativeModel(LocalModel):
    """A loaded transformers module behind the `Model` protocol; the module is never moved, cast or rewired."""

    backend: ClassVar[str] = "native"

    def _call(self, taps: ForwardHooks, tokens: Tensor, **kwargs: Any) -> Any:
        with taps.on(self.module, (tokens.shape[0], tokens.shape[1])):
            return self.module(input_ids=tokens, **kwargs)

    def block_output_lengths(self) -> tuple[int | None, ...]:
        """Per block, the length of the tuple it returns; None where it returns a bare tensor."""
        return self._block_output_lengths

    @cached_property
    def _block_output_lengths(self) -> tuple[int | None, ...]:
        with self.exclusive():
            return block_outputs(self.module, self.anatomy, self.device)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """No other thread runs this model inside; for alterations of the module that are undone on the way out."""
        with self._lock, evaluating(self.module):
            yield

    @contextmanager
    def hooked(
        self, reads: Mapping[Address, Read], writes: Mapping[Address, Write], rows: tuple[int, int]
    ) -> Iterator[None]:
        """Reads and writes happen whenever the blocks run inside, on (batch, pos) rows; for callers of single blocks."""
        self._admit(reads, writes)
        taps = self._taps(reads, writes, stop=False)
        with self._lock, self._watching(taps), taps.on(self.module, rows):
            yield
