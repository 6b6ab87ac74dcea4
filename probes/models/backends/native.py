"""A Hugging Face model as it is, read and edited through forward hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from probes.blocks.rerouting import block_outputs
from probes.blocks.strands import ContextMaker
from probes.cache_folder import cache_root
from probes.hooks.forward_hooks import ForwardHooks
from probes.models.backends.in_memory import LocalModel, evaluating
from probes.models.protocol import Read, SavedRun, Write
from probes.points import Address
from probes.shelf import Shelf


class NativeModel(LocalModel):
    """A loaded transformers module behind the `Model` protocol; the module is never moved, cast or rewired."""

    backend: ClassVar[str] = "native"
    _evaluated = False
    """Whether the thread that holds the lock has put the module in evaluation mode already."""

    @cached_property
    def shelf(self) -> Shelf:
        """Where activations wait that a later block needs."""
        return Shelf(cache_root() / "spill", None)

    def _call(self, hooks: ForwardHooks, tokens: Tensor, **kwargs: Any) -> Any:
        with self.during(lambda: hooks.on(self.module, (tokens.shape[0], tokens.shape[1]))):
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
        with self._lock:
            if self._evaluated:
                yield
                return
            with evaluating(self.module):
                self._evaluated = True
                try:
                    yield
                finally:
                    self._evaluated = False

    def whole(self) -> AbstractContextManager[None]:
        """Keep other threads from running the model inside, whose weights are all in memory."""
        return self.exclusive()

    def at(self, layer: int) -> AbstractContextManager[None]:
        """Do nothing: every block is in memory."""
        return nullcontext()

    @contextmanager
    def altering(self, layer: int, alteration: ContextMaker) -> Iterator[None]:
        """Have the weights of block `layer` altered inside."""
        with self.exclusive(), alteration():
            yield

    def during(self, context: ContextMaker) -> AbstractContextManager[None]:
        """Enter the context."""
        return context()

    def saved_run(self, *entering: Tensor) -> SavedRun | None:
        """Return None: a run through blocks in memory is short."""
        return None

    def ends_group(self, layer: int) -> bool:
        """Return False, as nothing is kept."""
        return False

    @contextmanager
    def hooked(
        self, reads: Mapping[Address, Read], writes: Mapping[Address, Write], rows: tuple[int, int]
    ) -> Iterator[None]:
        """Make reads and writes happen whenever a block runs inside, on `rows` (batch, pos); for callers of single blocks."""
        self._admit(reads, writes)
        hooks = self._hooks(reads, writes, stop=False)
        with self._lock, self._watching(hooks), self.during(lambda: hooks.on(self.module, rows)):
            yield
