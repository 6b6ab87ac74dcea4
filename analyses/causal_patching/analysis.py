"""Causal patching: copy activations of one run into another, and see how far the answer follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import pandas as pd

from analyses.base import Analysis, Measured, PromptsLike, as_prompts
from analyses.causal_patching import costs
from analyses.causal_patching.ablation import AblationKind
from analyses.causal_patching.cells import Component, check_components
from analyses.causal_patching.circuit_plan import SHARES, CircuitPlan
from analyses.causal_patching.corruption import Noise, SigmaOver, element_deviation
from analyses.causal_patching.decision import window_table
from analyses.causal_patching.edges import Line, LinePath, Rule
from analyses.causal_patching.estimates import EstimatePlan, estimates
from analyses.causal_patching.figures import FIGURES, PROFILES
from analyses.causal_patching.journal import Journal, journal_in
from analyses.causal_patching.levels import METHODS
from analyses.causal_patching.metrics import Metric
from analyses.causal_patching.notes import run_notes
from analyses.causal_patching.nulls import Null
from analyses.causal_patching.pairs import FIELDS, Direction, Pair, pair_of, resolved
from analyses.causal_patching.patched import GridPlan, pairs_table
from analyses.causal_patching.paths import KvView, Through
from analyses.causal_patching.running import Run, count_cells, noise_floor
from analyses.causal_patching.selection import check_gaps, gauge
from analyses.causal_patching.statistics import map_table
from analyses.causal_patching.task_pairs import generated
from analyses.interventions import Interventions, Tally
from analyses.options import option
from probes.blocks.together import resumable, together
from probes.errors import OptionError
from probes.models.protocol import Model
from probes.progress import QUIET, Progress
from probes.prompts import Prompt, PromptLine, read_prompts
from probes.store import ActivationStore

REFERENCES = 16
"""Prompts of each generated pair's form over which means are taken."""
DEFAULT_METHODS = {"nodes": ("exact", "atp"), "edges": ("eap_ig",)}
"""What orders circuits where nothing is named."""


