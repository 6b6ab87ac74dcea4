"""Tiny models in float64 throughout, so that identities can be checked to 1e-10."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from families import make
from torch import Tensor
from torch.overrides import TorchFunctionMode

from probes.models.backends.native import NativeModel


class _KeepDouble(TorchFunctionMode):
    """Models that compute norms or softmax in float32 whatever their dtype go on in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, casts = kwargs or {}, func is Tensor.float or func is Tensor.to
        if (casts or kwargs) and args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if casts and (func is Tensor.float or args[1:2] == (torch.float32,)):
                return args[0]
            if kwargs.get("dtype") is torch.float32:
                kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


@contextmanager
def float64() -> Iterator[None]:
    """Nothing is rounded to float32 within."""
    with _KeepDouble():
        yield


def double(family: str, seed: int = 0, **config: Any) -> NativeModel:
    """A tiny random model of the family in float64."""
    module = make(family, seed, **config)
    if hasattr(module, "set_experts_implementation"):
        module.set_experts_implementation("eager")
    return NativeModel(module.double(), ref=f"double-{family}", weights="random")
