"""What an attention block does between its projections and its weighted values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from probes.anatomy import Anatomy
from probes.decomposition.rules import Scoring
from probes.hooks.attention_probabilities import Attended, watched
from probes.hooks.forward_hooks import Stop
from probes.models.verify.recording import attention_layers


@contextmanager
def capture_attention_inputs(
    module: nn.Module, anatomy: Anatomy, found: dict[int, Attended], layers: tuple[int, ...]
) -> Iterator[None]:
    """Within, forwards of `module` leave in `found` what attention of `layers` received, the latest call of each.

    Attention is heard at transformers' attention interface, or where a model goes past it at torch's own function.
    """
    config = module.config.get_text_config()  # type: ignore[union-attr,operator]
    inside = attention_layers(module, anatomy)
    with ExitStack() as stack:
        if "pattern" in anatomy.refused:
            stack.enter_context(_Calls(anatomy, found, stack))
        else:
            watch = {layer: _keep(found, layer) for layer in layers}
            stack.enter_context(watched(config, inside, watch))
        yield


def _keep(found: dict[int, Attended], layer: int) -> Any:
    return lambda attended: found.__setitem__(layer, attended)


class _Calls(TorchFunctionMode):
    """Calls of torch's attention function, by the layer whose attention module makes them."""

    def __init__(self, anatomy: Anatomy, found: dict[int, Attended], stack: ExitStack) -> None:
        super().__init__()
        self.found, self.layer = found, -1
        for layer in range(anatomy.n_layers):
            if path := anatomy.map.path("attn", layer):
                hook = anatomy.map.module.get_submodule(path).register_forward_pre_hook(self._entering(layer))
                stack.callback(hook.remove)

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
            self.found[self.layer] = Attended(query, key, value, query.new_zeros(0), given.get("attn_mask"), arguments)
        return func(*args, **kwargs)


def scoring_of(attention: nn.Module, attended: Attended, causal: bool) -> Scoring:
    """How one layer turned queries into probabilities, from the arguments of its attention function; one prompt."""
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
    """The linear map of each position between a normed projection and attention: [pos, d_head, d_head], inputs first."""

    query: Tensor
    key: Tensor

    def turned(self, x: Tensor, which: str, at: slice | Tensor) -> Tensor:
        """States [..., pos, head, d_head] at positions `at`, as attention receives them."""
        # Over positions, not rows: a batch of d_head-wide products over few heads each would be mostly overhead.
        return torch.einsum("...phd,pde->...phe", x, getattr(self, which)[at])


Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a module."""


@torch.no_grad()
def rotation_of(
    module: nn.Module, anatomy: Anatomy, layer: int, call: Call, sizes: tuple[int, int], dtype: torch.dtype
) -> Rotation:
    """The map measured: every unit vector is put in place of each projection, and what attention receives is read.

    Args:
        call: the arguments with which the model calls this layer's attention, whose first is the hidden states.
        sizes: (positions, d_model).
    """
    d_head, found = anatomy.d_head, dict[int, Attended]()
    attention = anatomy.component("attn", layer)
    hidden = _first(call).new_zeros(d_head, *sizes)
    with ExitStack() as stack:
        stack.enter_context(capture_attention_inputs(module, anatomy, found, (layer,)))
        for name in ("attn.q", "attn.k", "attn.v", "attn.qkv"):
            if anatomy.map.path(name, layer):
                hook = anatomy.component(name, layer).register_forward_hook(_units(d_head))
                stack.callback(hook.remove)
        for name in ("attn.q_norm", "attn.k_norm"):
            if anatomy.map.path(name, layer):
                hook = anatomy.component(name, layer).register_forward_hook(lambda _, args, __: args[0])
                stack.callback(hook.remove)
        if path := anatomy.map.path("attn.o", layer):
            hook = module.get_submodule(path).register_forward_pre_hook(_stop)
            stack.callback(hook.remove)
        _call(attention, hidden, call)
    attended = found[layer]
    return Rotation(*(t[:, 0].transpose(0, 1).to(dtype, copy=True) for t in (attended.query, attended.key)))


def _stop(*_: Any) -> None:
    raise Stop


def _call(attention: nn.Module, hidden: Tensor, call: Call) -> None:
    args, kwargs = call
    try:
        if args:
            attention(hidden, *args[1:], **kwargs)
        else:
            attention(**{**kwargs, "hidden_states": hidden})
    except Stop:
        return


def _first(call: Call) -> Tensor:
    args, kwargs = call
    found: Tensor = args[0] if args else kwargs["hidden_states"]
    return found


def _units(d_head: int) -> Any:
    """A hook under which row i of the batch has unit vector i in every head at every position."""

    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        eye = torch.eye(d_head, dtype=output.dtype, device=output.device)
        return eye.repeat(1, output.shape[-1] // d_head)[:, None].expand(output.shape).contiguous()

    return hook
