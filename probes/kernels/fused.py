"""The reducers on top of the operators: as `probes.kernels.eager.reduce_rows`, with one launch a captured tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from probes.kernels.int8_codes import Codes
from probes.kernels.outputs import RowOutputs, reduced_shape
from probes.kernels.torch_operators import capture_rows, lens_rows, sequence_means
from probes.models.protocol import Unembedding
from probes.reducers import POOLED, Reducer


def reduce_rows(
    tensor: Shaped[Tensor, "source ..."],
    index: Int[Tensor, " row"],
    counts: Sequence[int],
    reducer: Reducer,
    unembedding: Callable[[], Unembedding] | None = None,
    out: Shaped[Tensor, "reduced ..."] | None = None,
) -> Shaped[Tensor, "reduced ..."]:
    """Reduce rows as `probes.kernels.eager.reduce_rows` does; written into `out` where it is given, without waiting for the device."""
    index = index.to(tensor.device, non_blocking=True)
    if out is None:
        shape, dtype = reduced_shape(tensor.shape, tensor.dtype, len(index), counts, reducer)
        out = torch.empty(shape, dtype=dtype, device=tensor.device)
    if reducer.kind in ("lens_ids", "lens_top"):
        if unembedding is None:
            raise ValueError("lens reducers need an unembedding")
        return out.copy_(read_lens(gathered(tensor, index), reducer, unembedding()))
    if reducer.kind in POOLED:
        starts = torch.tensor([0, *accumulate(counts)]).to(tensor.device, non_blocking=True)
        rows = tensor.flatten(1)
        if reducer.kind == "mean_square":
            rows, index = gathered(rows, index).float().square(), torch.arange(len(index), device=tensor.device)
        sequence_means(rows, index, starts, out.view(len(counts), -1))
    elif reducer.basis is not None:
        basis = reducer.basis.to(tensor.device, torch.float32).contiguous()
        capture_rows(tensor, index, RowOutputs(coordinates=out), basis=basis)
    elif reducer.kind == "rows":
        capture_rows(tensor, index, RowOutputs(packed=out.view(len(index), tensor.shape[1:].numel())))
    elif reducer.kind == "int8":
        out.copy_(coded(tensor, index).packed)
    else:
        capture_rows(tensor, index, RowOutputs(norm=out) if reducer.kind == "norm" else RowOutputs(moments=out))
    return out


def gathered(tensor: Shaped[Tensor, "source *rest"], index: Int[Tensor, " row"]) -> Shaped[Tensor, "row *rest"]:
    """Return a copy of chosen rows."""
    rows = torch.empty(len(index), *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)
    capture_rows(tensor, index, RowOutputs(packed=rows.view(len(index), tensor.shape[1:].numel())))
    return rows


def coded(tensor: Shaped[Tensor, "source *rest"], index: Int[Tensor, " row"]) -> Codes:
    """Return chosen rows as codes, in one pass over them."""
    n, device = len(index), tensor.device
    values = torch.empty(n, tensor.shape[1:].numel(), dtype=torch.int8, device=device)
    codes = Codes(values, torch.empty(n, device=device), torch.empty(n, device=device))
    capture_rows(tensor, index, RowOutputs(packed=codes.codes, scale=codes.scale, error=codes.error))
    return codes


def read_lens(
    rows: Float[Tensor, "row d_model"], reducer: Reducer, unembedding: Unembedding
) -> Float[Tensor, "row ..."]:
    """Apply a lens reducer to residual rows, through the model's own final norm."""
    weight = unembedding.weight
    hidden = unembedding.norm(rows.to(weight.device, weight.dtype)).contiguous()
    ids = torch.tensor(reducer.ids).to(weight.device, non_blocking=True) if reducer.ids else None
    outputs = lens_rows(hidden, weight, unembedding.bias, unembedding.softcap, ids, reducer.top_k)
    if reducer.kind == "lens_ids":
        return outputs.logprobs
    return torch.stack([outputs.top_logprobs, outputs.top_ids.float()], dim=-1)
