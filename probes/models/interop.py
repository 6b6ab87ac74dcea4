"""Models handed over from notebooks, by the libraries that made them, and back."""

from __future__ import annotations

import copy
from importlib import import_module
from typing import Any, cast

from torch import Tensor, nn

from probes.errors import ModelError, unknown
from probes.models.choices import BACKENDS
from probes.models.protocol import Model
from probes.models.sources.digest import weights_digest


def backend_class(name: str) -> Any:
    """The class of a backend.

    Raises:
        ModelError: no backend of that name.
    """
    if name not in BACKENDS:
        raise ModelError(unknown("backend", name, BACKENDS))
    module, _, attribute = BACKENDS[name].partition(":")
    return getattr(import_module(module), attribute)


def from_hf(
    module: nn.Module,
    tokenizer: Any = None,
    *,
    backend: str = "native",
    ref: str | None = None,
    revision: str | None = None,
) -> Model:
    """A transformers model in memory, which is neither moved nor cast.

    Raises:
        ModelError: no such backend, an architecture without a map, or identities that fail.
    """
    name = ref or getattr(module, "name_or_path", "") or type(module).__name__
    built = backend_class(backend)(module, tokenizer, ref=name, weights=weights_digest(module), revision=revision)
    return cast(Model, built)


def from_bridge(bridge: Any, *, ref: str | None = None) -> Model:
    """A TransformerLens TransformerBridge, with its hooks and processed weights in force.

    Raises:
        ModelError: not a bridge around a transformers model, or identities that fail.
    """
    if not isinstance(getattr(bridge, "original_model", None), nn.Module):
        raise ModelError(f"{type(bridge).__name__} is no TransformerBridge: give what boot_transformers returns")
    return cast(Model, backend_class("transformer_lens").from_bridge(bridge, ref))


def from_nnsight(traced: Any, *, ref: str | None = None) -> Model:
    """An nnsight model whose weights are in memory.

    Raises:
        ModelError: not an nnsight model, one without weights, or identities that fail.
    """
    module = getattr(traced, "_module", None)
    if not isinstance(module, nn.Module):
        raise ModelError(f"{type(traced).__name__} is no nnsight model: give a TransformersModel")
    if any(p.is_meta for p in module.parameters()):
        raise ModelError(
            f"{type(traced).__name__} holds no weights yet: build it with dispatch=True, or run it on a server with "
            "load_model(ref, backend='nnsight', remote=True)"
        )
    name = ref or getattr(traced, "repo_id", None) or type(module).__name__
    tokenizer = getattr(traced, "tokenizer", None)
    return cast(Model, backend_class("nnsight")(traced, tokenizer, ref=name, weights=weights_digest(module)))


def copied(module: nn.Module, ref: str, *, sharing: bool) -> nn.Module:
    """A copy of a module tree without the hooks and controllers that others put on it.

    Args:
        sharing: around the very same tensors, rather than copies of them.

    Raises:
        ModelError: a model spread over devices, whose parts cannot be copied.
    """
    if any(hasattr(m, "_hf_hook") for m in module.modules()):
        raise ModelError(f"{ref}: a model spread over devices cannot be copied; use backend native or nnsight")
    tensors: list[Tensor] = [*module.parameters(), *module.buffers()] if sharing else []
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    controllers = [m.__dict__[name] for m in module.modules() for name in _CONTROLLERS if name in m.__dict__]
    made = copy.deepcopy(module, memo | {id(controller): None for controller in controllers})
    for part in made.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
        for name in _CONTROLLERS:
            if part.__dict__.get(name, part) is None:
                del part.__dict__[name]
    return made


_CONTROLLERS = ("__nnsight__", "forward")
"""What nnsight leaves on the parts of a module that it has wrapped."""
