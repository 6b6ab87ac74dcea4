"""A module compared with its class built anew from the configuration, which shows what else was done to it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from probes.models.fingerprint.checksum import combined, host_bytes
from probes.models.fingerprint.description import Described, describe
from probes.models.silence_loggers import silence_loggers
from probes.norms.large_eps import undo_large_eps


def deviations(module: nn.Module) -> tuple[str, ...]:
    """Describe what decides a module's numbers beside its state dict and configuration; nothing for a plain load.

    A plain load is compared with its own class, built anew, so that keys do not follow a library's private attributes.
    """
    described, hidden = describe(module), unsaved(module)
    twin = _twin(module, hidden)
    expected: Described = describe(twin) if twin is not None else {}
    plain = unsaved(twin) if twin is not None else {}
    ambient = {where: text for where, text in described.items() if where[1].startswith("torch.")}
    words = sorted(set(described.items()) - set(expected.items()) | set(ambient.items()))
    lost = sorted(where for where in expected if where not in described and not where[1].startswith("torch."))
    tensors = [_of(name, tensor) for name, tensor in sorted(hidden.items()) if not _same(tensor, plain.get(name))]
    return (*(f"{where}={text}" for where, text in words), *(f"{where} is gone" for where in lost), *tensors)


def unsaved(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers that the state dict leaves out, by full name."""
    saved = set(module.state_dict())
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: tensor for name, tensor in tensors if name not in saved}


def _of(name: str, tensor: Tensor) -> str:
    content = "no data" if tensor.is_meta else combined([host_bytes(tensor).tobytes().hex()])
    return f"{name}: {tensor.dtype}{tuple(tensor.shape)}{content}"


def _same(tensor: Tensor, other: Tensor | None) -> bool:
    if other is None or (tensor.dtype, tensor.shape) != (other.dtype, other.shape):
        return False
    return tensor.is_meta or torch.equal(tensor, other.to(tensor.device))


def _twin(module: nn.Module, hidden: Mapping[str, Tensor]) -> nn.Module | None:
    """The module's class built anew from its configuration, without data; None where it cannot be built."""
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    device = next((t.device for t in hidden.values() if not t.is_meta), torch.device("cpu"))
    try:
        with silence_loggers(), torch.random.fork_rng(devices=[]), _default_dtype(dtype):
            with torch.device("meta"):
                twin: nn.Module = type(module)(copy.deepcopy(module.config))
            undo_large_eps(twin)
            compute_buffers(twin, device)
    except Exception:  # Whatever a class raises that is not built from a configuration alone.
        return None
    return twin


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def compute_buffers(module: nn.Module, device: torch.device) -> None:
    """Compute the buffers that no checkpoint holds (frequencies, position tables), by the model's own class."""
    from transformers import PreTrainedModel

    models = {name: part for name, part in module.named_modules() if isinstance(part, PreTrainedModel)}
    for path, part in module.named_modules():
        missing = [n for n in part._non_persistent_buffers_set if getattr(part._buffers.get(n), "is_meta", False)]
        for name in missing:
            empty: Tensor = part._buffers[name]  # type: ignore[assignment]
            # Not left as memory happens to be: a class that fills it in no way gives the same model every time.
            part._buffers[name] = torch.full_like(empty, torch.nan if empty.is_floating_point() else 0, device=device)
        if missing:
            nearest = max((n for n in models if not n or path == n or path.startswith(f"{n}.")), key=len)
            # Its parameters are still on the meta device, where this does nothing.
            models[nearest]._init_weights(part)
