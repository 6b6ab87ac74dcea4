"""Captured rows of a list of prompts, read back from the store on demand."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from probes.batches import select
from probes.capture.lookup import Lookup
from probes.capture.needs import CapturePlan, Feature
from probes.errors import ModelError, StoreError
from probes.kernels import reduce_rows
from probes.models.protocol import Model
from probes.points import Address
from probes.reducers import ROWS, Reducer
from probes.store import DamagedShard


@dataclass(frozen=True)
class CaptureReport:
    """What a capture had to do, and did."""

    plan: CapturePlan
    forwards: int
    """Sequences run through the model, those of rows recaptured after damage among them."""
    bytes_written: int


class Activations:
    """Captured rows of a list of prompts, read back from the store on demand.

    Whatever follows from stored rows (a norm, the last row, a lens) is computed from them, with no forward.

    Args:
        model: the model that the rows were captured from.
        sequences: the prompts' token ids.
        lookup: the store, and the context under which it has the rows.
        done: what the capture did.
        live: returns the model's context as it is now.
        recapture: captures again what the store set aside as damaged.
        pinned: keeps the store's shards in place until these activations are gone.
    """

    def __init__(
        self,
        model: Model,
        sequences: list[tuple[int, ...]],
        lookup: Lookup,
        done: CaptureReport,
        live: Callable[[], dict[str, str]],
        recapture: Callable[[], CaptureReport],
        pinned: ExitStack,
    ) -> None:
        weakref.finalize(self, pinned.close)
        self.model, self.sequences, self.done = model, sequences, done
        self._lookup, self._live, self._recapture = lookup, live, recapture
        self._read: dict[tuple[str, tuple[int, ...]], None] = {}

    def get(self, address: Address | str, reducer: Reducer = ROWS) -> list[Tensor]:
        """Return one tensor per prompt, [rows, ...] ([head, query, key] for `pattern`).

        Raises:
            StoreError: the rows were never captured.
            ModelError: they need the model once more (a lens, or damage), and it is no longer the one that made them.
        """
        address = Address.parse(address) if isinstance(address, str) else address
        feature = Feature(address.canonical, reducer)
        try:
            return self._get(feature)
        except DamagedShard:
            # The store has set the shard aside; its rows are captured again, once.
            self._check_unchanged()
            self.done = replace(self.done, forwards=self.done.forwards + self._recapture().forwards)
            return self._get(feature)

    def _get(self, feature: Feature) -> list[Tensor]:
        candidates = (feature, *feature.parents())
        groups: dict[Feature, list[tuple[int, tuple[int, ...]]]] = {}
        for i, row in enumerate(self._lookup.sources(self.sequences, candidates)):
            stored = [
                (candidate, source) for candidate, source in zip(candidates, row, strict=True) if source is not None
            ]
            if not stored:
                raise StoreError(f"prompt {i} has no {feature.key!r} in the store: capture it first")
            candidate, source = stored[0]
            groups.setdefault(candidate, []).append((i, source))
        by_prompt: dict[int, Tensor] = {}
        for candidate, members in groups.items():
            values = self._values(candidate, members, feature.reducer)
            by_prompt.update(zip((i for i, _ in members), values, strict=True))
        return [by_prompt[i] for i in range(len(self.sequences))]

    def _values(self, feature: Feature, members: list[tuple[int, tuple[int, ...]]], reducer: Reducer) -> list[Tensor]:
        sequences, sources = [self.sequences[i] for i, _ in members], [source for _, source in members]
        values = self._lookup.read(sequences, feature, sources)
        self._read.update(dict.fromkeys((feature.key, source) for source in sources))
        pairs = zip(values, sequences, strict=True)
        if feature.address.point == "pattern":
            return [self._shape_pattern(value, sequence, feature, reducer) for value, sequence in pairs]
        if feature.reducer == reducer:
            return values
        if reducer.kind.startswith("lens"):
            self._check_unchanged()
        return [self._derive(value, sequence, feature, reducer) for value, sequence in pairs]

    def _check_unchanged(self) -> None:
        """Raises ModelError where the model is no longer the one that made these rows."""
        if self._live() != dict(self._lookup.context):
            raise ModelError(
                f"{self.model.ref} has been changed since these rows were captured, so they cannot be captured again or read "
                "through its unembedding: put it back as it was, or capture anew"
            )

    def packed(self, address: Address | str, reducer: Reducer = ROWS) -> Tensor:
        """Return the rows of all prompts, one after the other."""
        return torch.cat(self.get(address, reducer))

    def keys(self) -> list[str]:
        """Return the shards read so far, for provenance."""
        by_feature: dict[str, list[tuple[int, ...]]] = {}
        for feature, sequence in self._read:
            by_feature.setdefault(feature, []).append(sequence)
        store, context = self._lookup.store, self._lookup.context
        shards = (store.shards_of(context, sequences, [feature]) for feature, sequences in by_feature.items())
        return list(dict.fromkeys(chain.from_iterable(shards)))

    def _derive(self, values: Tensor, sequence: tuple[int, ...], source: Feature, reducer: Reducer) -> Tensor:
        whole = source.reducer.positions == "all"
        index = select(len(sequence), reducer.positions) if whole else torch.arange(len(values))
        return reduce_rows(values, index, [len(index)], reducer, self.model.unembedding)

    def _shape_pattern(self, flat: Tensor, sequence: tuple[int, ...], source: Feature, reducer: Reducer) -> Tensor:
        length = len(sequence)
        block = flat.view(self.model.shape.n_heads, source.reducer.count(length), length)
        if source.reducer == reducer:
            return block
        return block.index_select(1, select(length, reducer.positions))
