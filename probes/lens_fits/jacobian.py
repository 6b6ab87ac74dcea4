"""The mean Jacobian of a late row with respect to an early one, on one text: the estimator of the Jacobian lens.

Gurnee et al. 2026, arXiv 2607.15495: cotangents at every counted position of the target layer at once; causality makes the
gradient at a source position the sum over the later positions it can influence; then the mean over source positions.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from probes.blocks.cached_prompt import CachedPrompt
from probes.blocks.rerouting import block_access
from probes.errors import OptionError, PointError
from probes.lens_fits.attention import Cut, cut_attention
from probes.lens_fits.mlp_maps import mapped_mlps
from probes.models.protocol import Model

Positions = Literal["later", "self", "future"]
Cotangents = Literal["one_hot", "rademacher"]
GRADIENT_BYTES = 1 << 30
"""Gradients of a text that are carried back together take at most this."""


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
    dim_batch: int = 64
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
    """The uncounted positions never matter: no gradient of a counted one comes from those before it, or goes to a later one."""
    with cut_attention(model, cut):
        prompt = CachedPrompt(model, tokens[: counted[-1] + 1], counted[0])
        entering = prompt.entering[0]
        row_bytes = entering.numel() * entering.element_size()
        parts = [
            _backward(prompt, estimator, rows)
            for rows in torch.split(cotangents.to(entering), max(1, GRADIENT_BYTES // row_bytes))
        ]
    return {layer: torch.cat([part[layer] for part in parts]) for layer in estimator.layers}


def _backward(prompt: CachedPrompt, estimator: Estimator, cotangents: Tensor) -> dict[int, Tensor]:
    """Carry cotangents back block by block; only one block's activations and the gradients [cotangent, pos, d_model] are kept."""
    means: dict[int, Tensor] = {}
    gradients = cotangents[:, None].expand(-1, len(prompt.entering[0]), -1).clone()
    with mapped_mlps(prompt.model, gradients.shape[1], len(cotangents)), prompt.model.exclusive():
        for layer in range(estimator.target, min(estimator.layers), -1):
            _carry(prompt, layer, torch.split(gradients, estimator.dim_batch))
            if layer - 1 in estimator.layers:
                means[layer - 1] = gradients.mean(1).float().cpu()
    return means


def _carry(prompt: CachedPrompt, layer: int, batches: Sequence[Tensor]) -> None:
    """Replace gradients at a block's output by those at its input; one copy of its activations serves all."""
    with torch.enable_grad():
        entering = prompt.entering[layer].detach()[None].requires_grad_()
        leaving = prompt.block(layer, entering)

    def back(gradient: Tensor) -> Tensor:
        return torch.autograd.grad(leaving, entering, gradient[None], retain_graph=True)[0][0]

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        for batch in batches:
            batch.copy_(torch.func.vmap(back)(batch))


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
