"""Confidence neurons: last-layer neurons that act on the prediction through the final norm rather than on its logits.

Stolfo et al. 2024 (arXiv 2406.16254) and Baroni et al. 2025 (arXiv 2507.02559): ranked by the length of what they write over
the variance, over tokens, of its cosine with the unembedding; mean-ablated with the final norm live and held.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from analyses.norm_removal.attribution import read_out, rows_of
from analyses.norm_removal.measured import Measured, Part
from analyses.results.per_prompt import PerPrompt, interval
from probes.edits.weights import matrix
from probes.lenses import logit
from probes.lenses.row_sums import LOG2
from probes.models.protocol import Unembedding
from probes.points import Address
from probes.progress import Progress

TILE = 4096
"""Tokens of the unembedding compared at once."""


@dataclass(frozen=True, eq=False)
class Ranking:
    """The last MLP's neurons."""

    written: Tensor
    """[neuron, d_model], what one unit of activation adds to the stream."""
    norm: Tensor
    """[neuron]."""
    cosine_variance: Tensor
    """[neuron], over the vocabulary."""

    @property
    def ratio(self) -> Float[Tensor, " neuron"]:
        """[neuron]; the higher it is, the more the neuron acts through the norm alone."""
        return self.norm / self.cosine_variance


@torch.no_grad()
def rank(measured: Measured) -> Ranking:
    """Rank all neurons of the last MLP, the unembedding taken with the final norm's gain."""
    layer = measured.n_layers - 1
    weight, rows = matrix(measured.anatomy.component("mlp.out", layer), measured.model.shape.d_mlp)
    written = (weight if rows else weight.T).detach().float()
    if path := measured.anatomy.map.path("ln2_post", layer):
        gain = getattr(measured.anatomy.map.module.get_submodule(path), "weight", None)
        written = written if gain is None else written * gain.detach().float()
    out = read_out(measured, torch.zeros(1, dtype=torch.long))
    gain = out.gain.float()
    direction = torch.nn.functional.normalize(written, dim=-1)
    total = torch.zeros(len(written), dtype=torch.float64, device=written.device)
    squares = total.clone()
    vocabulary = measured.unembedding.weight
    for tile in torch.split(vocabulary, TILE):
        tokens = tile.float() * gain
        tokens = tokens - tokens.mean(-1, keepdim=True) if out.centred else tokens
        cosines = (direction @ torch.nn.functional.normalize(tokens, dim=-1).T).double()
        total += cosines.sum(1)
        squares += cosines.square().sum(1)
    n = vocabulary.shape[0]
    variance = (squares / n - (total / n).square()).clamp_min(1e-30)
    return Ranking(written, written.norm(dim=-1), variance.float())


def candidates(ranking: Ranking, top: int, seed: int) -> list[tuple[int, str]]:
    """Choose the `top` neurons of the ranking, and as many others drawn at random as their control."""
    order = ranking.ratio.argsort(descending=True).tolist()
    rest = order[top:]
    drawn = np.random.default_rng(seed).permutation(len(rest))[:top]
    return [(n, "top") for n in order[:top]] + [(rest[i], "random") for i in drawn]


