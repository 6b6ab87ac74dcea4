"""Linear maps by oneDNN, where MKL, which torch takes by itself, uses half the width of a processor's registers."""

from __future__ import annotations

import platform
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

FEWEST_ROWS = 2
"""Rows of a product from which on it is quicker."""


def quicker(x: Float[Tensor, "*rows d_in"], weight: Float[Tensor, "d_out d_in"], bias: Tensor | None = None) -> bool:
    """Return whether `linear` takes less time than torch's own: a matter of shapes, types and the processor alone."""
    return mkl_is_narrow() and x.numel() >= FEWEST_ROWS * x.shape[-1] and float32_on_cpu(x, weight, bias)


def float32_on_cpu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Return whether a linear map is one of float32 numbers on the CPU, of which no gradient is asked."""
    given = [tensor for tensor in (x, weight, bias) if tensor is not None]
    return weight.dim() == 2 and all(
        tensor.dtype is torch.float32
        and tensor.device.type == "cpu"
        and not (tensor.requires_grad and torch.is_grad_enabled())
        for tensor in given
    )


def linear(
    x: Float[Tensor, "*rows d_in"], weight: Float[Tensor, "d_out d_in"], bias: Float[Tensor, " d_out"] | None = None
) -> Float[Tensor, "*rows d_out"]:
    """Return x @ weight.T + bias, to float32's rounding what torch gives, for what is `quicker`."""
    # The operator that torch.compile calls: by `Tensor.to_mkldnn` numbers would be copied twice.
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


@cache
def mkl_is_narrow() -> bool:
    """Return whether MKL leaves half of this processor's registers unused.

    MKL has code for the AVX-512 of Intel's processors alone; oneDNN has it for all. On a Zen 5 it takes half the time.
    """
    processor = platform.processor()
    with suppress(OSError):
        processor = Path("/proc/cpuinfo").read_text()
    return (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "GenuineIntel" not in processor
        and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
