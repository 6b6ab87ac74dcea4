"""What blocks return: a bare tensor, or a tuple that begins with it. Whatever stands in for a block has to imitate that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn


@contextmanager
def watched_widths(blocks: Sequence[nn.Module]) -> Iterator[dict[int, int | None]]:
    """Note during the forwards inside how long the tuple is that each block returns; None for a bare tensor."""
    widths: dict[int, int | None] = {}

    def note(index: int, _: nn.Module, __: Any, output: Any) -> None:
        widths[index] = None if isinstance(output, Tensor) else len(output)

    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.enter_context(block.register_forward_hook(partial(note, index)))
        yield widths


def imitated(hidden: Float[Tensor, "batch pos d_model"], width: int | None) -> Any:
    """Return `hidden` as a block returns it whose tuples have this length; None for a bare tensor."""
    return hidden if width is None else (hidden, *[None] * (width - 1))
