"""Responses of a model, written once and kept in the store."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch

from probes.blocks.cached_prompt import CachedPrompt
from probes.blocks.decoding import Continuation, end_tokens
from probes.capture.run import context_of
from probes.edits import Edit, generate
from probes.models.backends.native import NativeModel
from probes.models.protocol import Model
from probes.progress import QUIET, Progress
from probes.store import ActivationStore, Packet, Ragged

TOGETHER = 32
"""Texts written together."""


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
    """(the response to each sequence, those that had to be written now).

    Greedy ones of a model whose blocks are at hand are written together, each with the tokens it has alone.
    """
    context = context_of(model, edits)
    distinct = list(dict.fromkeys(sequences))
    present = store.contains(context, distinct, [decoding.key])[:, 0]
    missing = [s for s, has in zip(distinct, present, strict=True) if not has]
    progress.start(len(missing), "response")
    new = []
    for sequence, written in _written(model, missing, decoding, edits):
        new.append(written)
        tokens = torch.tensor(written, dtype=torch.int64)
        store.put(Packet(context, (sequence,), {decoding.key: Ragged(tokens, (len(written),))}))
        progress.advance()
    values = store.read(context, list(sequences), decoding.key)
    return [tuple(int(t) for t in value) for value in values], new


Tokens = tuple[int, ...]


def _written(
    model: Model, sequences: Sequence[Tokens], decoding: Decoding, edits: Sequence[Edit]
) -> Iterator[tuple[Tokens, Tokens]]:
    """Yield each sequence with its response."""
    greedy = decoding.temperature == 0 and not edits
    for first in range(0, len(sequences), TOGETHER):
        part = sequences[first : first + TOGETHER]
        alone = list(part)
        if greedy and len(part) > 1 and isinstance(model, NativeModel) and model.shape.causal:
            ends = end_tokens(model.module)
            # One token leaves nothing to go on from, and after an end token nothing would be written.
            joint = [s for s in part if 1 < len(s) <= model.shape.n_ctx - decoding.max_new_tokens and s[-1] not in ends]
            yield from zip(joint, _together(model, joint, decoding.max_new_tokens, ends), strict=True)
            alone = [sequence for sequence in part if sequence not in set(joint)]
        for sequence in alone:
            yield sequence, tuple(
                generate(
                    model, sequence, decoding.max_new_tokens, edits,
                    temperature=decoding.temperature, top_p=decoding.top_p, seed=decoding.seed,
                )
            )  # fmt: skip


@torch.no_grad()
def _together(model: NativeModel, sequences: Sequence[Tokens], n: int, ends: Collection[int]) -> list[Tokens]:
    """Return the greedy continuations of sequences of two tokens and more, each read by itself and written with the others."""
    read = []
    for sequence in sequences:
        cached = CachedPrompt(model, sequence[:-1], 0)
        plain = cached.resume([model.shape.n_layers], cached.entering[-1][None], keep=True)
        read.append([(keys[0].clone(), values[0].clone()) for keys, values in plain.suffix])
    if not read:
        return []
    texts = Continuation(model, read, [None] * len(read))
    new = texts.write([sequence[-1] for sequence in sequences], [n + 1] * len(read), ends)
    return [tuple(text[1:]) for text in new]
