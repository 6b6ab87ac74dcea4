"""Packets whose numbers follow from their tokens, so that any two writers agree and any reader can check."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from probes.store import ActivationStore, Packet, Ragged

CONTEXT = {"weights": "w0", "backend": "native", "dtype": "float32", "attention": "sdpa", "edits": "none"}
FEATURES = ("resid_post.0/rows", "resid_post.1/rows", "resid_post.1/last")
Tokens = tuple[int, ...]


def expected(tokens: Sequence[int], feature: str, width: int = 4) -> Tensor:
    """[n_rows, width]: all rows, or the last one for a feature that ends in `last`."""
    base = torch.tensor(tokens, dtype=torch.float32)[:, None] * 10 + len(feature) + int(feature.split("/")[0][-1])
    rows = base + torch.arange(width, dtype=torch.float32)
    return rows[-1:] if feature.endswith("last") else rows


def make(
    sequences: Sequence[Tokens], features: Sequence[str] = FEATURES, width: int = 4, weights: str = "w0"
) -> Packet:
    table = {}
    for feature in features:
        parts = [expected(tokens, feature, width) for tokens in sequences]
        table[feature] = Ragged(torch.cat(parts), tuple(len(part) for part in parts))
    return Packet({**CONTEXT, "weights": weights}, tuple(sequences), table)


def numbered(i: int, length: int = 3) -> Tokens:
    """The i-th of as many different sequences as one likes."""
    return tuple(range(100 * i, 100 * i + length))


def check_rows(store: ActivationStore, sequences: Sequence[Tokens], features: Sequence[str] = FEATURES) -> None:
    """Every row is there and right."""
    for feature in features:
        for tokens, rows in zip(sequences, store.read(CONTEXT, sequences, feature), strict=True):
            torch.testing.assert_close(rows, expected(tokens, feature, rows.shape[1]), rtol=0, atol=0)


def shard_files(store: ActivationStore) -> list[str]:
    return sorted(path.stem for path in store.root.glob("shards/*/*.safetensors"))
