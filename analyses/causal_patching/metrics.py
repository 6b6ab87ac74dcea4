"""What a run's last row says of the answer: the metrics of a pair, many rows at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.causal_patching.pairs import Pair
from probes.lenses import logit as lens
from probes.models.protocol import Unembedding

Metric = Literal["logit_diff", "logprob", "prob", "prob_diff", "kl"]
UNITS: Mapping[str, str] = {
    "logit_diff": "logits", "logprob": "nats", "prob": "probability", "prob_diff": "probability", "kl": "nats",
}  # fmt: skip
"""What each metric is counted in."""
MIN_KL = 0.01
"""Nats between the clean and the corrupted run below which a divergence cannot be shared out."""


def metrics_of(
    names: Sequence[str],
    scores: Float[Tensor, "row token"],
    n_answers: int,
    kl: Float[Tensor, " row"],
    detached: bool = True,
) -> Float[Tensor, "row metric"]:
    """Return the metrics of rows from the log-probabilities of answers and, after them, distractors.

    `logit_diff` is the mean of the answers less that of the distractors, for which logits do as well.

    Args:
        names: metrics, the columns of the result.
        scores: log-probabilities, in nats.
        n_answers: how many of the tokens are answers.
        kl: divergence from the clean run, in nats; empty where it is not among the metrics.
        detached: float64 on the CPU, for tables; otherwise as it came, for gradients.
    """
    answers, distractors = scores[:, :n_answers], scores[:, n_answers:]
    columns = {
        "logit_diff": lambda: answers.mean(-1) - distractors.mean(-1),
        "logprob": lambda: answers.logsumexp(-1),
        "prob": lambda: answers.exp().sum(-1),
        "prob_diff": lambda: answers.exp().sum(-1) - distractors.exp().sum(-1),
        "kl": lambda: kl,
    }
    table = torch.stack([columns[name]() for name in names], dim=-1)
    return table.double().cpu() if detached else table


@dataclass(frozen=True, eq=False)
class RowReader:
    """Reads what leaves the last block at the last position."""

    unembedding: Unembedding
    pair: Pair
    names: tuple[str, ...]
    clean: Float[Tensor, " d_model"]
    """The clean run's row, to which `kl` compares."""

    @torch.no_grad()
    def read(self, rows: Float[Tensor, "row d_model"]) -> Float[Tensor, "row metric"]:
        """Return the metrics of rows; a run over all tokens happens only for metrics that need their probabilities."""
        ids = torch.tensor(self.pair.ids, device=self.unembedding.weight.device)
        n = len(self.pair.answers)
        if set(self.names) == {"logit_diff"}:
            scores = lens.token_logits(lens.normalized(rows, self.unembedding), self.unembedding, ids)
            return metrics_of(self.names, scores, n, scores.new_empty(0))
        reference = self.clean[None] if "kl" in self.names else None
        of = torch.zeros(len(rows), dtype=torch.long)
        read = lens.read(rows, self.unembedding, ids=ids, reference=reference, reference_of=of)
        return metrics_of(self.names, read.logprobs, n, read.kl)


@dataclass(frozen=True, eq=False)
class LogitReader:
    """Reads whole rows of logits, for models whose last row cannot be unembedded by itself."""

    pair: Pair
    names: tuple[str, ...]
    clean: Float[Tensor, " d_vocab"]

    @torch.no_grad()
    def read(self, rows: Float[Tensor, "row d_vocab"]) -> Float[Tensor, "row metric"]:
        """Return the metrics of rows of logits."""
        logprobs = rows.float().log_softmax(-1)
        clean = self.clean.float().log_softmax(-1)
        kl = (clean.exp() * (clean - logprobs)).sum(-1)
        scores = logprobs[:, torch.tensor(self.pair.ids, device=rows.device)]
        return metrics_of(self.names, scores, len(self.pair.answers), kl)
