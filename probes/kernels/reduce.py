"""The reducers, run by the kernels that fit the tensor's device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxtyping import Int, Shaped
from torch import Tensor

from probes.kernels import eager
from probes.kernels.triton_choice import kernels_for
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
