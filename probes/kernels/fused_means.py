"""The mean of each sequence's rows in one launch, without gathering them first."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

ROWS, BLOCK = 16, 128
"""Rows and values that a program adds up at once."""


@triton.jit
@no_type_check
def means_kernel(
    x,
    index,
    starts,
    out,
    row_stride,
    width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a sequence and block of values."""
    sequence = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin = tl.load(starts + sequence).to(tl.int32)
    end = tl.load(starts + sequence + 1).to(tl.int32)
    sums = tl.zeros([BLOCK], tl.float32)
    for first in range(begin, end, ROWS):
        places = first + tl.arange(0, ROWS)
        row = tl.load(index + places, mask=places < end, other=0).to(tl.int64)
        mask = (places < end)[:, None] & (c < width)[None, :]
        sums += tl.sum(tl.load(x + row[:, None] * row_stride + c[None, :], mask=mask, other=0.0).to(tl.float32), axis=0)
    count = (end - begin).to(tl.float32)
    means = tl.where(count > 0, sums / tl.maximum(count, 1.0), float("nan"))
    tl.store(out + sequence.to(tl.int64) * width + c, means, mask=c < width)


def sequence_means(
    tensor: Float[Tensor, "source width"],
    index: Int[Tensor, " row"],
    starts: Int[Tensor, " boundary"],
    out: Float[Tensor, "sequence width"],
) -> None:
    """Write the mean of each sequence's rows; see `probes.kernels.eager.sequence_means`.

    Args:
        index: the rows, sequence by sequence.
        starts: where each sequence begins in `index`, and the end of the last.
    """
    if not len(out):
        return
    width = tensor.shape[1]
    view = tensor if tensor.stride(1) == 1 else tensor.contiguous()
    with torch.cuda.device(tensor.device) if tensor.is_cuda else torch.no_grad():
        means_kernel[(len(out), triton.cdiv(width, BLOCK))](
            view, index, starts, out, view.stride(0), width, ROWS=ROWS, BLOCK=BLOCK
        )
