"""Lenses that should read worse: a lens's maps at the wrong layer, turned at random, or its mean shift alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from probes.lenses.card import LensCard
from probes.lenses.protocol import Lens
from probes.lenses.tuned import TunedLens, unit_scale


@dataclass(frozen=True, eq=False)
class Control:
    """A lens spoilt in one way; its card is the lens's own."""

    lens: Lens

    @property
    def card(self) -> LensCard:
        """That of the lens."""
        return self.lens.card


@dataclass(frozen=True, eq=False)
class ShuffledLayers(Control):
    """Every layer read through the maps of another."""

    order: tuple[int, ...]
    """Per layer, the layer whose maps are used."""

    def readable(self, rows: Float[Tensor, "row d_model"], layer: int) -> Float[Tensor, "row d_model"]:
        """Return rows as the lens makes them readable for another layer."""
        return self.lens.readable(rows, self.order[layer])


@dataclass(frozen=True, eq=False)
class Rotated(Control):
    """What the lens makes of a row, turned by a rotation drawn at random: the same spectrum, no direction."""

    rotation: Float[Tensor, "d_model d_model"]

    def readable(self, rows: Float[Tensor, "row d_model"], layer: int) -> Float[Tensor, "row d_model"]:
        """Return rows turned after the lens's maps, where it has any."""
        through = self.lens.readable(rows, layer)
        return through @ self.rotation.to(through) if layer in self.card.layers else through


@dataclass(frozen=True, eq=False)
class BiasOnly(Control):
    """The mean shift of a tuned lens, without its matrix."""

    lens: TunedLens

    def readable(self, rows: Float[Tensor, "row d_model"], layer: int) -> Float[Tensor, "row d_model"]:
        """Return rows at unit scale, shifted as the fitting text's were on average."""
        return unit_scale(rows) + self.lens.mean_shift[layer] if layer in self.lens.mean_shift else rows


def shuffled_layers(lens: Lens, seed: int = 0) -> ShuffledLayers:
    """Return the lens with the maps of its layers exchanged, so that no layer keeps its own."""
    own = list(lens.card.layers)
    shift = 1 + int(torch.randint(max(1, len(own) - 1), (1,), generator=torch.Generator().manual_seed(seed)))
    other = {layer: own[(i + shift) % len(own)] for i, layer in enumerate(own)}
    return ShuffledLayers(lens, tuple(other.get(layer, layer) for layer in range(lens.card.n_layers)))


def rotated(lens: Lens, seed: int = 0) -> Rotated:
    """Return the lens followed by a rotation drawn uniformly."""
    d_model = lens.card.d_model
    drawn = torch.linalg.qr(torch.randn(d_model, d_model, generator=torch.Generator().manual_seed(seed)))
    return Rotated(lens, drawn.Q * drawn.R.diagonal().sign())
