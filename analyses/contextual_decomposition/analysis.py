"""Contextual decomposition: what of a model's answer comes from each head, MLP or word, and the circuit that makes it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import pandas as pd
from torch import Tensor

from analyses.base import Analysis, Measured, PromptsLike, as_prompts
from analyses.circuits import sizes_of
from analyses.contextual_decomposition import costs
from analyses.contextual_decomposition.cases import Case, generated_cases, generated_questions, given_cases
from analyses.contextual_decomposition.circuit import Search
from analyses.contextual_decomposition.comparison import (
    Comparison,
    agree_on,
    circuit_tables,
    compare_heads,
    heads_compared,
    removed,
)
from analyses.contextual_decomposition.figures import FIGURES, PROFILES
from analyses.contextual_decomposition.gradient_scores import Plan, read_scores
from analyses.contextual_decomposition.node_comparison import compared_mlps, compared_streams
from analyses.contextual_decomposition.notes import PAPER, coverage_note, form_note, span_notes
from analyses.contextual_decomposition.prepared_cases import (
    PreparedCases,
    Scored,
    cases_table,
    find_circuit,
    links_by_walking,
    links_from_sweep,
    prepare_cases,
    scored_mlps,
    scored_positions,
)
from analyses.contextual_decomposition.scores import Reading
from analyses.contextual_decomposition.tables import circuit_table, edges_table, relevance_table
from analyses.contextual_decomposition.token_relevance import leak_notes, token_tables
from analyses.contextual_decomposition.unseen import unseen_note
from analyses.contextual_decomposition.word_relevance import words_table
from analyses.interventions import Interventions
from analyses.options import option
from analyses.tokens import tokens_text
from probes.decomposition import PRESETS, Node, Rules, Source
from probes.errors import OptionError
from probes.models.protocol import Model
from probes.progress import Progress
from probes.prompts import Field, Prompt, check_ids, read_prompts
from probes.relevance import exceptions
from probes.store import ActivationStore

_SWITCHES = {
    "bias": "bias", "normalise": "normalise", "attention_rule": "attention", "activation": "activation", "gate": "gate",
}  # fmt: skip
"""Options that override a rule of the preset, and the rule's name."""


def check_positions(value: Any) -> str | None:
    """Say what is wrong with a `positions` field; None if nothing is."""
    if not isinstance(value, list) or not value or any(isinstance(v, bool) or not isinstance(v, int) for v in value):
        return "must be a list of positions, such as [0, -1] (-1 is the last)"
    return None


