"""What a Patchscope adds to its prompt: the lift of a watched token over the same prompt with rows that do not hold it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analyses.lenses.items import Watched
from analyses.lenses.watched import place_rows
from probes.capture.activations import Activations
from probes.lens_fits.patchscope import Patchscope, norm_matched_noise
from probes.lenses import logit
from probes.points import Address
from probes.reducers import ROWS

CONTROLS = ("unpatched", "foreign_row", "noise", "mean_row", "embedding")


def lift_table(
    activations: Activations, watched: Sequence[Watched], patchscope: Patchscope, place: str, seed: int
) -> pd.DataFrame:
    """Return the log-probability of watched tokens at each source layer, the controls', and the lift over the greatest.

    Columns prompt, name, source_position, source_layer, target_layer, logprob, one a control, control_max, lift. Controls are
    the prompt without a patch, another prompt's row, noise of the same norm, the mean row, and the token's own embedding put
    in at the same layer: what the embedding gives too is computed by the upper blocks, and not read from the row.
    """
    model = activations.model
    items = [item for item in watched if place in item.places]
    unembedding, n_layers = model.unembedding(), model.shape.n_layers
    texts = activations.get(Address("embed"), ROWS)
    embedded = torch.stack([texts[item.prompt][item.places[place]] for item in items]).float()
    width = max(len(item.token_ids) for item in items)
    ids = torch.tensor([[*item.token_ids, *[item.token_ids[0]] * (width - len(item.token_ids))] for item in items])

    def said(rows: Tensor) -> np.ndarray:
        return logit.read(rows, unembedding, ids=ids).logprobs.amax(1).double().cpu().numpy()

    unpatched = said(patchscope.unpatched().expand(len(items), -1))
    parts = []
    for layer in range(n_layers - 1):
        rows = place_rows(activations, items, layer, place)
        variants = {
            "foreign_row": rows.roll(1, 0), "noise": norm_matched_noise(rows, seed + layer),
            "mean_row": rows.mean(0).expand_as(rows), "embedding": embedded,
        }  # fmt: skip
        columns = {name: said(patchscope.readable(variant, layer)) for name, variant in variants.items()}
        part = pd.DataFrame(
            {
                "prompt": [item.prompt for item in items], "name": [item.name for item in items],
                "source_position": [item.places[place] for item in items], "source_layer": layer,
                "target_layer": layer if patchscope.into is None else patchscope.into,
                "logprob": said(patchscope.readable(rows, layer)), "unpatched": unpatched, **columns,
            }
        )  # fmt: skip
        part["control_max"] = part[list(CONTROLS)].max(axis=1)
        part["lift"] = part["logprob"] - part["control_max"]
        parts.append(part)
    return pd.concat(parts, ignore_index=True)
