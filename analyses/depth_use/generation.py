"""What a model writes without a part of a block, beside what it would lose by it on its own text (Song et al. 2025, arXiv 2510.02091).

Up to the first token at which the two differ, the model without the part reads the same text as the plain model. So one
forward over the plain model's text tells the first difference of every removal, and only what follows it has to be written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from analyses.depth_use.answers import Judge
from analyses.depth_use.settings import Settings, Tick
from analyses.results.statistics import Array
from probes.blocks.batch import left_out
from probes.blocks.cached_prompt import CachedPrompt
from probes.blocks.decoding import Continuation, KeyValues, Place, end_tokens
from probes.models.protocol import BlockAccess
from probes.models.unembedding import logits_of
from probes.prompts import Prompt

KEPT_BYTES = 2**28
"""Keys and values of texts in memory at once."""
TEXTS = 64
"""Texts written at once, at most."""

Tokens = tuple[int, ...]


@dataclass(eq=False)
class Written:
    """What the model writes after one prompt, plainly or without one part of a block."""

    prompt: int
    removed: Place | None
    """None is the plain model."""
    tokens: Tokens
    ended: bool
    losses: Array
    """[token], cross-entropy of each written token under the plain model, nats."""
    right_logits: float
    """1 where the answer is right by the logits after the prompt, 0 where wrong, NaN where there is none."""
    right_generated: float
    """The same by what is written."""
    agrees: Array = field(default_factory=lambda: np.empty(0))
    """[token of the plain text], 1 where it is still the most probable token when the plain text before it is read."""
    delta_ce: Array = field(default_factory=lambda: np.empty(0))
    """[token of the plain text], rise of its cross-entropy, nats."""

    @property
    def diverged_at(self) -> int | None:
        """The first token, from 0, that is not the plain text's; None where all are."""
        differs = np.flatnonzero(self.agrees == 0)
        return int(differs[0]) if len(differs) else None


@dataclass(eq=False)
class _Open:
    """A text that is still to be written from its first difference on."""

    written: Written
    changed: KeyValues
    plain: KeyValues
    """Of the text before the difference, without the part and with it."""


def steps(n: int, settings: Settings, n_layers: int) -> dict[str, int]:
    """Count what is run at most, for `n` prompts."""
    rows = n * len(settings.generated(n_layers))
    return {
        "removals over the written text": rows,
        "written tokens": rows * (settings.generate_tokens - 1),
        "written texts read by the plain model": rows,
    }


