"""What is read where a program ends: how probable the answer and the own text are, and how far from the plain prediction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from analyses.layer_programs.questions import Question
from analyses.results.statistics import Array
from probes.models.protocol import Model
from probes.models.unembedding import logits_of

Metric = Literal["answer", "first_token", "correct", "loss", "kl"]
METRICS: tuple[Metric, ...] = ("answer", "first_token", "correct", "loss", "kl")
UNITS: dict[Metric, str] = {
    "answer": "nats of the answer", "first_token": "nats of the answer's first token", "correct": "share of right answers",
    "loss": "nats a token", "kl": "nats from the plain prediction",
}  # fmt: skip
LOWER_IS_BETTER: frozenset[str] = frozenset({"loss", "kl"})
ROW_TILE = 256
"""Positions whose logits are in memory at once."""


@dataclass(frozen=True, eq=False)
class Readings:
    """What programs of one prompt end in, one entry a program; NaN where the stream is not finite."""

    values: dict[Metric, Array]
    """[program] of each metric that was asked for, and of `correct`."""
    said: NDArray[np.int64]
    """[program], the next token, or the likeliest of the choices."""
    confidence: Array
    """[program], log-probability of what is said."""
    written: NDArray[np.bool_]
    """[program], whether greedy decoding writes the whole answer: each of its tokens is the likeliest after those before."""
    norm: Array
    """[program], Euclidean norm of the last stream at the prompt's last position."""


