"""A copy of a model whose block weights are rounded to few bits and back."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probes.errors import ModelError
from probes.models.backends.native import NativeModel
from probes.models.protocol import Model
from probes.models.sources.digest import weights_digest

BITS = (4, 8)


def fake_quantised(model: Model, bits: int) -> NativeModel:
    """Return a copy of `model` with every weight matrix inside its blocks rounded, per output channel, to `bits` bits.

    Weights only: embeddings, unembedding, norms and biases stay, and activations are never rounded. The copy has its own
    weights digest, so its rows never mix with the model's.

    Raises:
        ModelError: another number of bits, or a backend that does not hold the module itself.
    """
    if bits not in BITS:
        raise ModelError(f"cannot quantise to {bits} bits: legal are 4 and 8")
    if not isinstance(model, NativeModel):
        raise ModelError(
            f"{model.ref} on backend {model.context.backend!r} cannot be quantised here: load it with backend native"
        )
    module = copy.deepcopy(model.module)
    with torch.no_grad():
        for weight, channels in _matrices(module):
            weight.copy_(rounded(weight, bits, channels))
    ref = f"{model.ref}+int{bits}"
    return NativeModel(module, model.tokenizer, ref=ref, weights=weights_digest(module), revision=model.revision)


def rounded(weight: Float[Tensor, "*shape"], bits: int, channels: int) -> Float[Tensor, "*shape"]:
    """Round weights to a symmetric grid of 2^bits - 1 values per channel of axis `channels`, scaled by the channel's largest."""
    limit = 2 ** (bits - 1) - 1
    others = [axis for axis in range(weight.dim()) if axis != channels % weight.dim()]
    # Stacked experts [expert, out, in] have a scale for each expert's every channel.
    reduced = others[-1:] if weight.dim() > 2 else others
    scale = weight.float().abs().amax(dim=reduced, keepdim=True) / limit
    steps = (weight.float() / scale.clamp_min(1e-30)).round().clamp(-limit, limit)
    return (steps * scale).to(weight.dtype)


def _matrices(module: nn.Module) -> Iterator[tuple[Tensor, int]]:
    """Every weight matrix but those of embeddings and of the output layer, with the axis of its output channels."""
    kept = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head = module.get_output_embeddings()  # type: ignore[operator]
    kept |= {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            if parameter.dim() >= 2 and id(parameter) not in kept:
                # GPT-2's Conv1D keeps its weight as [in, out].
                transposed = type(part).__name__ == "Conv1D"
                yield parameter, 1 if transposed else parameter.dim() - 2