@dataclass(frozen=True)
class CausalPatching(Analysis):
    """Activation patching in both directions, resumed from inside the stack (Meng et al. 2022; Heimersheim and Nanda 2024)."""

    task: Literal["prompts", "ioi", "greater_than", "docstring", "two_hop", "facts"] = option(
        "prompts", "prompts: the pairs of the prompt file; otherwise generated pairs of that task."
    )
    n_pairs: int = option(32, "Generated pairs.", low=1)
    corruption: Literal["token", "reference", "noise"] = option(
        "token",
        "token: another prompt of the same form with another answer; reference: one in which the answer is not determined; "
        "noise: Gaussian noise on the embeddings of the subject.",
    )
    noise_factor: float = option(3.0, "noise: standard deviations of embedding elements that are added.", low=1e-9)
    noise_samples: int = option(10, "noise: draws for each pair.", low=1, high=100)
    sigma_over: SigmaOver = option("subjects", "noise: the embedding rows whose elements' deviation is taken.")
    directions: tuple[Direction, ...] = option(
        ("denoise", "noise"),
        "denoise: clean into corrupted, what is enough; noise: corrupted into clean, what is needed.",
    )
    components: tuple[Component, ...] = option(("resid_post", "attn_out", "mlp_out", "z"), "What is copied.")
    heads: Literal["none", "all_positions", "by_position"] = option(
        "all_positions",
        "Heads of z, q, k, v and pattern: at all positions from the first difference on, at each, or not at all.",
    )
    roles: tuple[str, ...] = option(
        (), "Positions, by name or distance from the end (-1 is the last); all where none is named."
    )
    layers: tuple[int, ...] = option((), "Layers that are patched; every stride-th where none is named.", low=0)
    stride: int = option(1, "Every how many layers one is patched, where layers names none.", low=1)
    window: str = option(
        "1", "Layers of attn_out, mlp_out and z patched together: a number, prefix (0 to l) or suffix (l to the last)."
    )
    metric: tuple[Metric, ...] = option(
        ("logit_diff",), "What is read of the answer; the first decides which pairs are kept."
    )
    min_gap: float = option(0.5, "Pairs whose runs differ less in the first metric are left out.", low=0)
    min_pairs: int = option(4, "Fewer pairs than these are refused.", low=1)
    nulls: Null = option(
        "unrelated",
        "Also copy from a prompt that does not hold the fact: another answer's, or the same answer's in other words.",
    )
    attribution: tuple[Literal["none", "atp", "atp_star", "eap", "eap_ig"], ...] = option(
        ("none",), "Estimate every cell (atp; atp_star for sizes alone) or every edge (eap, eap_ig) from gradients."
    )
    ig_steps: int = option(5, "eap_ig: runs between the corrupted and the clean prompt.", low=1, high=100)
    ig_rule: Rule = option("gauss", "eap_ig: where on the line they lie.")
    ig_path: LinePath = option(
        "inputs",
        "eap_ig: what lies between them, the token embeddings, or each component's output by itself (many more runs).",
    )
    verify: int = option(
        32, "Estimates that are patched exactly: so many of the largest, and as many at random.", low=0, high=1000
    )
    paths: tuple[str, ...] = option((), "Edges to patch exactly, such as 9.6>10.0.q, embed>m2 or m4>logits.")
    through: Through = option("residual", "paths: the edge alone, or also MLPs on the way.")
    kv_view: KvView = option(
        "shared",
        "paths: a changed key or value is seen by its whole group, or by one query head alone, as in no real model.",
    )
    max_edges: int = option(2000, "paths: more than these are refused.", low=1)
    circuit: Literal["none", "nodes", "edges"] = option(
        "none", "Try circuits of heads and MLPs, or of the edges between them, ordered by each method."
    )
    ablation: AblationKind = option(
        "counterfactual",
        "circuit: what everything outside becomes, the corrupted run's, the mean over references, or zero.",
    )
    circuit_methods: tuple[Literal["exact", "mean", "atp", "atp_star", "eap", "eap_ig"], ...] = option(
        (),
        "circuit: what orders nodes (exact and mean patch each by itself) or edges (eap, eap_ig); exact and atp, or eap_ig.",
    )
    sizes: tuple[float, ...] = option(SHARES, "circuit: sizes, as shares of all nodes or edges.", low=0, high=1)
    n_random: int = option(20, "circuit: random circuits of each size, and as many of each layer's.", low=0)
    n_subsets: int = option(
        32,
        "circuit: subsets taken out of the smallest faithful one, to see if it is complete and minimal; 0 for none.",
        low=0,
    )
    seed: int = option(0, "Seed of generated pairs, noise, signs and intervals.")

    name = "causal_patching"
    title = "Causal patching: where a change decides the answer"
    reference = (
        'Meng et al. 2022, "Locating and Editing Factual Associations in GPT", arXiv 2202.05262; Heimersheim and Nanda 2024, '
        '"How to use and interpret activation patching", arXiv 2404.15255'
    )
    prompt_fields = FIELDS
    figures = FIGURES
    profiles = PROFILES
    reads = "own forwards"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window not in ("prefix", "suffix") and not (
            self.window.isascii() and self.window.isdigit() and int(self.window)
        ):
            raise OptionError(
                f"option window is {self.window!r}: legal are a number of layers from 1, prefix and suffix"
            )
        legal = METHODS.get(self.circuit, self.circuit_methods)
        for method in self.circuit_methods:
            if method not in legal:
                raise OptionError(
                    f"circuit method {method!r} does not order {self.circuit}: legal are {', '.join(legal)}"
                )

    @property
    def makes_prompts(self) -> bool:
        """Whether a task generates its pairs."""
        return self.task != "prompts"

    @property
    def plan(self) -> GridPlan:
        """Which cells of each pair are patched."""
        window = self.window if self.window in ("prefix", "suffix") else int(self.window)
        return GridPlan(self.components, self.heads, self.roles, window, self.layers, self.stride)

    @property
    def estimates(self) -> EstimatePlan:
        """What is estimated, verified and tried beside the grid."""
        circuits, line = None, Line(self.ig_steps, self.ig_rule, self.ig_path)
        if self.circuit != "none":
            ordering = self.circuit_methods or DEFAULT_METHODS[self.circuit]
            circuits = CircuitPlan(
                self.circuit,
                ordering,
                self.sizes,
                self.ablation,
                self.n_random,
                self.n_subsets,
                line,
                self.seed,
            )
        methods = tuple(method for method in self.attribution if method != "none")
        return EstimatePlan(
            methods,
            line,
            self.verify,
            self.paths,
            self.through,
            self.kv_view,
            self.max_edges,
            circuits,
            self.seed,
        )

    def collect(self, model: Model, prompts: PromptsLike = ()) -> list[Prompt]:
        """Return the clean prompts, each with its pair as token ids in its fields.

        Raises:
            PromptError: a line that is no pair, with file and line.
        """
        noise = self.corruption == "noise"
        if self.makes_prompts:
            return generated(model, self.task, self.n_pairs, self.corruption, self.seed, REFERENCES * self._means)
        lines = read_prompts(prompts, FIELDS) if isinstance(prompts, str | Path) else list(prompts)
        wheres = [line.where if isinstance(line, PromptLine) else f"prompt {i}" for i, line in enumerate(lines)]
        return resolved(model, as_prompts(lines, model, FIELDS), wheres, noise)

    def interventions(self, model: Model, prompts: Sequence[Prompt]) -> Interventions:
        """Count the cells of all pairs, before it is known which of them the model tells apart."""
        pairs = [pair for pair in self._pairs(prompts) if not pair.reason]
        run = self._run(model, pairs, Tally(QUIET), None)
        return costs.planned(run, self._samples, self.estimates)

    def measure(self, model: Model, prompts: PromptsLike, store: ActivationStore, progress: Progress) -> Measured:
        """Return the tables `pairs`, `cells`, `map` and `window`; by option `nodes`, `edges`, `verification`, `paths`,
        `faithfulness`, `circuit_area` and `circuit_checks`.

        Raises:
            OptionError: a component or layer that the model does not have.
            PointError: edges, paths or circuits of a model that keeps its blocks to itself.
            PromptError: a line that is no pair, or pairs that the model does not tell apart.
        """
        questions = self.collect(model, prompts)
        pairs = self._pairs(questions)
        tally = Tally(progress)
        usable = [pair for pair in pairs if not pair.reason]
        run = self._run(model, usable, tally, store)
        self.estimates.check(run)
        ends, reasons = gauge(run, self.min_gap, self.task == "two_hop", progress)
        reasons = {**{pair.index: pair.reason for pair in pairs if pair.reason}, **reasons}
        check_gaps(pairs, ends, reasons, self.min_pairs, self.metric[0])
        kept = [pair for pair in usable if pair.index not in reasons]
        run = replace(run, pairs=kept)
        counts = count_cells(run, self._samples)
        progress.start(sum(counts.values()), "cell patched")
        with resumable(model, repr((self, [(pair.clean, pair.corrupted) for pair in kept]))):
            tables_of = together(model, [partial(run.cells, pair, ends[pair.index]) for pair in kept])
        cells = pd.concat([table for of_pair in tables_of for table in of_pair], ignore_index=True)
        tables = {"pairs": pairs_table(pairs, ends, reasons, self.metric), "cells": cells}
        tables["map"] = map_table(cells, tables["pairs"], self.seed)
        tables["window"] = window_table(cells, tables["pairs"], self.metric[0], self.seed)
        tables["pairs"]["corruption"] = self.corruption
        notes = run_notes(pairs, tables, self.nulls, run.noise, noise_floor(run))
        further, said = estimates(run, self.estimates, ends, progress)
        tables |= further
        notes += said
        run.journal.close()
        done = {"pairs": len(kept), "pairs_left_out": len(pairs) - len(kept)}
        return Measured(questions, tables, None, notes, done, tally.forwards)

    @property
    def _means(self) -> bool:
        """Whether something is replaced by its mean over references."""
        return self.circuit != "none" and (self.ablation == "mean" or "mean" in self.circuit_methods)

    @property
    def _samples(self) -> int:
        return self.noise_samples if self.corruption == "noise" else 1

    def _pairs(self, prompts: Sequence[Prompt]) -> list[Pair]:
        return [pair_of(index, prompt, self.corruption == "noise") for index, prompt in enumerate(prompts)]

    def _run(self, model: Model, pairs: Sequence[Pair], tally: Tally, store: ActivationStore | None) -> Run:
        check_components(model, self.components)
        self.plan.swept(model.shape)
        noise = None
        if self.corruption == "noise" and pairs:
            sigma = element_deviation(model, pairs, self.sigma_over)
            noise = Noise(self.noise_factor * sigma, self.noise_samples, self.seed)
        journal = journal_in(store.root, repr((self, model.context))) if store is not None else Journal(None)
        return Run(model, pairs, self.plan, self.directions, self.metric, self.nulls, noise, journal, tally)
