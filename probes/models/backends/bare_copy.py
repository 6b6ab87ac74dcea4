"""Copies of a module without the hooks and controllers that others put on it."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from probes.errors import ModelError


def bare_copy(module: nn.Module, ref: str, *, share_tensors: bool) -> nn.Module:
    """Return a copy of a module tree without the hooks and controllers that others put on it.

    Args:
        module: The tree, left as it is.
        ref: What to call it in an error.
        share_tensors: Whether the copy holds the very same tensors, rather than copies of them.

    Raises:
        ModelError: a model spread over devices, whose parts cannot be copied.
    """
    if any(hasattr(m, "_hf_hook") for m in module.modules()):
        raise ModelError(f"{ref}: a model spread over devices cannot be copied; use backend native or nnsight")
    tensors: list[Tensor] = [*module.parameters(), *module.buffers()] if share_tensors else []
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    controllers = [m.__dict__[name] for m in module.modules() for name in _CONTROLLERS if name in m.__dict__]
    copied = copy.deepcopy(module, memo | {id(controller): None for controller in controllers})
    for part in copied.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
        for name in _CONTROLLERS:
            if part.__dict__.get(name, part) is None:
                del part.__dict__[name]
    return copied


_CONTROLLERS = ("__nnsight__", "forward")
"""What nnsight leaves on the parts of a module that it has wrapped."""
