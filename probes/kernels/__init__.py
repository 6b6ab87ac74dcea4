"""Kernels that reduce captured tensors: the reference in plain torch, and fused ones in Triton, chosen by the tensor's
device. Imported by capture and by models/verify; knows no backend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxtyping import Int, Shaped
from torch import Tensor

from probes.kernels import eager
from probes.kernels.int8_codes import Codes, unpacked
from probes.kernels.outputs import RowOutputs, reduced_shape
from probes.kernels.torch_operators import capture_rows, lens_rows, sequence_means
from probes.kernels.triton_choice import forced, has_triton, kernels_for
from probes.models.protocol import Unembedding
from probes.reducers import Reducer


def reduce_rows(
    tensor: Shaped[Tensor, "source ..."],
    index: Int[Tensor, " row"],
    counts: Sequence[int],
    reducer: Reducer,
    unembedding: Callable[[], Unembedding] | None = None,
    out: Shaped[Tensor, "reduced ..."] | None = None,
) -> Shaped[Tensor, "reduced ..."]:
    """Reduce chosen rows of `tensor`, packed sequence by sequence and written into `out` where it is given.

    See `probes.kernels.eager.reduce_rows`, whose numbers the fused kernels reproduce to float32 rounding.
    """
    if kernels_for(tensor) == "fused":
        from probes.kernels import fused

        return fused.reduce_rows(tensor, index, counts, reducer, unembedding, out)
    rows = eager.reduce_rows(tensor, index, counts, reducer, unembedding)
    return rows if out is None else out.copy_(rows)


__all__ = [
    "Codes",
    "RowOutputs",
    "capture_rows",
    "forced",
    "has_triton",
    "kernels_for",
    "lens_rows",
    "reduce_rows",
    "reduced_shape",
    "sequence_means",
    "unpacked",
]
