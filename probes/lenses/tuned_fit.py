"""The closed-form fit of a tuned lens: ridge per layer, its strength chosen by divergence from the model on held-out texts.

Belrose et al. 2023 descend the divergence by gradients. Here the last block's rows are regressed on each layer's, both at
unit scale and in residual form, so that an infinite ridge is the logit lens; what is then chosen among is judged by the
divergence itself. Offsets predict the last row of a later token (Pal et al. 2023, "Future Lens").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from probes.errors import OptionError, ProbeError
from probes.lenses import logit
from probes.lenses.card import LensCard
from probes.lenses.tuned import AffineMap, Place, TunedLens, unit_scale
from probes.lenses.tuned_refine import refined
from probes.linear.affine_maps import CrossMoments
from probes.models.protocol import Unembedding

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Strengths tried, relative to the mean variance of a dimension."""
CHOOSING_ROWS = 128
"""Rows of the choosing fold on which candidates are compared."""
SCORED_ROWS = 240
"""Rows of the scoring fold, at most, on which the lens and its controls are measured."""
MIN_TEXTS = 5
CONTROLS = ("logit", "bias_only", "shuffled")

TextRows = Callable[[int], Sequence[Float[Tensor, "pos d_model"]]]
"""Rows of a layer, text by text; the same positions at every layer."""


@dataclass(frozen=True, eq=False)
class TunedFit:
    """A fitted lens, what was chosen, and held-out divergences in nats."""

    lens: TunedLens
    choice: Mapping[Place, str]
    """Per layer and offset: `identity`, `bias_only`, the ridge strength, or `refined`."""
    choosing: Mapping[Place, Mapping[str, float]]
    """Per layer and offset, the mean divergence of every candidate on the choosing fold."""
    kl: Mapping[str, NDArray[np.float64]]
    """[layer, row] for the lens (`tuned`) and each of `CONTROLS`, on the scoring fold at offset 0, at `layers`."""
    layers: tuple[int, ...]
    """Those that were fitted, and the last."""
    text_of: NDArray[np.int64]
    """[row], the text (or group of texts) that a scored row comes from."""
    rows_fitted: int


class Moments(CrossMoments):
    """Sums over pairs of rows of one width, from which maps in residual form follow."""

    def bias_only(self) -> AffineMap:
        """Return the map that shifts every row by the mean residual."""
        zero = torch.zeros(self.xx.shape, dtype=torch.float32)
        return AffineMap(zero, ((self.y - self.x) / self.n).float())

    def ridges(self, strengths: Sequence[float]) -> list[AffineMap]:
        """Return the residual ridge map of y on x at each strength, from one eigendecomposition."""
        x_mean, r_mean = self.x / self.n, (self.y - self.x) / self.n
        gram = self.xx - self.n * torch.outer(x_mean, x_mean)
        cross = self.xy - self.xx - self.n * torch.outer(x_mean, r_mean)
        values, vectors = torch.linalg.eigh(gram)
        moment, values = vectors.T @ cross, values.clamp_min(0)
        maps = []
        for strength in strengths:
            change = vectors @ (moment / (values + strength * values.mean().clamp_min(1e-12))[:, None])
            maps.append(AffineMap(change.float(), (r_mean - x_mean @ change).float()))
        return maps


@dataclass(frozen=True, eq=False)
class _Folds:
    """Texts of each fold, and a few rows of the last two as (text, position)."""

    fitting: list[int]
    choosing: list[tuple[int, int]]
    scoring: list[tuple[int, int]]


