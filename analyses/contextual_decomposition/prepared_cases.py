"""Cases that are traced once, and what every part of a run measures on them: scores, ablation effects, the circuit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch

from analyses.contextual_decomposition.ablation import Ablation, shared_start, without
from analyses.contextual_decomposition.cases import Case, baseline_of
from analyses.contextual_decomposition.circuit import Edge, Links, Search, pruned, search
from analyses.contextual_decomposition.direct_attribution import direct_attribution
from analyses.contextual_decomposition.faithfulness import Keep, metrics
from analyses.contextual_decomposition.scores import (
    PreparedCase,
    Reading,
    mlp_sources,
    position_sources,
    sweep,
    to_nodes,
)
from analyses.results.statistics import Array
from probes.decomposition import Baseline, Decomposer, Node, Rules, Source
from probes.errors import OptionError
from probes.models.protocol import Model
from probes.progress import QUIET, Progress


@dataclass(frozen=True, eq=False)
class PreparedCases:
    """Cases that are traced once and ready for every measurement."""

    model: Model
    decomposer: Decomposer
    cases: tuple[PreparedCase, ...]
    ablations: tuple[Ablation, ...]
    heads: tuple[Node, ...]
    """The heads that are scored and ablated, at all positions."""
    full: Array
    """The metric of each prompt as it is."""
    empty: Array
    """The metric of each prompt with all of `heads` at their baseline."""
    forwards: int
    """Plain forwards that preparing them took."""

    def scores(self, sources: Sequence[Source], rules: Rules, progress: Progress, what: str) -> Array:
        """Return relevance to the metric, [prompt, source]."""
        return self.swept(sources, rules, None, progress, what)[0]

    def swept(
        self, sources: Sequence[Source], rules: Rules, reading: Reading | None, progress: Progress, what: str
    ) -> tuple[Array, torch.Tensor | None]:
        """Return relevance to the metric, [prompt, source], and under `reading` that to every head.

        The latter is a mean over prompts, [source, layer, head].
        """
        progress.start(len(self.cases), what)
        out, links = [], None
        for one in self.cases:
            scores, heads = sweep(self.decomposer, one, sources, rules, reading)
            _finite(one.case.index, scores)
            out.append(scores.numpy())
            if heads is not None:
                links = heads if links is None else links + heads
            progress.advance()
        return np.stack(out), None if links is None else links / len(self.cases)

    def effects(self, progress: Progress) -> Array:
        """Return the fall of the metric on ablating each head [prompt, head]."""
        progress.start(len(self.ablations), "prompt ablated")
        out = []
        for ablation in self.ablations:
            out.append(without(ablation, self.heads).numpy())
            progress.advance()
        return np.stack(out)

    def direct(self) -> Array | None:
        """Return the direct logit attribution of each head [prompt, head]; None where the model has none."""
        parts = [direct_attribution(self.decomposer, one.prompt, one.case, one.baseline) for one in self.cases]
        if any(part is None for part in parts):
            return None
        return np.stack([self._chosen(part) for part in parts if part is not None])

    def _chosen(self, values: torch.Tensor) -> Array:
        """Return the values, of [layer, head], of the heads that are scored [head]."""
        return values[[node.layer for node in self.heads], [node.head for node in self.heads]].double().numpy()


def _finite(prompt: int, scores: torch.Tensor) -> None:
    if lost := int((~torch.isfinite(scores)).sum()):
        raise OptionError(
            f"prompt {prompt}: under these rules the relevant part of {lost} of {len(scores)} sources outgrows "
            "the model's numbers; give --gate frozen, as the faithful preset does"
        )


def prepare_cases(
    model: Model, cases: Sequence[Case], heads: Sequence[Node], joint: bool, progress: Progress
) -> PreparedCases:
    """Trace every case and read its baseline; cases of one group pool their references.

    Raises:
        PointError: an operation of the model that the rules do not know.
    """
    decomposer = Decomposer(model, cases[0].tokens)
    baselines: dict[tuple[str, int], Baseline | None] = {}
    pools = _pools(cases)
    forwards, prepared, ablations, ends = 1, [], [], []
    progress.start(len(cases), "prompt traced")
    for case in cases:
        key = case.group, len(case.tokens)
        references = pools[key]
        if key not in baselines:
            baselines[key] = baseline_of(model, references) if references else None
            forwards += len(references)
        ablation = Ablation(model, case, baselines[key], shared_start(case.tokens, references))
        prepared.append(PreparedCase(case, decomposer.prepare(case.tokens, joint=joint), baselines[key]))
        ablations.append(ablation)
        ends.append(
            ablation.metric(torch.stack([Keep(keep, tuple(heads)).at(ablation) for keep in (tuple(heads), ())]))
        )
        forwards += 2
        progress.advance()
    full, empty = torch.stack(ends).numpy().T
    return PreparedCases(model, decomposer, tuple(prepared), tuple(ablations), tuple(heads), full, empty, forwards)


def _pools(cases: Sequence[Case]) -> dict[tuple[str, int], list[tuple[int, ...]]]:
    """Return the references of each group and length, without repeats."""
    pools: dict[tuple[str, int], set[tuple[int, ...]]] = {}
    for case in cases:
        pools.setdefault((case.group, len(case.tokens)), set()).update(case.references)
    return {key: sorted(references) for key, references in pools.items()}


def same_form(prepared: PreparedCases) -> list[int]:
    """Indices of the largest set of cases in which a position means the same: those of one group and one length."""
    forms: dict[tuple[str, int], list[int]] = {}
    for index, one in enumerate(prepared.cases):
        forms.setdefault((one.case.group, len(one.case.tokens)), []).append(index)
    return max(forms.values(), key=len)


@dataclass(frozen=True, eq=False)
class Scored:
    """Sources and their relevance [prompt, source]; prompts by their index in the prepared."""

    nodes: list[Node]
    scores: Array
    prompts: list[int]


def scored_positions(prepared: PreparedCases, rules: Rules, progress: Progress) -> Scored:
    """Score every head at every position of interest, on the cases in which positions mean the same."""
    chosen = same_form(prepared)
    part = replace(prepared, cases=tuple(prepared.cases[i] for i in chosen))
    positions = sorted({p for i in chosen for p in prepared.cases[i].case.positions})
    sources = position_sources(prepared.heads, positions)
    return Scored(
        [source[0] for source in sources], part.scores(sources, rules, progress, "prompt by position"), chosen
    )


def scored_mlps(prepared: PreparedCases, layers: Sequence[int], rules: Rules, progress: Progress) -> Scored:
    """Score every MLP of some layers at all positions."""
    sources = mlp_sources(layers)
    scores = prepared.scores(sources, rules, progress, "prompt's MLPs")
    return Scored([source[0] for source in sources], scores, list(range(len(prepared.cases))))


def links_from_sweep(heads: torch.Tensor, nodes: Sequence[Node]) -> Links:
    """Return links between heads at all positions, from what one sweep read of every head [source, layer, head]."""
    row = {node: i for i, node in enumerate(nodes)}

    def links(sources: Sequence[Node], targets: Sequence[Node]) -> torch.Tensor:
        rows = torch.tensor([row[node] for node in sources])[:, None]
        return heads[rows, [node.layer for node in targets], [node.head for node in targets]]

    return links


def links_by_walking(
    decomposer: Decomposer, cases: Sequence[PreparedCase], rules: Rules, reading: Reading, progress: Progress = QUIET
) -> Links:
    """Return links that sweep every prompt for each step of the search.

    Heads at single positions have too many pairs to keep the scores of all.
    """

    def links(sources: Sequence[Node], targets: Sequence[Node]) -> torch.Tensor:
        progress.start(len(cases), "prompt searched")
        total = torch.zeros(len(sources), len(targets), dtype=torch.float64)
        for one in cases:
            total += to_nodes(decomposer, one, [(node,) for node in sources], targets, rules, reading)
            progress.advance()
        return total / len(cases)

    return links


def find_circuit(
    prepared: PreparedCases, scored: Scored, links: Links, how: Search, prune: bool, progress: Progress
) -> tuple[list[Node], list[Node], list[Edge]]:
    """Return the nodes of the searched circuit, those that pruning keeps, and the edges."""
    circuit, edges = search(links, scored.nodes, torch.from_numpy(scored.scores.mean(0)), how)
    if not prune:
        return circuit, circuit, edges
    ablations = [prepared.ablations[i] for i in scored.prompts]
    protected = [edge.source for edge in edges if edge.target is None]

    def value(circuits: Sequence[Sequence[Node]]) -> torch.Tensor:
        keeps = [Keep(tuple(nodes), prepared.heads) for nodes in circuits]
        return torch.from_numpy(metrics(ablations, keeps, progress).mean(0))

    return circuit, pruned(circuit, protected, value), edges


def by_magnitude(nodes: Sequence[Node], scores: Array) -> list[Node]:
    """Return nodes by the magnitude of their mean score, largest first."""
    sizes = np.abs(scores.mean(0))
    return [nodes[int(i)] for i in np.argsort(-sizes, kind="stable")]


def cases_table(prepared: PreparedCases, texts: Sequence[str]) -> pd.DataFrame:
    """Return columns prompt, text, n_tokens, metric (as it is), metric_ablated (with every head at its baseline)."""
    cases = [one.case for one in prepared.cases]
    return pd.DataFrame({
        "prompt": [case.index for case in cases], "text": [texts[case.index] for case in cases],
        "n_tokens": [len(case.tokens) for case in cases], "metric": prepared.full, "metric_ablated": prepared.empty,
    })  # fmt: skip
