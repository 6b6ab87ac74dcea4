"""A module of a model read as an operation that the rules know, and checked against what the module computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from probes.decomposition.rules import Linear, Norm
from probes.edits.weights import matrix
from probes.errors import PointError
from probes.models.verify.recording import deviation

Activation = Callable[[Tensor], Tensor]

TOLERANCE = 1e-4
"""How far, relative to the largest value, an operation may be from what the module computed (1e-2 in half precision)."""


def tolerance(dtype: torch.dtype) -> float:
    """Return the relative deviation allowed of a module that computes in `dtype`."""
    return 1e-2 if dtype in (torch.float16, torch.bfloat16) else TOLERANCE


def working(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a decomposition: float32 at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def linear_of(module: nn.Module, n_inputs: int, columns: Int[Tensor, " output"] | None = None) -> Linear:
    """Read a projection as x W + b, of some of its outputs where `columns` are given.

    Raises:
        PointError: its weights are no plain matrix in memory.
    """
    weight, rows = matrix(module, n_inputs)
    bias = getattr(module, "bias", None)
    weight = weight.detach() if rows else weight.detach().T
    bias = bias.detach() if isinstance(bias, Tensor) else None
    if columns is not None:
        columns = columns.to(weight.device)
        weight, bias = weight[:, columns], None if bias is None else bias[columns]
    dtype = working(weight.dtype)
    return Linear(weight.to(dtype), None if bias is None else bias.to(dtype))


def norm_of(
    module: nn.Module, x: Float[Tensor, "pos *rest width"], y: Float[Tensor, "pos *rest width"], where: str
) -> Norm:
    """Read a norm from its parameters, told apart by the values it gave: y for inputs x.

    Raises:
        PointError: neither LayerNorm nor RMSNorm gives these values.
    """
    errors = [(deviation(norm.total(x), y), norm) for norm in _norms(module, x)]
    error, best = min(errors, key=lambda pair: pair[0])
    dtype = next((p.dtype for p in module.parameters()), x.dtype)
    if error > tolerance(dtype):
        raise PointError(f"{where}: {type(module).__name__} is neither a LayerNorm nor an RMSNorm (off by {error:.1e})")
    return best


def _norms(module: nn.Module, x: Tensor) -> Iterator[Norm]:
    eps = next((float(getattr(module, n)) for n in ("eps", "variance_epsilon", "norm_eps") if hasattr(module, n)), 1e-5)
    weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
    bias = bias.detach().to(x.dtype) if isinstance(bias, Tensor) else None
    gains: list[Tensor | None] = [None]
    if isinstance(weight, Tensor) and weight.shape[-1] == x.shape[-1]:
        gains = [weight.detach().to(x.dtype), 1 + weight.detach().to(x.dtype)]
    for gain in gains:
        for centred in (False, True):
            yield Norm(gain, bias, eps, centred)


def activation_of(
    block: nn.Module,
    config: object,
    gate: Float[Tensor, "pos d_mlp"] | None,
    up: Float[Tensor, "pos d_mlp"],
    out: Float[Tensor, "pos d_mlp"],
    where: str,
) -> Activation:
    """Return the elementwise function of an MLP, told apart by the values: out == act(gate) * up, or act(up) without a gate.

    Raises:
        PointError: no function that the block holds or its configuration names gives these values.
    """
    best = float("inf")
    for function in _candidates(block, config):
        try:
            with torch.no_grad():
                value = function(up) if gate is None else function(gate) * up
        except (TypeError, RuntimeError, ValueError):
            continue
        error = deviation(value, out)
        if error <= TOLERANCE:
            return function
        best = min(best, error)
    raise PointError(
        f"{where}: the MLP's hidden units are no known function of its input projections (nearest is off by {best:.1e}), "
        "so they cannot be decomposed"
    )


def _candidates(block: nn.Module, config: object) -> Iterator[Activation]:
    for module in block.modules():
        if not list(module.parameters()) and not list(module.children()) and not isinstance(module, nn.Dropout):
            yield module
    from transformers.activations import ACT2FN

    for name, value in vars(config).items():
        if "act" in name and isinstance(value, str) and value in ACT2FN:
            yield ACT2FN[value]
