"""Tables of the lenses compared: what each was fitted on, and what each reads of the given prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import torch

from analyses.reading.read_outs import positions_table, read_tables
from probes.capture.activations import Activations
from probes.lenses.protocol import Lens
from probes.points import Address
from probes.prompts import Prompt
from probes.reducers import ROWS

CHUNK = 8
"""Prompts read at once."""


def read_of(
    activations: Activations,
    prompts: Sequence[Prompt],
    lenses: Mapping[str, Lens],
    layers: Sequence[int],
    first_position: int,
    top_k: int,
) -> dict[str, pd.DataFrame]:
    """Return the tables `top` and `read` of prompts' positions from `first_position` on, some prompts at a time, one lens after the other."""
    places = [range(len(prompt.tokens))[first_position:] for prompt in prompts]
    stream = {
        layer: [
            rows[place.start :]
            for rows, place in zip(activations.get(Address("resid_post", layer), ROWS), places, strict=True)
        ]
        for layer in layers
    }
    tops, reads = [], []
    for first in range(0, len(prompts), CHUNK):
        chunk = slice(first, first + CHUNK)
        where = positions_table(activations.model, prompts, first, places[chunk])
        rows = {layer: torch.cat(own[chunk]).float() for layer, own in stream.items()}
        for name, lens in lenses.items():
            readable = torch.cat([lens.readable(rows[layer], layer).float() for layer in layers])
            top, read = read_tables(activations.model, readable, rows[layers[-1]], where, top_k, layers)
            tops.append(top.assign(lens=name))
            reads.append(read.assign(lens=name))
    return {"top": pd.concat(tops, ignore_index=True), "read": pd.concat(reads, ignore_index=True)}


def cards_table(lenses: Mapping[str, Lens]) -> pd.DataFrame:
    """Return one row a lens: what it was fitted on."""
    rows = []
    for name, lens in lenses.items():
        card = lens.card
        rows.append(
            {
                "lens": name, "kind": card.kind, "digest": card.tensors, "foreign": card.foreign, "corpus": card.corpus.name,
                "texts": card.corpus.texts, "tokens": card.corpus.tokens, "target": card.target,
                "length": card.options.get("length"), "dtype": card.dtype, "layers": len(card.layers), "reads": card.sentence(),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)
