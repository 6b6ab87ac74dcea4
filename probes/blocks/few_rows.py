"""Linear maps of few rows, which a processor's library shares out badly among its threads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from probes.blocks.function_instead import FunctionInstead

ROWS = range(8, 49)
"""Numbers of rows whose product is faster the other way round: by a half at 20 rows and two threads."""


class FewRows(FunctionInstead):
    """Inside, and in this thread, x @ weight.T is computed as (weight @ x.T).T where x has few rows: to float32's rounding the same.

    Which way a map takes depends on its shapes alone, so that what runs twice inside comes out the same to the last bit.
    """

    def __init__(self) -> None:
        super().__init__(functional.linear, _linear)


def _linear(*args: Any, **kwargs: Any) -> Tensor:
    return _turned(*args) if not kwargs and _suits(*args[:2]) else functional.linear(*args, **kwargs)


def _suits(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype is weight.dtype is torch.float32
        and x.device.type == weight.device.type == "cpu"
        and weight.dim() == 2
        and x.numel() in range(ROWS.start * x.shape[-1], ROWS.stop * x.shape[-1])
    )


def _turned(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # Contiguous, as the library's own is: what follows may add up in another order otherwise.
    rows = (weight @ x.reshape(-1, x.shape[-1]).T).T.contiguous()
    return (rows if bias is None else rows + bias).reshape(*x.shape[:-1], len(weight))
