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

    def _call(self, hooks: ForwardHooks, tokens: Tensor, **kwargs: Any) -> Any:
        with hooks.on(self.module, (tokens.shape[0], tokens.shape[1])):
            return self.module(input_ids=tokens, **kwargs)

    def block_output_lengths(self) -> tuple[int | None, ...]:
        """Return the length of the tuple that each block returns; None where it returns a bare tensor."""
        return self._block_output_lengths

    @cached_property
    def _block_output_lengths(self) -> tuple[int | None, ...]:
        with self.exclusive():
            return block_outputs(self.module, self.anatomy, self.device)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other threads from running the model inside, for alterations of the module that are undone on the way out."""
        with self._lock, evaluating(self.module):
            yield

    @contextmanager
    def hooked(
        self, reads: Mapping[Address, Read], writes: Mapping[Address, Write], rows: tuple[int, int]
    ) -> Iterator[None]:
        """Make reads and writes happen whenever a block runs inside, on `rows` (batch, pos); for callers of single blocks."""
        self._admit(reads, writes)
        hooks = self._hooks(reads, writes, stop=False)
        with self._lock, self._watching(hooks), hooks.on(self.module, rows):
            yield
