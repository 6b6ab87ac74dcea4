"""What is read at each token's exit layer, beside controls of equal skipping."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from analyses.voids.norm_gates import NormGate, RandomGate
from analyses.voids.trace import Item, Trace
from probes.batches import Batch, batches
from probes.capture.activations import Activations
from probes.edits import Edit
from probes.lenses import logit
from probes.models.protocol import Model, Write
from probes.points import Address
from probes.reducers import Reducer

LAST = Reducer(positions="last")
GATED_TOKENS = 1024
"""Padded tokens per gated forward."""

Tokens = NDArray[np.int64]
"""Indices of tokens in the packed order of all items."""


@dataclass(frozen=True, eq=False)
class Masked:
    """The model while blocks are skipped: as the rule says, and as many at random."""

    trace: Trace
    """Of the rule on the masked stream."""
    last: Mapping[str, Tensor]
    """Per variant (`voids`, `random_voids`), the last block's output [tokens, d_model]."""
    forwards: int
    """Sequences that were run."""


def run_masked(model: Model, items: Sequence[Item], gates: Mapping[float, NormGate], seed: int) -> Masked:
    """Every item under its alpha's gate, and under random gates that skip each block at the rule's rate."""
    trace, voids = gated_trace(model, items, gates)
    alphas, active = np.repeat([i.alpha for i in items], [len(i.sequence) for i in items]), trace.active.numpy()
    rates = {alpha: tuple(1 - active[:, alphas == alpha].mean(axis=1)) for alpha in gates}
    random = gated_rows(model, items, {alpha: RandomGate(rate, seed) for alpha, rate in rates.items()})
    return Masked(trace, {"voids": voids, "random_voids": random}, 2 * len(items))


def gated_trace(model: Model, items: Sequence[Item], gates: Mapping[float, NormGate]) -> tuple[Trace, Tensor]:
    """The rule's trace while void blocks are skipped, and the last block's output [tokens, d_model]."""
    parts: list[Trace | None] = [None] * len(items)
    hidden: list[Tensor | None] = [None] * len(items)
    for alpha, batch, members in _gated_batches(items):
        writes, record = gates[alpha].recorded(model.shape)
        last = _last_block(model, batch, writes)
        fields = (record.norms[1:], record.steps, record.thresholds, record.active)
        for row, (index, n) in enumerate(zip(members, batch.lengths, strict=True)):
            parts[index] = Trace(*(torch.stack([entry[row, :n].cpu() for entry in field]) for field in fields))
            hidden[index] = last[row, :n]
    return Trace.joined([part for part in parts if part is not None]), torch.cat([h for h in hidden if h is not None])


def gated_rows(model: Model, items: Sequence[Item], gates: Mapping[float, Edit]) -> Float[Tensor, "tokens d_model"]:
    """The last block's output under each alpha's gate; [tokens, d_model]."""
    hidden: list[Tensor | None] = [None] * len(items)
    for alpha, batch, members in _gated_batches(items):
        last = _last_block(model, batch, gates[alpha].writes(model.shape))
        for row, (index, n) in enumerate(zip(members, batch.lengths, strict=True)):
            hidden[index] = last[row, :n]
    return torch.cat([h for h in hidden if h is not None])


def _gated_batches(items: Sequence[Item]) -> Iterator[tuple[float, Batch, list[int]]]:
    for alpha in dict.fromkeys(item.alpha for item in items):
        members = [i for i, item in enumerate(items) if item.alpha == alpha]
        for batch in batches([items[i].sequence for i in members], GATED_TOKENS):
            yield alpha, batch, [members[index] for index in batch.indices]


def _last_block(model: Model, batch: Batch, writes: Mapping[Address, Write]) -> Tensor:
    kept: list[Tensor] = []
    address = Address("resid_post", model.shape.n_layers - 1)
    model.run(batch.tokens, {address: lambda tensor: kept.append(tensor.float().cpu())}, writes, batch.lengths)
    return kept[0]


def fixed_exits(exits: Tokens) -> Tokens:
    """As many exits [n] at the same mean depth, all in the two layers next to that mean.

    One layer alone would have to be rounded: to the last one where few tokens leave early, and then nothing would be left
    out at all.
    """
    low, deeper = divmod(int(exits.sum()), len(exits))
    return low + (np.arange(len(exits)) < deeper).astype(np.int64)


@dataclass(frozen=True)
class Readings:
    """What is predicted at some tokens, beside the full model."""

    top: NDArray[np.int64]
    """[tokens], the most probable next token as read."""
    full_top: NDArray[np.int64]
    """[tokens], the full model's."""
    kl: NDArray[np.float32]
    """[tokens], KL(full || read) in nats."""

    @property
    def changed(self) -> NDArray[np.bool_]:
        """[tokens], whether the most probable token is another than the full model's."""
        return self.top != self.full_top


