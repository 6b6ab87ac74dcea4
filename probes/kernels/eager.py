"""The reference reducers: gather the wanted rows, then reduce them in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from probes import lens
from probes.models.base import Unembedding
from probes.needs import Reducer


def reduce_rows(
    tensor: Tensor,
    index: Tensor,
    counts: Sequence[int],
    reducer: Reducer,
    unembedding: Callable[[], Unembedding] | None = None,
) -> Tensor:
    """Rows of `tensor` reduced, packed sequence by sequence.

    Args:
        tensor: [rows, ...], for instance a captured [batch, pos, ...] with its first two axes flattened.
        index: [wanted], which rows, sequence by sequence.
        counts: how many of the wanted rows belong to each sequence.
        reducer: what to keep; see `Reducer`.
        unembedding: makes the final norm and unembedding, for the lens reducers.
    """
    rows = tensor.index_select(0, index.to(tensor.device))
    if reducer.kind == "rows":
        return rows
    if reducer.kind == "mean":
        return torch.stack([part.float().mean(dim=0) for part in torch.split(rows, list(counts))])
    if reducer.kind in ("lens_ids", "lens_top"):
        if unembedding is None:
            raise ValueError("lens reducers need an unembedding")
        return _lens(rows, reducer, unembedding())
    flat = rows.float().flatten(1) if rows.ndim > 1 else rows.float()[:, None]
    if reducer.kind == "norm":
        return torch.linalg.vector_norm(flat, dim=-1)
    if reducer.kind == "moments":
        return torch.stack([flat.mean(-1), flat.var(-1, correction=0), flat.abs().amax(-1)], dim=-1)
    assert reducer.basis is not None
    return flat @ reducer.basis.to(flat).T


def _lens(rows: Tensor, reducer: Reducer, unembedding: Unembedding) -> Tensor:
    if reducer.kind == "lens_ids":
        return lens.read(rows, unembedding, ids=torch.tensor(reducer.ids)).logprobs
    top = lens.read(rows, unembedding, top_k=reducer.top_k)
    return torch.stack([top.top_logprobs, top.top_ids.float()], dim=-1)
