"""Stored streams of prompts of similar length as padded batches, for running blocks from any depth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from probes.batches import Batch, batches
from probes.blocks.batch import Chunk
from probes.capture.activations import Activations
from probes.points import Address

CHUNK_TOKENS = 1024
"""Padded tokens of a chunk, at most."""
CHUNK_LOGITS = 2**26
"""Log-probabilities of a chunk, at most, which bounds it for a model with a large vocabulary."""
STRETCH = 1.5
"""How many times longer than its shortest prompt the longest of a chunk may be."""


def chunks(activations: Activations, prompts: Sequence[int], *, together: bool = False) -> Iterator[Chunk]:
    """Yield the prompts of these indices in padded batches of similar length, or all in one where `together`.

    The stream before the first block, after every block, and what each block's attention adds must have been captured.
    """
    model, sequences = activations.model, activations.sequences
    n_layers = model.shape.n_layers
    limit = max(1, min(CHUNK_TOKENS, CHUNK_LOGITS // model.shape.d_vocab))
    stream_at = [Address("resid_pre", 0), *(Address("resid_post", layer) for layer in range(n_layers))]
    stream_rows = [activations.get(address) for address in stream_at]
    attn_rows = [activations.get(Address("attn_out", layer)) for layer in range(n_layers)]
    for group in [list(prompts)] if together else _alike(sequences, prompts):
        longest = max(len(sequences[i]) for i in group)
        for batch in batches([sequences[i] for i in group], longest * len(group) if together else limit):
            members = tuple(group[i] for i in batch.indices)
            stream, attn = (
                [padded([layer[i] for i in members], batch).to(model.device) for layer in rows]
                for rows in (stream_rows, attn_rows)
            )
            real = torch.arange(batch.tokens.shape[1]) < torch.tensor(batch.lengths)[:, None]
            yield Chunk(members, batch.tokens, real, stream, attn)


def padded(rows: Sequence[Float[Tensor, "_ d_model"]], batch: Batch) -> Float[Tensor, "batch pos d_model"]:
    """Return the rows of each of a batch's prompts as one tensor, zero where padded."""
    rectangle = rows[0].new_zeros(*batch.tokens.shape, rows[0].shape[-1])
    for index, row in enumerate(rows):
        rectangle[index, : len(row)] = row
    return rectangle


def _alike(sequences: Sequence[tuple[int, ...]], prompts: Sequence[int]) -> Iterator[list[int]]:
    """Groups of prompts whose lengths differ by at most `STRETCH`, so that little of a batch is padding."""
    group: list[int] = []
    for index in sorted(prompts, key=lambda i: len(sequences[i])):
        if group and len(sequences[index]) > STRETCH * len(sequences[group[0]]):
            yield group
            group = []
        group.append(index)
    if group:
        yield group
