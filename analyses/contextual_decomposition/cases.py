"""Prompts with the answer and the distractors whose logits are compared, and what their nodes are compared to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.answers import as_merged, continuation, single
from analyses.tasks import docstring, greater_than, ioi
from analyses.tasks.item import Item
from probes.decomposition import Baseline
from probes.errors import PromptError
from probes.models.protocol import Model
from probes.points import Address
from probes.prompts import Prompt, tokenize

BATCH = 16
"""Reference prompts of one forward."""
TASKS: dict[str, Callable[..., list[Item]]] = {
    "ioi": ioi.items,
    "greater_than": greater_than.items,
    "docstring": docstring.items,
}


@dataclass(frozen=True)
class Case:
    """A prompt and its metric: mean logit of its answers less mean logit of its distractors, at its end."""

    index: int
    tokens: tuple[int, ...]
    answers: tuple[int, ...]
    distractors: tuple[int, ...]
    references: tuple[tuple[int, ...], ...]
    """Prompts of the same length; empty where nodes are compared to zero."""
    positions: tuple[int, ...]
    """Positions whose nodes may be sources."""
    group: str
    """Cases of one group share their references."""
    span: tuple[int, ...] = ()
    """Positions that the most relevant token should be among; empty: those that hold an answer's token."""

    @property
    def ids(self) -> tuple[int, ...]:
        """Tokens whose logits the metric compares, answers first."""
        return (*self.answers, *self.distractors)

    def metric(self, logits: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows"]:
        """Return the metric of the logits of `ids`."""
        n = len(self.answers)
        return logits[..., :n].mean(-1) - logits[..., n:].mean(-1)


def generated_questions(model: Model, task: str, n: int, references: int, seed: int) -> list[tuple[Prompt, Item]]:
    """Generate questions of a task, as the model's tokenizer sees them.

    Raises:
        PromptError: the model has no tokenizer, or one that has too few of the task's words.
    """
    if model.tokenizer is None:
        raise PromptError(f"task {task!r} needs a tokenizer, and {model.ref} has none: give prompts of token ids")

    extra: dict[str, Any] = {}
    if task == "greater_than":
        question = greater_than.TEXT.format(event="war", century=17, year=41)
        extra["pairs"] = len(as_merged(model.tokenizer, question, "42") or ()) == 1
    items = TASKS[task](n, references, seed, partial(single, model.tokenizer), **extra)
    return list(zip(tokenize([item.text for item in items], model), items, strict=True))


def case_of(model: Model, index: int, prompt: Prompt, item: Item) -> Case:
    """Return a generated question as a case.

    Raises:
        PromptError: an answer that begins as a distractor does, or references of another length.
    """
    answers, distractors = (
        tuple(dict.fromkeys(continuation(model.tokenizer, item.text, text)[0] for text in texts))
        for texts in (item.answers, item.distractors)
    )
    if set(answers) & set(distractors):
        raise PromptError(f"prompt {index}: an answer and a distractor begin with the same token")
    references = tuple(p.tokens for p in tokenize(list(item.references), model))
    if any(len(tokens) != len(prompt.tokens) for tokens in references):
        raise PromptError(f"prompt {index}: a reference has another number of tokens than the prompt")
    return Case(index, prompt.tokens, answers, distractors, references, tuple(range(len(prompt.tokens))), item.group)


def generated_cases(
    model: Model, task: str, n: int, references: int, seed: int, zero: bool
) -> tuple[list[Prompt], list[Case], list[str]]:
    """Return the generated questions, the cases of those that can be used, and notes on what was left out.

    Raises:
        PromptError: no question can be used.
    """
    pairs = generated_questions(model, task, n, references, seed)
    cases, dropped, reason = [], 0, ""
    for index, (prompt, item) in enumerate(pairs):
        try:
            cases.append(case_of(model, index, prompt, item))
        except PromptError as error:
            dropped, reason = dropped + 1, str(error)
    if not cases:
        raise PromptError(f"task {task!r} gives no usable question on {model.ref}; {reason}")
    notes = [f"{dropped} generated questions were left out; the last: {reason}."] if dropped else []
    cases = [replace(case, references=()) for case in cases] if zero else cases
    return [prompt for prompt, _ in pairs], cases, notes


def given_cases(
    model: Model, prompts: Sequence[Prompt], references: Sequence[Prompt], mode: str
) -> tuple[list[Case], list[str]]:
    """Return the cases of prompts that carry answers, and notes on what was filled in.

    Raises:
        PromptError: a prompt without an answer, or without a reference of its length in mean mode.
    """
    by_length: dict[int, list[tuple[int, ...]]] = {}
    for prompt in references or prompts:
        by_length.setdefault(len(prompt.tokens), []).append(prompt.tokens)
    cases, filled = [], 0
    for index, prompt in enumerate(prompts):
        answers = tuple(prompt.fields.get("answer_tokens", ()))
        if not answers:
            raise PromptError(f'prompt {index}: give "answer_tokens", the token ids of right next tokens')
        distractors = tuple(prompt.fields.get("distractor_tokens", ()))
        if both := set(answers) & set(distractors):
            raise PromptError(f"prompt {index}: token {min(both)} is both answer and distractor")
        if not distractors:
            distractors, filled = (_rival(model, prompt.tokens, answers),), filled + 1
        same = tuple(by_length.get(len(prompt.tokens), ()))
        if mode == "mean" and (not same or (not references and len(same) < 2)):
            raise PromptError(
                f"prompt {index}: no {'reference' if references else 'other prompt'} has its {len(prompt.tokens)} tokens, "
                f"so its heads have no mean to be compared to; give --reference FILE with prompts of that length, or --mode zero"
            )
        n = len(prompt.tokens)
        positions = tuple(_inside(index, p, n) for p in prompt.fields.get("positions", range(n)))
        span = tuple(_inside(index, p, n) for p in prompt.fields.get("span", ()))
        kept = same if mode == "mean" else ()
        cases.append(Case(index, prompt.tokens, answers, distractors, kept, positions, f"length {n}", span))
    notes = []
    if filled:
        notes.append(f"{filled} prompts name no distractor_tokens: the model's likeliest other token stands for them.")
    if mode == "mean" and not references:
        notes.append(
            "No reference prompts were given, so heads are compared to their mean over the prompts themselves, "
            "which keeps what all prompts share."
        )
    return cases, notes


def _inside(index: int, position: int, n: int) -> int:
    if not -n <= position < n:
        raise PromptError(f"prompt {index}: position {position} is outside its {n} tokens: legal are {-n} to {n - 1}")
    return position % n


def _rival(model: Model, tokens: Sequence[int], answers: tuple[int, ...]) -> int:
    rows: list[Tensor] = []
    model.run(torch.tensor([list(tokens)]), {Address("logits"): lambda t: rows.append(t[0, -1].float().clone())})
    logits = rows[0].cpu().clone()  # outside the forward, so that it may be written to
    logits[list(answers)] = -torch.inf
    return int(logits.argmax())


@torch.no_grad()
def baseline_of(model: Model, references: Sequence[Sequence[int]]) -> Baseline:
    """Average activations over reference prompts of one length, position by position."""
    shape = model.shape
    sums: dict[Address, Tensor] = {}

    def add(address: Address) -> Callable[[Tensor], None]:
        def read(tensor: Tensor) -> None:
            total = tensor.sum(0, dtype=torch.promote_types(tensor.dtype, torch.float32))
            sums[address] = sums[address] + total if address in sums else total.clone()

        return read

    points = ("z", "mlp_out", "resid_pre")
    addresses = [Address(point, layer) for point in points for layer in range(shape.n_layers)]
    distinct = sorted(set(map(tuple, references)))
    for start in range(0, len(distinct), BATCH):
        tokens = torch.tensor([list(row) for row in distinct[start : start + BATCH]])
        model.run(tokens, {address: add(address) for address in addresses})
    tables = [
        torch.stack([sums[Address(point, layer)] / len(distinct) for layer in range(shape.n_layers)])
        for point in points
    ]
    return Baseline(*(table.clone() for table in tables))