class Reader:
    """Reads the final streams of programs of several questions; a node that several read is read once.

    Args:
        paths: of each question, the nodes of the positions that programs act on.
        plain: the plain final stream, [node, d_model].
    """

    def __init__(
        self,
        model: Model,
        questions: Sequence[Question],
        metrics: tuple[Metric, ...],
        paths: Sequence[Sequence[int]],
        plain: Tensor,
    ) -> None:
        self.questions, self.metrics = questions, metrics
        self._unembedding = model.unembedding()
        wide = "loss" in metrics or "kl" in metrics
        # Answers alone need no position of the own text.
        places = [
            [path[place - question.start] for place in question.places[: None if wide else _answered(question)]]
            for question, path in zip(questions, paths, strict=True)
        ]
        said = [
            node for question, nodes in zip(questions, places, strict=True) for node in nodes[: _answered(question)]
        ]
        self._nodes = list(dict.fromkeys((*said, *(node for nodes in places for node in nodes))))
        self._said = len(dict.fromkeys(said))
        """The first so many nodes are those at which an answer is said."""
        column = {node: at for at, node in enumerate(self._nodes)}
        self._columns = [[column[node] for node in nodes] for nodes in places]
        self._pairs = {pair: at for at, pair in enumerate(sorted({*self._needed()}))}
        """By (column, token), the place of each logit that is kept."""
        self._clean: Tensor | None = None
        if "kl" in metrics:
            self._clean = logits_of(self._unembedding, plain[self._nodes]).float().log_softmax(-1)

    def _needed(self) -> Iterator[tuple[int, int]]:
        for question, columns in zip(self.questions, self._columns, strict=True):
            yield from zip(columns, question.targets, strict=False)
            yield from ((columns[0], token) for token in (*_firsts(question), *question.choices))

    @torch.no_grad()
    def read(self, final: Float[Tensor, "row node d_model"]) -> list[Readings]:
        """Return what the final streams of programs say of each question."""
        rows = final[:, self._nodes]
        n, wide = rows.shape[:2]
        logits, log_z, kl = rows.new_empty(n, len(self._pairs)).float(), *rows.new_zeros(2, n, wide).float()
        top, said = log_z.new_empty(n, self._said), torch.empty(n, self._said, dtype=torch.long, device=rows.device)
        high = min(n, ROW_TILE)
        for low in range(0, n, high):
            for first in range(0, wide, max(1, ROW_TILE // high)):
                some = slice(low, low + high), slice(first, first + max(1, ROW_TILE // high))
                self._tile(rows[some], some, logits, log_z, kl, top, said)
        norm = torch.linalg.vector_norm(rows[:, : self._said].double(), dim=-1).cpu().numpy()
        log_p = (logits - log_z[:, [column for column, _ in self._pairs]]).cpu()
        confidence, said, kl = (top - log_z[:, : self._said]).cpu(), said.cpu(), kl.cpu()
        return [self._readings(at, log_p, confidence, said, kl, norm) for at in range(len(self.questions))]

    def _tile(
        self,
        rows: Tensor,
        some: tuple[slice, slice],
        logits: Tensor,
        log_z: Tensor,
        kl: Tensor,
        top: Tensor,
        said: Tensor,
    ) -> None:
        """Fill in, for some rows and nodes: logits that are kept, the log of the sum, KL, and the likeliest token with its logit."""
        every, first = logits_of(self._unembedding, rows).float(), some[1].start
        total = every.logsumexp(-1)
        log_z[some] = total.to(log_z.device)
        for (column, token), at in self._pairs.items():
            if first <= column < first + every.shape[1]:
                logits[some[0], at] = every[:, column - first, token].to(logits.device)
        if first < self._said:
            best = every[:, : self._said - first].max(-1)
            top[some], said[some] = best.values.to(top.device), best.indices.to(said.device)
        if self._clean is not None:
            clean = self._clean[some[1]]
            p = clean.exp()
            each = (p * clean).sum(-1) - torch.einsum("pv,rpv->rp", p, every) + total
            kl[some] = each.clamp_min(0).to(kl.device)

    def _readings(self, at: int, log_p: Tensor, confidence: Tensor, said: Tensor, kl: Tensor, norms: Array) -> Readings:
        """Return what programs say of one question."""
        question, columns = self.questions[at], self._columns[at]
        a, targets = _answered(question), question.targets[: len(columns)]
        chosen = log_p[:, [self._pairs[pair] for pair in zip(columns, targets, strict=True)]]
        likeliest = log_p[:, [self._pairs[columns[0], token] for token in _firsts(question)]].amax(-1)
        likely, token = confidence[:, columns[0]], said[:, columns[0]]
        greedy = said[:, columns[:a]]
        if len(question.answer) <= 1:
            written = torch.isin(token, torch.tensor(_firsts(question)))
        else:
            written = (greedy == torch.tensor(targets[:a])).all(-1)
        if question.choices:
            best = log_p[:, [self._pairs[columns[0], token] for token in question.choices]].max(-1)
            likely, token = best.values, torch.tensor(question.choices)[best.indices]
        right = np.array([question.right(int(each)) for each in token], dtype=np.float64)
        values: dict[Metric, Array] = {
            "answer": chosen[:, :a].sum(1).double().numpy(),
            "first_token": likeliest.double().numpy(),
            "correct": right,
            "kl": kl[:, columns].mean(1).double().numpy(),
        }
        if not question.answer or len(question.answer) == 1:
            # Ids of which any is right have no one text: the likeliest stands for the answer.
            values["answer"] = values["first_token"]
        if "loss" in self.metrics:
            values["loss"] = -chosen[:, a:].double().mean(1).numpy()
        norm = norms[:, columns[0]]
        finite = np.isfinite(norm) & np.isfinite(likely.numpy())
        kept = {name: np.where(finite, values[name], np.nan) for name in {*self.metrics, "correct"}}
        kept["correct"] = np.where(finite, right, 0.0)
        return Readings(
            kept, token.numpy(), likely.double().numpy(), written.numpy() & finite, np.where(finite, norm, np.inf)
        )


def _answered(question: Question) -> int:
    """Return at how many places the answer is read, the first of all that are."""
    return max(1, len(question.answer))


def _firsts(question: Question) -> list[int]:
    """Return the tokens that begin a right answer; where there is none, one that stands for it."""
    return sorted(question.firsts) or [0]