class Generation:
    """The texts that follow the first prompts, plain and without each part.

    Args:
        responses: what the plain model writes after each of the first of them, greedily.
    """

    def __init__(
        self, model: BlockAccess, prompts: Sequence[Prompt], responses: Sequence[Tokens], settings: Settings, tick: Tick
    ) -> None:
        self.model, self.prompts, self.responses = model, prompts[: len(responses)], responses
        self.settings, self.tick = settings, tick
        self.ends = end_tokens(model.module)
        self.removals: list[Place] = settings.generated(model.shape.n_layers)
        self._judges = [Judge(model, index, prompt) for index, prompt in enumerate(self.prompts)]
        self._open: list[_Open] = []

    def texts(self) -> list[Written]:
        """Return what is written after every prompt, the plain text before those without a part."""
        written: list[Written] = []
        for index in range(len(self.prompts)):
            written += self._compare(index)
            if self._open_bytes() > KEPT_BYTES or len(self._open) >= TEXTS:
                self._write()
        self._write()
        return written

    def _open_bytes(self) -> int:
        return sum(side.nbytes for one in self._open for pair in one.changed for side in pair)

    @torch.no_grad()
    def _compare(self, index: int) -> Iterator[Written]:
        """Read one plain text without each part; yield all that is known by it, and keep open what differs."""
        prompt, text = self.prompts[index].tokens, self.responses[index]
        cached = CachedPrompt(self.model, (*prompt, *text[:-1]), 0)
        n_layers, after = self.model.shape.n_layers, len(prompt) - 1
        plain = cached.resume([n_layers], cached.entering[n_layers][None], keep=True)
        assert plain.leaving is not None
        logits = self._logits(plain.leaving[0, after:])
        losses, judge = _losses(logits, text), self._judges[index]
        judged = (judge.by_logits(logits[0]), judge.by_text(text))
        yield Written(index, None, text, text[-1] in self.ends, losses, *judged)
        own = [(keys[0].clone(), values[0].clone()) for keys, values in plain.suffix]
        plainly = logits.log_softmax(-1)
        for places in self._parts(own):
            entering = torch.stack([_entering(cached, place) for place in places])
            changed = cached.resume([layer + 1 for _, layer in places], entering, keep=True)
            assert changed.leaving is not None
            for row, place in enumerate(places):
                logits = self._logits(changed.leaving[row, after:])
                best = logits.argmax(-1).cpu()
                agrees = (best == torch.tensor(text)).double().numpy()
                one = Written(
                    index, place, text, text[-1] in self.ends, losses,
                    judge.by_logits(logits[0]), judged[1], agrees, _losses(logits, text) - losses,
                )  # fmt: skip
                if (at := one.diverged_at) is not None:
                    one.tokens = (*text[:at], int(best[at]))
                    one.losses = np.append(losses[:at], -float(plainly[at, int(best[at])]))
                    n = len(prompt) + at
                    before = [(keys[row, :, :n].clone(), values[row, :, :n].clone()) for keys, values in changed.suffix]
                    self._open.append(_Open(one, before, [(keys[:, :n], values[:, :n]) for keys, values in own]))
                yield one
            self.tick(len(places))

    def _logits(self, rows: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_vocab"]:
        return logits_of(self.model.unembedding(), rows).float()

    def _parts(self, own: KeyValues) -> Iterator[list[Place]]:
        """Yield removals whose keys and values fit into memory together."""
        together = max(1, min(TEXTS, KEPT_BYTES // sum(side.nbytes for pair in own for side in pair)))
        for first in range(0, len(self.removals), together):
            yield self.removals[first : first + together]

    @torch.no_grad()
    def _write(self) -> None:
        """Write what is open to its end, and read it with the plain model."""
        for first in range(0, len(self._open), TEXTS):
            some = self._open[first : first + TEXTS]
            changed = Continuation(self.model, [one.changed for one in some], [one.written.removed for one in some])
            starts = [len(one.written.tokens) for one in some]
            most = [self.settings.generate_tokens - start + 1 for start in starts]
            new = changed.write([one.written.tokens[-1] for one in some], most, self.ends, self.tick)
            del changed
            for one, tokens in zip(some, new, strict=True):
                one.written.tokens += tuple(tokens[1:])
                one.written.ended = one.written.tokens[-1] in self.ends
                one.written.right_generated = self._judges[one.written.prompt].by_text(one.written.tokens)
            self._read(some, starts)
        self._open.clear()

    def _read(self, some: Sequence[_Open], starts: Sequence[int]) -> None:
        """Enter what the plain model loses on the tokens of each text from `starts` on."""
        longer = [(one, start) for one, start in zip(some, starts, strict=True) if len(one.written.tokens) > start]
        if not longer:
            return
        plain = Continuation(self.model, [one.plain for one, _ in longer], [None] * len(longer))
        following = [one.written.tokens[start - 1 :] for one, start in longer]
        tokens = torch.zeros(len(longer), max(map(len, following)) - 1, dtype=torch.long)
        for row, text in enumerate(following):
            tokens[row, : len(text) - 1] = torch.tensor(text[:-1])
        leaving = plain.run(tokens)
        for row, ((one, _), text) in enumerate(zip(longer, following, strict=True)):
            losses = _losses(self._logits(leaving[row, : len(text) - 1]), text[1:])
            one.written.losses = np.append(one.written.losses, losses)
        self.tick(len(longer))


def _entering(cached: CachedPrompt, place: Place) -> Float[Tensor, "pos d_model"]:
    """Return what leaves a block of the cached text without one of its parts."""
    part, layer = place
    entering = cached.entering[layer]
    return entering if part == "block" else cached.through(layer, entering[None], left_out([place]))[0]


def _losses(logits: Float[Tensor, "pos d_vocab"], text: Tokens) -> Array:
    """Return the cross-entropy of each token of a text, nats."""
    tokens = torch.tensor(text, device=logits.device)[:, None]
    losses: Array = -logits.log_softmax(-1).gather(1, tokens)[:, 0].double().cpu().numpy()
    return losses
