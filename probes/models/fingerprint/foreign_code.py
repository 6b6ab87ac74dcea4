"""Hooks and patched forwards of others, and global switches, under which no key can say what a module computes."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from probes.models.fingerprint.description import ambient

_MODEL_CODE = re.compile(r"transformers\.models\.(?!auto\.)\w+\.modeling_")
_KNOWN_HOOKS = ("torch.nn.utils.", "transformers.", "accelerate.", "transformer_lens.")
"""Packages whose hooks do what the module's own tensors and attributes say (pruning, weight norm, output recording)."""


def unkeyable(module: nn.Module) -> str | None:
    """Return why no key can say what a module computes, with what to do about it; None where one can."""
    if _hooked_everywhere():
        return "a global module hook of torch runs in every forward; remove it (its handle has `remove()`)"
    for path, part in module.named_modules():
        if reason := _hooked(part) or _patched(part):
            return f"{type(part).__name__} {path or 'at the top'!r} {reason}"
    kinds = {module.get_parameter(name).device.type for name, _ in list(module.named_parameters())[:1]} | {"cpu"}
    on = [kind for kind in sorted(kinds - {"meta"}) if torch.is_autocast_enabled(kind)]
    return f"torch.autocast is on for {on[0]}; capture outside of it, or load the model in that dtype" if on else None


def untouched(kind: str) -> bool:
    """Whether models on a kind of device compute what their files say: none of their classes is imported that others could have patched.

    That holds of a process that has not loaded a model yet, whose switches of torch are as torch starts.
    """
    return not (_model_classes() or _hooked_everywhere() or torch.is_autocast_enabled(kind) or dict(ambient(True)))


def _model_classes() -> bool:
    return any(_MODEL_CODE.match(name) for name in sys.modules)


def _hooked_everywhere() -> bool:
    hooks = torch.nn.modules.module
    return bool(hooks._global_forward_hooks or hooks._global_forward_pre_hooks)


def _hooked(part: nn.Module) -> str | None:
    if users := getattr(part, "fwd_hooks", None):
        # TransformerLens wraps a user's function in one of its own, and notes it here.
        return f"carries {len(users)} hook(s) of the user; remove them (bridge.reset_hooks()), or give what they do as edits"
    for kind, hooks in (("forward hook", part._forward_hooks), ("forward pre-hook", part._forward_pre_hooks)):
        for hook in hooks.values():
            if not _home(hook).startswith(_KNOWN_HOOKS):
                return f"carries a {kind} that is not ours ({_name(hook)}); remove it, or give what it does as an edit"
    return None


def _patched(part: nn.Module) -> str | None:
    own, kind = vars(part).get("forward"), type(part)
    if own is not None and not _reinstated(part, own):
        return (
            f"runs a forward that was put on the instance ({_name(own)}); delete it with `del module.forward`, or make it "
            "a class of its own"
        )
    definer = next(c for c in kind.__mro__ if "forward" in vars(c))
    forward = inspect.unwrap(vars(definer)["forward"])
    if getattr(forward, "__module__", None) not in (definer.__module__, "torch.nn.modules.module"):
        return (
            f"runs a forward that was put on its class ({definer.__name__}: {_name(forward)}); put the class's own back"
        )
    return None


def _reinstated(part: nn.Module, forward: Any) -> bool:
    """Whether a library stands around the class's own forward and runs it as it is."""
    own = type(part).forward
    state = vars(part).get("__nnsight__")
    if type(forward).__module__.startswith("nnsight.") and state is not None:
        return state.original is own
    if "_hf_hook" in vars(part) and type(part._hf_hook).__module__.startswith("accelerate."):
        old: Any = vars(part).get("_old_forward")
        return getattr(old, "__func__", old) is own or type(old).__module__.startswith("nnsight.")
    return False


def _home(hook: Callable[..., Any]) -> str:
    hook = hook.func if isinstance(hook, partial) else hook
    return str(getattr(hook, "__module__", "") if inspect.isroutine(hook) else type(hook).__module__) + "."


def _name(hook: Callable[..., Any]) -> str:
    hook = hook.func if isinstance(hook, partial) else hook
    return str(getattr(hook, "__qualname__", type(hook).__qualname__))
