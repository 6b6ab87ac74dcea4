"""The words, tables, parts and prompts of a fact of two words, for all families that are made of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from probes.planted.blueprint import Blueprint
from probes.planted.hosts import BOS, Host, Norm
from probes.planted.making import PROMPTS, classes, latin_square, planted_task, randint
from probes.planted.parts import copy_head, lookup
from probes.planted.record import Question
from probes.planted.task import Example, PlantedTask
from probes.planted.vocabulary import words

SUBJECTS, RELATIONS, ANSWERS = 16, 16, 4
FACT_WORDS = (BOS, *words(f=26, e=SUBJECTS, r=RELATIONS, a=ANSWERS, ask=0))
POSITIONS = {"e": 1, "r": 2, "ask": -1}
_SLOTS = {"bos": 1, "subject": 1, "relation": 1, "ask": 1, "e": 16, "r": 16, "e at r": 16}


@dataclass(frozen=True)
class FactWords:
    """A blueprint whose words are embedded, the classes of its two content words, and the parts of a fact's circuit."""

    blueprint: Blueprint
    subject_class: Sequence[int]
    relation_class: Sequence[int]
    table: Int[Tensor, "subject relation"]
    """Number of the answer; every answer is equally frequent with every word."""

    def place_bringer(self, layer: int, score: float) -> str:
        """Plant the head that brings the subject to the relation's position."""
        head = copy_head(self.blueprint, query="relation", key="subject", source="e", target="e at r", score=score)
        return self.blueprint.place_head(layer, head)

    def place_mover(self, layer: int, score: float, *, source: str = "attribute", size: float = 1.0) -> str:
        """Plant the head that moves a slot from the relation's position to the end."""
        head = copy_head(
            self.blueprint, query="ask", key="relation", source=source, target="moved", score=score, size=size
        )
        return self.blueprint.place_head(layer, head)

    def place_table(
        self, layer: int, table: Int[Tensor, "subject relation"] | None = None, slot: str = "attribute"
    ) -> str:
        """Plant the look-up of a table of subjects and relations, the facts' own unless given, at the relation's position."""
        stream, table = self.blueprint.stream, self.table if table is None else table
        rules = [
            ((stream.vector("e at r", e), stream.vector("r", r)), stream.vector(slot, int(table[e, r])))
            for e in range(SUBJECTS) for r in range(RELATIONS)
        ]  # fmt: skip
        return self.blueprint.place_mlp(layer, lookup(self.blueprint, rules))

    def place_decider(self, layer: int) -> str:
        """Plant the look-up of the answer of what was moved to the end."""
        stream = self.blueprint.stream
        rules = [((stream.vector("moved", v),), stream.vector("answer", v)) for v in range(ANSWERS)]
        return self.blueprint.place_mlp(layer, lookup(self.blueprint, rules, step=True))

    def examples(
        self,
        *,
        n_fillers: int = 2,
        per_answer: Sequence[int] = (PROMPTS // ANSWERS,) * ANSWERS,
        subsets: Sequence[str | None] = (None,) * ANSWERS,
    ) -> list[Example]:
        """Return prompts BOS e r f … f ask with partners of other classes, half of each answer's pairs to fit.

        Args:
            per_answer: how many prompts each answer has; pairs come again, with other fillers, where there are fewer.
            subsets: the class of prompts that each answer makes.
        """
        blueprint, generator = self.blueprint, self.blueprint.generator
        subjects, relations, answers = (blueprint.tokens(kind) for kind in "era")
        bos, ask, fillers = blueprint.token(BOS), blueprint.token("ask"), blueprint.tokens("f")[1:]

        def prompt(e: int, r: int) -> tuple[int, ...]:
            filler = [fillers[randint(len(fillers), generator)] for _ in range(n_fillers)]
            return (bos, subjects[e], relations[r], *filler, ask)

        examples = []
        for value, n_prompts in enumerate(per_answer):
            pairs = (self.table == value).nonzero()
            order = torch.randperm(len(pairs), generator=generator)
            n_fit = min(len(pairs), n_prompts) // 2
            for number in range(n_prompts):
                place = number % len(pairs)
                e, r = pairs[order[place]].tolist()
                x, y = self._partner(e, r, value)
                examples.append(Example(
                    prompt(e, r), answers[value], prompt(x, y), answers[int(self.table[x, y])], {"attribute": value},
                    f"e{e} r{r}", "fit" if place < n_fit else "test", subsets[value],
                ))  # fmt: skip
        return examples

    def task(
        self, task: str, seed: int, questions: Sequence[Question], examples: Sequence[Example] | None = None
    ) -> PlantedTask:
        """Assemble the task of these facts; with the usual examples unless others are given."""
        return planted_task(
            task, seed, self.blueprint, self.examples() if examples is None else examples, positions=POSITIONS,
            concepts={"attribute": ANSWERS}, questions=questions,
        )  # fmt: skip

    def _partner(self, e: int, r: int, value: int) -> tuple[int, int]:
        others = [
            (x, y)
            for x in range(SUBJECTS)
            for y in range(RELATIONS)
            if self.subject_class[x] != self.subject_class[e]
            and self.relation_class[y] != self.relation_class[r]
            and self.table[x, y] != value
        ]
        return others[randint(len(others), self.blueprint.generator)]


def fact_words(n_layers: int, norm: Norm, generator: torch.Generator, slots: Mapping[str, int]) -> FactWords:
    """Return a blueprint with words, tables and the slots of the circuit, and `slots` besides."""
    blueprint = Blueprint(Host(n_layers, 112, FACT_WORDS, norm, d_head=16), generator)
    stream, token = blueprint.stream, blueprint.token
    for slot, size in (_SLOTS | dict(slots)).items():
        stream.slot(slot, size)
    blueprint.embedding[token(BOS)] += stream.vector("bos")
    blueprint.embedding[token("ask")] += stream.vector("ask")
    blueprint.embedding[blueprint.tokens("e")] += stream.basis("e") + stream.vector("subject")
    blueprint.embedding[blueprint.tokens("r")] += stream.basis("r") + stream.vector("relation")
    subject_class, relation_class = classes(SUBJECTS, ANSWERS, generator), classes(RELATIONS, ANSWERS, generator)
    table = latin_square(ANSWERS, generator)[subject_class][:, relation_class]
    return FactWords(blueprint, subject_class, relation_class, table)
