"""The parts of a run: cases opened, sources scored, a circuit searched, and all of it checked against ablation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from analyses.contextual_decomposition.cases import Case, baseline_of
from analyses.contextual_decomposition.circuit import Edge, Search, pruned, search
from analyses.contextual_decomposition.effects import (
    Ablation,
    attribution_patching,
    direct_attribution,
    head_ablation,
)
from analyses.contextual_decomposition.faithfulness import metrics
from analyses.contextual_decomposition.scores import (
    Opened,
    head_sources,
    mlp_sources,
    position_sources,
    to_metric,
)
from probes.decomposition import Baseline, Decomposer, Node, Rules, Source
from probes.errors import OptionError
from probes.models.base import Model
from probes.progress import Progress

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Study:
    """Cases traced once, ready for every measurement."""

    model: Model
    decomposer: Decomposer
    opened: tuple[Opened, ...]
    ablations: tuple[Ablation, ...]
    forwards: int
    """Plain forwards it took to open them."""

    @property
    def heads(self) -> list[Node]:
        """Every head of the model at all positions."""
        return [source[0] for source in head_sources(self.model.shape.n_layers, self.model.shape.n_heads)]

    def scores(self, sources: Sequence[Source], rules: Rules, progress: Progress) -> Array:
        """Relevance to the metric [prompt, source]."""
        progress.start(len(self.opened), "prompt")
        out = []
        for one in self.opened:
            found = to_metric(self.decomposer, one, sources, rules).numpy()
            if lost := int((~np.isfinite(found)).sum()):
                raise OptionError(
                    f"prompt {one.case.index}: under these rules the relevant part of {lost} of {len(found)} sources outgrows "
                    "the model's numbers; give --gate frozen, as the faithful preset does"
                )
            out.append(found)
            progress.advance()
        return np.stack(out)

    def effects(self, progress: Progress) -> Array:
        """The fall of the metric on ablating each head [prompt, head]."""
        progress.start(len(self.ablations), "ablated prompt")
        out = []
        for ablation in self.ablations:
            out.append(head_ablation(ablation).flatten().double().numpy())
            progress.advance()
        return np.stack(out)

    def attributions(self) -> Array:
        """Attribution patching of each head [prompt, head]."""
        parts = [attribution_patching(self.model, one.case, one.baseline) for one in self.opened]
        return torch.stack([part.sum(1).flatten() for part in parts]).double().numpy()

    def direct(self) -> Array | None:
        """Direct logit attribution of each head [prompt, head]; None where the model has none."""
        parts = [direct_attribution(self.decomposer, one.prompt, one.case, one.baseline) for one in self.opened]
        if any(part is None for part in parts):
            return None
        return torch.stack([part.flatten() for part in parts if part is not None]).double().numpy()


def open_study(model: Model, cases: Sequence[Case], joint: bool, progress: Progress) -> Study:
    """Traces every case and reads its baseline; cases of one group pool their references.

    Raises:
        PointError: an operation of the model that the rules do not know.
    """
    decomposer = Decomposer(model, cases[0].tokens)
    baselines: dict[str, Baseline | None] = {}
    forwards, opened = 1, []
    progress.start(len(cases), "prompt traced")
    for case in cases:
        key = f"{case.group}, {len(case.tokens)}"
        if key not in baselines:
            same = [c for c in cases if c.group == case.group and len(c.tokens) == len(case.tokens)]
            references = sorted({r for c in same for r in c.references})
            baselines[key] = baseline_of(model, references) if references else None
            forwards += len(references)
        opened.append(Opened(case, decomposer.prepare(case.tokens, joint=joint), baselines[key]))
        forwards += 1
        progress.advance()
    ablations = tuple(Ablation(model, one.case, one.baseline) for one in opened)
    return Study(model, decomposer, tuple(opened), ablations, forwards)


def same_form(study: Study) -> list[int]:
    """The largest set of cases in which a position means the same: one group, one length; their indices."""
    forms: dict[tuple[str, int], list[int]] = {}
    for index, one in enumerate(study.opened):
        forms.setdefault((one.case.group, len(one.case.tokens)), []).append(index)
    return max(forms.values(), key=len)


@dataclass(frozen=True, eq=False)
class Scored:
    """Sources and their relevance [prompt, source]; prompts by their index in the study."""

    nodes: list[Node]
    scores: Array
    prompts: list[int]


def positioned(study: Study, rules: Rules, progress: Progress) -> Scored:
    """Every head at every position of interest, on the cases in which positions mean the same."""
    chosen = same_form(study)
    part = Study(study.model, study.decomposer, tuple(study.opened[i] for i in chosen), (), 0)
    positions = sorted({p for i in chosen for p in study.opened[i].case.positions})
    sources = position_sources(study.model.shape.n_layers, study.model.shape.n_heads, positions)
    return Scored([source[0] for source in sources], part.scores(sources, rules, progress), chosen)


def mlps(study: Study, rules: Rules, progress: Progress) -> Scored:
    """Every MLP at all positions."""
    sources = mlp_sources(study.model.shape.n_layers)
    found = study.scores(sources, rules, progress)
    return Scored([source[0] for source in sources], found, list(range(len(study.opened))))


def find_circuit(study: Study, scored: Scored, how: Search, prune: bool) -> tuple[list[Node], list[Node], list[Edge]]:
    """The nodes found, those that pruning keeps, and the edges."""
    opened = [study.opened[i] for i in scored.prompts]
    circuit, edges = search(study.decomposer, opened, scored.nodes, torch.from_numpy(scored.scores.mean(0)), how)
    if not prune:
        return circuit, circuit, edges
    ablations = [study.ablations[i] for i in scored.prompts]
    protected = [edge.source for edge in edges if edge.target is None]
    kept = pruned(circuit, protected, lambda found: torch.from_numpy(metrics(ablations, found).mean(0)))
    return circuit, kept, edges


def order_of(nodes: Sequence[Node], scores: Array) -> list[Node]:
    """Nodes by the magnitude of their mean score, largest first."""
    sizes = np.abs(scores.mean(0))
    return [nodes[int(i)] for i in np.argsort(-sizes, kind="stable")]


def cases_table(study: Study, texts: Sequence[str]) -> pd.DataFrame:
    """Columns prompt, text, n_tokens, metric, metric_ablated: the metric as it is and with every head at its baseline."""
    rows = []
    for one, ablation in zip(study.opened, study.ablations, strict=True):
        shape = study.model.shape
        keep = torch.ones(2, shape.n_layers, shape.n_heads, dtype=torch.bool)
        keep[1] = False
        full, empty = ablation.metric(0, keep).tolist()
        rows.append((one.case.index, texts[one.case.index], len(one.case.tokens), full, empty))
    return pd.DataFrame(rows, columns=["prompt", "text", "n_tokens", "metric", "metric_ablated"])
