"""What the further measurements take from the analysis's options."""

from __future__ import annotations

from dataclasses import dataclass

from analyses.latent_language.items import Item
from analyses.latent_language.task_prompts import Form, Framing
from analyses.results.statistics import Ci


@dataclass(frozen=True)
class Settings:
    """Options shared by the further measurements, under the analysis's names."""

    items: tuple[Item, ...]
    pairs: tuple[tuple[str, str], ...]
    seed: int
    ci: Ci
    n_items: int
    framings: tuple[Framing, ...]
    depths: tuple[float, ...]
    shares: tuple[float, ...]
    swap_to: str
    extra_items: int
    beam_width: int
    beam_tokens: int
    spaces: bool
    case: bool
    words: str

    def layers(self, n_layers: int) -> list[int]:
        """The layers at the relative depths asked for."""
        return sorted({round(depth * (n_layers - 1)) for depth in self.depths})

    form: Form = "quoted"
