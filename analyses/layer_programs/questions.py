"""What programs are run on: prompts with what is read of each, its answer and its own text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from analyses.answers import answer_after
from analyses.scoring import check_answer, check_choices
from analyses.tasks.two_hop import sample
from probes.errors import OptionError, PromptError
from probes.models.protocol import Model
from probes.prompts import Field, Prompt, check_ids, tokenize

Scope = Literal["all", "last"]


def check_group(value: object) -> str | None:
    """Say what is wrong with a `group` field; None if nothing is."""
    return None if isinstance(value, str | int) and str(value) else "must be a text or a number that names a group"


FIELDS: Mapping[str, Field] = {
    "answer": Field("The right answer, as text.", check_answer),
    "answer_tokens": Field("Ids of which any one is the right next token, in place of a text: [262].", check_ids, ids=tuple),
    "aliases": Field('Other right answers: ["Holland"].', lambda value: None if isinstance(value, list) and all(isinstance(v, str) for v in value) else "must be a list of texts"),
    "choices": Field('Texts among which the answer is looked for: ["Paris", "Rome"].', check_choices),
    "group": Field("What stands in the training or in the test half as a whole: a text or an int.", check_group),
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """One prompt, and what is read of it."""

    prompt: int
    tokens: tuple[int, ...]
    """The prompt's own."""
    answer: tuple[int, ...]
    """The tokens of the right answer; empty where there is none."""
    firsts: frozenset[int]
    """Tokens that begin a right answer."""
    choices: tuple[int, ...]
    """First tokens of the choices; empty where any token may come."""
    group: str
    scope: Scope
    own_text: tuple[int, ...]
    """Positions at which the loss of the prompt's own next token is read."""

    @property
    def forced(self) -> tuple[int, ...]:
        """The prompt, and behind it the answer without its last token."""
        return self.tokens + self.answer[:-1]

    @property
    def start(self) -> int:
        """The first position that programs act on."""
        return 0 if self.scope == "all" else len(self.tokens) - 1

    @property
    def places(self) -> tuple[int, ...]:
        """Positions that are read: those before each token of the answer, or the last one; then those of the own text."""
        last = len(self.tokens) - 1
        return (*range(last, last + max(1, len(self.answer))), *self.own_text)

    @property
    def targets(self) -> tuple[int, ...]:
        """The token whose probability is read at each place; 0 at the last one where there is no answer."""
        return (*(self.answer or (0,)), *(self.tokens[place + 1] for place in self.own_text))

    def right(self, choice: int) -> bool:
        """Return whether the next token, or the likeliest choice, begins a right answer."""
        return choice in self.firsts


def two_hop_prompts(model: Model, n: int, seed: int) -> list[Prompt]:
    """Return generated two-hop questions about countries; those of one country are one group.

    Raises:
        PromptError: the model has no tokenizer.
    """
    if model.tokenizer is None:
        raise PromptError(f"{model.ref} has no tokenizer to ask two-hop questions with: give --prompts with token ids")
    prompts = []
    for question in sample(n, seed):
        prompt = tokenize([question.prompt], model)[0]
        fields = {"answer": question.answer, "group": question.bridge}
        prompts.append(Prompt(prompt.tokens, prompt.text, fields))
    return prompts


def questions_of(
    model: Model, prompts: Sequence[Prompt], scope: Scope, loss_positions: int, seed: int
) -> list[Question]:
    """Return what is read of each prompt.

    Args:
        scope: whether programs act on all positions or on the last alone; on the last alone only the answer's first
            token is read.
        loss_positions: at most so many positions of the own text are read, drawn at random; 0 reads none.
    """
    return [_question(model, index, prompt, scope, loss_positions, seed) for index, prompt in enumerate(prompts)]


def _question(model: Model, index: int, prompt: Prompt, scope: Scope, most: int, seed: int) -> Question:
    fields, tokens = prompt.fields, prompt.tokens
    ids = _checked(model, index, fields.get("answer_tokens", ()))
    texts = [*([fields["answer"]] if "answer" in fields else []), *fields.get("aliases", ())]
    written = [] if ids and model.tokenizer is None else [answer_after(model, prompt, text) for text in texts]
    answer = written[0].tokens if written else tuple(ids[:1])
    firsts = frozenset((*ids, *(each.first for each in written)))
    return Question(
        index, tokens, answer if scope == "all" else answer[:1], firsts, _choices(model, index, prompt, firsts),
        str(fields.get("group", f"prompt {index}")), scope, _own_text(len(tokens), most, (seed, index)),
    )  # fmt: skip


def _checked(model: Model, index: int, ids: Sequence[int]) -> Sequence[int]:
    if bad := [token for token in ids if not 0 <= token < model.shape.d_vocab]:
        raise PromptError(
            f"prompt {index}: answer token {bad[0]} is outside the vocabulary: legal are 0 to {model.shape.d_vocab - 1}"
        )
    return ids


def _choices(model: Model, index: int, prompt: Prompt, firsts: frozenset[int]) -> tuple[int, ...]:
    texts: list[Any] = prompt.fields.get("choices", [])
    choices = tuple(answer_after(model, prompt, text).first for text in texts)
    if len(set(choices)) < len(choices):
        raise PromptError(f"prompt {index}: two of the choices {texts} start with the same token: choose others")
    if choices and not firsts & set(choices):
        raise PromptError(f"prompt {index}: its answer is not among its choices {texts}")
    return choices


def _own_text(length: int, most: int, seed: tuple[int, int]) -> tuple[int, ...]:
    """Draw positions with a next token; the first one, whose norm is massive, only where there is no other."""
    places = np.arange(1 if length > 2 else 0, length - 1)
    drawn = places if len(places) <= most else np.random.default_rng(seed).choice(places, most, replace=False)
    return tuple(int(place) for place in np.sort(drawn))


def check_reads(questions: Sequence[Question], metrics: Sequence[str], searched: bool) -> None:
    """Refuse metrics and searches for which the prompts have nothing to read.

    Args:
        searched: whether programs are searched that answer them.

    Raises:
        PromptError: no answer where one is read, or no second token where the loss is.
        OptionError: the loss of the own text under programs that act on the last position alone.
    """
    if questions and questions[0].scope == "last" and "loss" in metrics:
        raise OptionError("metric loss reads every position, and --scope last changes one: leave one of them out")
    read = [f"metric {metric}" for metric in metrics if metric in ("answer", "first_token", "correct")]
    read += ["a search"] if searched else []
    if read and (bad := [question.prompt for question in questions if not question.firsts]):
        raise PromptError(f"prompt {bad[0]} has no answer for {read[0]}: give answers, or --metric loss and no search")
    if "loss" in metrics and (bad := [question.prompt for question in questions if not question.own_text]):
        raise PromptError(f"prompt {bad[0]} has no second token, so there is no loss to measure; give longer prompts")
