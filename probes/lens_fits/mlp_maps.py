"""MLPs whose gradients go through their matrix at each position: cheaper than two passes of products where cotangents are many.

At one position an MLP's derivative is the product of its output weights and of its input weights, the rows of the latter
weighed by the slopes of the hidden units. Made once, of d_model² entries, it serves every cotangent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probes.anatomy import Anatomy, linear_weight
from probes.blocks.rerouting import block_access
from probes.models.protocol import Model
from probes.module_calls import temporary

MAPS_BYTES = 1 << 30
"""The matrices of all positions of one MLP take at most this."""
TOLERANCE = 1e-4
"""Relative error up to which a matrix counts as the MLP's derivative; others are differentiated as they are."""


@dataclass(frozen=True, eq=False)
class _Mlp:
    """An MLP of hidden units, each a function of its own rows of the input weights."""

    module: nn.Module
    readers: tuple[nn.Module, ...]
    """Linear maps of its input: the gate's, where it has one, and the units'."""
    writer: nn.Module

    def maps(self, x: Float[Tensor, "1 pos d_model"]) -> Float[Tensor, "pos d_model d_model"] | None:
        """Return its derivative at every position, [output, input]; None where it is of another form."""
        with torch.enable_grad():
            entering = x.detach().requires_grad_()
            seen: dict[nn.Module, Tensor] = {}
            hooks = [part.register_forward_hook(lambda at, _, out: seen.__setitem__(at, out)) for part in self.readers]
            hooks.append(self.writer.register_forward_pre_hook(lambda at, args: seen.__setitem__(at, args[0])))
            with temporary(hooks):
                leaving = self.module(entering)
            if not isinstance(leaving, Tensor) or seen.keys() != {*self.readers, self.writer}:
                return None
            before = [seen[reader] for reader in self.readers]
            hidden = seen[self.writer]
            if any(part.shape[:-1] != x.shape[:-1] or part.shape[-1] % hidden.shape[-1] for part in (*before, hidden)):
                return None
            slopes = torch.autograd.grad(hidden.sum(), before, retain_graph=True, allow_unused=True)
            probe = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
            (expected,) = torch.autograd.grad(leaving, entering, probe)
        if any(slope is None for slope in slopes):
            return None
        maps = self._products([slope[0] for slope in slopes])
        error = (torch.einsum("po,poi->pi", probe[0], maps) - expected[0]).norm()
        return maps if bool(error <= TOLERANCE * expected.norm()) else None

    def _products(self, slopes: Sequence[Tensor]) -> Tensor:
        out = linear_weight(self.writer).detach()
        d_model, width = out.shape
        weights = [linear_weight(reader).detach().reshape(-1, width, d_model) for reader in self.readers]
        maps = out.new_empty(len(slopes[0]), d_model, d_model)
        for position, product in enumerate(maps):
            inner = out.new_zeros(width, d_model)
            for weight, slope in zip(weights, slopes, strict=True):
                for rows, weighed in zip(weight, slope[position].reshape(-1, width), strict=True):
                    inner.addcmul_(rows, weighed[:, None])
            torch.mm(out, inner, out=product)
        return maps


@contextmanager
def mapped_mlps(model: Model, n_positions: int, n_cotangents: int) -> Iterator[None]:
    """Inside, carry gradients of every MLP through its matrices, where that is cheaper and they fit; values stay the model's.

    Only gradients with respect to the stream are right inside, and only under `torch.func.vmap` over cotangents.
    """
    access, d_model = block_access(model), model.shape.d_model
    with ExitStack() as stack:
        if 2 * n_cotangents >= d_model and 4 * n_positions * d_model**2 <= MAPS_BYTES:
            for layer in range(model.shape.n_layers):
                if (mlp := _mlp_of(access.anatomy, layer)) is not None:
                    stack.enter_context(patch.object(mlp.module, "forward", _mapped(mlp)))
        yield


def _mlp_of(anatomy: Anatomy, layer: int) -> _Mlp | None:
    """The MLP of a block whose input and output maps are plain matrices of their own."""
    paths = {name: anatomy.map.path(name, layer) for name in ("mlp", "mlp.gate", "mlp.in", "mlp.out")}
    module, *readers, writer = (anatomy.map.module.get_submodule(path) if path else None for path in paths.values())
    linear = [reader for reader in readers if reader is not None]
    if module is None or writer is None or not linear or not all(map(_plain, (*linear, writer))):
        return None
    return _Mlp(module, tuple(dict.fromkeys(linear)), writer)


def _plain(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2


def _mapped(mlp: _Mlp) -> Any:
    plain = mlp.module.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not (torch.is_grad_enabled() and x.requires_grad):
            return plain(x, *args, **kwargs)
        with patch.object(mlp.module, "forward", plain):
            maps = mlp.maps(x)
        if maps is None:
            return plain(x)
        with torch.no_grad():
            value = plain(x)
        return _Mapped.apply(x, value, maps)  # type: ignore[no-untyped-call]

    return forward


class _Mapped(torch.autograd.Function):
    """A value whose gradient at `x` goes through given matrices."""

    @staticmethod
    def forward(x: Tensor, value: Tensor, maps: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Product.apply(gradient, ctx.saved_tensors[0]), None, None  # type: ignore[no-untyped-call]


class _Product(torch.autograd.Function):
    """Rows at each position times that position's matrix; batched, all cotangents of a position go in one product."""

    @staticmethod
    def forward(rows: Tensor, maps: Tensor) -> Tensor:
        return torch.einsum("...po,poi->...pi", rows, maps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], rows: Tensor, maps: Tensor) -> tuple[Tensor, int]:
        return torch.einsum("...po,poi->...pi", rows.movedim(in_dims[0], 0), maps), 0
