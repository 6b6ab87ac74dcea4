"""The tuned lens: an affine map per layer that carries its rows to where the unembedding can read them.

Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens", section 2. Maps act at unit scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from probes.errors import OptionError
from probes.lenses.card import LensCard

Place = tuple[int, int]
"""A layer, and how many tokens ahead of it the map reads."""


@dataclass(frozen=True, eq=False)
class AffineMap:
    """Rows at unit scale become row + row @ change + bias."""

    change: Float[Tensor, "d_model d_model"]
    bias: Float[Tensor, " d_model"]

    def __call__(self, rows: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """Map rows of any scale."""
        unit = unit_scale(rows)
        return unit + unit @ self.change.to(unit) + self.bias.to(unit)


@dataclass(frozen=True, eq=False)
class TunedLens:
    """Fitted maps by layer and offset; a layer without one is read by the logit lens."""

    card: LensCard
    maps: Mapping[Place, AffineMap] = field(default_factory=dict)
    mean_shift: Mapping[int, Float[Tensor, " d_model"]] = field(default_factory=dict)
    """Per layer, the last row less the layer's on average, at unit scale: the control of a lens of bias alone."""

    def readable(self, rows: Float[Tensor, "row d_model"], layer: int, offset: int = 0) -> Float[Tensor, "row d_model"]:
        """Map rows of a layer to what leaves the last block `offset` tokens later, at unit scale; see `Lens.readable`.

        Raises:
            OptionError: an offset that was not fitted.
        """
        if (layer, offset) in self.maps:
            return self.maps[layer, offset](rows)
        if offset and offset not in {fitted for _, fitted in self.maps}:
            raise OptionError(f"this lens has no maps {offset} tokens ahead: fit it with --offsets 0,{offset}")
        return rows

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the file format, by name."""
        named: dict[str, Tensor] = {}
        for (layer, offset), fitted in self.maps.items():
            place = f"{layer}.{offset}" if offset else f"{layer}"
            named[f"change.{place}"], named[f"bias.{place}"] = fitted.change, fitted.bias
        return named | {f"mean_shift.{layer}": shift for layer, shift in self.mean_shift.items()}

    @classmethod
    def of(cls, card: LensCard, tensors: Mapping[str, Tensor]) -> TunedLens:
        """Return the lens of a file's tensors."""
        maps: dict[Place, AffineMap] = {}
        shifts: dict[int, Tensor] = {}
        for name, tensor in tensors.items():
            what, _, place = name.partition(".")
            layer, _, offset = place.partition(".")
            if what == "change":
                maps[int(layer), int(offset or 0)] = AffineMap(tensor, tensors[f"bias.{place}"])
            elif what == "mean_shift":
                shifts[int(layer)] = tensor
        return cls(card, maps, shifts)


def unit_scale(rows: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
    """Return rows divided by their root mean square, float32; a final norm reads them as before."""
    rows = rows.float()
    return rows / rows.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(1e-12)
