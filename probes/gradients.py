"""Values and gradients at addresses, from one forward and one backward."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.blocks.rerouting import block_access
from probes.errors import ModelError
from probes.hooks.forward_hooks import tensor_of
from probes.models.protocol import Model, Write
from probes.points import Address

Metric = Callable[[Float[Tensor, "batch d_vocab"]], Float[Tensor, " batch"]]
"""What is differentiated: one number for each row of last logits."""


def values_and_gradients(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    addresses: Collection[Address],
    metric: Metric,
    *,
    writes: Mapping[Address, Write] | None = None,
    stopped_block: int | None = None,
) -> tuple[dict[Address, Tensor], dict[Address, Tensor]]:
    """Return (values, gradients of the metric) of points, each [batch, pos, ...], in the model's dtype.

    Rows of a batch do not mix, so each row's gradient is that of its own metric. Weights are constants.

    Args:
        model: the model, of a backend that hands out its module.
        tokens: prompts of one length.
        addresses: points to differentiate at; written ones are what is written.
        metric: read from the logits of the last position, float32.
        writes: writes of points under which the forward runs.
        stopped_block: a block whose own contribution passes no gradient, only its skip path does (GradDrop, Kramár et al.
            2024, "AtP*", arXiv 2403.00745); at points inside it gradients are zero.

    Raises:
        PointError: the backend keeps its module to itself, or a point that the model refuses.
        ModelError: weights that no gradient can pass, as those of some quantised models.
    """
    access = block_access(model)
    values: dict[Address, Tensor] = {}
    probes: dict[Address, Tensor] = {}
    stops = () if stopped_block is None else (Address("attn_out", stopped_block), Address("mlp_out", stopped_block))

    def hook(address: Address) -> Write:
        def visit(tensor: Tensor) -> Tensor:
            if writes and address in writes:
                tensor = writes[address](tensor)
            if address in addresses:
                values[address] = tensor.detach().clone()
                probes[address] = torch.zeros_like(tensor, requires_grad=True)
                # What is added is zero, and the gradient of what is added is that of the point, whatever view it is.
                tensor = tensor + probes[address]
            return tensor.detach() if address in stops else tensor

        return visit

    changed = {address: hook(address) for address in {*addresses, *(writes or {}), *stops}}
    kwargs: dict[str, Any] = {"use_cache": False} if model.shape.causal else {}
    with access.whole(), access.hooked({}, changed, (tokens.shape[0], tokens.shape[1])), torch.enable_grad():
        output = access.module(input_ids=tokens.to(model.device), **kwargs)
        try:
            total = metric(tensor_of(output)[:, -1].float()).sum()
            points = [probes[address] for address in addresses]
            gradients = torch.autograd.grad(total, points, allow_unused=True)
        except RuntimeError as error:
            raise ModelError(f"{model.ref}: no gradient passes its weights ({error}); load it unquantised") from error
    return values, {
        address: torch.zeros_like(values[address]) if gradient is None else gradient
        for address, gradient in zip(addresses, gradients, strict=True)
    }
