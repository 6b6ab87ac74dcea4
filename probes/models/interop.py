"""Models that other libraries made come in, and models go out to them, with the same numbers."""

from __future__ import annotations

from importlib import import_module
from typing import Any, cast

from torch import nn

from probes.errors import ModelError, unknown
from probes.models.backends.bare_copy import bare_copy
from probes.models.backends.in_memory import LocalModel
from probes.models.backends.nnsight import NnsightModel, traced_over
from probes.models.backends.remote import RemoteModel
from probes.models.backends.transformer_lens import TransformerLensModel, bridge_over
from probes.models.choices import BACKENDS
from probes.models.protocol import Model
from probes.models.sources.digest import weights_digest


def backend_class(name: str) -> Any:
    """Return the class of a backend.

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
    """Wrap a transformers model in memory, which is neither moved nor cast.

    Raises:
        ModelError: no such backend, an architecture without a map, or identities that fail.
    """
    name = ref or getattr(module, "name_or_path", "") or type(module).__name__
    built = backend_class(backend)(module, tokenizer, ref=name, weights=weights_digest(module), revision=revision)
    return cast(Model, built)


def from_bridge(bridge: Any, *, ref: str | None = None) -> Model:
    """Wrap a TransformerLens TransformerBridge, with its hooks and processed weights in force.

    Raises:
        ModelError: not a bridge around a transformers model, or identities that fail.
    """
    if not isinstance(getattr(bridge, "original_model", None), nn.Module):
        raise ModelError(f"{type(bridge).__name__} is no TransformerBridge: give what boot_transformers returns")
    return TransformerLensModel.from_bridge(bridge, ref)


def from_nnsight(traced: Any, *, ref: str | None = None) -> Model:
    """Wrap an nnsight model whose weights are in memory.

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
    return NnsightModel(traced, getattr(traced, "tokenizer", None), ref=name, weights=weights_digest(module))


def on_backend(model: Model, backend: str) -> Model:
    """Return the same module behind another backend.

    Raises:
        ModelError: no such backend, one that cannot take this module, or one whose package is missing.
    """
    local = _local(model)
    return from_hf(local.source, local.tokenizer, backend=backend, ref=local.ref, revision=local.revision)


def as_bridge(model: Model) -> Any:
    """Return a TransformerLens TransformerBridge around a copy of the model's module, to do with as one likes.

    A model that came in as a bridge goes out as that very bridge.

    Raises:
        ModelError: the bridge cannot wrap it, or the weights are not here.
    """
    local = _local(model)
    if isinstance(local, TransformerLensModel) and local.source is local.module:
        return local.bridge
    return bridge_over(bare_copy(local.source, local.ref, share_tensors=False), local.tokenizer, local.ref)


def as_nnsight(model: Model) -> Any:
    """Return an nnsight model around this very module: a TransformersModel, or the plain wrapper without a tokenizer.

    Raises:
        ModelError: nnsight is not installed.
    """
    if isinstance(model, NnsightModel | RemoteModel):
        return model.traced
    local = _local(model)
    return traced_over(local.source, local.tokenizer)


def _local(model: Model) -> LocalModel:
    if isinstance(model, LocalModel) and not isinstance(model, RemoteModel):
        return model
    raise ModelError(f"{model.ref}: its weights stay on the server; load it without remote to hand it over")
