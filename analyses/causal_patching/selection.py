"""Which pairs a map is made of: those that the model tells apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from analyses.causal_patching.pairs import Pair
from analyses.causal_patching.running import Run
from analyses.results.statistics import Array, cluster_bootstrap
from probes.blocks.together import together
from probes.errors import PromptError
from probes.progress import Progress

Ends = Mapping[int, tuple[Array, Array]]
"""The metrics of each pair's clean and corrupted run."""


def gauge(
    run: Run, min_gap: float, answered: bool, progress: Progress
) -> tuple[dict[int, tuple[Array, Array]], dict[int, str]]:
    """Run both prompts of every pair; return (their metrics by pair, why pairs are left out).

    The gap is that of the first metric of the run; of `kl`, which has no sign, the divergence itself.

    Args:
        min_gap: pairs below it are left out.
        answered: also leave out pairs whose prompts the model does not both answer right.
    """

    def one(pair: Pair) -> tuple[tuple[Array, Array], str | None]:
        clean, corrupted = run.ends(pair)
        gap = float(clean[0] - corrupted[0]) * (-1 if run.metrics[0] == "kl" else 1)
        reason = None
        if not gap >= min_gap:
            reason = f"a gap of {gap:.2f}, below min_gap {min_gap:g}"
        elif answered and not run.answers_both(pair):
            reason = "the model does not answer both prompts"
        progress.advance()
        return (clean, corrupted), reason

    progress.start(len(run.pairs), "pair gauged")
    outcomes = together(run.model, [partial(one, pair) for pair in run.pairs])
    ends = {pair.index: own for pair, (own, _) in zip(run.pairs, outcomes, strict=True)}
    reasons = {pair.index: reason for pair, (_, reason) in zip(run.pairs, outcomes, strict=True) if reason}
    return ends, reasons


def check_gaps(pairs: Sequence[Pair], ends: Ends, reasons: Mapping[int, str], min_pairs: int, metric: str) -> None:
    """Refuse a run whose pairs the model does not tell apart.

    Raises:
        PromptError: fewer than `min_pairs` pairs are left, or the interval of their mean gap reaches zero.
    """
    kept = [pair for pair in pairs if pair.index not in reasons]
    if len(kept) < min_pairs:
        first = next((f"{p.where}: {reasons[p.index]}" for p in pairs if p.index in reasons), "no others were given")
        raise PromptError(
            f"{len(kept)} of {len(pairs)} pairs can be patched, and min_pairs is {min_pairs}: the model does not tell these "
            f"prompts apart ({first}). Give other pairs, a lower --min-gap, or --min-pairs {max(1, len(kept))}"
        )
    gaps = np.array([float(ends[pair.index][0][0] - ends[pair.index][1][0]) for pair in kept])
    interval = cluster_bootstrap(gaps if metric != "kl" else -gaps, np.array([pair.group for pair in kept]))
    if float(interval.low[0]) <= 0:
        raise PromptError(
            f"the mean gap of {len(kept)} pairs is {interval.mean[0]:.2f} [{interval.low[0]:.2f}, {interval.high[0]:.2f}], which "
            "reaches 0: the model does not tell these prompts apart. Give other pairs"
        )
