"""Layers whose Jacobian readings look like a workspace: neither those of an input nor those of an answer.

Gurnee et al. 2026 draw four curves over depth and set the boundaries by eye. The rule here is ours: the longest run of three
or more layers in which the logits' kurtosis and the agreement of neighbouring positions lie above both controls with disjoint
95 % intervals over texts, and the accuracy for the next token is below half of its value at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from analyses.reading.texts import Texts
from analyses.results.statistics import Array, cluster_bootstrap
from probes.capture.needs import Need
from probes.capture.run import capture
from probes.lenses import logit
from probes.lenses.controls import rotated, shuffled_layers
from probes.lenses.jacobian import JacobianLens
from probes.lenses.protocol import Lens
from probes.models.protocol import Model, Unembedding
from probes.points import Address
from probes.progress import QUIET, Progress
from probes.reducers import ROWS
from probes.store import RowStore

MIN_RUN = 3
NEIGHBOURS = 6
"""Neighbouring positions of each text that are read."""
CURVES = ("accuracy", "kurtosis", "autocorrelation", "dimension")
CONTROLS = ("shuffled", "rotated")


def band_table(
    model: Model, texts: Texts, lens: JacobianLens, store: RowStore, seed: int = 0, progress: Progress = QUIET
) -> tuple[pd.DataFrame, str]:
    """Return the curves (layer, curve, lens_or_control, value, ci_low, ci_high, in_band), and the verdict in words."""
    activations = capture(model, list(texts.sequences), [Need("resid_post.*", ROWS)], store, progress=progress)
    unembedding = model.unembedding()
    readers: dict[str, Lens] = {"lens": lens, "shuffled": shuffled_layers(lens, seed), "rotated": rotated(lens, seed)}
    starts = [max(1, len(sequence) - 1 - NEIGHBOURS) for sequence in texts.sequences]
    following = [torch.tensor(s[a + 1 :]) for s, a in zip(texts.sequences, starts, strict=True)]

    def text_rows(layer: int) -> list[Tensor]:
        kept = activations.get(Address("resid_post", layer), ROWS)
        return [text[start:-1].float() for text, start in zip(kept, starts, strict=True)]

    table = curves(text_rows, following, model.shape.n_layers, readers, unembedding, seed)
    dimensions = [
        {
            "layer": layer,
            "curve": "dimension",
            "lens_or_control": "lens",
            "value": effective_dimension(matrix, unembedding.weight),
        }
        for layer, matrix in sorted(lens.maps.items())
    ]
    table = pd.concat([table, pd.DataFrame(dimensions)], ignore_index=True)
    layers = workspace(table)
    table["in_band"] = table["layer"].isin(layers)
    if not layers:
        return (
            table,
            "no band: no three neighbouring layers read unlike both controls without already reading the answer.",
        )
    return table, f"band: layers {layers[0]} to {layers[-1]} read unlike both controls and do not yet read the answer."


def curves(
    text_rows: Callable[[int], Sequence[Tensor]],
    following: Sequence[Tensor],
    n_layers: int,
    readers: Mapping[str, Lens],
    unembedding: Unembedding,
    seed: int = 0,
) -> pd.DataFrame:
    """Return accuracy, kurtosis and autocorrelation by layer of `lens` and each control, with intervals over texts.

    Args:
        text_rows: rows [pos, d_model] of neighbouring positions of each text, by layer.
        following: the token after each of these positions, text by text.
        readers: `lens`, and the controls by name.
    """
    parts = []
    for layer in range(n_layers):
        rows = text_rows(layer)
        for name, reader in readers.items():
            readable = reader.readable(torch.cat(list(rows)), layer).float()
            for curve, values in _text_values(readable, list(map(len, rows)), following, unembedding, seed).items():
                known = np.flatnonzero(np.isfinite(values))
                interval = cluster_bootstrap(values[known], known, seed=seed)
                bounds = {"value": interval.mean[0], "ci_low": interval.low[0], "ci_high": interval.high[0]}
                parts.append({"layer": layer, "curve": curve, "lens_or_control": name, **bounds})
    return pd.DataFrame(parts)


def workspace(table: pd.DataFrame) -> list[int]:
    """Return the layers of the band by the module's rule; none where there is no such run."""
    by = table.set_index(["curve", "lens_or_control", "layer"])
    layers = sorted(table["layer"].unique())
    final = by.loc[("accuracy", "lens", layers[-1]), "value"]
    inside = [
        by.loc[("accuracy", "lens", layer), "value"] < final / 2
        and all(
            by.loc[(curve, "lens", layer), "ci_low"] > by.loc[(curve, control, layer), "ci_high"]
            for curve in ("kurtosis", "autocorrelation")
            for control in CONTROLS
        )
        for layer in layers
    ]
    return longest_run(layers, inside)


def longest_run(layers: Sequence[int], inside: Sequence[bool]) -> list[int]:
    """Return the first longest run of neighbouring layers that are inside, if it has at least `MIN_RUN`."""
    best: list[int] = []
    run: list[int] = []
    for layer, is_inside in zip(layers, inside, strict=True):
        run = [*run, int(layer)] if is_inside else []
        best = run if len(run) > len(best) else best
    return best if len(best) >= MIN_RUN else []


def _text_values(
    rows: Tensor, lengths: Sequence[int], following: Sequence[Tensor], unembedding: Unembedding, seed: int
) -> Mapping[str, Array]:
    """Per text: accuracy for the next token, kurtosis of the logits, and how often neighbours share their first token.

    The last is taken less the share of pairs of the same text in a shuffled order.
    """
    read = logit.read(rows, unembedding, top_k=1)
    tops, peaks = read.top_ids[:, 0].cpu(), excess_kurtosis(rows, unembedding)
    rng = np.random.default_rng(seed)
    values: dict[str, list[float]] = {name: [] for name in CURVES[:3]}
    parts = zip(torch.split(tops, list(lengths)), torch.split(peaks, list(lengths)), following, strict=True)
    for top, peak, following_ids in parts:
        values["accuracy"].append(float((top == following_ids).float().mean()))
        values["kurtosis"].append(float(peak.mean()))
        if len(top) < 3:
            values["autocorrelation"].append(float("nan"))
            continue
        mixed = top[torch.from_numpy(rng.permutation(len(top)))]
        neighbours, shuffled = ((x[1:] == x[:-1]).float().mean() for x in (top, mixed))
        values["autocorrelation"].append(float(neighbours - shuffled))
    return {name: np.array(column) for name, column in values.items()}


@torch.inference_mode()
def excess_kurtosis(rows: Float[Tensor, "row d_model"], unembedding: Unembedding) -> Float[Tensor, " row"]:
    """Return the excess kurtosis of each row's logits over the vocabulary; 0 for a Gaussian."""
    parts = []
    for part in torch.split(rows, 64):
        # A log-probability is a logit less a number that all tokens of the row share.
        logits = logit.all_logprobs(part, unembedding).double()
        centred = logits - logits.mean(-1, keepdim=True)
        parts.append((centred.pow(4).mean(-1) / centred.square().mean(-1).square() - 3).cpu())
    return torch.cat(parts).float()


@torch.inference_mode()
def effective_dimension(
    matrix: Float[Tensor, "d_model d_model"], unembedding: Float[Tensor, "d_vocab d_model"]
) -> float:
    """Return the participation ratio of the lens vectors, their mean over the vocabulary taken off first."""
    weight = unembedding.float()
    centred = weight - weight.mean(0)
    gram = matrix.double().T @ (centred.T @ centred).double() @ matrix.double()
    return float(gram.trace().square() / gram.square().sum())
