"""What a Patchscope adds to its prompt: the lift of a watched token over the same prompt with rows that do not hold it."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch

from analyses.lenses.items import Watched
from analyses.lenses.watched import place_rows
from probes.capture.activations import Activations
from probes.lens_fits.patchscope import Patchscope, norm_matched_noise
from probes.lenses import logit
from probes.points import Address
from probes.reducers import ROWS

CONTROLS = ("unpatched", "foreign_row", "noise", "mean_row", "embedding")


def lift_table(
    activations: Activations,
    watched: Sequence[Watched],
    patchscope: Patchscope,
    place: str,
    seed: int,
    layers: Sequence[int],
) -> pd.DataFrame:
    """Return the log-probability of watched tokens at source layers, the controls', and the lift over the greatest.

    Columns prompt, name, source_position, source_layer, target_layer, logprob, one a control, control_max, lift. Controls are
    the prompt without a patch, another prompt's row, noise of the same norm, the mean row, and the token's own embedding put
    in at the same layer: what the embedding gives too is computed by the upper blocks, and not read from the row.
    """
    model = activations.model
    items = [item for item in watched if place in item.places]
    unembedding = model.unembedding()
    texts = activations.get(Address("embed"), ROWS)
    embedded = torch.stack([texts[item.prompt][item.places[place]] for item in items]).float()
    width = max(len(item.token_ids) for item in items)
    ids = torch.tensor([[*item.token_ids, *[item.token_ids[0]] * (width - len(item.token_ids))] for item in items])

    variants = ("own", *CONTROLS[1:])
    patched = [patchscope.unpatched().expand(len(items), -1)]
    for layer in layers:
        rows = place_rows(activations, items, layer, place)
        put = {
            "own": rows, "foreign_row": rows.roll(1, 0), "noise": norm_matched_noise(rows, seed + layer),
            "mean_row": rows.mean(0).expand_as(rows), "embedding": embedded,
        }  # fmt: skip
        patched += [patchscope.readable(put[name], layer) for name in variants]
    read = logit.read(torch.cat(patched), unembedding, ids=ids.repeat(len(patched), 1))
    unpatched, *said = read.logprobs.amax(1).double().cpu().numpy().reshape(len(patched), len(items))
    parts = []
    for at, layer in enumerate(layers):
        columns = dict(zip(variants, said[at * len(variants) :], strict=False))
        part = pd.DataFrame(
            {
                "prompt": [item.prompt for item in items], "name": [item.name for item in items],
                "source_position": [item.places[place] for item in items], "source_layer": layer,
                "target_layer": layer if patchscope.into is None else patchscope.into,
                "logprob": columns.pop("own"), "unpatched": unpatched, **columns,
            }
        )  # fmt: skip
        part["control_max"] = part[list(CONTROLS)].max(axis=1)
        part["lift"] = part["logprob"] - part["control_max"]
        parts.append(part)
    return pd.concat(parts, ignore_index=True)
