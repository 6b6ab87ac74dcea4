"""What one pass over captured rows writes: packed rows, their statistics, coordinates on a basis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from probes.reducers import POOLED, TAIL, Reducer

STORAGE = (torch.bfloat16, torch.float16, torch.float32, torch.int8)
"""Types that rows can be packed into; int8 with a scale and an error per row."""


@dataclass(frozen=True, eq=False)
class RowOutputs:
    """Preallocated outputs of one pass over n chosen rows of a given width; None leaves a quantity out.

    The result of chosen row i is written at `offset + i`; rows that would fall behind the end of an output are dropped.
    """

    packed: Tensor | None = None
    """[capacity, width], the rows in the storage type."""
    scale: Tensor | None = None
    """[capacity] float32, with int8 rows: a row is its codes times its scale."""
    error: Tensor | None = None
    """[capacity] float32, with int8 rows: the largest |row - codes * scale|."""
    norm: Tensor | None = None
    """[capacity] float32, L2 norms."""
    moments: Tensor | None = None
    """[capacity, 3] float32: mean, variance (divided by the width) and max|x|."""
    change: Tensor | None = None
    """[capacity, 2] float32, against `previous`: the norm of the difference, and the cosine (0 for a zero row)."""
    coordinates: Tensor | None = None
    """[capacity, k] float32, on `basis`."""

    def every(self) -> tuple[Tensor | None, ...]:
        """Return every output, in the order of the fields."""
        return (self.packed, self.scale, self.error, self.norm, self.moments, self.change, self.coordinates)

    def filled(self) -> tuple[Tensor, ...]:
        """Return the outputs that are not left out."""
        return tuple(tensor for tensor in self.every() if tensor is not None)


def reduced_shape(
    shape: Sequence[int], dtype: torch.dtype, n: int, counts: Sequence[int], reducer: Reducer
) -> tuple[tuple[int, ...], torch.dtype]:
    """Return shape and dtype of n chosen rows of a tensor of `shape` [rows, ...] after a reducer."""
    if reducer.kind == "rows":
        return (n, *shape[1:]), dtype
    if reducer.kind in POOLED:
        return (len(counts), *shape[1:]), torch.float32
    if reducer.kind == "int8":
        return (n, math.prod(shape[1:]) + TAIL), torch.int8
    tails = {"norm": (), "moments": (3,), "lens_ids": (len(reducer.ids),), "lens_top": (reducer.top_k, 2)}
    if reducer.basis is not None:
        tails["project"] = (len(reducer.basis),)
    return (n, *tails[reducer.kind]), torch.float32


def check(
    tensor: Tensor, index: Tensor, out: RowOutputs, previous: Tensor | None, basis: Tensor | None, offset: Tensor | None
) -> None:
    """Refuse operands that do not fit together.

    Raises:
        ValueError: names the operand, its shape or type, and the legal one.
    """
    width = tensor.shape[1:].numel()
    sizes = {"packed": (out.packed, width), "moments": (out.moments, 3), "change": (out.change, 2)}
    sizes["previous"], sizes["basis"] = (previous, width), (basis, width)
    sizes["coordinates"] = (out.coordinates, 0 if basis is None else len(basis))
    for name, (given, columns) in sizes.items():
        if given is not None and (given.ndim != 2 or given.shape[1] != columns):
            raise ValueError(f"{name} has shape {tuple(given.shape)}; it must be [rows, {columns}]")
    if out.packed is not None and out.packed.dtype not in STORAGE:
        raise ValueError(f"rows cannot be packed as {out.packed.dtype}; legal are {', '.join(map(str, STORAGE))}")
    coded = out.packed is not None and out.packed.dtype == torch.int8
    if coded != (out.scale is not None) or coded != (out.error is not None):
        raise ValueError("int8 rows come with a scale and an error, other types with neither")
    if (out.change is None) != (previous is None) or (out.coordinates is None) != (basis is None):
        raise ValueError("change needs previous rows, coordinates need a basis, and neither is given without the other")
    if previous is not None and len(previous) < len(index):
        raise ValueError(f"{len(previous)} previous rows for {len(index)} rows")
    if offset is not None and (offset.numel() != 1 or offset.dtype != torch.int64):
        raise ValueError("the offset is one int64 number")
