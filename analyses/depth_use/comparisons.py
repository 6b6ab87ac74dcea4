"""The tables that compare groups of prompts, and layers with layers."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from analyses.depth_use.kv_subspaces import kv_tables
from analyses.depth_use.stream_settings import StreamSettings
from analyses.similarity.alignment import alignment_table, norm_table
from analyses.similarity.groups import names_of
from analyses.similarity.masks import mask_table
from analyses.similarity.readouts import readout_table
from analyses.similarity.steps import step_table
from probes.capture.activations import Activations


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
