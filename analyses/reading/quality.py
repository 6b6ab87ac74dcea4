"""How good lenses are on text that none was fitted on, beside controls that should read worse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from analyses.reading.texts import Texts
from analyses.reading.tuned import kl_to_fixed, unigram_logprobs
from analyses.results.statistics import Array, cluster_bootstrap
from probes.capture.activations import Activations
from probes.capture.needs import Need
from probes.capture.run import capture
from probes.lenses import logit
from probes.lenses.card import card_of
from probes.lenses.controls import BiasOnly, rotated, shuffled_layers
from probes.lenses.logit import LogitLens
from probes.lenses.protocol import Lens
from probes.lenses.tuned import TunedLens
from probes.models.protocol import Model
from probes.points import Address
from probes.progress import QUIET, Progress
from probes.reducers import ROWS
from probes.store import RowStore

POSITIONS = 6
"""Positions of each text that are judged, drawn by seed."""
TOP = 10
UNITS: Mapping[str, str] = {
    "kl_to_final": "nats", "ce_next": "nats", "top1_agreement": "share", "top10_overlap": "share", "entropy": "bits",
}  # fmt: skip
"""Measures to their units: divergence from the model, cross-entropy of the token that really follows, agreement of the first
token and overlap of the ten first tokens with the model's, entropy."""


@dataclass(frozen=True, eq=False)
class JudgedRows:
    """Rows of texts at every layer, what follows them, and what they are read by."""

    activations: Activations
    places: tuple[tuple[int, int], ...]
    """(text, position) of each row."""
    groups: Int[np.ndarray, " row"]
    next_ids: Int[Tensor, " row"]
    final: Tensor
    """[row, d_model], of the last layer."""

    def rows(self, layer: int) -> Tensor:
        """Return the rows of a layer, [row, d_model] float32."""
        texts = self.activations.get(Address("resid_post", layer), ROWS)
        return torch.stack([texts[text][position] for text, position in self.places]).float()


@dataclass(frozen=True, eq=False)
class Quality:
    """Every measure of every judged row: [layer, row] by (lens, control) and measure; control is empty for a lens itself."""

    values: Mapping[tuple[str, str], Mapping[str, Array]]
    layers: tuple[int, ...]
    groups: Int[np.ndarray, " row"]


def controls_of(name: str, lens: Lens, seed: int = 0) -> dict[tuple[str, str], Lens]:
    """Return a lens and its controls by (lens, control)."""
    lenses: dict[tuple[str, str], Lens] = {(name, ""): lens}
    if lens.card.kind == "patchscope" or not lens.card.layers:
        return lenses
    if len(lens.card.layers) > 1:
        lenses[name, "shuffled"] = shuffled_layers(lens, seed)
    if isinstance(lens, TunedLens):
        lenses[name, "bias_only"] = BiasOnly(lens)
    if lens.card.kind == "jacobian":
        lenses[name, "rotated"] = rotated(lens, seed)
    return lenses


def judged_rows(
    model: Model,
    texts: Texts,
    store: RowStore,
    *,
    seed: int = 0,
    positions: int = POSITIONS,
    progress: Progress = QUIET,
) -> JudgedRows:
    """Capture texts where the store lacks them, and draw positions after the first token and before the last."""
    activations = capture(model, list(texts.sequences), [Need("resid_post.*", ROWS)], store, progress=progress)
    rng = np.random.default_rng(seed)
    places = []
    for text, sequence in enumerate(texts.sequences):
        drawn = rng.permutation(np.arange(1, len(sequence) - 1))[:positions]
        places += [(text, int(position)) for position in sorted(drawn)]
    following = torch.tensor([texts.sequences[text][position + 1] for text, position in places])
    groups = np.array([texts.groups[text] for text, _ in places])
    last = activations.get(Address("resid_post", model.shape.n_layers - 1), ROWS)
    final = torch.stack([last[text][position] for text, position in places]).float()
    return JudgedRows(activations, tuple(places), groups, following, final)


