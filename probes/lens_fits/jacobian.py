"""The mean Jacobian of a late row with respect to an early one, on one text: the estimator of the Jacobian lens.

Gurnee et al. 2026, arXiv 2607.15495: cotangents at every counted position of the target layer at once; causality makes the
gradient at a source position the sum over the later positions it can influence; then the mean over source positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from probes.blocks.rerouting import Caller, block_access, call_blocks
from probes.errors import OptionError, PointError
from probes.lens_fits.attention import Cut, cut_attention
from probes.models.protocol import Model

Positions = Literal["later", "self", "future"]
Cotangents = Literal["one_hot", "rademacher"]


@dataclass(frozen=True)
class Estimator:
    """What is averaged; part of a lens's card."""

    target: int
    """The layer whose rows are differentiated."""
    layers: tuple[int, ...]
    """Layers with respect to whose rows, all below the target."""
    positions: Positions = "later"
    """`self` keeps what a row does to its own position, `future` what it does to later ones, `later` both."""
    skip: int = 16
    """First positions left out, as sources and as targets; the last is left out too."""
    length: int = 128
    """Tokens of a text that are used, at most."""
    dim_batch: int = 16
    """Cotangents carried back at once."""
    cotangents: Cotangents = "one_hot"
    """One per output dimension, or as many random signs."""
    freeze_qk: bool = False
    """Take attention's weights as constants."""
    seed: int = 0
    """Of random signs."""

    def check(self, n_layers: int) -> None:
        """Refuse what cannot be estimated.

        Raises:
            OptionError: a target or layer outside the model or in the wrong order, or texts too short for `skip`.
        """
        if not 0 < self.target < n_layers:
            raise OptionError(f"target layer {self.target}: legal are 1 to {n_layers - 1}")
        if not self.layers or not all(0 <= layer < self.target for layer in self.layers):
            raise OptionError(f"layers {self.layers}: give layers from 0 to {self.target - 1}, below the target")
        if self.skip < 0 or self.skip + 2 > self.length:
            raise OptionError(f"skip {self.skip} and length {self.length}: skip + 2 may not exceed length")

    def counted(self, n_tokens: int) -> range:
        """Return the positions of a text that count; empty where it is too short."""
        return range(self.skip, min(n_tokens, self.length) - 1)

    def as_options(self) -> dict[str, Any]:
        """Return the options as a card carries them; `dim_batch` changes no number and is left out."""
        return {name: value for name, value in asdict(self).items() if name not in ("dim_batch", "target", "layers")}


def check_differentiable(model: Model) -> None:
    """Refuse models whose blocks cannot be differentiated, or for which the sum over later positions is not causal.

    Raises:
        PointError: a bidirectional model, one that keeps its blocks to itself, or one that runs a block more than once.
    """
    access = block_access(model)
    if not model.shape.causal:
        raise PointError(
            f"{model.ref} reads both ways: a Jacobian lens sums over later positions, which needs causality"
        )
    blocks = [access.anatomy.component("block", layer) for layer in range(model.shape.n_layers)]
    if len(set(map(id, blocks))) < len(blocks):
        raise PointError(f"{model.ref} runs a block more than once: its layers have no Jacobians of their own")
    if not all(p.is_floating_point() and not p.is_meta for p in access.module.parameters()):
        raise PointError(
            f"{model.ref} keeps weights quantised or elsewhere: load it whole, as float32, to differentiate it"
        )


def text_jacobians(
    model: Model, tokens: Sequence[int], estimator: Estimator, cotangents: Float[Tensor, "output d_model"]
) -> dict[int, Float[Tensor, "output d_model"]]:
    """Return each cotangent times the mean Jacobian of one text, per source layer, float32 on the host.

    Args:
        model: a causal model of a backend that hands out its blocks.
        tokens: the text, of at least skip + 2 tokens.
        estimator: what is averaged.
        cotangents: the identity gives the Jacobian itself.

    Raises:
        OptionError: a text that is too short.
        PointError: attention that cannot be split, where `estimator` asks for that.
    """
    counted = estimator.counted(len(tokens))
    if not counted:
        raise OptionError(
            f"a text of {len(tokens)} tokens: a Jacobian with skip {estimator.skip} needs {estimator.skip + 2}"
        )
    if estimator.positions == "future":
        later, own = (
            _carried(model, tokens, estimator, counted, cotangents, Cut(positions == "self", estimator.freeze_qk))
            for positions in ("later", "self")
        )
        return {layer: later[layer] - own[layer] for layer in later}
    return _carried(
        model, tokens, estimator, counted, cotangents, Cut(estimator.positions == "self", estimator.freeze_qk)
    )


def _carried(
    model: Model, tokens: Sequence[int], estimator: Estimator, counted: range, cotangents: Tensor, cut: Cut
) -> dict[int, Tensor]:
    ids = torch.tensor([list(tokens[: estimator.length])])
    first, last = counted[0], counted[-1] + 1

    def work(hidden: Tensor, call: Caller) -> dict[int, Tensor]:
        sources, target = _streams(hidden, call, estimator)
        parts: dict[int, list[Tensor]] = {layer: [] for layer in estimator.layers}
        for rows in torch.split(cotangents.to(target), estimator.dim_batch):
            given = target.new_zeros(len(rows), *target.shape)
            given[:, 0, first:last] = rows[:, None]
            for layer, gradient in zip(estimator.layers, _backward(target, sources, given), strict=True):
                parts[layer].append(gradient[:, 0, first:last].mean(1).float().cpu())
        return {layer: torch.cat(rows) for layer, rows in parts.items()}

    with torch.enable_grad(), cut_attention(model, cut):
        return call_blocks(model, ids, work, use_cache=False)


def _streams(hidden: Tensor, call: Caller, estimator: Estimator) -> tuple[list[Tensor], Tensor]:
    """What leaves each source layer and the target, with the graph between them; blocks below the lowest need none."""
    lowest = min(estimator.layers)
    with torch.no_grad():
        for layer in range(lowest + 1):
            hidden = call(layer, hidden)
    hidden = hidden.detach().requires_grad_()
    streams = {lowest: hidden}
    for layer in range(lowest + 1, estimator.target + 1):
        streams[layer] = call(layer, streams[layer - 1])
    return [streams[layer] for layer in estimator.layers], streams[estimator.target]


def _backward(target: Tensor, sources: Sequence[Tensor], given: Tensor) -> tuple[Tensor, ...]:
    """Gradients of every cotangent at every source, [cotangent, 1, pos, d_model]; one copy of the activations serves all."""
    return torch.autograd.grad(target, list(sources), given, retain_graph=True, is_grads_batched=True)


def cotangent_batches(d_model: int, estimator: Estimator) -> Iterator[Float[Tensor, "output d_model"]]:
    """Yield what `text_jacobians` carries back for a whole Jacobian: the identity, or random signs."""
    if estimator.cotangents == "one_hot":
        yield torch.eye(d_model)
        return
    generator = torch.Generator().manual_seed(estimator.seed)
    yield torch.randint(0, 2, (d_model, d_model), generator=generator).float() * 2 - 1


def whole_jacobians(
    model: Model, tokens: Sequence[int], estimator: Estimator
) -> dict[int, Float[Tensor, "d_model d_model"]]:
    """Return the mean Jacobian of one text per source layer, [output, input]; random signs give an unbiased estimate of it."""
    cotangents = next(cotangent_batches(model.shape.d_model, estimator))
    carried = text_jacobians(model, tokens, estimator, cotangents)
    if estimator.cotangents == "one_hot":
        return carried
    return {layer: cotangents.T @ rows / len(cotangents) for layer, rows in carried.items()}
