"""A model's blocks as operations that the rules know, each checked against a plain forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from probes.anatomy import Anatomy, Kind
from probes.decomposition.module_reading import activation_of, linear_of, norm_of, tolerance
from probes.decomposition.rules import Linear, Norm
from probes.decomposition.trace import Trace
from probes.errors import PointError
from probes.hooks.forward_hooks import replaced, tensor_of
from probes.models.verify.recording import deviation


@dataclass(frozen=True, eq=False)
class Dense:
    """An MLP: out(act(gate(x)) * up(x)), or out(act(up(x)))."""

    up: Linear
    gate: Linear | None
    out: Linear
    activation: Callable[[Tensor], Tensor]

    def units(self, *inputs: Float[Tensor, "*rest d_mlp"]) -> Float[Tensor, "*rest d_mlp"]:
        """Return the hidden units of (up,) or (gate, up) pre-activations."""
        return self.activation(inputs[0]) * inputs[1] if len(inputs) == 2 else self.activation(inputs[0])


@dataclass(frozen=True, eq=False)
class Mixture:
    """A mixture of experts as one function of its input, its routing that of the total."""

    module: nn.Module
    router: nn.Module

    def apply(
        self, x: Float[Tensor, "source pos d_model"], routed: Any, at: Int[Tensor, " pos"], n: int
    ) -> Float[Tensor, "source pos d_model"]:
        """Return the output for inputs at positions `at` of a prompt of n tokens, routed as in the plain forward."""
        dtype = next(self.module.parameters()).dtype
        with _routed(self.router, routed, at, n, x.shape[0]):
            out = tensor_of(self.module(x.to(dtype)))
        return out.reshape(x.shape).to(x.dtype)


@contextmanager
def _routed(router: nn.Module, routed: Any, at: Tensor, n: int, sources: int) -> Iterator[None]:
    def pick(value: Tensor) -> Tensor:
        # Kept as [pos, ...] or [1, pos, ...]; given back for every source in the same form.
        flat = value if value.shape[0] == n else value[0]
        out = flat[at].repeat(sources, *[1] * (flat.dim() - 1))
        return out if value.shape[0] == n else out.reshape(sources, len(at), *out.shape[1:])

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(routed, Tensor):
            return replaced(output, pick(routed))
        return type(output)(pick(value) for value in routed)

    with router.register_forward_hook(hook):
        yield


@dataclass(frozen=True, eq=False)
class BlockOperations:
    """One block's operations; None where it has no such part."""

    ln1: Norm | None
    ln1_post: Norm | None
    ln2: Norm | None
    ln2_post: Norm | None
    q: Linear
    k: Linear
    v: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    o: Linear
    mlp: Dense | Mixture


@dataclass(frozen=True, eq=False)
class ModelOperations:
    """The operations of every block, and the sizes that a walk over them needs."""

    kind: Kind
    blocks: tuple[BlockOperations, ...]
    n_heads: int
    n_kv_heads: int
    d_head: int
    causal: bool


@torch.no_grad()
def read_model_operations(anatomy: Anatomy, causal: bool, seen: Trace, config: object) -> ModelOperations:
    """Read a model's blocks from its anatomy and check them on one traced prompt.

    Raises:
        PointError: a part that the rules do not know, by name.
    """
    reader = _Reader(anatomy, seen, config)
    blocks = tuple(reader.block(layer) for layer in range(anatomy.n_layers))
    return ModelOperations(anatomy.kind, blocks, anatomy.n_heads, anatomy.n_kv_heads, anatomy.d_head, causal)


