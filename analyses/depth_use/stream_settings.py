"""What is compared across groups of prompts and across layers: its options, what it needs captured, and its tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from analyses.depth_use.kv_subspaces import kv_tables
from analyses.options import option
from analyses.similarity.alignment import alignment_table, norm_table
from analyses.similarity.groups import names_of
from analyses.similarity.masks import mask_needs, mask_table
from analyses.similarity.readouts import readout_table
from analyses.similarity.steps import step_table
from probes.capture.activations import Activations
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


def compared(
    activations: Activations,
    groups: Sequence[str],
    settings: StreamSettings,
    layers: Sequence[int],
    first_token: bool,
    seed: int,
) -> dict[str, pd.DataFrame]:
    """Return `alignment`, `norms`, `steps`, `readouts` and `masks` where groups are named, and `kv_subspaces`, `kv_joint`, as the options say.

    Args:
        groups: the group of each prompt; empty for one in none.
        layers: those whose keys and values are compared.
    """
    tables: dict[str, pd.DataFrame] = {}
    if len(names_of(groups)) > 1:
        points = tuple(dict.fromkeys(settings.alignment_points))
        tables["alignment"] = alignment_table(activations, groups, first_token, seed, points, settings.alignment_anchor)
        tables["norms"] = norm_table(activations, groups, first_token, seed, points)
        tables["steps"] = step_table(activations, groups, settings.alignment_steps, first_token, seed)
        if settings.alignment_readouts:
            tables["readouts"] = readout_table(activations, groups, first_token, seed)
        if settings.mask_sparsity:
            tables["masks"] = mask_table(activations, groups, settings.mask_sparsity, first_token, seed)
    if settings.kv_rank:
        tables |= kv_tables(activations, settings.kv_rank, layers, first_token, seed)
    return tables
