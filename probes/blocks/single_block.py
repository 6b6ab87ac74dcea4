"""One block of a model at a time, run by the model's own forward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

from jaxtyping import Float
from torch import Tensor, nn

from probes.blocks.block_outputs import imitated, watched_widths
from probes.hooks.forward_hooks import Stop, tensor_of
from probes.models.protocol import Forward
from probes.points import Address, stage_of

T = TypeVar("T")


def steps(forward: Forward, n_layers: int) -> int:
    """Return how many stages a forward has to run, up to the last that it has an address in."""
    stages = (stage_of(address, n_layers) for address in (*forward.reads, *forward.writes))
    return 1 + max(stages, default=-1)


def of_stage(mapping: Mapping[Address, T], stage: int, n_layers: int) -> dict[Address, T]:
    """Return the entries of one stage."""
    return {address: value for address, value in mapping.items() if stage_of(address, n_layers) == stage}


class SingleBlockRunner:
    """Runs one block by the model's own forward, which prepares its arguments; the other blocks pass their input on."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.blocks = tuple(blocks)
        self._widths: dict[int, int | None] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Learn from a whole forward inside what each block returns, which a block that passes on has to imitate."""
        with watched_widths(self.blocks) as self._widths:
            yield

    @property
    def output_lengths(self) -> tuple[int | None, ...]:
        """The length of the tuple that each block returns; None where it returns a bare tensor."""
        return tuple(self._widths[layer] for layer in range(len(self._widths)))

    @output_lengths.setter
    def output_lengths(self, lengths: Sequence[int | None]) -> None:
        self._widths = dict(enumerate(lengths))

    @contextmanager
    def only(self, layer: int, entering: Float[Tensor, "batch pos d_model"] | None) -> Iterator[list[Tensor]]:
        """Make a forward inside run block `layer` alone and stop after it; the list receives what leaves the block.

        Args:
            layer: the block; the number of blocks stands for what follows them.
            entering: what enters the block, None for the first; where `layer` follows the blocks, what leaves the last.
        """
        left: list[Tensor] = []

        def catch(_: nn.Module, __: Any, output: Any) -> None:
            left.append(tensor_of(output))
            raise Stop

        with ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                if index != layer:
                    given = entering if index == layer - 1 else None
                    # An attribute of the instance stands before the class's method, and hooks still happen around it.
                    block.forward = partial(self._pass_on, index, given)  # type: ignore[method-assign]
                    stack.callback(block.__dict__.pop, "forward")
            if layer < len(self.blocks):
                block = self.blocks[layer]

                def last_of_all(*_: Any) -> None:
                    # Hung up when the block is called, after the hooks that read and write what leaves it.
                    stack.enter_context(block.register_forward_hook(catch))

                stack.enter_context(block.register_forward_pre_hook(last_of_all))
            yield left

    def _pass_on(self, index: int, given: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        return imitated(hidden if given is None else given.to(hidden.device), self._widths[index])
