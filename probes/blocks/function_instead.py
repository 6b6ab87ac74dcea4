"""A function of torch replaced for a while, in one thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.overrides import TorchFunctionMode


class FunctionInstead(TorchFunctionMode):
    """Inside, and in this thread, a function stands for one of torch's.

    Args:
        function: of torch, that is called.
        instead: what runs, with the same arguments; it may call `function`.
    """

    def __init__(self, function: Callable[..., Any], instead: Callable[..., Any]) -> None:
        super().__init__()
        self.function, self.instead = function, instead

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the function, or what stands for it."""
        return (self.instead if func is self.function else func)(*args, **(kwargs or {}))
