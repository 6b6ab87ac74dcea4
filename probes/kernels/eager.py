"""The reference kernels, in plain torch: gather the chosen rows, then measure or reduce them in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from probes.kernels.int8_codes import encoded
from probes.kernels.outputs import RowOutputs, check
from probes.lenses import logit
from probes.lenses.protocol import LensRead
from probes.models.protocol import Unembedding
from probes.reducers import POOLED, Reducer


def reduce_rows(
    tensor: Shaped[Tensor, "source ..."],
    index: Int[Tensor, " row"],
    counts: Sequence[int],
    reducer: Reducer,
    unembedding: Callable[[], Unembedding] | None = None,
) -> Shaped[Tensor, "reduced ..."]:
    """Reduce chosen rows of `tensor`, packed sequence by sequence.

    Args:
        tensor: [rows, ...], for instance a captured [batch, pos, ...] with its first two axes flattened.
        index: which rows, sequence by sequence.
        counts: how many of the chosen rows belong to each sequence.
        reducer: what to keep; see `Reducer`.
        unembedding: makes the final norm and unembedding, for the lens reducers.
    """
    rows = tensor.index_select(0, index.to(tensor.device))
    if reducer.kind == "rows":
        return rows
    if reducer.kind in POOLED:
        values = rows.float().square() if reducer.kind == "mean_square" else rows.float()
        return torch.stack([part.mean(dim=0) for part in torch.split(values, list(counts))])
    if reducer.kind in ("lens_ids", "lens_top"):
        if unembedding is None:
            raise ValueError("lens reducers need an unembedding")
        return _lens(rows, reducer, unembedding())
    flat = rows.float().flatten(1) if rows.ndim > 1 else rows.float()[:, None]
    if reducer.kind == "int8":
        return encoded(flat).packed
    if reducer.kind == "norm":
        return torch.linalg.vector_norm(flat, dim=-1)
    if reducer.kind == "moments":
        return torch.stack([flat.mean(-1), flat.var(-1, correction=0), flat.abs().amax(-1)], dim=-1)
    assert reducer.basis is not None
    return flat @ reducer.basis.to(flat).T


def _lens(rows: Tensor, reducer: Reducer, unembedding: Unembedding) -> Tensor:
    if reducer.kind == "lens_ids":
        return logit.read(rows, unembedding, ids=torch.tensor(reducer.ids)).logprobs
    top = logit.read(rows, unembedding, top_k=reducer.top_k)
    return torch.stack([top.top_logprobs, top.top_ids.float()], dim=-1)


def capture_rows(
    tensor: Shaped[Tensor, "source ..."],
    index: Int[Tensor, " row"],
    out: RowOutputs,
    previous: Float[Tensor, "before width"] | None = None,
    basis: Float[Tensor, "direction width"] | None = None,
    offset: Shaped[Tensor, "..."] | None = None,
) -> None:
    """Pack and measure chosen rows into `out`, the result of `index[i]` at `offset + i`.

    Args:
        tensor: [rows, ...], of any strides; a row's values are all its trailing axes.
        index: which rows; a negative one masks the row, which then reads as zeros.
        previous: the same rows of the tensor captured before, for `out.change`.
        basis: directions, for `out.coordinates`.
        offset: one int64 number on the tensor's device, 0 when left out; not read by the host.

    Raises:
        ValueError: operands that do not fit together.
    """
    check(tensor, index, out, previous, basis, offset)
    flat = tensor.flatten(1) if tensor.ndim > 1 else tensor[:, None]
    rows = flat.index_select(0, index.clamp_min(0)).masked_fill((index < 0)[:, None], 0)
    at = torch.arange(len(index), device=index.device) + (0 if offset is None else offset)
    before = None if previous is None else previous[: len(index)].float().masked_fill((index < 0)[:, None], 0)
    for target, values in _measured(rows, out, before, basis):
        fits = (at >= 0) & (at < len(target))
        target[at[fits]] = values[fits].to(target.dtype)


def _measured(
    rows: Tensor, out: RowOutputs, before: Tensor | None, basis: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """Return (output, its values) of rows [n, width] for every output that is not left out."""
    wide, measured = rows.float(), list[tuple[Tensor, Tensor]]()
    if out.packed is not None and out.scale is not None and out.error is not None:
        coded = encoded(wide)
        measured += [(out.packed, coded.codes), (out.scale, coded.scale), (out.error, coded.error)]
    elif out.packed is not None:
        measured.append((out.packed, rows))
    if out.norm is not None:
        measured.append((out.norm, wide.norm(dim=-1)))
    if out.moments is not None:
        measured.append(
            (out.moments, torch.stack([wide.mean(-1), wide.var(-1, correction=0), wide.abs().amax(-1)], dim=-1))
        )
    if out.change is not None and before is not None:
        lengths = wide.norm(dim=-1) * before.norm(dim=-1)
        cosine = torch.where(lengths > 0, (wide * before).sum(-1) / lengths.where(lengths > 0, 1), 0)
        measured.append((out.change, torch.stack([(wide - before).norm(dim=-1), cosine], dim=-1)))
    if out.coordinates is not None and basis is not None:
        measured.append((out.coordinates, wide @ basis.float().T))
    return measured


def sequence_means(
    tensor: Float[Tensor, "source width"],
    index: Int[Tensor, " row"],
    starts: Int[Tensor, " boundary"],
    out: Float[Tensor, "sequence width"],
) -> None:
    """Write the mean of each sequence's rows of `tensor` into `out`; NaN for a sequence without rows.

    Args:
        index: the rows, sequence by sequence.
        starts: where each sequence begins in `index`, and the end of the last.
    """
    rows = tensor.index_select(0, index).float()
    for i, part in enumerate(torch.split(rows, starts.diff().tolist())):
        out[i] = part.mean(dim=0)


def lens_rows(
    hidden: Float[Tensor, "row d_model"],
    weight: Float[Tensor, "d_vocab d_model"],
    bias: Float[Tensor, " d_vocab"] | None,
    softcap: float | None,
    ids: Int[Tensor, " token"] | None,
    top_k: int,
) -> LensRead:
    """Read rows that are already normalised by the logit lens.

    Args:
        hidden: rows after the final norm.
        weight: the unembedding's; logits become softcap * tanh(logits / softcap).
        ids: tokens whose log-probability is returned.
    """
    unembedding = Unembedding(lambda rows: rows, weight, bias, softcap)
    return logit.read(hidden, unembedding, ids=ids, top_k=top_k)