@dataclass(frozen=True)
class ContextualDecomposition(Analysis):
    """CD-T: contextual decomposition for transformers (Hsu et al. 2024, arXiv 2407.00886)."""

    task: Literal["prompts", "ioi", "greater_than", "docstring"] = option(
        "prompts", "prompts: the prompt file's; otherwise generated questions of that task."
    )
    n_prompts: int = option(12, "Generated questions.", low=1)
    n_references: int = option(8, "Generated reference prompts for each question.", low=1)
    reference_prompts: str = option(
        "", "A prompt file of references, to whose mean activations heads are compared.", flag="reference"
    )
    mode: Literal["mean", "zero"] = option("mean", "Whether a node is compared to its mean over references or to zero.")
    preset: Literal["faithful", "paper"] = option(
        "faithful",
        "Rules: those nearer to measured ablation effects (Pearson 0.92 against 0.37 over the heads of smollm2-135m), or "
        "the conventions of the authors' code, but with the model's own epsilons.",
    )
    bias: Literal["preset", "shared", "irrelevant"] = option("preset", "Where biases go.")
    normalise: Literal["preset", "on", "off"] = option(
        "preset", "Whether around an MLP the larger of two parts of opposite sign takes the whole sum."
    )
    attention_rule: Literal["preset", "joint", "frozen", "function"] = option(
        "preset", "The pattern of the relevant part's own queries and keys, the model's, or attention as one function."
    )
    activation: Literal["preset", "cd", "shapley"] = option("preset", "How an activation function is split.")
    gate: Literal["preset", "joint", "frozen"] = option("preset", "Whether an MLP's gate is split or a constant.")
    layers: tuple[int, ...] = option(
        (), "Layers whose heads and MLPs are scored and ablated; none: every stride-th.", low=0
    )
    stride: int = option(1, "Of the layers, only every so many.", low=1)
    heads: tuple[str, ...] = option((), "Heads as layer.head, such as 3.1: only these are scored and ablated.")
    granularity: Literal["head", "position"] = option(
        "head", "Nodes of the circuit: whole heads, or heads at single positions of prompts of one form."
    )
    top: int = option(2, "Nodes that each step of the search keeps.", low=1)
    search_steps: int = option(
        6, "Steps of the search from the metric towards block 0; 0 leaves the search out.", low=0
    )
    target_at: Literal["z", "q", "k", "v"] = option("z", "Where a target head's relevance is read.")
    target_score: Literal["dot", "ratio"] = option("dot", "Along the target's own change, or a ratio of magnitudes.")
    layer_normalise: bool = option(False, "Rank scores divided by their layer's sum of magnitudes.")
    prune: bool = option(False, "Delete nodes from the circuit while that raises the metric.")
    methods: tuple[Literal["cdt", "attribution", "relp", "lrp", "ig", "direct"], ...] = option(
        ("cdt", "attribution", "relp", "lrp", "direct"),
        "Methods compared. relp and lrp: one backward pass under changed rules, from the baseline or from zero; ig: eight "
        "plain ones on the way from the references to the prompt.",
    )
    rule: Literal["attnlrp", "cp", "gradient"] = option(
        "attnlrp",
        "Backward rules of relp and lrp. cp holds attention patterns constant, so what acts through queries and keys alone "
        "has none; agreement shows both. gradient changes nothing.",
    )
    dynamic_lrp: bool = option(False, "Also relevance of tokens by DynamicLRP's rules, sums shared out by magnitude.")
    ablation: bool = option(True, "Measure the mean ablation of every head, and how scores agree with it.")
    other_preset: bool = option(False, "Also score heads by the other preset, to see how each agrees with ablation.")
    shares: tuple[float, ...] = option(
        (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7), "Sizes of circuits, as shares of all heads.", low=0, high=1
    )
    random_circuits: int = option(10, "Random circuits of each size; 0 leaves faithfulness out.", low=0)
    mlps: bool = option(True, "Also score MLPs.")
    streams: bool = option(
        False,
        "Also score positions of the streams between blocks, and ablate each: about the cost of the heads' ablation.",
    )
    removal: tuple[Literal["heads", "tokens"], ...] = option(
        (),
        "Take heads or tokens away by each method's order, most and least relevant first, beside 20 random orders: of a prompt "
        "of 15 tokens about 700 forwards, of heads about 1000 circuits.",
    )
    words: Literal["none", "token", "head"] = option(
        "token", "Also score words, by their rows of the first stream or by the heads of block 0 there."
    )
    seed: int = option(0, "Seed of generated prompts, random circuits and intervals.")

    name = "contextual_decomposition"
    title = "Contextual decomposition: heads, words and circuits"
    reference = 'Hsu et al. 2024, "Efficient Automated Circuit Discovery in Transformers using Contextual Decomposition", arXiv 2407.00886'
    prompt_fields: ClassVar[Mapping[str, Field]] = {
        "answer_tokens": Field(
            "Ids whose mean logit counts for the metric: [262]. Every line needs them.", check_ids, ids=tuple
        ),
        "distractor_tokens": Field("Ids whose mean logit counts against it: [318].", check_ids, ids=tuple),
        "positions": Field(
            "Positions at which heads are scored by themselves; all where it is left out: [0, -1].", check_positions
        ),
        "span": Field(
            "Positions that the most relevant token should be among; those of an answer's token where it is left out: [3, 4].",
            check_positions,
        ),
    }
    figures = FIGURES
    profiles = PROFILES
    reads = "own forwards"

    def __post_init__(self) -> None:
        super().__post_init__()
        if "cdt" not in self.methods:
            raise OptionError(
                f"methods {', '.join(self.methods) or 'none'}: cdt must be among them, for the search and the words use its scores"
            )

    @property
    def makes_prompts(self) -> bool:
        """Whether a task generates its questions."""
        return self.task != "prompts"

    @property
    def rules(self) -> Rules:
        """The rules of the preset, with the switches that were given."""
        switches = {rule: getattr(self, name) for name, rule in _SWITCHES.items() if getattr(self, name) != "preset"}
        return replace(PRESETS[self.preset], **switches)

    def interventions(self, model: Model, prompts: Sequence[Prompt]) -> Interventions:
        """Count head ablations, circuits and the deletions that pruning tries."""
        heads = len(self.nodes(model))
        return costs.interventions(
            self._lengths(model, prompts), heads, one_form=self.granularity == "position", ablation=self.ablation,
            methods=len(self._ordering(model)), token_methods=len(self._plan.token_methods),
            sizes=sizes_of(self.shares, heads), random_circuits=self.random_circuits,
            searched=self.top * (self.search_steps + 1) if self.search_steps else 0, prune=self.prune,
            mlps=len({node.layer for node in self.nodes(model)}) if self.mlps else 0,
            streams=len(self._stream_layers(model)), removal=self.removal,
        )  # fmt: skip

    @property
    def _plan(self) -> Plan:
        return Plan(self.methods, self.rule, self.dynamic_lrp)

    def _ordering(self, model: Model) -> list[str]:
        """Return the methods whose order of heads makes circuits; RelP and LRP by the chosen rule alone."""
        names: list[str] = [name for name in self.methods if name != "direct" or costs.has_direct(model)]
        names += [f"cdt_{next(p for p in PRESETS if p != self.preset)}"] if self.other_preset else []
        return [*dict.fromkeys(names), *(["ablation"] if self.ablation else [])]

    def _stream_layers(self, model: Model) -> list[int]:
        """Return the blocks whose leaving stream is scored; the last one's is read at the end alone."""
        return sorted({n.layer for n in self.nodes(model)} - {model.shape.n_layers - 1}) if self.streams else []

    def nodes(self, model: Model) -> list[Node]:
        """Return the heads that are scored and ablated.

        Raises:
            OptionError: a layer or head that the model does not have, or both `heads` and `layers`.
        """
        return costs.chosen_heads(model.shape.n_layers, model.shape.n_heads, self.layers, self.stride, self.heads)

    def collect(self, model: Model, prompts: PromptsLike = ()) -> list[Prompt]:
        """Return the generated questions, or the prompts given."""
        if self.makes_prompts:
            return [
                prompt
                for prompt, _ in generated_questions(model, self.task, self.n_prompts, self.n_references, self.seed)
            ]
        return as_prompts(prompts, model, self.prompt_fields)

    def measure(self, model: Model, prompts: PromptsLike, store: ActivationStore, progress: Progress) -> Measured:
        """Return the tables `cases`, `relevance`, `heads`, `token_relevance`, `leak`, `routed`, `pointing`, and by option `mlps`,
        `streams`, `agreement` with `agreement_differences`, `edges`, `circuit`, `faithfulness` with `areas`, `curves` with
        `abpc`, `words`.

        Raises:
            OptionError: a layer or head that the model does not have.
            PointError: an operation of the model that the rules do not know, by name.
            PromptError: a prompt without an answer, or without a reference of its length.
        """
        heads = self.nodes(model)
        questions, cases, notes = self._cases(model, prompts)
        prepared = prepare_cases(model, cases, heads, self._joint, progress)
        reading = Reading(self.target_at, self.target_score)
        pairs = self.search_steps > 0 and self.granularity == "head"
        started = time.perf_counter()
        own, links = prepared.swept(_each(heads), self.rules, reading if pairs else None, progress, "prompt scored")
        took = time.perf_counter() - started
        scored = [Scored(heads, own, list(range(len(cases))))]
        if self.granularity == "position":
            scored.append(scored_positions(prepared, self.rules, progress))
            notes.append(form_note(prepared, scored[-1]))
        tables = {"cases": cases_table(prepared, [_text(model, prompt) for prompt in questions])}
        notes += [*span_notes(tables["cases"]), *coverage_note(model, len(heads))]
        if "paper" in (self.preset, *(PRESETS if self.other_preset else ())):
            notes.append(PAPER)
        gradients = read_scores(model, prepared.cases, self._plan, progress)
        other = next(name for name in PRESETS if name != self.preset) if self.other_preset else None
        comparison = compare_heads(
            prepared, (own, took), gradients, self.methods, None if other is None else (other, PRESETS[other]), progress
        )
        tables["heads"] = heads_compared(prepared, comparison, self.ablation, self.seed, progress)
        relevance, changed = list(scored), 0
        if self.mlps:
            layers = sorted({node.layer for node in heads})
            relevance.append(scored_mlps(prepared, layers, self.rules, progress))
            mlps = compared_mlps(prepared, layers, relevance[-1].scores, gradients, self.ablation, progress)
            agree_on(comparison, mlps, self.seed, "mlps")
            tables["mlps"], changed = mlps.table(self.seed), mlps.forwards
        if below := self._stream_layers(model):
            streams, used = compared_streams(prepared, below, gradients, self.ablation, progress)
            agree_on(comparison, streams, self.seed, "streams")
            tables["streams"], changed = streams.table(self.seed), changed + streams.forwards
            if len(used) < len(cases):
                notes.append(f"Stream positions use the {len(used)} of {len(cases)} prompts of one form and length.")
        agreed, said = comparison.agreement()
        tables, notes = tables | agreed, notes + said
        tables["relevance"] = pd.concat(
            [relevance_table(s.nodes, s.scores, [cases[i].index for i in s.prompts]) for s in relevance],
            ignore_index=True,
        )
        gated = any(getattr(block.mlp, "gate", None) is not None for block in prepared.decomposer.operations.blocks)
        notes += unseen_note(tables, frozen_gate=gated and self.rules.gate == "frozen")
        tables |= self._circuits(prepared, scored[-1], links, comparison, progress)
        layered = prepared.decomposer.operations.kind != "post_norm"
        tables |= token_tables(model, [one.case for one in prepared.cases], gradients, self._plan, layered, self.seed)
        notes += [*leak_notes(gradients), *(exceptions(model) if gradients.leaks else ())]
        tables |= removed(prepared, comparison, self._ordering(model), self.removal, self.seed, progress)
        if self.words != "none":
            tables["words"] = words_table(
                model, prepared.decomposer, prepared.cases, self.rules, self.words, self.mode, progress
            )
        counts = {"forwards": prepared.forwards, "decomposed": len(cases) * len(heads)}
        changed += sum(ablation.forwards for ablation in prepared.ablations)
        return Measured(questions, tables, None, notes, counts, changed)

    @property
    def _joint(self) -> bool:
        others = [PRESETS[name] for name in PRESETS] if self.other_preset else []
        return any(rules.attention != "frozen" for rules in (self.rules, *others))

    def _lengths(self, model: Model, prompts: Sequence[Prompt]) -> list[tuple[str, int]]:
        """Return the group and length of each case."""
        if not self.makes_prompts:
            return [("", len(prompt.tokens)) for prompt in prompts]
        return [(case.group, len(case.tokens)) for case in self._cases(model, prompts)[1]]

    def _cases(self, model: Model, prompts: PromptsLike) -> tuple[list[Prompt], list[Case], list[str]]:
        if self.makes_prompts:
            size = self.n_prompts, self.n_references
            return generated_cases(model, self.task, *size, self.seed, zero=self.mode == "zero")
        questions = as_prompts(prompts, model, self.prompt_fields)
        references = (
            as_prompts(read_prompts(self.reference_prompts, self.prompt_fields), model, self.prompt_fields)
            if self.reference_prompts
            else []
        )
        cases, notes = given_cases(model, questions, references, self.mode)
        return questions, cases, notes

    def _circuits(
        self,
        prepared: PreparedCases,
        scored: Scored,
        pairs: Tensor | None,
        comparison: Comparison,
        progress: Progress,
    ) -> dict[str, pd.DataFrame]:
        tables: dict[str, pd.DataFrame] = {}
        kept: list[Node] = []
        if self.search_steps:
            how = Search(self.top, self.search_steps, self.layer_normalise)
            chosen, reading = [prepared.cases[i] for i in scored.prompts], Reading(self.target_at, self.target_score)
            links = (
                links_by_walking(prepared.decomposer, chosen, self.rules, reading, progress)
                if pairs is None
                else links_from_sweep(pairs, prepared.heads)
            )
            circuit, kept, edges = find_circuit(prepared, scored, links, how, self.prune, progress)
            tables["edges"] = edges_table(edges, prepared.model.shape.n_layers)
            tables["circuit"] = circuit_table(circuit, kept, edges)
        if self.random_circuits:
            methods = self._ordering(prepared.model)
            tables |= circuit_tables(
                prepared, scored, comparison, methods, kept, self.shares, self.random_circuits, self.seed, progress
            )
        return tables


def _each(nodes: Sequence[Node]) -> list[Source]:
    return [(node,) for node in nodes]


def _text(model: Model, prompt: Prompt) -> str:
    if prompt.text is not None:
        return prompt.text
    return " ".join(map(str, prompt.tokens)) if model.tokenizer is None else tokens_text(model, prompt.tokens)
