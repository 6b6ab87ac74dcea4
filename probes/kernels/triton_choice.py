"""Which kernels take a tensor: Triton's on CUDA, the reference everywhere else; decided per call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

Kernels = Literal["eager", "fused"]
_forced: ContextVar[Kernels | None] = ContextVar("forced_kernels", default=None)


@cache
def has_triton() -> bool:
    """Return whether Triton is installed (`pip install 'bathyscope[triton]'`; CUDA builds of torch bring it)."""
    return find_spec("triton") is not None


def kernels_for(tensor: Tensor) -> Kernels:
    """Return the kernels that `tensor` gets: those forced, otherwise the fused ones for a CUDA tensor they take."""
    forced = _forced.get()
    if forced is not None:
        return forced
    supported = tensor.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return "fused" if tensor.is_cuda and supported and has_triton() else "eager"


@contextmanager
def forced(kernels: Kernels) -> Iterator[None]:
    """Use one set of kernels for every tensor inside the block, for tests and measurements."""
    token = _forced.set(kernels)
    try:
        yield
    finally:
        _forced.reset(token)
