"""Where the store has the rows of a prompt: under its own tokens, or as the beginning of a longer sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from probes.capture.needs import Feature
from probes.store import Packet, Ragged, RowStore

CONTINUATION = "continuation"
"""Stored under a prompt: the token ids of a longer sequence, captured, that begins with it."""

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Lookup:
    """Finds rows in a store.

    In a causal model a row does not depend on later tokens, so a prompt's rows are also the first rows of any captured
    sequence that continues it.
    """

    store: RowStore
    context: Mapping[str, str]
    causal: bool

    @property
    def _prefixes(self) -> bool:
        return self.causal and self.context["edits"] == "none"

    def remember(self, sequences: Sequence[Tokens], prompt_lengths: Mapping[Tokens, int]) -> None:
        """Note in the store that each sequence continues the prompt of its first `prompt_lengths` tokens."""
        pairs = {s[: prompt_lengths[s]]: s for s in sequences if prompt_lengths.get(s, len(s)) < len(s)}
        if self._prefixes and pairs:
            ids = torch.tensor([token for s in pairs.values() for token in s], dtype=torch.int64)
            longer = Ragged(ids, tuple(len(s) for s in pairs.values()))
            self.store.put(Packet(self.context, tuple(pairs), {CONTINUATION: longer}))

    def sources(self, sequences: Sequence[Tokens], features: Sequence[Feature]) -> list[list[Tokens | None]]:
        """Return [sequences][features]: the sequence under which the store has the feature's rows, or None."""
        keys = [feature.key for feature in features]
        own = self.store.contains(self.context, sequences, keys)
        longer = self._continuations(sequences) if self._prefixes and not own.all() else {}
        closed = np.array([feature.reducer.per_position for feature in features])
        after = {s: row & closed for s, row in self._stored_by_sequence(list(longer.values()), keys).items()}
        nothing = np.zeros(len(features), dtype=bool)
        sources: list[list[Tokens | None]] = []
        for sequence, row in zip(sequences, own, strict=True):
            whole = longer.get(sequence)
            more = after[whole] if whole is not None else nothing
            sources.append([sequence if o else whole if m else None for o, m in zip(row, more, strict=True)])
        return sources

    def stored(self, sequences: Sequence[Tokens], features: Sequence[Feature]) -> np.ndarray:
        """Return whether the rows can be read, bool [sequences, features]."""
        return np.array([[s is not None for s in row] for row in self.sources(sequences, features)]).reshape(
            len(sequences), len(features)
        )

    def read(self, sequences: Sequence[Tokens], feature: Feature, sources: Sequence[Tokens]) -> list[Tensor]:
        """Return the stored values of `feature` for each sequence, read from its source."""
        values = self.store.read(self.context, sources, feature.key)
        triples = zip(values, sequences, sources, strict=True)
        return [value if s == whole else _beginning(value, feature, len(s), len(whole)) for value, s, whole in triples]

    def _stored_by_sequence(self, sequences: list[Tokens], keys: list[str]) -> dict[Tokens, np.ndarray]:
        if not sequences:
            return {}
        return dict(zip(sequences, self.store.contains(self.context, sequences, keys), strict=True))

    def _continuations(self, sequences: Sequence[Tokens]) -> dict[Tokens, Tokens]:
        has = self.store.contains(self.context, sequences, [CONTINUATION])[:, 0]
        known = [s for s, h in zip(sequences, has, strict=True) if h]
        if not known:
            return {}
        values = self.store.read(self.context, known, CONTINUATION)
        return {s: tuple(value.tolist()) for s, value in zip(known, values, strict=True)}


def _beginning(value: Tensor, feature: Feature, length: int, whole: int) -> Tensor:
    """The rows of the first `length` of `whole` tokens."""
    if feature.address.point == "pattern":
        return value.view(-1, whole, whole)[:, :length, :length].flatten()
    return value[:length]
