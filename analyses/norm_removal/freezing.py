"""The loss when a norm's scale is frozen and nothing is trained, restarted from the stored stream that enters its block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analyses.norm_removal.measured import Measured, Part, batched
from analyses.results.per_prompt import PerPrompt, interval
from probes.blocks.batch import Blocks, on_blocks
from probes.lenses import logit
from probes.models.protocol import Unembedding
from probes.norms import NormSite, Scale, Switches
from probes.progress import Progress

Source = Literal["mean", "per_position"]
FirstScale = Literal["own", "shared"]


@dataclass(frozen=True)
class Frozen:
    """Sites frozen together, and what they are called."""

    site: str
    layer: int | None
    sites: tuple[NormSite, ...]


def single(switches: Switches, split_paths: bool, layers: Sequence[int]) -> list[Frozen]:
    """Return every norm of `layers`, and the final one, to be frozen by itself.

    The norm before attention is frozen as a whole and, with `split_paths`, also on each of its two paths.
    """
    frozen = []
    for norm in switches.norms:
        first = norm.sites[0]
        if first.layer is not None and first.layer not in layers:
            continue
        joint = len(norm.sites) > 1
        name = "attn" if {site.kind for site in norm.sites} == {"qk", "v"} else "block" if joint else first.kind
        frozen.append(Frozen(name, first.layer, norm.sites))
        if joint and split_paths:
            frozen += [Frozen(site.kind, site.layer, (site,)) for site in norm.sites]
    return frozen


def together(switches: Switches) -> list[Frozen]:
    """Return all sites of each kind, and all sites, to be frozen together."""
    kinds = dict.fromkeys(site.kind for site in switches.sites)
    groups = [Frozen(f"all {k}", None, tuple(s for s in switches.sites if s.kind == k)) for k in kinds if k != "final"]
    return [*groups, Frozen("all", None, switches.sites)]


def sweep(switches: Switches, split_paths: bool, layers: Sequence[int]) -> list[Frozen]:
    """Return everything that is frozen: norms by themselves, and together."""
    return [*single(switches, split_paths, layers), *together(switches)]


def forwards(switches: Switches, frozen: Sequence[Frozen], lengths: Sequence[int]) -> int:
    """Count the sequences that restart under a frozen norm, of prompts of these lengths, the control among them.

    The final norm by itself is read out anew and restarts nothing; prompts without a next token share a batch with others
    or are not run.
    """
    restarting = 1 + sum(any(site.layer is not None for site in one.sites) for one in frozen)
    rows = [len(batch.lengths) for batch in batched([range(n) for n in lengths]) if max(batch.lengths) > 1]
    return restarting * sum(rows)


def mean_scales(
    site_scales: Mapping[NormSite, Sequence[Tensor]], source: Source, first: FirstScale
) -> dict[NormSite, Scale]:
    """Average each site's scales [pos] over prompts; sites of one norm are given the same numbers.

    Args:
        source: a mean over all positions, or over prompts for each position.
        first: whether position 0, whose norm is often massive, has a mean of its own.
    """
    out = {}
    for site, rows in site_scales.items():
        if source == "per_position":
            longest = max(map(len, rows))
            means = [torch.cat([r[p : p + 1] for r in rows if len(r) > p]).mean() for p in range(longest)]
            out[site] = Scale(1.0, positions=torch.stack(means))
            continue
        start = torch.stack([row[0] for row in rows])
        rest = torch.cat([row[1:] for row in rows])
        if first == "own" and len(rest):
            out[site] = Scale(float(rest.mean()), float(start.mean()))
        else:
            out[site] = Scale(float(torch.cat(list(rows)).mean()))
    return out


class FreezeEffects:
    """Changes of loss per prompt, one column for each thing that is frozen."""

    def __init__(self, measured: Measured, frozen: Sequence[Frozen], scales: Mapping[NormSite, Scale]) -> None:
        assert measured.switches is not None
        self.measured, self.frozen, self.switches = measured, list(frozen), measured.switches
        # One object for a norm's sites, so that its output is divided once.
        self.scales = {s: scales[self.switches.norm(s).sites[0]] for s in scales}
        self.change: PerPrompt = measured.column(len(self.frozen))
        self.diverged: PerPrompt = measured.column(len(self.frozen))
        """Tokens whose loss was no finite number: a gated MLP whose norm is frozen can grow without bound."""
        self.clean: PerPrompt = measured.column()
        self.control = 0.0
        """Largest change of a token's loss when every row keeps its own scale at every site."""
        self.forwards = 0
        """Sequences that were restarted."""

    def measure(self, progress: Progress) -> None:
        """Freeze each in turn, on all prompts."""
        lengths = [len(sequence) for sequence in self.measured.sequences]
        progress.start(forwards(self.switches, self.frozen, lengths), "frozen norm")
        for part in self.measured.parts():
            if part.counted.any():
                self._part(part, progress)

    def _part(self, part: Part, progress: Progress) -> None:
        clean = self.measured.loss(part.stream[-1][part.counted], part.targets)
        self.clean.add(0, part.prompts, clean)

        def work(blocks: Blocks) -> None:
            self.switches.enter(part.batch.tokens.to(self.measured.model.device))
            with self.switches.attached():
                own = dict.fromkeys(self.switches.sites, Scale(1.0, own=True))
                self.control = max(self.control, float((self._loss(blocks, part, own, progress) - clean).abs().max()))
                for index, frozen in enumerate(self.frozen):
                    loss = self._loss(blocks, part, {site: self.scales[site] for site in frozen.sites}, progress)
                    self.change.add(index, part.prompts, loss - clean)
                    self.diverged.add(index, part.prompts, (~loss.isfinite()).double())

        on_blocks(self.measured.model, part.batch.tokens, work)

    def _loss(self, blocks: Blocks, part: Part, on: Mapping[NormSite, Scale], progress: Progress) -> Tensor:
        layers, end = [site.layer for site in on if site.layer is not None], part.stream[-1]
        if layers:
            self.switches.on.update(on)
            try:
                end = blocks.run(part.stream[min(layers)], min(layers))[-1]
            finally:
                self.switches.on.clear()
            self.forwards += len(end)
            progress.advance(len(end))
        final = NormSite("final")
        unembedding = self._unembedding(on[final], part) if final in on else None
        return self.measured.loss(end[part.counted], part.targets, unembedding)

    def _unembedding(self, scale: Scale, part: Part) -> Unembedding:
        """Return the read-out of this part's counted rows, in their order, with the final norm's scale given."""
        own = self.measured.unembedding
        parts = self.switches.norm(NormSite("final")).parts
        if scale.own:
            return replace(own, norm=parts.own)
        each = scale.at(self.switches.rows)[part.counted.to(self.measured.model.device)]
        left = iter(torch.split(each, logit.ROW_TILE))
        return replace(own, norm=lambda rows: parts.divided(rows, next(left)))

    def tables(self, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Return (`freeze_effect`, `freeze_together`), with 95 % intervals over prompts; infinite where any token's loss is."""
        share = self.diverged.mean().numpy()
        # A mean over the tokens that stayed finite would make the worst cases look harmless.
        mean, low, high = (np.where(share > 0, np.inf, values) for values in interval(self.change, seed))
        table = pd.DataFrame(
            {
                "site": [frozen.site for frozen in self.frozen],
                "layer": [frozen.layer for frozen in self.frozen],
                "delta_ce": mean,
                "ci_low": low,
                "ci_high": high,
                "diverged": share,
                "tokens": self.diverged.counts.sum(0).long().numpy(),
            }
        )
        joint = table["site"].str.startswith("all")
        single_rows = table[~joint].assign(layer=table["layer"].fillna(self.measured.n_layers).astype(int))
        return single_rows.reset_index(drop=True), table[joint].drop(columns="layer").reset_index(drop=True)
