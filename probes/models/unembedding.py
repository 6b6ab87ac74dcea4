"""The final norm and unembedding of a plain Hugging Face module."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probes.anatomy import Anatomy
from probes.errors import PointError
from probes.models.placement import data_of
from probes.models.protocol import Unembedding


def apply(module: nn.Module, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return `module(x)`, computed on the module's own device, on `x`'s."""
    weight = next(module.parameters(), None)
    device = x.device if weight is None or weight.is_meta else weight.device
    out: Tensor = module(x.to(device))
    return out.to(x.device)


def unembedding_of(anatomy: Anatomy) -> Unembedding:
    """Return the unembedding as the map states it, not yet compared with the model's logits.

    Raises:
        PointError: there is no unembedding, or it does not take the residual stream's width.
    """
    known = anatomy.map
    if known.path("unembed") is None:
        raise PointError(f"{known.architecture} has no unembedding")
    unembed = anatomy.component("unembed")
    weight = data_of(unembed, "weight")
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.shape[1] != known.sizes.d_model:
        shape = tuple(weight.shape) if isinstance(weight, Tensor) else None
        raise PointError(
            f"the unembedding of {known.architecture} has weights {shape}, which do not take the residual stream "
            f"of width {known.sizes.d_model}"
        )
    if weight.is_meta:
        raise PointError(f"the unembedding of {known.architecture} has no weights here")
    bias = data_of(unembed, "bias")
    cap = float(known.sizes.output_logits_soft_cap)
    norm = anatomy.component("ln_final") if known.path("ln_final") else nn.Identity()
    return Unembedding(norm, weight.detach(), None if bias is None else bias.detach(), cap if cap > 0 else None)


def logits_of(unembedding: Unembedding, residual: Float[Tensor, "*rest d_model"]) -> Float[Tensor, "*rest d_vocab"]:
    """Return the logits [..., d_vocab] of a residual [..., d_model], in the weights' dtype, on the weights' device."""
    normed = unembedding.norm(residual.to(unembedding.weight))
    out = nn.functional.linear(normed.to(unembedding.weight), unembedding.weight, unembedding.bias)
    return out if unembedding.softcap is None else unembedding.softcap * torch.tanh(out / unembedding.softcap)
