"""The final prediction fused with a middle layer's: our reading of layer-fused decoding, beside the controls that a gain has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.optimize import brentq
from torch import Tensor

from analyses.passage_use.items import Item
from analyses.passage_use.measures import LastRows
from analyses.results.statistics import cluster_bootstrap
from analyses.similarity.divergence import entropy

RANDOM_LAYERS = 10
"""Layers drawn for each prompt behind the random control."""
LEAST, MOST = 0.05, 20.0
"""Temperatures tried."""


@dataclass(frozen=True)
class Fusing:
    """How two predictions become one."""

    strength: float
    """Weight of the middle layer's log-probabilities."""
    keep: float
    """Tokens less probable than this share of the final prediction's most probable one are ruled out."""

    def fused(
        self, final: Float[Tensor, "*row d_vocab"], middle: Float[Tensor, "*row d_vocab"]
    ) -> Float[Tensor, "*row d_vocab"]:
        """Return log-probabilities: final + strength * middle on the tokens that are kept, minus infinity elsewhere."""
        kept = final >= final.amax(-1, keepdim=True) + log(self.keep)
        return (final + self.strength * middle).masked_fill(~kept, -torch.inf).log_softmax(-1)


def fusion_table(
    rows: LastRows, items: Sequence[Item], chosen: pd.DataFrame, fusing: Fusing, seed: int
) -> pd.DataFrame:
    """Return how well the answer is predicted, with and without fusion; layers and temperatures come from the other half of the prompts.

    Returns:
        Columns variant (none; fused: each prompt's own layer; random_layer: of the second half of the layers; fixed_layer: the layer that
        serves the other half best; temperature: the final prediction as sure as the fused one), accuracy, accuracy_low,
        accuracy_high, answer_logprob (nats, over prompts whose answer fusing does not rule out), low, high, gain (in answer_logprob
        over none, of the same prompts), gain_low, gain_high, ruled_out (share of prompts), prompts.
    """
    n_layers, late = rows.n_layers, range(rows.n_layers // 2, rows.n_layers)
    full, answers = [item.passage for item in items], torch.tensor([item.answer for item in items])
    final = rows.read("resid_post", n_layers - 1, full)
    by_layer = torch.stack([fusing.fused(final, rows.read("resid_post", layer, full)) for layer in late])
    index = torch.arange(len(items))
    at = torch.tensor(chosen.set_index("prompt")["layer"][[item.prompt for item in items]].to_numpy()) - late[0]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(late), (RANDOM_LAYERS, len(items)), generator=generator)
    halves = torch.randperm(len(items), generator=generator).argsort() % 2
    fixed = torch.zeros(len(items), dtype=torch.long)
    cooled = final.clone()
    own = by_layer[at, index]
    for half in (0, 1):
        test, train = halves == half, halves != half
        if train.any():
            fixed[test] = _best(by_layer[:, train], answers[train])
            cooled[test] = (final[test] / _temperature(final[train], entropy(own[train]).mean())).log_softmax(-1)
    predictions = {
        "none": final[None], "fused": own[None], "random_layer": by_layer[drawn, index], "fixed_layer": by_layer[fixed, index][None],
        "temperature": cooled[None],
    }  # fmt: skip
    scores = {name: _scores(p, answers) for name, p in predictions.items()}
    kept = np.isfinite(scores["fused"][1])
    records = []
    for name, (correct, logprob) in scores.items():
        right = cluster_bootstrap(correct, np.arange(len(items)), seed=seed)
        said, gain = (
            cluster_bootstrap(values[kept], np.flatnonzero(kept), seed=seed)
            for values in (logprob, logprob - scores["none"][1])
        )
        row: dict[str, object] = {"variant": name}
        for column, ends, interval in (
            ("accuracy", "accuracy_", right), ("answer_logprob", "", said), ("gain", "gain_", gain),
        ):  # fmt: skip
            row |= {column: interval.mean[0], f"{ends}low": interval.low[0], f"{ends}high": interval.high[0]}
        records.append(row | {"ruled_out": 1 - float(kept.mean()), "prompts": len(items)})
    return pd.DataFrame(records)


def fusion_note(table: pd.DataFrame) -> str:
    """Return what the intervals say of fusion beside all of its controls."""
    rows = table.set_index("variant")
    fused = rows.loc["fused"]
    others = rows.drop(index=["none", "fused"])
    gain = f"{fused['gain']:+.2f} nats [{fused['gain_low']:.2f}, {fused['gain_high']:.2f}]"
    beside = ", ".join(f"{str(name).replace('_', ' ')} {row['gain']:+.2f}" for name, row in others.iterrows())
    if fused["gain_low"] > 0 and (fused["gain_low"] > others["gain_high"]).all():
        verdict = "more than none and than every control"
    elif fused["gain_high"] < 0:
        verdict = "less than without it"
    else:
        verdict = "not told from none or from a control"
    return f"Fusion (ours, after LFD) changes the answer's log-probability by {gain}: {verdict} (controls: {beside})."


def _best(by_layer: Tensor, answers: Tensor) -> int:
    """Return the layer, among the late ones, that gives most answers, then most probability."""
    logprobs = by_layer[:, torch.arange(len(answers)), answers]
    correct = (by_layer.argmax(-1) == answers).double().mean(1)
    return int((correct + 0.5 * logprobs.exp().double().mean(1) / len(answers)).argmax())


def _temperature(final: Tensor, target: Tensor) -> float:
    """Return the temperature at which the mean entropy of predictions is `target`; the nearest end where none is."""

    def excess(temperature: float) -> float:
        return float(entropy((final / temperature).log_softmax(-1)).mean() - target)

    if excess(LEAST) >= 0:
        return LEAST
    return MOST if excess(MOST) <= 0 else float(brentq(excess, LEAST, MOST, xtol=1e-3))


def _scores(predictions: Tensor, answers: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return whether each answer comes first and its log-probability, averaged over the predictions [draw, prompt, d_vocab]."""
    logprobs = predictions[:, torch.arange(len(answers)), answers].double().mean(0)
    return (predictions.argmax(-1) == answers).double().mean(0).numpy(), logprobs.numpy()
