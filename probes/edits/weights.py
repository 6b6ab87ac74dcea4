"""Weights altered in place, and put back on the way out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probes.blocks.rerouting import block_access
from probes.errors import PointError
from probes.models.protocol import BlockAccess, Model


def orthonormal(rows: Float[Tensor, "m d_model"]) -> Float[Tensor, "m d_model"]:
    """Return orthonormal rows that span the same."""
    return torch.linalg.qr(rows.double().T)[0].T.float()


@contextmanager
def writing_less(
    model: Model, layer: int, head: int, directions: Float[Tensor, "m d_model"], keep: float
) -> Iterator[None]:
    """Multiply what a head writes along orthonormal directions by `keep` inside, by its weights.

    Raises:
        PointError: a head this model does not have, or weights that are not a plain matrix.
    """
    shape = model.shape
    if not (0 <= layer < shape.n_layers and 0 <= head < shape.n_heads):
        raise PointError(f"head {layer}.{head}: layers end at {shape.n_layers - 1}, heads at {shape.n_heads - 1}")
    access = block_access(model)
    with access.altering(layer, partial(_changed, access, layer, head, directions, keep)):
        yield


@contextmanager
def _changed(access: BlockAccess, layer: int, head: int, directions: Tensor, keep: float) -> Iterator[None]:
    shape = access.shape
    weight, rows = matrix(access.anatomy.component("attn.o", layer), shape.n_heads * shape.d_head)
    part = slice(head * shape.d_head, (head + 1) * shape.d_head)
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            v = directions.to(weight.device, torch.float32)
            old = (weight[part] if rows else weight[:, part].T).float()
            new = (old + (keep - 1) * (old @ v.T) @ v).to(weight.dtype)
            (weight[part] if rows else weight[:, part].T).copy_(new)
        yield
    finally:
        with torch.no_grad():
            weight.copy_(before)


def matrix(projection: nn.Module, n_inputs: int) -> tuple[Tensor, bool]:
    """Return (a projection's weights, whether their rows are its inputs).

    Raises:
        PointError: the weights are quantised, offloaded or no matrix of this many inputs.
    """
    weight = getattr(projection, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.is_meta or not weight.is_floating_point():
        raise PointError("the output projection's weights are quantised or not in memory, so they cannot be edited")
    rows = type(projection).__name__ == "Conv1D"
    if weight.shape[0 if rows else 1] != n_inputs:
        raise PointError(
            f"the output projection has weights {tuple(weight.shape)}, which do not take {n_inputs} inputs"
        )
    return weight, rows
