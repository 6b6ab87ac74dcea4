"""From an effect at each layer to the layers at which it is at least half, with bounds over prompts."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from analyses.ground_truth.answers import UNKNOWN, Answer, name_of
from analyses.results.statistics import MIN_CLUSTERS, RESAMPLES, draw_groups, quantiles
from probes.planted.record import Question
from probes.planted.task import PlantedTask

HALF = 0.5


def longest_run(effects: Float[np.ndarray, "*rest layer"]) -> NDArray[np.float64]:
    """Return the first and last index of the longest run of effects of at least one half, [..., 2]; NaN where there is none.

    Of two runs of one length, the earlier.
    """
    inside = np.asarray(effects) >= HALF
    length = np.zeros(inside.shape[:-1])
    best_length, best_end = np.zeros(inside.shape[:-1]), np.full(inside.shape[:-1], np.nan)
    for layer in range(inside.shape[-1]):
        length = np.where(inside[..., layer], length + 1, 0)
        longer = length > best_length
        best_length, best_end = np.where(longer, length, best_length), np.where(longer, layer, best_end)
    return np.stack([best_end - best_length + 1, best_end], axis=-1)


def span_answer(
    method: str, task: PlantedTask, question: Question, effects: Float[np.ndarray, "prompt layer"], first_layer: int
) -> Answer:
    """Return the layers at which the mean effect over prompts is at least one half; none where it never is.

    Args:
        effects: 1 where a prompt's answer is wholly changed, 0 where it is not.
        first_layer: the layer of the first column.
    """
    name = name_of(task.record)
    first, last = longest_run(effects.mean(0)) + first_layer
    if np.isnan(first):
        return Answer(method, name, question.key, "none")
    low, high = (UNKNOWN, UNKNOWN)
    if len(effects) >= MIN_CLUSTERS:
        ends = longest_run(effects[draw_groups(len(effects), 0, RESAMPLES)].mean(1)) + first_layer
        (low_first, low_last), (high_first, high_last) = quantiles(ends)
        low, high = (float(low_first), float(low_last)), (float(high_first), float(high_last))
    return Answer(method, name, question.key, "answered", (float(first), float(last)), low, high)
