"""Pairs that tasks make, as the model's tokenizer sees them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from analyses.answers import as_merged, continuation, encode, single
from analyses.causal_patching.pairs import WHERE
from analyses.tasks import docstring, facts, greater_than, ioi, two_hop
from analyses.tasks.item import TextPair
from analyses.tokens import character_ends, token_at
from probes.errors import OptionError, PromptError
from probes.models.protocol import Model
from probes.prompts import Prompt, tokenize

WITHOUT_REFERENCE = ("two_hop", "facts")
"""Tasks that have no prompt in which the answer is not determined."""


def generated(model: Model, task: str, n: int, corruption: str, seed: int, references: int = 0) -> list[Prompt]:
    """Return generated pairs, the clean prompt with what a prompt line would carry in its fields, as token ids.

    Args:
        model: whose tokenizer and vocabulary the pairs are for.
        task: one of `MAKERS`.
        corruption: `token`, `reference` or `noise`.
        references: prompts of the same form beside each pair, in tasks that have some.

    Raises:
        OptionError: a task that has no reference prompts.
        PromptError: the model has no tokenizer, or one that has too few of the task's words.
    """
    if model.tokenizer is None:
        raise PromptError(f"task {task!r} needs a tokenizer, and {model.ref} has none: give pairs of token ids")
    if corruption == "reference" and task in WITHOUT_REFERENCE:
        raise OptionError(f"task {task!r} has no reference prompts: give --corruption token or noise")
    drawn: list[TextPair] = MAKERS[task](
        model.tokenizer, n, seed, "reference" if corruption == "reference" else "token", references
    )
    if not drawn:
        raise PromptError(f"task {task!r} gives no pair of equal length under the tokenizer of {model.ref}")
    return [_prompt(model, task, i, pair, corruption == "noise") for i, pair in enumerate(drawn)]


def _greater_than(tokenizer: Any, n: int, seed: int, _: str, references: int) -> list[TextPair]:
    question = greater_than.TEXT.format(event="war", century=17, year=41)
    whole = len(as_merged(tokenizer, question, "42") or ()) == 1
    return greater_than.text_pairs(n, seed, partial(single, tokenizer), whole, references)


def _length(tokenizer: Any) -> Callable[[str], int]:
    return lambda text: len(encode(tokenizer, text))


MAKERS: dict[str, Callable[..., list[TextPair]]] = {
    "ioi": lambda tokenizer, n, seed, corruption, references: ioi.pairs(
        n, seed, corruption, partial(single, tokenizer), references
    ),
    "greater_than": _greater_than,
    "docstring": lambda tokenizer, n, seed, corruption, _: docstring.pairs(
        n, seed, corruption, partial(single, tokenizer)
    ),
    "two_hop": lambda tokenizer, n, seed, *_: two_hop.pairs(n, seed, _length(tokenizer)),
    "facts": lambda tokenizer, n, seed, *_: facts.pairs(n, seed, _length(tokenizer)),
}
"""Name of a task to what makes its pairs."""


def _prompt(model: Model, task: str, index: int, pair: TextPair, noise: bool) -> Prompt:
    clean, other = tokenize([pair.clean, pair.clean if noise else pair.corrupted], model)
    ends = character_ends(model, clean.tokens)
    answers, distractors = (
        list(dict.fromkeys(continuation(model.tokenizer, context, text)[0] for text in texts))
        for context, texts in ((pair.clean, pair.answers), (pair.clean, pair.distractors))
    )
    fields: dict[str, Any] = {
        WHERE: f"{task} pair {index}", "corrupted": other.text or "", "corrupted_tokens": list(other.tokens),
        "answer_tokens": answers, "distractor_tokens": distractors,
        "named_positions": {role: token_at(ends, place) for role, place in pair.roles.items()},
        "group": pair.group or f"pair {index}",
    }  # fmt: skip
    if pair.references:
        fields["reference_tokens"] = [list(other.tokens) for other in tokenize(list(pair.references), model)]
    if noise and pair.subject is not None:
        fields["span"] = [token_at(ends, pair.subject[0] + 1), token_at(ends, pair.subject[1]) + 1]
    return Prompt(clean.tokens, clean.text, fields)
