"""One launch over captured rows: gather, cast and pack them, and measure them, reading memory once."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from probes.kernels.int8_codes import LEVELS
from probes.kernels.outputs import RowOutputs

MAX_BLOCK = 8192
"""Row values in registers at once; a wider row is read in parts."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Types of captured tensors that the kernels take."""


@triton.jit
@no_type_check
def _place(c, inner, outer_stride, inner_stride):
    return (c // inner).to(tl.int64) * outer_stride + (c % inner).to(tl.int64) * inner_stride


@triton.jit
@no_type_check
def _stored(raw, value, target: tl.constexpr):
    """A captured value in the storage type, rounded to nearest even; `raw` where it already has that type."""
    if raw.dtype == target:
        return raw
    if target == tl.bfloat16:
        # Written out, because the interpreter would cut the bits off.
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(value == value, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(target)


@triton.jit
@no_type_check
def rows_kernel(
    x,
    index,
    packed,
    scale,
    error,
    norm,
    moments,
    change,
    previous,
    coordinates,
    basis,
    offset,
    row_stride,
    outer_stride,
    inner_stride,
    inner,
    width,
    n_basis,
    capacity,
    FLAT: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a chosen row, which is contiguous where FLAT."""
    chosen = tl.program_id(0).to(tl.int64)
    row = tl.load(index + chosen).to(tl.int64)
    readable = tl.where(row >= 0, width, 0)
    start = x + row * row_stride
    at = chosen
    if offset is not None:
        at += tl.load(offset)
    fits = (at >= 0) & (at < capacity)
    writable = tl.where(fits, width, 0)
    seen = 0.0
    mean = 0.0
    scatter = 0.0
    squares = 0.0
    high = 0.0
    dot = 0.0
    other = 0.0
    moved = 0.0
    for first in range(0, width, BLOCK):
        c = first + tl.arange(0, BLOCK)
        inside = c < width
        place = c if FLAT else _place(c, inner, outer_stride, inner_stride)
        raw = tl.load(start + place, mask=c < readable, other=0.0)
        value = raw.to(tl.float32)
        squares += tl.sum(value * value)
        high = tl.maximum(high, tl.max(tl.abs(value)))
        if packed is not None:
            if scale is None:
                kept = _stored(raw, value, packed.dtype.element_ty)
                tl.store(packed + at * width + c, kept, mask=c < writable)
        if moments is not None:
            # Chan's update: parts of a row are merged by their own mean and scatter, so nothing large cancels.
            here = tl.minimum(width - first, BLOCK).to(tl.float32)
            total = seen + here
            centre = tl.sum(value) / here
            centred = tl.where(inside, value - centre, 0.0)
            step = centre - mean
            scatter += tl.sum(centred * centred) + step * step * seen * here / total
            mean += step * here / total
            seen = total
        if change is not None:
            before = tl.load(previous + chosen * width + c, mask=c < readable, other=0.0).to(tl.float32)
            dot += tl.sum(value * before)
            other += tl.sum(before * before)
            moved += tl.sum((value - before) * (value - before))
    high = tl.where(squares == squares, high, squares)
    if scale is not None:
        unit = tl.math.div_rn(high, LEVELS * 1.0)
        divisor = tl.where(unit > 0, unit, 1.0)
        worst = 0.0
        for first in range(0, width, BLOCK):
            c = first + tl.arange(0, BLOCK)
            inside = c < width
            place = c if FLAT else _place(c, inner, outer_stride, inner_stride)
            value = tl.load(start + place, mask=c < readable, other=0.0).to(tl.float32)
            code = tl.floor(tl.math.div_rn(value, divisor) + 0.5)
            code = tl.minimum(tl.maximum(code, -LEVELS * 1.0), LEVELS * 1.0)
            worst = tl.maximum(worst, tl.max(tl.abs(value - code * unit)))
            tl.store(packed + at * width + c, code.to(tl.int8), mask=c < writable)
        tl.store(scale + at, unit, mask=fits)
        tl.store(error + at, worst, mask=fits)
    if norm is not None:
        tl.store(norm + at, tl.sqrt(squares), mask=fits)
    if moments is not None:
        tl.store(moments + at * 3, mean, mask=fits)
        tl.store(moments + at * 3 + 1, scatter / width, mask=fits)
        tl.store(moments + at * 3 + 2, high, mask=fits)
    if change is not None:
        lengths = tl.sqrt(squares) * tl.sqrt(other)
        tl.store(change + at * 2, tl.sqrt(moved), mask=fits)
        tl.store(change + at * 2 + 1, tl.where(lengths > 0, dot / tl.where(lengths > 0, lengths, 1.0), 0.0), mask=fits)
    if coordinates is not None:
        for k in range(0, n_basis):
            along = 0.0
            for first in range(0, width, BLOCK):
                c = first + tl.arange(0, BLOCK)
                inside = c < width
                place = c if FLAT else _place(c, inner, outer_stride, inner_stride)
                value = tl.load(start + place, mask=c < readable, other=0.0).to(tl.float32)
                along += tl.sum(value * tl.load(basis + k * width + c, mask=inside, other=0.0).to(tl.float32))
            tl.store(coordinates + at * n_basis + k, along, mask=fits)


def block_of(width: int) -> tuple[int, int]:
    """Return (values in registers at once, warps) for rows of `width`."""
    block = min(MAX_BLOCK, max(16, triton.next_power_of_2(width)))
    return block, 1 if block <= 512 else 4 if block <= 2048 else 8


def as_rows(tensor: Shaped[Tensor, "row ..."]) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Return a tensor [rows, ...] and its (row stride, outer stride, inner stride, inner size), copied only where it must be."""
    if tensor.ndim == 1:
        return tensor, (tensor.stride(0), 0, 0, 1)
    if tensor.ndim == 2:
        return tensor, (tensor.stride(0), 0, tensor.stride(1), max(1, tensor.shape[1]))
    if tensor.ndim > 3:
        tensor = tensor.flatten(2)
    return tensor, (tensor.stride(0), tensor.stride(1), tensor.stride(2), max(1, tensor.shape[2]))


def capture_rows(
    tensor: Shaped[Tensor, "source ..."],
    index: Int[Tensor, " row"],
    out: RowOutputs,
    previous: Float[Tensor, "before width"] | None = None,
    basis: Float[Tensor, "direction width"] | None = None,
    offset: Shaped[Tensor, "..."] | None = None,
) -> None:
    """Pack and measure chosen rows; see `probes.kernels.eager.capture_rows`."""
    filled = out.filled()
    if not filled or not len(index):
        return
    view, (row_stride, outer_stride, inner_stride, inner) = as_rows(tensor)
    width = tensor.shape[1:].numel()
    flat = inner_stride == 1 and (tensor.ndim < 3 or outer_stride == inner)
    block, warps = block_of(width)
    with torch.cuda.device(tensor.device) if tensor.is_cuda else torch.no_grad():
        rows_kernel[(len(index),)](
            view,
            index,
            *out.every()[:-1],
            previous,
            out.coordinates,
            basis,
            offset,
            row_stride,
            outer_stride,
            inner_stride,
            inner,
            width,
            0 if basis is None else len(basis),
            min(len(part) for part in filled),
            FLAT=flat,
            LEVELS=LEVELS,
            BLOCK=block,
            num_warps=warps,
        )
