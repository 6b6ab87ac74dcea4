"""What enters a module that is called, and hooks on modules that are gone at the end of a block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle


def entering(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the tensor that enters a module called with `args` and `kwargs`: its first argument, or its first tensor."""
    if args and isinstance(args[0], Tensor):
        return args[0]
    return next(value for value in kwargs.values() if isinstance(value, Tensor))


def entered(args: tuple[Any, ...], kwargs: Mapping[str, Any], new: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the call's arguments with the tensor that enters the module exchanged for `new`."""
    if args and isinstance(args[0], Tensor):
        return (new, *args[1:]), dict(kwargs)
    name = next(key for key, value in kwargs.items() if isinstance(value, Tensor))
    return args, {**kwargs, name: new}


@contextmanager
def temporary(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Let hooks act inside, and remove them at the end, even after an error."""
    with ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle)
        yield
