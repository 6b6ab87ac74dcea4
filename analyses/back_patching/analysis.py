"""Back-patching: a later layer's representation put back into an earlier one, to give it the layers it came too late for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
from torch import Tensor

from analyses.answers import clash_note
from analyses.back_patching.cases import (
    HOPS,
    LAST,
    Case,
    cases_of,
    check_ints,
    check_texts,
    judge,
    two_hop_prompts,
)
from analyses.back_patching.figures import FIGURES, PROFILES
from analyses.back_patching.grid import Cell, OpenPrompt, Patched, Try, Variant, cells_of, frame, mirrored, noise_like
from analyses.back_patching.planned import Plan, planned, rival
from analyses.back_patching.stages import Critical, Patchscope, Resolution, critical_layers, resolutions, stage_tables
from analyses.back_patching.tables import control_rates, summary
from analyses.back_patching.verdicts import names, verdicts
from analyses.base import Analysis, Measured, PromptsLike, as_prompts
from analyses.interventions import Interventions, swept
from analyses.options import accept_old_names, option
from analyses.prompt_fields import check_text
from analyses.tasks.two_hop import sample
from probes.blocks.together import resumable, together
from probes.capture.needs import Need
from probes.capture.run import capture
from probes.errors import OptionError, PromptError
from probes.models.protocol import Model
from probes.points import Address
from probes.progress import Progress
from probes.prompts import Field, Prompt, check_ids
from probes.store import ActivationStore


@accept_old_names
@dataclass(frozen=True)
class BackPatching(Analysis):
    """Back-patching of two-hop questions (Biran et al. 2024, "Hopping Too Late", arXiv 2406.12775)."""

    task: Literal["prompts", "two_hop"] = option(
        "prompts", "prompts: the prompt file's questions; two_hop: generated questions about countries instead."
    )
    pool: int = option(160, "two_hop: how many generated questions the model is first asked.", low=1)
    n_prompts: int = option(
        50, "At most this many questions get a grid, those with both hops right first.", low=1, aliases=("questions",)
    )
    positions: tuple[Literal["t1", "t2"], ...] = option(
        ("t1", "t2"), "Where to patch: the entity's last token, the prompt's last token."
    )
    cells: Literal["upper", "full"] = option("upper", "upper: source above target; full: every pair of layers.")
    layers: tuple[int, ...] = option((), "Layers a source and a target stand at; all where none is named.", low=0)
    stride: int = option(1, "Every how many layers a source and a target stand, where no layers are named.", low=1)
    include_embedding: bool = option(False, "Also patch what enters block 0, as target layer -1.")
    rescale: bool = option(False, "Bring the source to the norm of what it replaces.")
    mode: Literal["first_token", "generate"] = option(
        "first_token", "How an answer is judged: by its first token, or by text in a greedy continuation."
    )
    max_new_tokens: int = option(10, "generate: length of a continuation.", low=1)
    top_cells: int = option(8, "generate: cells with the likeliest answer that are written out.", low=1)
    controls: bool = option(True, "Also patch another question's source, forwards, and noise of the same norm.")
    stages: bool = option(True, "Also find when each stage of the answer happens.")
    window: int = option(3, "stages: layers knocked out on either side.", low=0)
    scope_step: int = option(5, "stages: every how many blocks the naming prompt is patched.", low=1)
    seed: int = option(0, "Seed of the sample of questions, of noise and of intervals.")

    name = "back_patching"
    title = "Back-patching: hopping too late"
    reference = 'Biran et al. 2024, "Hopping Too Late", arXiv 2406.12775'
    prompt_fields: ClassVar[Mapping[str, Field]] = {
        "answer": Field("The right answer, as text.", check_text),
        "answer_tokens": Field("Ids of which any one is the right next token, in place of a text: [262].", check_ids, ids=tuple),
        "aliases": Field('Other right answers: ["Holland"].', check_texts),
        "bridge": Field("The answer to the first hop, whose resolution is looked for.", check_text),
        "entity": Field("The text that the question starts from; its last token is patched too.", check_text),
        "positions": Field("Positions to patch instead: [4, -1].", check_ints),
        **{name: Field(about, check_text) for name, about in HOPS.items()},
    }  # fmt: skip
    figures = FIGURES
    profiles = PROFILES

    @property
    def makes_prompts(self) -> bool:
        """Whether the task is `two_hop`, which generates its questions."""
        return self.task == "two_hop"

    def interventions(self, model: Model, prompts: Sequence[Prompt]) -> Interventions:
        """Count the cells of the grid, its controls and the forwards of the stages."""
        cases, _ = cases_of(model, prompts)
        return planned(self._plan(model), cases, [self._names(case) for case in cases], self.n_prompts)

    def _plan(self, model: Model) -> Plan:
        n, layers = model.shape.n_layers, self._swept(model)
        named = self.stages and model.tokenizer is not None
        knocked = self.stages and model.refusal(Address("pattern", 0)) is None
        return Plan(
            cells=self._cells(model), n_layers=n, controls=self.controls,
            written=self.max_new_tokens if self.mode == "generate" else 0, top_cells=self.top_cells,
            named=len(layers) * len(range(0, n, self.scope_step)) if named else 0, knocked_out=len(layers) if knocked else 0,
        )  # fmt: skip

    def _cells(self, model: Model) -> list[Cell]:
        cells = cells_of(model.shape.n_layers, self.cells, self.stride, self.include_embedding, self.layers)
        if not cells:
            named = f"layers {', '.join(map(str, self.layers))}" if self.layers else f"stride {self.stride}"
            raise OptionError(
                f"{named} leave no source above a target among {model.shape.n_layers} layers: name two or more, or a smaller stride"
            )
        return cells

    def _swept(self, model: Model) -> list[int]:
        return swept(model.shape.n_layers, self.layers, self.stride)

    def _names(self, case: Case) -> list[str]:
        """Return the names of the positions to patch: those of the option, or all where the question has none of them."""
        return [n for n in case.positions if n.split(".")[0] in self.positions] or list(case.positions)

    def collect(self, model: Model, prompts: PromptsLike = ()) -> list[Prompt]:
        """Return the generated questions, or those of the prompts."""
        if self.task == "two_hop":
            return two_hop_prompts(model, sample(self.pool, self.seed))
        return as_prompts(prompts, model, self.prompt_fields)

    def needs(self, model: Model) -> list[Need]:
        """Ask for the last stream, from which answers are read, and for the stages sublayer outputs."""
        points = [f"resid_post.{model.shape.n_layers - 1}"]
        return [Need((*points, "attn_out.*", "mlp_out.*") if self.stages else tuple(points), LAST)]

    def measure(self, model: Model, prompts: PromptsLike, store: ActivationStore, progress: Progress) -> Measured:
        """Return the tables `cases`, `grid`, `summary`, `control_rates`; with stages `resolution`, `knockout`, `projection`, `stages`.

        Raises:
            PromptError: no prompt has an answer.
        """
        questions = self.collect(model, prompts)
        cases, dropped = cases_of(model, questions)
        if not cases:
            raise PromptError(f"no prompt can be patched; the first reason: {dropped[0][1]}")
        judged = judge(model, questions, cases, store, progress)
        chosen = _chosen(judged, self.n_prompts)
        with resumable(model, repr((self, [(case.tokens, case.positions) for case in chosen]))):
            tokens = [case.tokens for case in chosen]
            opening: list[Callable[[], Any]] = [
                partial(capture, model, tokens, self.needs(model), store, progress=progress),
                partial(self._scope, model),
                *(partial(OpenPrompt.at, model, case, self._names(case)) for case in chosen),
            ]
            activations, scope, *bases = together(model, opening)
            opened: dict[int, dict[str, OpenPrompt]] = dict(zip((case.prompt for case in chosen), bases, strict=True))
            progress.start(len(chosen), "question")
            work: list[Callable[[], Any]] = [
                *(partial(self._case, model, chosen, opened, progress, index) for index in range(len(chosen))),
                *(partial(self._stage_rows, model, opened, scope, case) for case in chosen),
            ]
            outcomes = together(model, work)
        grids, rows = outcomes[: len(chosen)], outcomes[len(chosen) :]
        forwards = sum(ran for _, ran in grids)
        everything = pd.concat([patched for patched, _ in grids], ignore_index=True)
        controls = control_rates(everything)
        grid = everything[everything["variant"] == "back_patch"].drop(columns="variant").reset_index(drop=True)
        tables = {
            "cases": _case_table(questions, judged, {case.prompt for case in chosen}),
            "grid": grid,
            "summary": summary(grid, controls, self.seed),
            "control_rates": controls,
        }
        if self.stages:
            tables |= stage_tables(chosen, rows, activations)
            forwards += sum(ran for _, _, ran in rows)
        counts = {
            "prompts": len(chosen), "tokens": sum(len(case.tokens) for case in chosen), "prompts_judged": len(judged),
            "patched_cells": len(everything), "dropped": len(dropped),
        }  # fmt: skip
        notes = (*verdicts(tables["summary"], controls, tables["cases"]), *self._notes(judged, chosen, dropped))
        return Measured(questions, tables, activations, notes, counts, interventions=forwards)

    def _scope(self, model: Model) -> Patchscope | None:
        return Patchscope.open(model, self.scope_step) if self.stages and model.tokenizer is not None else None

    def _case(
        self,
        model: Model,
        chosen: Sequence[Case],
        opened: Mapping[int, Mapping[str, OpenPrompt]],
        progress: Progress,
        index: int,
    ) -> tuple[pd.DataFrame, int]:
        """Return (the grid of one question at each position with its controls, the forwards it took)."""
        other = rival(chosen, index)
        others = opened[other.prompt] if other else {}
        wrong = other.answers if other else frozenset[int]()
        positions = []
        for name, patching in opened[chosen[index].prompt].items():
            cells, sources = self._cells(model), patching.sources()
            tries: dict[Variant, Try] = {"back_patch": (cells, sources)}
            if self.controls:
                tries["forward"] = (mirrored(cells, model.shape.n_layers), sources)
                tries["noise"] = (cells, noise_like(sources, self.seed + patching.case.prompt))
                if name in others:
                    tries["other_query"] = (cells, others[name].sources())
            positions.append(partial(self._position, model, patching, wrong, tries))
        outcomes = together(model, positions)
        progress.advance()
        return pd.concat([rows for rows, _ in outcomes], ignore_index=True), sum(ran for _, ran in outcomes)

    def _position(
        self, model: Model, patching: OpenPrompt, wrong: frozenset[int], tries: Mapping[Variant, Try]
    ) -> tuple[pd.DataFrame, int]:
        """Return (the rows of every variant at one position, the forwards it took)."""
        alone = patching.baseline()
        started = bool(alone.success(patching.case.answers)[0])
        patched = patching.patch(list(tries.values()), wrong, self.rescale)
        judging = [
            partial(self._success, model, patching, one, sources)
            for one, (_, sources) in zip(patched, tries.values(), strict=True)
        ]
        tables, ran = [], 0
        for variant, one, (success, written) in zip(tries, patched, together(model, judging), strict=True):
            rows = frame(model, patching, variant, one, success, float(alone.logprob))
            tables.append(rows.drop_duplicates(["source_layer", "target_layer"]))
            ran += len(one.cells) + written
        return pd.concat(tables, ignore_index=True).assign(baseline_success=started), ran

    def _success(self, model: Model, patching: OpenPrompt, patched: Patched, sources: Tensor) -> tuple[np.ndarray, int]:
        """Return (whether the answer is given, [cells]; the forwards run to see it)."""
        if self.mode == "first_token" or not patching.case.answer_texts:
            return patched.success(patching.case.answers), 0
        best = patched.logprob.argsort(descending=True)[: self.top_cells]
        cells = [patched.cells[int(i)] for i in best]
        written = patching.continue_cells(cells, sources, patched.top[best], self.max_new_tokens, self.rescale)
        out = np.zeros(len(patched.cells), dtype=bool)
        for i, tokens in zip(best.tolist(), written, strict=True):
            said = str(model.tokenizer.decode(tokens)).lower()
            out[i] = any(names(said, text.lower()) for text in patching.case.answer_texts)
        return out, sum(map(len, written))

    def _stage_rows(
        self, model: Model, opened: Mapping[int, Mapping[str, OpenPrompt]], scope: Patchscope | None, case: Case
    ) -> tuple[list[Resolution], list[Critical], int]:
        """Return (when the bridge and the answer are named, which layers are critical, the forwards it took)."""
        if not self.stages:
            return [], [], 0
        layers, sources = self._swept(model), {n: prompt.sources() for n, prompt in opened[case.prompt].items()}
        resolved = resolutions(scope, case, sources, layers) if scope else []
        named = len(layers) * len(scope.targets) * len(sources) if scope else 0
        knocked = (
            critical_layers(model, case, layers, self.window) if model.refusal(Address("pattern", 0)) is None else []
        )
        return resolved, knocked, named + len(knocked)

    def _notes(
        self, judged: Sequence[Case], chosen: Sequence[Case], dropped: Sequence[tuple[int, str]]
    ) -> tuple[str, ...]:
        notes = []
        if self.mode == "first_token":
            notes.append("An answer counts as given when its first token is the most probable next token.")
            if said := clash_note([answer for case in chosen for answer in case.written]):
                notes.append(said)
        if not any(set(HOPS) & set(case.verdicts) for case in judged):
            notes.append("Questions without hops and shortcuts are sorted by their own answer alone.")
        if dropped:
            notes.append(f"{len(dropped)} prompts were left out; the first reason: {dropped[0][1]}")
        return tuple(notes)


def _chosen(cases: Sequence[Case], n: int) -> list[Case]:
    """Choose `n` questions: incorrect and correct ones first, then others; in the order of the prompts."""
    return sorted(sorted(cases, key=lambda c: c.set == "other")[:n], key=lambda c: c.prompt)


def _case_table(prompts: Sequence[Prompt], cases: Sequence[Case], chosen: set[int]) -> pd.DataFrame:
    rows = [
        {
            "prompt": case.prompt, "text": case.text, "set": case.set, "patched": case.prompt in chosen,
            "answer": ", ".join(case.answer_texts), "answer_tokens": len(case.written[0].tokens) if case.written else None,
            "bridge": prompts[case.prompt].fields.get("bridge"),
            **{name: case.verdicts.get(name) for name in ("composition", *HOPS)},
        }
        for case in cases
    ]  # fmt: skip
    return pd.DataFrame(rows)