@dataclass(frozen=True)
class Reader:
    """The residual rows that the full model, the gated model and its controls read."""

    model: Model
    activations: Activations
    items: Sequence[Item]
    frame: pd.DataFrame
    """One row per token of all items."""
    trace: Trace
    reducer: Reducer
    """How rows were captured: all rows, or the last of each prompt."""
    masked: Mapping[str, Tensor]
    """Under mode `skip`, per variant the last block's output [tokens, d_model]; else empty."""
    seed: int

    def full(self, tokens: Tokens) -> Float[Tensor, "tokens d_model"]:
        """The last block's output of the full model, [tokens, d_model]."""
        return self._at_layer(tokens, np.full(len(tokens), self.model.shape.n_layers - 1))

    def read(self, tokens: Tokens) -> Float[Tensor, "tokens d_model"]:
        """What the gated model reads, [tokens, d_model]."""
        return self._at_layer(tokens, self.exits(tokens)) if not self.masked else self.masked["voids"][tokens]

    def exits(self, tokens: Tokens) -> Tokens:
        """The last active layer of each token; -1 is the embedding."""
        return np.asarray(self.trace.exit_layer.numpy()[tokens])

    def variants(self, tokens: Tokens) -> dict[str, Readings]:
        """`voids`: what the rule reads; then what as much skipping reads without the rule."""
        if self.masked:
            return {name: self._compare(self.full(tokens), rows[tokens]) for name, rows in self.masked.items()}
        alphas, exits = self.frame["alpha"].to_numpy()[tokens], self.exits(tokens)
        fixed, shuffled = exits.copy(), exits.copy()
        rng = np.random.default_rng(self.seed)
        for alpha in dict.fromkeys(alphas):
            rows = np.flatnonzero(alphas == alpha)
            shuffled[rows] = rng.permutation(exits[rows])
            fixed[rows] = rng.permutation(fixed_exits(exits[rows]))
        return self._at_exits(tokens, {"voids": exits, "fixed_exit": fixed, "shuffled_exit": shuffled})

    def prompt_ends(self) -> Tokens:
        """The last prompt token of each item."""
        return np.asarray(self._starts()[:-1] + np.array([item.prompt_length - 1 for item in self.items]))

    def _at_exits(self, tokens: Tokens, variants: Mapping[str, Tokens]) -> dict[str, Readings]:
        """Readings of each variant; a stream row that several alphas or variants read is read once."""
        first_of = {item.sequence: i for i, item in reversed(list(enumerate(self.items)))}
        items, positions = self._locate(tokens)
        owner = np.array([first_of[self.items[i].sequence] for i in items], dtype=np.int64)
        same_row = self._starts()[owner] + positions
        reads = np.concatenate([np.stack([same_row, exits], axis=1) for exits in variants.values()])
        pairs, index = np.unique(reads, axis=0, return_inverse=True)
        rows, row_of = np.unique(pairs[:, 0], return_inverse=True)
        read = self._compare(self.full(rows), self._at_layer(pairs[:, 0], pairs[:, 1]), row_of)
        parts = np.split(index.reshape(-1), len(variants))
        return {
            name: Readings(read.top[i], read.full_top[i], read.kl[i]) for name, i in zip(variants, parts, strict=True)
        }

    def _compare(self, full: Tensor, read: Tensor, of: Tokens | None = None) -> Readings:
        """`read` rows against the `full` rows they belong to (row i to row i where `of` is left out)."""
        of = np.arange(len(read)) if of is None else of
        unembedding = self.model.unembedding()
        best = logit.read(full, unembedding, top_k=1).top_ids[:, 0].cpu().numpy()[of]
        same = (full[of] == read).all(dim=-1)
        top, kl = best.copy(), np.zeros(len(read), dtype=np.float32)
        different = np.flatnonzero(~same.numpy())
        if len(different):
            target = torch.from_numpy(of[different])
            readings = logit.read(read[different], unembedding, top_k=1, reference=full, reference_of=target)
            top[different] = readings.top_ids[:, 0].cpu().numpy()
            kl[different] = readings.kl.cpu().numpy()
        return Readings(top, best, kl)

    def _starts(self) -> Tokens:
        return np.cumsum([0, *(len(item.sequence) for item in self.items)])

    def _locate(self, tokens: Tokens) -> tuple[Tokens, Tokens]:
        starts = self._starts()
        items = np.searchsorted(starts, tokens, side="right") - 1
        return items, tokens - starts[items]

    def _at_layer(self, tokens: Tokens, layers: Tokens) -> Tensor:
        items, positions = self._locate(tokens)
        readings = torch.empty(len(tokens), self.model.shape.d_model)
        for layer in np.unique(layers):
            address = Address("resid_pre", 0) if layer < 0 else Address("resid_post", int(layer))
            stored = self.activations.get(address, self.reducer)
            for row in np.flatnonzero(layers == layer):
                readings[row] = stored[items[row]][0 if self.reducer == LAST else positions[row]]
        return readings
