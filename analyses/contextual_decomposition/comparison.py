"""Every method on the same nodes: its scores, how they agree with measured effects, and what each took."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch

from analyses.contextual_decomposition.agreement import agreement_notes, agreement_tables
from analyses.contextual_decomposition.faithfulness import faithfulness_tables
from analyses.contextual_decomposition.gradient_scores import GradientScores
from analyses.contextual_decomposition.node_comparison import Compared
from analyses.contextual_decomposition.prepared_cases import PreparedCases, Scored, by_magnitude
from analyses.contextual_decomposition.removal import Rank, head_unit, removal_tables, token_unit
from analyses.contextual_decomposition.tables import heads_table
from analyses.results.statistics import Array
from probes.decomposition import Node, Rules, Source
from probes.progress import Progress


@dataclass(eq=False)
class Comparison:
    """Scores of heads by method, in the order of the tables, and what each took."""

    scores: dict[str, Array]
    """Per method [prompt, head]; `cdt` is the decomposition's, `ablation` the measured effect once it is known."""
    gradients: GradientScores
    seconds: dict[str, float]
    """Of methods without a backward pass."""
    tables: list[tuple[pd.DataFrame, pd.DataFrame]] = field(default_factory=list)
    """Agreement and differences of each kind of nodes."""

    def agree(
        self, scores: Mapping[str, Array], effects: Array, seed: int, controls: Mapping[str, Array], kind: str
    ) -> None:
        """Enter how the scores of a kind of nodes agree with measured effects."""
        table, differences = agreement_tables(scores, effects, seed, controls, kind)
        methods, passes = table["method"], self.gradients.passes
        # What decomposes, or reads the end alone, needs each prompt's plain forward and no backward.
        table["forwards"] = [passes.get(m, 1 if m in self.seconds else 0) for m in methods]
        table["backwards"] = [passes.get(m, 0) for m in methods]
        took = {**self.gradients.seconds, **self.seconds}
        table["seconds"] = [took.get(m, 0.0) for m in methods]
        self.tables.append((table, differences))

    def agreement(self) -> tuple[dict[str, pd.DataFrame], list[str]]:
        """Return the tables `agreement` and `agreement_differences`, and what their intervals say in words."""
        if not self.tables:
            return {}, []
        table, differences = (pd.concat(parts, ignore_index=True) for parts in zip(*self.tables, strict=True))
        return {"agreement": table, "agreement_differences": differences}, agreement_notes(table, differences)


def compare_heads(
    prepared: PreparedCases,
    cdt: tuple[Array, float],
    gradients: GradientScores,
    methods: Sequence[str],
    other: tuple[str, Rules] | None,
    progress: Progress,
) -> Comparison:
    """Score heads by every method.

    Args:
        cdt: the decomposition's scores [prompt, head] and the seconds they took.
        gradients: what backward passes say.
        other: the name and rules of a further decomposition.
    """
    scores, seconds = {"cdt": cdt[0]}, {"cdt": cdt[1]}
    by_pass = {
        name: gradients.of_heads(name, prepared.heads) for name, kinds in gradients.nodes.items() if "heads" in kinds
    }
    if "attribution" in by_pass:
        scores["attribution"] = by_pass.pop("attribution")
    started = time.perf_counter()
    if "direct" in methods and (direct := prepared.direct()) is not None:
        scores["direct"], seconds["direct"] = direct, time.perf_counter() - started
    if other is not None:
        started = time.perf_counter()
        sources: list[Source] = [(node,) for node in prepared.heads]
        name = f"cdt_{other[0]}"
        scores[name] = prepared.scores(sources, other[1], progress, f"prompt scored by {other[0]} rules")
        seconds[name] = time.perf_counter() - started
    return Comparison(scores | by_pass, gradients, seconds)


def heads_compared(
    prepared: PreparedCases, comparison: Comparison, ablation: bool, seed: int, progress: Progress
) -> pd.DataFrame:
    """Return the table `heads`; where their effects are measured, enter these and how the methods agree with them."""
    if ablation:
        effects = prepared.effects(progress)
        index = torch.tensor([float(node.layer) for node in prepared.heads]).expand(len(effects), -1).double().numpy()
        controls = {"layer": index}
        if "heads" in comparison.gradients.distances:
            chosen = [node.layer for node in prepared.heads], [node.head for node in prepared.heads]
            rows = [row[chosen] for row in comparison.gradients.distances["heads"]]
            controls = {"distance": torch.stack(rows).numpy(), **controls}
        comparison.agree(comparison.scores, effects, seed, controls, "heads")
        comparison.scores["ablation"] = effects
    return heads_table(prepared.heads, comparison.scores, seed)


def agree_on(comparison: Comparison, nodes: Compared, seed: int, kind: str) -> None:
    """Enter how methods agree with the measured effects of further nodes, where they were measured."""
    if nodes.effects is not None:
        comparison.agree(nodes.scores, nodes.effects, seed, nodes.controls, kind)


def circuit_tables(
    prepared: PreparedCases,
    scored: Scored,
    comparison: Comparison,
    methods: Sequence[str],
    kept: Sequence[Node],
    shares: Sequence[float],
    n_random: int,
    seed: int,
    progress: Progress,
) -> dict[str, pd.DataFrame]:
    """Return the tables `faithfulness` and `areas`."""
    orders = {name: by_magnitude(prepared.heads, comparison.scores[name]) for name in methods}
    rows = scored.prompts
    curves, areas = faithfulness_tables(
        [prepared.ablations[i] for i in rows], prepared.full[rows], prepared.empty[rows], orders, kept, shares,
        n_random, seed, progress,
    )  # fmt: skip
    return {"faithfulness": curves, "areas": areas}


def removed(
    prepared: PreparedCases,
    comparison: Comparison,
    methods: Sequence[str],
    units: Sequence[str],
    seed: int,
    progress: Progress,
) -> dict[str, pd.DataFrame]:
    """Return the tables `curves` and `abpc` of heads, by each method's mean scores, and of tokens, by each prompt's own."""
    parts = []
    for name in dict.fromkeys(units):
        orders: dict[str, list[Rank]] = {}
        if name == "heads":
            unit = head_unit(prepared)
            for method in methods:
                orders[method] = [(-comparison.scores[method].mean(0)).argsort(kind="stable")] * len(prepared.cases)
        else:
            unit = token_unit(prepared)
            for method, kinds in comparison.gradients.nodes.items():
                orders[method] = [(-values.numpy()).argsort(kind="stable") for values in kinds["tokens"]]
        if orders:
            parts.append(removal_tables(unit, orders, seed, progress))
    if not parts:
        return {}
    curves, areas = (pd.concat(tables, ignore_index=True) for tables in zip(*parts, strict=True))
    return {"curves": curves, "abpc": areas}