def fit_tuned(
    text_rows: TextRows,
    groups: Sequence[int],
    unembedding: Unembedding,
    card: LensCard,
    *,
    offsets: Sequence[int] = (0,),
    layers: Sequence[int] | None = None,
    refine: int = 0,
    seed: int = 0,
) -> TunedFit:
    """Fit one map per layer and offset; whole groups of texts are held out, a fifth to choose by and a fifth to score by.

    Args:
        text_rows: rows of any layer.
        groups: [text], texts that say the same in other words (translations) share a number.
        unembedding: the model's.
        card: of the lens; layers and options are filled in.
        offsets: how many tokens ahead to read.
        layers: those fitted, all by default; others are read by the logit lens.
        refine: steps of gradient descent on the divergence after the closed form; they count only where they help on the
            fold that chooses.
        seed: of the split into folds.

    Raises:
        OptionError: a layer outside the model.
        ProbeError: fewer than five groups, or none of whose rows reaches as far as an offset.
    """
    read = sorted({*(range(card.n_layers) if layers is None else layers), card.n_layers - 1})
    if not 0 <= read[0] <= read[-1] < card.n_layers:
        raise OptionError(f"layers {read}: legal are 0 to {card.n_layers - 1}")
    last = [unit_scale(rows) for rows in text_rows(card.n_layers - 1)]
    folds = _folds(groups, [len(rows) for rows in last], max(offsets), seed)
    maps: dict[Place, AffineMap] = {}
    shifts: dict[int, Tensor] = {}
    choice: dict[Place, str] = {}
    choosing: dict[Place, Mapping[str, float]] = {}
    kl: dict[str, list[NDArray[np.float64]]] = {name: [] for name in ("tuned", *CONTROLS)}
    rows_fitted = 0

    def mean_losses(maps: Mapping[str, AffineMap | None], unit: Sequence[Tensor], offset: int) -> dict[str, float]:
        losses = _losses(maps, unit, last, folds.choosing, offset, unembedding)
        return {name: float(values.mean()) for name, values in losses.items()}

    for layer in read:
        unit = [unit_scale(rows) for rows in text_rows(layer)]
        controls: dict[str, AffineMap] = {}
        for offset in offsets if layer < card.n_layers - 1 else ():
            moments = _moments(unit, last, folds.fitting, offset)
            rows_fitted = rows_fitted or moments.n
            candidates: dict[str, AffineMap | None] = {"identity": None, "bias_only": moments.bias_only()}
            candidates |= {f"{s:g}": fitted for s, fitted in zip(RIDGES, moments.ridges(RIDGES), strict=True)}
            losses = mean_losses(candidates, unit, offset)
            best = min(losses, key=losses.__getitem__)
            strength = float(best) if best not in ("identity", "bias_only") else RIDGES[-1]
            if refine:
                start = candidates[best] or AffineMap(
                    torch.zeros_like(moments.xx).float(), torch.zeros_like(moments.x).float()
                )
                x, y = map(torch.cat, zip(*_pairs(unit, last, folds.fitting, offset), strict=True))
                candidates["refined"] = refined(start, x, y, unembedding, refine, seed)
                losses |= mean_losses({"refined": candidates["refined"]}, unit, offset)
                best = min(losses, key=losses.__getitem__)
            choosing[layer, offset], choice[layer, offset] = losses, best
            if (chosen := candidates[best]) is not None:
                maps[layer, offset] = chosen
            if offset == 0:
                shuffled = _moments(unit, [*last[1:], last[0]], folds.fitting, 0, wrapped=True)
                shifts[layer] = moments.bias_only().bias
                controls = {"bias_only": moments.bias_only(), "shuffled": shuffled.ridges([strength])[0]}
        scored = {"logit": None, "tuned": maps.get((layer, 0)), **{name: controls.get(name) for name in CONTROLS[1:]}}
        for name, values in _losses(scored, unit, last, folds.scoring, 0, unembedding).items():
            kl[name].append(values)
    fitted_layers = tuple(sorted({layer for layer, _ in maps}))
    options = {
        "offsets": list(offsets),
        "refine": refine,
        "choice": {f"{at}.{k}": name for (at, k), name in choice.items()},
    }
    card = replace(card, layers=fitted_layers, options={**card.options, **options}, seed=seed)
    names = np.array([groups[text] for text, _ in folds.scoring], dtype=np.int64)
    scores = {name: np.stack(values) for name, values in kl.items()}
    return TunedFit(TunedLens(card, maps, shifts), choice, choosing, scores, tuple(read), names, rows_fitted)


def _folds(groups: Sequence[int], lengths: Sequence[int], reach: int, seed: int) -> _Folds:
    names = np.unique(np.asarray(groups))
    if len(names) < MIN_TEXTS:
        raise ProbeError(f"a tuned lens needs rows of at least 5 texts to hold some out, not {len(names)}")
    rng = np.random.default_rng(seed)
    fold = dict(zip(rng.permutation(names), np.arange(len(names)) * 5 // len(names), strict=True))
    texts: list[list[int]] = [[], [], []]
    for text, group in enumerate(groups):
        texts[max(0, int(fold[group]) - 2)].append(text)
    rows = []
    for part, most in ((texts[1], CHOOSING_ROWS), (texts[2], SCORED_ROWS)):
        places = [(text, position) for text in part for position in range(lengths[text] - reach)]
        if not places:
            raise ProbeError(f"no held-out text is longer than {reach} tokens: give longer texts or smaller offsets")
        rows.append([places[i] for i in sorted(rng.permutation(len(places))[:most])])
    return _Folds(texts[0], rows[0], rows[1])


def _moments(
    unit: Sequence[Tensor], last: Sequence[Tensor], texts: Sequence[int], offset: int, wrapped: bool = False
) -> Moments:
    """Sums of pairs (row, last row `offset` tokens on); `wrapped` repeats a shorter text's rows to the other's length."""
    width = unit[0].shape[-1]
    moments = Moments(width, width)
    for x, y in _pairs(unit, last, texts, offset, wrapped):
        moments.add(x, y)
    return moments


def _pairs(
    unit: Sequence[Tensor], last: Sequence[Tensor], texts: Sequence[int], offset: int, wrapped: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    for text in texts:
        x, y = unit[text], last[text]
        if wrapped:
            y = y[torch.arange(len(x)) % len(y)] if len(y) else x[:0]
            x = x[: len(y)]
        if len(x) > offset:
            yield x[: len(x) - offset], y[offset:]


def _losses(
    candidates: Mapping[str, AffineMap | None],
    unit: Sequence[Tensor],
    last: Sequence[Tensor],
    places: Sequence[tuple[int, int]],
    offset: int,
    unembedding: Unembedding,
) -> dict[str, NDArray[np.float64]]:
    """KL(model || candidate) of every place, for each candidate; the model's distribution is computed once."""
    rows = torch.stack([unit[text][position] for text, position in places])
    reference = torch.stack([last[text][position + offset] for text, position in places])
    mapped = torch.cat([rows if fitted is None else fitted(rows) for fitted in candidates.values()])
    of: Int[Tensor, " row"] = torch.arange(len(rows)).repeat(len(candidates))
    kl = logit.read(mapped, unembedding, reference=reference, reference_of=of).kl.double().cpu().numpy()
    return dict(zip(candidates, kl.reshape(len(candidates), len(rows)), strict=True))
