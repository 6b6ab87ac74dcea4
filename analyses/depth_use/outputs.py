"""What the model predicts from a changed stream, compared token by token with what it predicts unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import pi
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.blocks.batch import Chunk
from probes.models.protocol import Model, Unembedding
from probes.models.unembedding import logits_of

ROW_TILE = 128
"""Tokens whose logits are in memory at once."""
LENS_TOP = 5
"""Most probable tokens whose overlap is counted."""


@dataclass(frozen=True)
class Change:
    """Per token of a chunk, [n] float32 on the CPU, in the order of `Outputs.where`."""

    ce: Tensor
    """Cross-entropy of the prompt's own next token, nats; NaN at the last token."""
    jsd: Tensor
    """Jensen-Shannon divergence from the unchanged prediction, nats."""
    probability_distance: Tensor
    """Euclidean distance of the two probability vectors."""


@dataclass(frozen=True)
class Lens:
    """Per token of a chunk, what a layer's stream would predict; [n] float32 on the CPU."""

    kl: Tensor
    """KL(the layer's prediction || the final one), nats."""
    overlap: Tensor
    """Share of the layer's five most probable tokens that are among the final five."""


class Outputs:
    """The unchanged predictions at some positions of a chunk, kept for comparison.

    Args:
        where: the positions; all real tokens when left out.
    """

    def __init__(self, model: Model, chunk: Chunk, where: Bool[Tensor, "batch pos"] | None = None) -> None:
        self.where = chunk.real if where is None else where
        self.prompt = chunk.prompt_of(self.where)
        self._unembedding: Unembedding = model.unembedding()
        following = torch.full_like(chunk.tokens, -1)
        following[:, :-1] = torch.where(chunk.real[:, 1:], chunk.tokens[:, 1:], -1)
        self._next = following[self.where].to(chunk.stream[0].device)
        final = chunk.stream[-1][self._at(chunk.stream[-1])]
        tiles = [self._logits(final[part]) for part in _tiles(len(final))]
        self._clean = torch.cat(tiles)
        self._probabilities = self._clean.softmax(-1)
        self._entropy = _entropy(self._probabilities)
        self._top = self._clean.topk(min(LENS_TOP, self._clean.shape[-1]), dim=-1).indices
        self.ce = self.loss(chunk.stream[-1])
        """[n], of the unchanged model."""

    @property
    def top(self) -> Int[Tensor, " row"]:
        """Most probable next token of each row."""
        return self._top[:, 0]

    def _at(self, stream: Tensor) -> Tensor:
        return self.where.to(stream.device)

    @torch.no_grad()
    def _logits(self, rows: Tensor) -> Tensor:
        return logits_of(self._unembedding, rows).float()

    def loss(self, final: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, " row"]:
        """Return the cross-entropy of the next token when `final` leaves the last block; NaN where there is none."""
        rows = final[self._at(final)]
        return torch.cat([self._ce(self._logits(rows[part]), part) for part in _tiles(len(rows))]).cpu()

    def _ce(self, logits: Tensor, part: slice) -> Tensor:
        target = self._next[part]
        chosen = logits.gather(1, target.clamp_min(0)[:, None])[:, 0]
        return torch.where(target >= 0, logits.logsumexp(-1) - chosen, torch.nan)

    def change(self, final: Float[Tensor, "batch pos d_model"]) -> Change:
        """Return loss, divergence and distance when `final` leaves the last block."""
        rows = final[self._at(final)]
        parts = []
        for part in _tiles(len(rows)):
            logits, p = self._logits(rows[part]), self._probabilities[part]
            q = logits.softmax(-1)
            jsd = _entropy((p + q) / 2) - (self._entropy[part] + _entropy(q)) / 2
            distance = torch.linalg.vector_norm(p - q, dim=-1)
            parts.append((self._ce(logits, part), jsd.clamp_min(0), distance))
        return Change(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))

    def lens(self, stream: Float[Tensor, "batch pos d_model"]) -> Lens:
        """Return what a layer's stream would predict through the final norm and unembedding."""
        rows = stream[self._at(stream)]
        kl, overlap = [], []
        for part in _tiles(len(rows)):
            logits = self._logits(rows[part])
            read, final = logits.log_softmax(-1), self._clean[part].log_softmax(-1)
            kl.append((read.exp() * (read - final)).sum(-1).clamp_min(0))
            top = logits.topk(self._top.shape[1], dim=-1).indices
            shared = (top[:, :, None] == self._top[part][:, None, :]).any(-1)
            overlap.append(shared.float().mean(-1))
        return Lens(torch.cat(kl).cpu(), torch.cat(overlap).cpu())

    def logit_distance(
        self, final: Float[Tensor, "batch pos d_model"], distance: Literal["angular", "euclidean"]
    ) -> Float[Tensor, " row"]:
        """Return how far changed logits are from unchanged ones: the angle as a share of a half turn, or the distance."""
        rows = final[self._at(final)]
        distances = []
        for part in _tiles(len(rows)):
            logits, clean = self._logits(rows[part]), self._clean[part]
            if distance == "euclidean":
                distances.append(torch.linalg.vector_norm(logits - clean, dim=-1))
            else:
                cosine = torch.nn.functional.cosine_similarity(logits, clean, dim=-1)
                distances.append(cosine.clamp(-1, 1).acos() / pi)
        return torch.cat(distances).cpu()

    def distance(self, final: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, " row"]:
        """Return the Euclidean distance of changed and unchanged probability vectors."""
        rows = final[self._at(final)]
        distances = [
            torch.linalg.vector_norm(self._logits(rows[part]).softmax(-1) - self._probabilities[part], dim=-1)
            for part in _tiles(len(rows))
        ]
        return torch.cat(distances).cpu()


def _entropy(p: Tensor) -> Tensor:
    # Several times faster than torch.special.entr, which takes one number at a time; 0 log 0 is 0 here too.
    return -(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum(-1)


def _tiles(n: int) -> Iterator[slice]:
    # At least one tile, so that no rows give empty columns instead of none.
    return (slice(first, first + ROW_TILE) for first in range(0, max(n, 1), ROW_TILE))
