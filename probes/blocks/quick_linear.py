"""Linear maps of blocks in the quickest way, among those that give the same to float32's rounding."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional

from probes import one_dnn
from probes.blocks.function_instead import FunctionInstead

FEW_ROWS = range(8, 49)
"""Numbers of rows whose product MKL computes sooner the other way round: by a half at 20 rows and two threads."""


class QuickLinear(FunctionInstead):
    """Inside, and in this thread, `linear` of float32 numbers on the CPU is computed in the quickest way.

    Which way that is depends on shapes alone, so that what runs twice inside comes out the same to the last bit.
    """

    def __init__(self) -> None:
        super().__init__(functional.linear, _linear)


def _linear(*args: Any, **kwargs: Any) -> Tensor:
    if not kwargs:
        if one_dnn.quicker(*args):
            return one_dnn.linear(*args)
        if args[0].numel() // args[0].shape[-1] in FEW_ROWS and one_dnn.float32_on_cpu(*args):
            return _turned(*args)
    return functional.linear(*args, **kwargs)


def _turned(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return (weight @ x.T).T, which is x @ weight.T."""
    # Contiguous, as the library's own is: what follows may add up in another order otherwise.
    rows = (weight @ x.reshape(-1, x.shape[-1]).T).T.contiguous()
    return (rows if bias is None else rows + bias).reshape(*x.shape[:-1], len(weight))
