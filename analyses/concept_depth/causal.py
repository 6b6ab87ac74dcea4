"""Whether the model uses what a probe reads: the probe's direction is projected out, and the answer read again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from analyses.answers import answer_after, clash_note
from analyses.concept_depth.probing import Probed
from analyses.results.statistics import cluster_bootstrap
from probes.capture.needs import Need
from probes.capture.run import capture
from probes.edits import Edit, project_out
from probes.errors import PromptError
from probes.lenses import logit
from probes.models.protocol import Model
from probes.points import Address
from probes.progress import Progress
from probes.prompts import Prompt
from probes.reducers import Reducer
from probes.store import ActivationStore

LAST = Reducer(positions="last")


@dataclass(frozen=True)
class Reading:
    """What the model says after some prompts."""

    final: Tensor
    """[prompts, d_model], the last stream at the last position."""
    answers: Tensor
    """[prompts, 2], log-probabilities of the answers of label 0 and label 1; empty where there are none."""
    forwards: int


@dataclass(frozen=True)
class Check:
    """The prompts and settings of one causal check."""

    model: Model
    store: ActivationStore
    probed: Probed
    representation: str
    positions: Any
    """Positions at which the direction is removed: those the probe reads."""
    n_prompts: int
    n_layers: int
    seed: int

    @property
    def chosen(self) -> list[int]:
        """Test prompts of the probe's first seed, half of each class, in a drawn order."""
        first = self.probed.layers[0]
        of_first_seed = first.seed == first.seed[0]
        rows, labels = first.row[of_first_seed], first.label[of_first_seed]
        rng = np.random.default_rng(self.seed)
        per_class = [rng.permutation(rows[labels == label])[: max(1, self.n_prompts // 2)] for label in (0, 1)]
        return sorted(int(row) for rows in per_class for row in rows)

    @property
    def layers(self) -> list[int]:
        """Which of the layers probed: some spread evenly over depth, and the one where the probe is best."""
        n = len(self.probed.layers)
        spread = np.linspace(0, n - 1, min(self.n_layers, n) + 2)[1:-1].round().astype(int).tolist()
        return sorted({*spread, int(self.probed.curve.argmax())})


@dataclass(frozen=True)
class Causal:
    """What a causal check found."""

    table: pd.DataFrame
    forwards: int
    edited: int
    """Forwards of those in which a direction was removed."""
    note: str | None
    """What is to be said of the answers."""


def answer_ids(
    model: Model, prompts: Sequence[Prompt], answers: tuple[str, str] | None
) -> tuple[Tensor | None, str | None]:
    """([prompts, 2], the first tokens of the two answers as they continue each prompt, or None; what to say of them)."""
    if answers is None or model.tokenizer is None:
        return None, None
    try:
        written = [[answer_after(model, prompt, text) for text in answers] for prompt in prompts]
        note = clash_note([answer for pair in written for answer in pair])
    except PromptError as error:
        return None, f"no margin of the answers: {error}"
    if any(a.first == b.first for a, b in written):
        return None, f"no margin of the answers: {answers[0]!r} and {answers[1]!r} begin with the same token"
    return torch.tensor([[a.first, b.first] for a, b in written]), note


def read_answers(
    check: Check, prompts: Sequence[Prompt], ids: Int[Tensor, "prompt 2"] | None, edits: Sequence[Edit] = ()
) -> Reading:
    """The last stream and the answers' log-probabilities, under the edits."""
    model = check.model
    address = Address("resid_post", model.shape.n_layers - 1)
    sequences = [prompt.tokens for prompt in prompts]
    rows_found = capture(model, sequences, [Need(str(address), LAST)], check.store, edits=edits)
    final = rows_found.packed(address, LAST).float()
    answers = final.new_zeros(len(final), 0)
    if ids is not None:
        distinct, where = ids.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        answers = logit.read(final, model.unembedding(), ids=distinct).logprobs.cpu().gather(1, where)
    return Reading(final, answers, rows_found.done.forwards)


def causal_table(check: Check, rows_of: Callable[[int], np.ndarray], progress: Progress) -> Causal:
    """Effect of removing the probe's direction and a random one, by layer.

    `margin_change` is the change of log p(right answer) - log p(wrong answer), in nats; `kl` the divergence of the next
    token's distribution from the unedited one; `answer_accuracy` the share of prompts whose right answer is the more
    probable. The random direction is drawn with the rows' own covariance, so that it removes about as much of them.

    Args:
        rows_of: layer -> rows [prompts, d_model] of the whole data set.
    """
    data, chosen = check.probed.data, check.chosen
    prompts = [data.prompts[i] for i in chosen]
    labels = torch.tensor([data.labels[i] for i in chosen])
    groups = np.asarray(data.groups)[chosen]
    ids, note = answer_ids(check.model, prompts, data.answers)
    progress.start(2 * len(check.layers) * len(prompts), f"forward with a direction removed, {data.name}")
    plain = read_answers(check, prompts, ids)
    edited_forwards, rows_found = 0, []
    for place in check.layers:
        layer = check.probed.numbers[place]
        for name, direction in _directions(check, place, rows_of(layer)).items():
            edit = project_out(Address(check.representation, layer), direction[None], positions=check.positions)
            edited = read_answers(check, prompts, ids, [edit])
            progress.advance(len(prompts))
            edited_forwards += edited.forwards
            row = {**check.probed.key, "layer": layer, "direction": name, "n": len(prompts)}
            rows_found.append({**row, **_effect(check, plain, edited, labels, groups)})
    said = f"{data.name}: {note}" if note else None
    return Causal(pd.DataFrame(rows_found), plain.forwards + edited_forwards, edited_forwards, said)


def _directions(check: Check, place: int, rows: np.ndarray) -> dict[str, Tensor]:
    generator = np.random.default_rng((check.seed, check.probed.numbers[place]))
    centred = rows - rows.mean(axis=0)
    drawn = generator.normal(size=len(rows)) @ centred
    if not np.linalg.norm(drawn):
        drawn = generator.normal(size=rows.shape[1])
    probe = check.probed.layers[place].probes[0].weight
    return {
        "probe": torch.from_numpy(np.asarray(probe, np.float32)),
        "random": torch.from_numpy(drawn.astype(np.float32)),
    }


def _effect(check: Check, plain: Reading, edited: Reading, labels: Tensor, groups: np.ndarray) -> dict[str, float]:
    kl = logit.read(edited.final, check.model.unembedding(), reference=plain.final).kl.cpu().numpy()
    columns = [kl, *np.full((4, len(kl)), np.nan)]
    if plain.answers.shape[1]:
        margins = [_margin(reading.answers, labels) for reading in (plain, edited)]
        columns[1:] = [margins[0], margins[1] - margins[0], margins[0] > 0, margins[1] > 0]
    interval = cluster_bootstrap(np.stack(columns, axis=1), groups, seed=check.seed)
    return {
        **interval.columns("kl"),
        "margin": interval.mean[1],
        **interval.columns("margin_change", "ci_", 2),
        "answer_accuracy": interval.mean[3],
        "answer_accuracy_edited": interval.mean[4],
    }


def _margin(answers: Tensor, labels: Tensor) -> np.ndarray:
    right = answers.gather(1, labels[:, None])[:, 0]
    wrong = answers.gather(1, 1 - labels[:, None])[:, 0]
    return np.asarray((right - wrong).numpy(), dtype=np.float64)