class Ablations:
    """Changes of loss and entropy when a neuron is set to its mean, with the final norm live and with its divisor held."""

    def __init__(self, measured: Measured, ranking: Ranking, chosen: list[tuple[int, str]]) -> None:
        self.measured, self.ranking, self.chosen = measured, ranking, chosen
        names = ("delta_ce", "delta_entropy", "delta_ce_held", "abs_delta_ce", "abs_delta_entropy", "abs_delta_ce_held")
        self.columns: dict[str, PerPrompt] = {name: measured.column(len(chosen)) for name in names}
        self.address = Address("mlp_post", measured.n_layers - 1)
        self.mean = torch.cat([a.float() for a in measured.activations.get(self.address)]).mean(0)

    @torch.no_grad()
    def measure(self, progress: Progress) -> None:
        """Ablate every chosen neuron, on all prompts."""
        parts = [part for part in self.measured.parts() if part.counted.any()]
        progress.start(len(parts) * len(self.chosen), "ablated neuron")
        for part in parts:
            stream = part.stream[-1][part.counted]
            held_norm = _frozen_unembedding(self.measured, stream)
            clean = self._read(stream, part)
            hidden = rows_of(self.measured, self.address, part.batch.indices, part.counted).float()
            for index, (neuron, _) in enumerate(self.chosen):
                change = self._change(hidden, neuron)
                gone = stream.float() + change
                ce, entropy = self._read(gone, part)
                ce_held, _ = self._read(gone, part, held_norm)
                changes = {
                    "delta_ce": ce - clean[0],
                    "delta_entropy": entropy - clean[1],
                    "delta_ce_held": ce_held - clean[0],
                }
                for name, values in changes.items():
                    self.columns[name].add(index, part.prompts, values)
                    self.columns[f"abs_{name}"].add(index, part.prompts, values.abs())
                progress.advance()

    def _change(self, hidden: Tensor, neuron: int) -> Tensor:
        """Return what the stream [n, d_model] gains when the neuron takes its mean instead of hidden [n, d_mlp]."""
        measured, layer = self.measured, self.measured.n_layers - 1
        step = (self.mean[neuron].to(hidden.device) - hidden[:, neuron])[:, None]
        path = measured.anatomy.map.path("ln2_post", layer)
        if path is None:
            return step * self.ranking.written[neuron]
        post, out = measured.anatomy.map.module.get_submodule(path), measured.anatomy.component("mlp.out", layer)
        changed = hidden.clone()
        changed[:, neuron] = self.mean[neuron]
        return (post(out(changed)) - post(out(hidden))).float()

    def _read(self, rows: Tensor, part: Part, unembedding: Unembedding | None = None) -> tuple[Tensor, Tensor]:
        """Return (loss, entropy) of rows [n, d_model], nats, [n] each."""
        own = unembedding or self.measured.unembedding
        ids = part.targets.to(own.weight.device)[:, None]
        reading = logit.read(rows, own, ids=ids)
        return -reading.logprobs[:, 0].cpu(), reading.entropy_bits.cpu() * LOG2

    def table(self, seed: int) -> pd.DataFrame:
        """Return the table `neurons`: one row a neuron, with intervals of the change of loss over prompts."""
        mean, low, high = interval(self.columns["delta_ce"], seed)
        rank_of = {n: r for r, n in enumerate(self.ranking.ratio.argsort(descending=True).tolist())}
        chosen = [neuron for neuron, _ in self.chosen]
        return pd.DataFrame(
            {
                "layer": self.measured.n_layers - 1,
                "neuron": chosen,
                "chosen": [how for _, how in self.chosen],
                "rank": [rank_of[n] for n in chosen],
                "ratio": self.ranking.ratio[chosen].cpu().numpy(),
                "norm": self.ranking.norm[chosen].cpu().numpy(),
                "cosine_variance": self.ranking.cosine_variance[chosen].cpu().numpy(),
                "delta_ce": mean,
                "ci_low": low,
                "ci_high": high,
                **{name: c.mean().numpy() for name, c in self.columns.items() if name != "delta_ce"},
            }
        )


def _frozen_unembedding(measured: Measured, clean: Tensor) -> Unembedding:
    """Return the read-out of rows in the order of `clean` [n, d_model] whose final norm divides by the clean rows' scales."""
    out = read_out(measured, torch.zeros(1, dtype=torch.long))
    scale = out.scale(clean.double()).float()
    gain, bias = out.gain.float(), out.bias.float()
    left: list[Tensor] = []

    def norm(rows: Tensor) -> Tensor:
        if not left:
            left.extend(torch.split(scale, logit.ROW_TILE))
        x = rows.float()
        x = x - x.mean(-1, keepdim=True) if out.centred else x
        return (x / left.pop(0) * gain + bias).to(rows.dtype)

    return replace(measured.unembedding, norm=norm)
