"""A module in words: the types and attributes of its parts, which decide a forward beside its tensors."""

from __future__ import annotations

import functools
import json
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from probes.models.fingerprint.checksum import checksum, combined
from probes.models.sources.digest import canonical_config

Described = dict[tuple[str, str], str]
"""(module path, attribute) to its value in words; the attribute `` is the module's type."""

_INERT = frozenset(
    {
        *vars(nn.Module()), "training", "forward", "config", "name_or_path", "generation_config", "warnings_issued",
        "_is_hf_initialized", "_use_kernels", "kernel_config", "_weight_conversions", "_hf_hook", "_old_forward", "hf_device_map", "__nnsight__",
        "_hf_peft_config_loaded", "hf_quantizer", "is_quantized", "quantization_method", "is_parallelizable", "model_parallel",
        "gradient_checkpointing", "_gradient_checkpointing_func", "_require_grads_hook", "_output_capturing_hooks_installed",
        "all_tied_weights_keys", "_tp_plan", "_tp_size", "_device_mesh", "_pp_plan", "_ep_plan", "_fsdp_plan",
        "_no_split_modules", "_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected", "_keys_to_ignore_on_save",
        "_skip_keys_device_placement", "_keep_in_fp32_modules", "_keep_in_fp32_modules_strict", "_loss_function",
        "to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa",
    }
)  # fmt: skip
"""Attributes of a module that cannot change a forward in evaluation, or that are described elsewhere."""


def describe(module: nn.Module, known: set[int] | None = None) -> Described:
    """Describe every part of a module in words, without its parameters and buffers.

    Args:
        module: The module.
        known: Ids of modules that are described elsewhere, to which those described here are added.
    """
    out: Described = {}
    if known is None:
        out |= ambient(any(p.dtype == torch.float32 for p in module.parameters()))
    parts = list(module.named_modules(remove_duplicate=False))
    known = (known or set()) | {id(part) for _, part in parts}
    root: Any = getattr(module, "config", None)
    configs = {id(root), id(root.get_text_config())} if hasattr(root, "get_text_config") else {id(root)}
    for path, part in parts:
        out[path, ""] = _named(type(part))
        for name, value in vars(part).items():
            if name not in _INERT and not _scratch(part, name, value):
                out[path, name] = words_of(value, known)
        own = vars(part).get("config")
        if own is not None and id(own) not in configs:
            out[path, "config"] = canonical_config(part)
    return out


def _scratch(part: nn.Module, name: str, value: Any) -> bool:
    """Whether an attribute holds what TransformerLens's components keep of their last forward."""
    kept = value is None or isinstance(value, bool | Tensor)
    return kept and name.startswith("_") and type(part).__module__.startswith("transformer_lens.")


def ambient(single: bool) -> Iterator[tuple[tuple[str, str], str]]:
    """Give the switches of torch itself that are not as torch starts; some matter where weights are of `single` precision."""
    if torch.get_default_dtype() != torch.float32:
        yield ("", "torch.get_default_dtype"), str(torch.get_default_dtype())
    if single and (precision := _matmul_precision()) != "highest":
        yield ("", "torch.get_float32_matmul_precision"), precision


def _matmul_precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        # torch refuses to answer where both its old and its new way of setting it were used.
        return "mixed"


def words_of(value: Any, known: set[int] | None = None, depth: int = 4) -> str:
    """Describe a value in words that are the same in every process; one without such words by its type alone."""
    if value is None or isinstance(value, bool | int | float | str | bytes | torch.dtype):
        return repr(value)
    if depth == 0 or isinstance(value, torch.device | types.ModuleType):
        return _named(type(value))
    if isinstance(value, Tensor):
        return f"{value.dtype}{tuple(value.shape)}{checksum(value.cpu()):x}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{value.shape}{combined([repr(value.tolist())])}"
    further = functools.partial(words_of, known=known, depth=depth - 1)
    if isinstance(value, Mapping):
        return json.dumps(sorted((further(k), further(v)) for k, v in value.items()))
    if isinstance(value, list | tuple | set | frozenset):
        items = [further(item) for item in value]
        return f"{type(value).__name__}{sorted(items) if isinstance(value, set | frozenset) else items}"
    if isinstance(value, nn.Module):
        return _words_of_module(value, set() if known is None else known)
    return _words_of_code(value, further) or _words_of_object(value, functools.partial(words_of, known=known, depth=1))


def _words_of_code(value: Any, further: Callable[[Any], str]) -> str | None:
    if isinstance(value, functools.partial):
        return f"partial({further(value.func)},{further(value.args)},{further(value.keywords)})"
    if isinstance(value, types.MethodType):
        return f"method({further(value.__func__)})"
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
        inside = further([value.__defaults__, value.__kwdefaults__, cells])
        return f"{value.__module__}.{value.__qualname__}:{combined([_code(value.__code__), inside])}"
    if isinstance(value, types.BuiltinFunctionType | type):
        return _named(value)
    return None


def _words_of_module(value: nn.Module, known: set[int]) -> str:
    """Describe a module that is an attribute outside the tree of modules; one inside the tree is described there."""
    if id(value) in known:
        return _named(type(value))
    known |= {id(part) for part in value.modules()}
    parts = sorted((" ".join(where), text) for where, text in describe(value, known).items())
    tensors = [(name, words_of(tensor)) for name, tensor in (*value.named_parameters(), *value.named_buffers())]
    return combined([json.dumps([parts, tensors])])


def _words_of_object(value: Any, further: Callable[[Any], str]) -> str:
    if hasattr(value, "to_dict"):
        return f"{_named(type(value))}{canonical_config(types.SimpleNamespace(config=value))}"
    inside = {name: item for name, item in getattr(value, "__dict__", {}).items() if not callable(item)}
    return f"{_named(type(value))}{[(name, further(item)) for name, item in sorted(inside.items())]}"


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _code(code: types.CodeType) -> str:
    constants = [_code(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    return combined([code.co_code.hex(), repr(code.co_names), *constants])


def _named(kind: Any) -> str:
    return f"{getattr(kind, '__module__', None)}.{getattr(kind, '__qualname__', kind)}"
