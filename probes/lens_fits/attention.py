"""Attention through which gradients take only some of their ways; its values stay the model's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probes.blocks.rerouting import block_access
from probes.errors import PointError
from probes.hooks.attention_probabilities import grouped, installed, probabilities
from probes.models.protocol import Model
from probes.points import Address


@dataclass(frozen=True)
class Cut:
    """Which ways a gradient may not take."""

    other_positions: bool
    """Through keys and values of other positions, so that a gradient stays at the position where it entered."""
    weights: bool
    """Through queries and keys: attention's weights are constants."""


@contextmanager
def cut_attention(model: Model, cut: Cut) -> Iterator[None]:
    """Cut the gradients of every attention of the model inside the context.

    Raises:
        PointError: the model's attention weights are out of reach, and something is to be cut.
    """
    if not (cut.other_positions or cut.weights):
        yield
        return
    if reason := model.refusal(Address("pattern", 0)):
        raise PointError(f"{model.ref}: positions self and future and freeze_qk split its attention, but {reason}")

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        return mixed(module, query, key, value, attention_mask, cut, **kwargs).transpose(1, 2).contiguous(), None

    with installed(attend, block_access(model).module.config):
        yield


def mixed(
    module: nn.Module,
    query: Float[Tensor, "batch head query d_head"],
    key: Float[Tensor, "batch kv_head key d_head"],
    value: Float[Tensor, "batch kv_head key d_value"],
    mask: Tensor | None,
    cut: Cut,
    **kwargs: Any,
) -> Float[Tensor, "batch head query d_value"]:
    """Return attention's output, equal to the uncut one in value, of queries at the last positions of the keys."""
    values = grouped(value, query.shape[1])
    if not cut.other_positions:
        return probabilities(module, query, key, mask, **kwargs).detach().to(value.dtype) @ values
    bias = _own_scores(module, query, key, kwargs)
    kwargs["position_bias"] = bias if kwargs.get("position_bias") is None else kwargs["position_bias"] + bias
    pattern = probabilities(module, query, key.detach(), mask, **kwargs)
    pattern = (pattern.detach() if cut.weights else pattern).to(value.dtype)
    own = pattern.diagonal(_before(query, key), -2, -1)[..., None] * _last(values - values.detach(), query)
    return pattern @ values.detach() + own


def _own_scores(module: nn.Module, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """A diagonal of zeros whose gradient at a key is that of the key's score with the query of its own position."""
    scaling, softcap = kwargs.get("scaling"), kwargs.get("softcap")
    if scaling is None:
        scaling = getattr(module, "scaling", None) or query.shape[-1] ** -0.5
    keys = grouped(key, query.shape[1])
    scores = (query.float() * _last(keys - keys.detach(), query).float()).sum(-1) * scaling
    if softcap is not None:
        value = (query.float() * _last(keys, query).float()).sum(-1).detach() * scaling
        scores = scores * (1 - torch.tanh(value / softcap).square())
    own = torch.diag_embed(scores)
    return torch.cat((own.new_zeros(*own.shape[:-1], _before(query, key)), own), -1)


def _before(query: Tensor, key: Tensor) -> int:
    """How many keys stand before the first query's own."""
    return key.shape[-2] - query.shape[-2]


def _last(states: Tensor, query: Tensor) -> Tensor:
    """Keys or values of the queries' own positions."""
    return states[..., states.shape[-2] - query.shape[-2] :, :]
