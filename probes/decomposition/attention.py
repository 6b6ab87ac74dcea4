"""What an attention block does between its projections and its weighted values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from probes.anatomy import Anatomy
from probes.decomposition.rules import Scoring
from probes.hooks.attention_probabilities import Attended, watched
from probes.hooks.forward_hooks import Stop
from probes.models.verify.recording import attention_layers
from probes.module_calls import entered, entering


@contextmanager
def capture_attention_inputs(
    module: nn.Module, anatomy: Anatomy, layers: tuple[int, ...]
) -> Iterator[dict[int, Attended]]:
    """Collect, during forwards of `module` inside the block, what attention of each layer received; the latest call counts.

    It is read at transformers' attention interface, or where a model goes past that, at torch's own attention function.
    """
    config = module.config.get_text_config()  # type: ignore[union-attr,operator]
    inside = attention_layers(module, anatomy)
    inputs: dict[int, Attended] = {}
    with ExitStack() as stack:
        if "pattern" in anatomy.refused:
            stack.enter_context(_Calls(anatomy, inputs, stack))
        else:
            watch = {layer: partial(inputs.__setitem__, layer) for layer in layers}
            stack.enter_context(watched(config, inside, watch))
        yield inputs


class _Calls(TorchFunctionMode):
    """Keeps the inputs of torch's attention function by the layer whose attention module calls it."""

    def __init__(self, anatomy: Anatomy, inputs: dict[int, Attended], stack: ExitStack) -> None:
        super().__init__()
        self.inputs, self.layer = inputs, -1
        for layer in range(anatomy.n_layers):
            if path := anatomy.map.path("attn", layer):
                attention = anatomy.map.module.get_submodule(path)
                stack.enter_context(attention.register_forward_pre_hook(self._entering(layer)))

    def _entering(self, layer: int) -> Any:
        return lambda *_: setattr(self, "layer", layer)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and self.layer >= 0:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            query, key, value = (given[name] for name in names[:3])
            causal = bool(given.get("is_causal", False))
            scale = given.get("scale") or query.shape[-1] ** -0.5
            arguments = {"scaling": scale, "is_causal": causal}
            self.inputs[self.layer] = Attended(query, key, value, query.new_zeros(0), given.get("attn_mask"), arguments)
        return func(*args, **kwargs)


def scoring_of(attention: nn.Module, attended: Attended, causal: bool) -> Scoring:
    """Return how one layer turned the queries of one prompt into probabilities, from the arguments of its attention function."""
    query, key, given = attended.query, attended.key, attended.arguments
    scale = given.get("scaling") or getattr(attention, "scaling", None) or query.shape[-1] ** -0.5
    bias = query.new_zeros(1, query.shape[2], key.shape[2])
    if given.get("position_bias") is not None:
        bias = bias + given["position_bias"][0]
    mask = attended.mask
    if mask is None:
        declared = given.get("is_causal")
        if (causal if declared is None else declared) and query.shape[2] > 1:
            mask = torch.ones(bias.shape[1:], dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is not None:
        part = mask[0, ..., : key.shape[2]]
        if part.dtype == torch.bool:
            bias = bias.masked_fill(~part, -torch.inf)
        else:
            bias = bias + part.masked_fill(part <= torch.finfo(part.dtype).min / 2, -torch.inf)
    sinks = given.get("s_aux")
    return Scoring(float(scale), given.get("softcap"), bias, None if sinks is None else sinks.detach())


@dataclass(frozen=True, eq=False)
class Rotation:
    """Per position, the linear map from a normed query or key to what attention receives: [pos, d_head, d_head], inputs first."""

    query: Tensor
    key: Tensor

    def turned(
        self, x: Float[Tensor, "*source pos head d_head"], which: str, at: slice | Tensor
    ) -> Float[Tensor, "*source pos head d_head"]:
        """Return states at positions `at` as attention receives them; `which` is `query` or `key`."""
        # Over positions, not rows: a batch of d_head-wide products over few heads each would be mostly overhead.
        return torch.einsum("...phd,pde->...phe", x, getattr(self, which)[at])


Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a module."""


@torch.no_grad()
def rotation_of(
    module: nn.Module, anatomy: Anatomy, layer: int, call: Call, sizes: tuple[int, int], dtype: torch.dtype
) -> Rotation:
    """Measure the map: put every unit vector in place of each projection, and read what attention receives.

    Args:
        call: the arguments with which the model calls this layer's attention, whose first is the hidden states.
        sizes: (positions, d_model).
    """
    d_head = anatomy.d_head
    hidden = entering(*call).new_zeros(d_head, *sizes)
    with ExitStack() as stack:
        inputs = stack.enter_context(capture_attention_inputs(module, anatomy, (layer,)))
        for name in ("attn.q", "attn.k", "attn.v", "attn.qkv"):
            if anatomy.map.path(name, layer):
                stack.enter_context(anatomy.component(name, layer).register_forward_hook(_units(d_head)))
        for name in ("attn.q_norm", "attn.k_norm"):
            if anatomy.map.path(name, layer):
                stack.enter_context(anatomy.component(name, layer).register_forward_hook(lambda _, args, __: args[0]))
        if path := anatomy.map.path("attn.o", layer):
            stack.enter_context(module.get_submodule(path).register_forward_pre_hook(_stop))
        args, kwargs = entered(*call, hidden)
        with suppress(Stop):
            anatomy.component("attn", layer)(*args, **kwargs)
    attended = inputs[layer]
    return Rotation(*(t[:, 0].transpose(0, 1).to(dtype, copy=True) for t in (attended.query, attended.key)))


def _stop(*_: Any) -> None:
    raise Stop


def _units(d_head: int) -> Any:
    """Return a hook that makes row i of the batch unit vector i in every head at every position."""

    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        eye = torch.eye(d_head, dtype=output.dtype, device=output.device)
        return eye.repeat(1, output.shape[-1] // d_head)[:, None].expand(output.shape).contiguous()

    return hook
