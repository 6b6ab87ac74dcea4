"""What is read where a program ends: how probable the answer and the own text are, and how far from the plain prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from analyses.layer_programs.questions import Question
from probes.models.protocol import Model
from probes.models.unembedding import logits_of

Metric = Literal["answer", "first_token", "correct", "loss", "kl"]
Array = NDArray[np.float64]
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
    """Reads the final streams of programs of one question.

    Args:
        model: the model.
        question: what is read.
        metrics: what of it.
        plain: the plain final stream of the positions that programs act on, [pos, d_model].
    """

    def __init__(self, model: Model, question: Question, metrics: tuple[Metric, ...], plain: Tensor) -> None:
        self.question, self.metrics = question, metrics
        self._unembedding = model.unembedding()
        answered = max(1, len(question.answer))
        wide = "loss" in metrics or "kl" in metrics
        # Answers alone need no position of the own text.
        self._places = [place - question.start for place in question.places[: None if wide else answered]]
        self._targets = torch.tensor(question.targets[: len(self._places)])
        self._answered = answered
        self._clean: Tensor | None = None
        if "kl" in metrics:
            self._clean = logits_of(self._unembedding, plain[self._places]).float().log_softmax(-1)

    @torch.no_grad()
    def read(self, final: Float[Tensor, "row pos d_model"]) -> Readings:
        """Return what the final streams of programs say."""
        rows = final[:, self._places]
        tile = max(1, ROW_TILE // len(self._places))
        parts = [self._tile(rows[first : first + tile]) for first in range(0, len(rows), tile)]
        chosen, kl, said, confidence, likeliest, written = (
            torch.cat(column).cpu() for column in zip(*parts, strict=True)
        )
        a = self._answered
        right = np.array([self.question.right(int(token)) for token in said], dtype=np.float64)
        values: dict[Metric, Array] = {
            "answer": chosen[:, :a].sum(1).double().numpy(),
            "first_token": likeliest.double().numpy(),
            "correct": right,
            "kl": kl.double().numpy(),
        }
        if not self.question.answer or len(self.question.answer) == 1:
            # Ids of which any is right have no one text: the likeliest stands for the answer.
            values["answer"] = values["first_token"]
        if "loss" in self.metrics:
            values["loss"] = -chosen[:, a:].double().mean(1).numpy()
        norm = torch.linalg.vector_norm(rows[:, 0].double(), dim=-1).cpu().numpy()
        finite = np.isfinite(norm) & np.isfinite(confidence.numpy())
        kept = {name: np.where(finite, values[name], np.nan) for name in {*self.metrics, "correct"}}
        kept["correct"] = np.where(finite, right, 0.0)
        return Readings(
            kept, said.numpy(), confidence.double().numpy(), written.numpy() & finite, np.where(finite, norm, np.inf)
        )

    def _tile(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Return (log-probabilities of targets [row, place], KL [row], what is said, its log-probability, the likeliest right token's, written)."""
        logits = logits_of(self._unembedding, rows).float()
        log_z = logits.logsumexp(-1)
        targets = self._targets.to(logits.device).expand(len(rows), -1)
        chosen = logits.gather(-1, targets[..., None])[..., 0] - log_z
        kl = chosen.new_zeros(len(rows))
        if self._clean is not None:
            p = self._clean.exp()
            each = (p * self._clean).sum(-1) - torch.einsum("pv,rpv->rp", p, logits) + log_z
            kl = each.clamp_min(0).mean(1)
        first, choices = logits[:, 0], list(self.question.choices)
        if choices:
            best = first[:, choices].max(-1)
            said, top = torch.tensor(choices, device=first.device)[best.indices], best.values
        else:
            top, said = first.max(-1)
        firsts = sorted(self.question.firsts) or [0]
        greedy = logits[:, : self._answered].argmax(-1)
        written = (greedy == targets[:, : self._answered]).all(-1)
        if len(self.question.answer) <= 1:
            written = torch.isin(greedy[:, 0], torch.tensor(firsts, device=greedy.device))
        return chosen, kl, said, top - log_z[:, 0], first[:, firsts].amax(-1) - log_z[:, 0], written
