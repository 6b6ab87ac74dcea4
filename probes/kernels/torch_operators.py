"""The kernels as torch operators, so that a compiled model keeps them in its graph; each call picks the kernels itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from probes.kernels import eager
from probes.kernels.outputs import RowOutputs, check
from probes.kernels.triton_choice import kernels_for
from probes.lenses.protocol import LensRead

FUSED = {
    "capture_rows": "probes.kernels.fused_rows",
    "sequence_means": "probes.kernels.fused_means",
    "lens_rows": "probes.kernels.fused_lens",
}
"""Where the fused kernel of each operation is, imported on demand."""
_ROW_OUTPUTS = tuple(field.name for field in fields(RowOutputs))
_ROWS = ", ".join(f"Tensor({chr(ord('a') + i)}!)? {name}" for i, name in enumerate(_ROW_OUTPUTS))


@torch.library.custom_op(
    "bathyscope::capture_rows",
    mutates_args=_ROW_OUTPUTS,
    schema=f"(Tensor tensor, Tensor index, {_ROWS}, Tensor? previous, Tensor? basis, Tensor? offset) -> ()",
)
def _capture_rows(
    tensor: Tensor,
    index: Tensor,
    packed: Tensor | None,
    scale: Tensor | None,
    error: Tensor | None,
    norm: Tensor | None,
    moments: Tensor | None,
    change: Tensor | None,
    coordinates: Tensor | None,
    previous: Tensor | None,
    basis: Tensor | None,
    offset: Tensor | None,
) -> None:
    out = RowOutputs(packed, scale, error, norm, moments, change, coordinates)
    _chosen("capture_rows", tensor)(tensor, index, out, previous, basis, offset)


@_capture_rows.register_fake
def _(*_: Tensor | None) -> None:
    return None


@torch.library.custom_op(
    "bathyscope::sequence_means",
    mutates_args=("out",),
    schema="(Tensor tensor, Tensor index, Tensor starts, Tensor(a!) out) -> ()",
)
def _sequence_means(tensor: Tensor, index: Tensor, starts: Tensor, out: Tensor) -> None:
    _chosen("sequence_means", tensor)(tensor, index, starts, out)


@_sequence_means.register_fake
def _(*_: Tensor) -> None:
    return None


@torch.library.custom_op(
    "bathyscope::lens_rows",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, float? softcap, Tensor? ids, int top_k) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _lens_rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, ids: Tensor | None, top_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    read = _chosen("lens_rows", hidden)(hidden, weight, bias, softcap, ids, top_k)
    return read.log_z, read.entropy_bits, read.logprobs, read.top_logprobs, read.top_ids.long()


@_lens_rows.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, ids: Tensor | None, top_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n = hidden.shape[0]
    make: dict[str, Any] = {"device": hidden.device, "dtype": torch.float32}
    chosen = torch.empty(n, 0 if ids is None else ids.shape[0], **make)
    top = torch.empty(n, top_k, **make)
    return torch.empty(n, **make), torch.empty(n, **make), chosen, top, top.long()


def capture_rows(
    tensor: Shaped[Tensor, "source ..."],
    index: Int[Tensor, " row"],
    out: RowOutputs,
    previous: Float[Tensor, "before width"] | None = None,
    basis: Float[Tensor, "direction width"] | None = None,
    offset: Shaped[Tensor, "..."] | None = None,
) -> None:
    """Pack and measure rows as `probes.kernels.eager.capture_rows` does; on CUDA one launch, which reads each row once.

    The launch can be recorded in a CUDA graph: the host neither waits nor reads anything back, and the replays write
    where `offset` then says.
    """
    check(tensor, index, out, previous, basis, offset)
    if torch.compiler.is_compiling():
        _capture_rows(tensor, index, *out.every(), previous, basis, offset)
    else:
        _chosen("capture_rows", tensor)(tensor, index, out, previous, basis, offset)


def sequence_means(
    tensor: Float[Tensor, "source width"],
    index: Int[Tensor, " row"],
    starts: Int[Tensor, " boundary"],
    out: Float[Tensor, "sequence width"],
) -> None:
    """Average rows as `probes.kernels.eager.sequence_means` does."""
    compiling = torch.compiler.is_compiling()
    (_sequence_means if compiling else _chosen("sequence_means", tensor))(tensor, index, starts, out)


def lens_rows(
    hidden: Float[Tensor, "row d_model"],
    weight: Float[Tensor, "d_vocab d_model"],
    bias: Float[Tensor, " d_vocab"] | None = None,
    softcap: float | None = None,
    ids: Int[Tensor, " token"] | None = None,
    top_k: int = 0,
) -> LensRead:
    """Read rows as `probes.kernels.eager.lens_rows` does; on CUDA the logits never leave registers."""
    if torch.compiler.is_compiling():
        return LensRead(*_lens_rows(hidden, weight, bias, softcap, ids, top_k))
    read: LensRead = _chosen("lens_rows", hidden)(hidden, weight, bias, softcap, ids, top_k)
    return read


def _chosen(operation: str, tensor: Tensor) -> Callable[..., Any]:
    """The kernel of an operation that fits the tensor's device."""
    home = FUSED[operation] if kernels_for(tensor) == "fused" else eager.__name__
    kernel: Callable[..., Any] = getattr(import_module(home), operation)
    return kernel