class _Reader:
    """Reads one block after the other."""

    def __init__(self, anatomy: Anatomy, seen: Trace, config: object) -> None:
        self.anatomy, self.seen, self.config = anatomy, seen, config
        self.d_model = int(anatomy.map.sizes.d_model)

    def block(self, layer: int) -> BlockOperations:
        norms = {
            name: self._norm(name, layer)
            for name in ("ln1", "ln1_post", "ln2", "ln2_post", "attn.q_norm", "attn.k_norm")
        }
        q, k, v = self._projections(layer)
        return BlockOperations(
            **{name.removeprefix("attn."): norm for name, norm in norms.items()},
            q=q,
            k=k,
            v=v,
            o=self._linear("attn.o", layer, self.anatomy.n_heads * self.anatomy.d_head),
            mlp=self._mlp(layer),
        )  # fmt: skip

    def _norm(self, name: str, layer: int) -> Norm | None:
        if not self.anatomy.map.path(name, layer):
            return None
        module = self.anatomy.component(name, layer)
        x, y = (self.seen.get(name, side, layer) for side in ("in", "out"))
        return norm_of(module, x, y, f"block {layer}, {name}")

    def _linear(self, name: str, layer: int, n_inputs: int, columns: Tensor | None = None) -> Linear:
        module = self.anatomy.component(name, layer)
        linear = linear_of(module, n_inputs, columns)
        x, y = (self.seen.get(name, side, layer) for side in ("in", "out"))
        y = y if columns is None else y[..., columns.to(y.device)]
        error = deviation(linear.total(x), y)
        if error > tolerance(next(module.parameters()).dtype):
            raise PointError(
                f"block {layer}, {name}: {type(module).__name__} does not compute its weights times its input "
                f"(off by {error:.1e}), so it cannot be decomposed"
            )
        return linear

    def _projections(self, layer: int) -> tuple[Linear, Linear, Linear]:
        if self.anatomy.map.path("attn.qkv", layer):
            layout = self.anatomy.layout
            if layout is None:
                raise PointError(f"block {layer}: the layout of the joint query-key-value projection is not known")
            columns = (layout.q, layout.k, layout.v)
            q, k, v = (self._linear("attn.qkv", layer, self.d_model, part.flatten()) for part in columns)
        else:
            q, k, v = (self._linear(f"attn.{name}", layer, self.d_model) for name in "qkv")
        return q, k, v

    def _mlp(self, layer: int) -> Dense | Mixture:
        known = self.anatomy.map
        if known.path("mlp.in", layer) and known.path("mlp.out", layer):
            return self._dense(layer)
        if known.path("mlp", layer) and known.path("mlp.gate", layer):
            mixture = Mixture(self.anatomy.component("mlp", layer), self.anatomy.component("mlp.gate", layer))
            self._check_mixture(mixture, layer)
            return mixture
        parts = ", ".join(known.components(layer))
        raise PointError(
            f"block {layer} of {known.architecture} has no MLP that the rules know (its parts: {parts}), so it cannot be decomposed"
        )

    def _dense(self, layer: int) -> Dense:
        up = self._linear("mlp.in", layer, self.d_model)
        gated = self.anatomy.map.path("mlp.gate", layer)
        gate = self._linear("mlp.gate", layer, self.d_model) if gated else None
        hidden = self.seen.get("mlp.out", "in", layer)
        out = self._linear("mlp.out", layer, hidden.shape[-1])
        activation = activation_of(
            self.anatomy.component("block", layer),
            self.config,
            self.seen.get("mlp.gate", "out", layer) if gate else None,
            self.seen.get("mlp.in", "out", layer),
            hidden,
            f"block {layer}",
        )
        return Dense(up, gate, out, activation)

    def _check_mixture(self, mixture: Mixture, layer: int) -> None:
        x, y = (self.seen.get("mlp", side, layer) for side in ("in", "out"))
        routed = self.seen.routed.get(layer)
        if routed is None:
            raise PointError(
                f"block {layer}: the router of the mixture of experts did not run, so it cannot be held fixed"
            )
        error = deviation(mixture.apply(x[None], routed, torch.arange(len(x)), len(x))[0], y)
        if error > tolerance(next(mixture.module.parameters()).dtype):
            raise PointError(
                f"block {layer}: with its routing held fixed the mixture of experts is off by {error:.1e}, so it cannot be decomposed"
            )
