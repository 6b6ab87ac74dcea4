"""Responses of a model, written once and kept in the store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from probes.capture.run import context_of
from probes.edits import Edit, generate
from probes.models.protocol import Model
from probes.progress import QUIET, Progress
from probes.store import ActivationStore, Packet, Ragged


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    @property
    def key(self) -> str:
        """Its name in the store; greedy decoding has no seed."""
        if self.temperature == 0:
            return f"response/greedy:{self.max_new_tokens}"
        return f"response/sample:{self.max_new_tokens},{self.temperature!r},{self.top_p!r},{self.seed}"


def respond(
    model: Model,
    sequences: Sequence[tuple[int, ...]],
    decoding: Decoding,
    store: ActivationStore,
    *,
    edits: Sequence[Edit] = (),
    progress: Progress = QUIET,
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """(the response to each sequence, those that had to be written now)."""
    context = context_of(model, edits)
    distinct = list(dict.fromkeys(sequences))
    present = store.contains(context, distinct, [decoding.key])[:, 0]
    missing = [s for s, has in zip(distinct, present, strict=True) if not has]
    new = []
    for sequence in progress.over(missing, "response"):
        written = generate(
            model,
            sequence,
            decoding.max_new_tokens,
            edits,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            seed=decoding.seed,
        )
        new.append(tuple(written))
        tokens = torch.tensor(written, dtype=torch.int64)
        store.put(Packet(context, (sequence,), {decoding.key: Ragged(tokens, (len(written),))}))
    values = store.read(context, list(sequences), decoding.key)
    return [tuple(int(t) for t in value) for value in values], new
