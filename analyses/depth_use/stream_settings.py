"""The options of what is compared across groups of prompts and across layers, and what they need captured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from analyses.options import option
from analyses.similarity.masks import mask_needs
from probes.capture.needs import Need
from probes.models.protocol import Model

BlockPoint = Literal["attn_in", "attn_out", "resid_mid", "mlp_in", "mlp_post", "mlp_out", "resid_post"]


@dataclass(frozen=True)
class StreamSettings:
    """The options of `DepthUse` that compare groups and layers; it has them among its own."""

    alignment_points: tuple[BlockPoint, ...] = option(
        ("resid_post",), "Where in each block groups of prompts are compared."
    )
    alignment_steps: tuple[int, ...] = option(
        (1, 4), "With groups: how many layers on a token's stream is compared with itself.", low=1, high=512
    )
    alignment_anchor: bool = option(
        False, "With groups: also compare one group at layer 0 with the other at every layer."
    )
    alignment_readouts: bool = option(
        False, "With groups: also compare what their streams would say next, read from every layer."
    )
    mask_sparsity: tuple[float, ...] = option(
        (),
        "With groups: shares of each output's weights that are pruned, such as 0.3,0.5, to see which weights both groups need; "
        "none leaves it out.",
        low=0.01,
        high=0.99,
    )
    kv_rank: int = option(
        0,
        "Dimensions of the subspaces over tokens in which keys, and values, of every two layers are compared, such as 16; 0 leaves it out.",
        low=0,
        high=1024,
    )

    def stream_needs(self, model: Model, first_token: bool) -> list[Need]:
        """Ask for what the comparisons read beside the streams that leave the blocks."""
        points = [f"{point}.*" for point in self.alignment_points if point != "resid_post"]
        points += ["k.*", "v.*"] if self.kv_rank else []
        needs = [Need(tuple(points))] if points else []
        return needs + (mask_needs(model, first_token) if self.mask_sparsity else [])
