"""Attention probabilities of a forward pass, through transformers' own attention interface.

The model keeps its attention implementation. While a pattern is read or written, its configuration names a function of
ours, which calls that implementation for the output and recomputes the probabilities beside it.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from probes.models.protocol import Write

_serial = itertools.count()


@dataclass(frozen=True, eq=False)
class Attended:
    """One layer's attention, as the attention function received it."""

    query: Float[Tensor, "batch head query d_head"]
    """[batch, head, query, d_head], after rotary embedding and q norm."""
    key: Float[Tensor, "batch kv_head key d_head"]
    """[batch, kv_head, key, d_head]."""
    value: Float[Tensor, "batch kv_head key d_value"]
    """[batch, kv_head, key, d_value]."""
    pattern: Float[Tensor, "batch head query key"]
    """[batch, head, query, key], float32."""
    mask: Tensor | None = None
    """Boolean (True attends) or additive, as the attention function received it."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """The attention function's other arguments, such as scaling and softcap."""


Watch = Callable[[Attended], None]


def reason_against(config: Any) -> str | None:
    """Return why patterns cannot be had under the model's attention implementation, or None where they can."""
    name = config._attn_implementation
    if name in ("sdpa", "eager"):
        return None
    return (
        f"attention implementation {name!r} gives its function no mask to recompute probabilities from; "
        "load the model with attention 'sdpa' or 'eager'"
    )


def grouped(states: Float[Tensor, "batch kv_head pos width"], n_heads: int) -> Float[Tensor, "batch head pos width"]:
    """Return key or value states [batch, kv_head, pos, width] repeated to one per query head."""
    return states.repeat_interleave(n_heads // states.shape[1], dim=1)


def attention_scores(
    module: nn.Module,
    query: Float[Tensor, "batch head query d_head"],
    key: Float[Tensor, "batch kv_head key d_head"],
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> Float[Tensor, "batch head query key"]:
    """Return what is masked and goes into the softmax, in float32, from the arguments of an attention function."""
    if scaling is None:
        scaling = getattr(module, "scaling", None) or query.shape[-1] ** -0.5
    scores = query.float() @ grouped(key, query.shape[1]).float().transpose(-1, -2) * scaling
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def probabilities(
    module: nn.Module,
    query: Float[Tensor, "batch head query d_head"],
    key: Float[Tensor, "batch kv_head key d_head"],
    mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    s_aux: Float[Tensor, head] | None = None,
    blocked: Bool[Tensor, "batch head query key"] | None = None,
    **_: Any,
) -> Float[Tensor, "batch head query key"]:
    """Return attention probabilities [batch, head, query, key] in float32, from the arguments of an attention function.

    `query` [batch, head, query, d_head], `key` [batch, kv_head, key, d_head]; `mask` is boolean (True attends) or
    additive and broadcasts to the scores; `s_aux` [head] are attention sinks;
    `blocked` [batch, head, query, key] is True where attention is forbidden, and a query without keys attends to none.
    """
    scores = attention_scores(module, query, key, scaling=scaling, softcap=softcap)
    if position_bias is not None:
        scores = scores + position_bias
    lowest = torch.finfo(scores.dtype).min
    n_query, n_key = scores.shape[-2:]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if mask is None and causal and n_query > 1:
        mask = torch.ones(n_query, n_key, dtype=torch.bool, device=scores.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, lowest)
    elif mask is not None:
        scores = (scores + mask[..., :n_key]).clamp_min(lowest)
    if blocked is not None:
        scores = scores.masked_fill(blocked, lowest)
    if s_aux is not None:
        sinks = s_aux.float().view(1, -1, 1, 1).expand(scores.shape[0], -1, n_query, 1)
        return torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]
    pattern = scores.softmax(-1)
    return pattern if blocked is None else pattern.masked_fill(scores <= lowest, 0.0)


def _original(module: nn.Module, name: str) -> Callable[..., Any]:
    """The attention function that `module` itself would have used under the implementation `name`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    home = sys.modules[type(module).__module__]
    table = getattr(home, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    function: Callable[..., Any] = table.get_interface(name, getattr(home, "eager_attention_forward", None))
    return function


@contextmanager
def installed(function: Callable[..., Any], config: Any) -> Iterator[None]:
    """Make `function` the attention implementation of `config`'s model inside, under a name no one else has."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = config._attn_implementation
    ours = f"{name}-pattern-{next(_serial)}"
    functions, masks = type(ALL_ATTENTION_FUNCTIONS), type(ALL_MASK_ATTENTION_FUNCTIONS)
    functions.register(ours, function)
    masks.register(ours, ALL_MASK_ATTENTION_FUNCTIONS[name])
    try:
        config._attn_implementation = ours
        yield
    finally:
        config._attn_implementation = name
        functions._global_mapping.pop(ours, None)
        masks._global_mapping.pop(ours, None)


@contextmanager
def watched(
    config: Any, layers: Mapping[nn.Module, int], watch: Mapping[int, Watch], edits: Mapping[int, Write] | None = None
) -> Iterator[None]:
    """Make every forward of `config`'s model inside the context report the attention of the layers in `watch`.

    `layers` says which layer each module inside an attention block belongs to. An edit receives the pattern and
    returns the one that weighs the values instead. The configuration is restored on the way out.
    """
    edits = edits or {}
    name = config._attn_implementation

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        original = _original(module, name)
        layer = layers.get(module)
        if layer is None or (layer not in watch and layer not in edits):
            result: tuple[Tensor, Tensor | None] = original(module, query, key, value, attention_mask, **kwargs)
            return result
        mask_of = getattr(edits.get(layer), "mask", None)
        sizes = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        blocked = None if mask_of is None else mask_of(*sizes).to(query.device)
        pattern = probabilities(module, query, key, attention_mask, blocked=blocked, **kwargs)
        if layer in edits:
            pattern = pattern if blocked is not None else edits[layer](pattern)
            mixed = pattern.to(value.dtype) @ grouped(value, query.shape[1])
            result = (mixed.transpose(1, 2).contiguous(), None)
        else:
            result = original(module, query, key, value, attention_mask, **kwargs)
        if layer in watch:
            watch[layer](Attended(query, key, value, pattern, attention_mask, kwargs))
        return result

    with installed(attend, config):
        yield