def read_texts(
    model: Model,
    texts: Texts,
    lenses: Mapping[str, Lens],
    store: RowStore,
    *,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    progress: Progress = QUIET,
) -> Quality:
    """Judge lenses, their controls and the logit lens on texts, at all layers or some; the model's distribution is computed
    once a layer.
    """
    layers = tuple(range(model.shape.n_layers) if layers is None else layers)
    judged = judged_rows(model, texts, store, seed=seed, progress=progress)
    every: dict[tuple[str, str], Lens] = {("logit", ""): LogitLens(card_of("logit", model))}
    for name, lens in lenses.items():
        every |= controls_of(name, lens, seed)
    values: dict[tuple[str, str], dict[str, list[Array]]] = {key: {name: [] for name in UNITS} for key in every}
    unembedding = model.unembedding()
    best = logit.read(judged.final, unembedding, top_k=TOP).top_ids
    n = len(judged.places)
    for layer in progress.over(layers, "layer"):
        rows = judged.rows(layer)
        of = torch.arange(n).repeat(len(every))
        seen = logit.read(
            torch.cat([lens.readable(rows, layer).float() for lens in every.values()]), unembedding,
            ids=judged.next_ids[of, None], top_k=TOP, reference=judged.final, reference_of=of,
        )  # fmt: skip
        shared = (seen.top_ids[:, :, None] == best[of][:, None, :]).any(2).float().mean(1)
        columns = {
            "kl_to_final": seen.kl, "ce_next": -seen.logprobs[:, 0], "top10_overlap": shared,
            "top1_agreement": (seen.top_ids[:, 0] == best[of, 0]).float(), "entropy": seen.entropy_bits,
        }  # fmt: skip
        for measure, column in columns.items():
            for key, part in zip(every, torch.split(column.double().cpu(), n), strict=True):
                values[key][measure].append(part.numpy())
    stacked = {key: {name: np.stack(parts) for name, parts in columns.items()} for key, columns in values.items()}
    kl = _unigram(model, texts, judged)
    stacked["logit", "unigram"] = {"kl_to_final": np.tile(kl, (len(layers), 1))}
    return Quality(stacked, layers, judged.groups)


def _unigram(model: Model, texts: Texts, judged: JudgedRows) -> Array:
    """Divergence of each text's rows from the token frequencies of the other texts, the same at every layer."""
    kl = np.zeros(len(judged.places))
    for group in np.unique(judged.groups):
        others = [s for s, g in zip(texts.sequences, texts.groups, strict=True) if g != group]
        rows = np.flatnonzero(judged.groups == group)
        frequencies = unigram_logprobs(others, model.shape.d_vocab)
        kl[rows] = kl_to_fixed(judged.final[torch.from_numpy(rows)], model.unembedding(), frequencies)
    return kl


def quality_rows(quality: Quality, seed: int = 0) -> list[dict[str, Any]]:
    """Return the means by lens, control, layer and measure, with 95 % intervals over texts."""
    table: list[dict[str, Any]] = []
    n_texts = len(np.unique(quality.groups))
    for (lens, control), columns in quality.values.items():
        for measure, values in columns.items():
            interval = cluster_bootstrap(values.T, quality.groups, seed=seed)
            table += [
                {
                    "lens": lens, "control": control, "layer": layer, "measure": measure, "unit": UNITS[measure],
                    "n_texts": n_texts, "n_rows": len(quality.groups), "value": float(interval.mean[at]),
                    "ci_low": float(interval.low[at]), "ci_high": float(interval.high[at]),
                }
                for at, layer in enumerate(quality.layers)
            ]  # fmt: skip
    return table


def solid_layers(rows: Sequence[Mapping[str, Any]], lens: str) -> list[int]:
    """Return the layers at which a lens's divergence lies below the logit lens's and its own control's, intervals apart."""
    by_key = {(r["lens"], r["control"], r["layer"]): r for r in rows if r["measure"] == "kl_to_final"}
    layers = []
    for (name, control, layer), row in by_key.items():
        if name != lens or control:
            continue
        others = [by_key.get(("logit", "", layer)), by_key.get((lens, "shuffled", layer))]
        if all(other is not None and row["ci_high"] < other["ci_low"] for other in others):
            layers.append(layer)
    return layers
