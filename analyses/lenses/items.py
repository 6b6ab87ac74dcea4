"""Prompts with tokens to watch for: given fields, or two-hop questions whose intermediate is known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analyses.prompt_fields import is_whole, must, named, some
from analyses.tasks.two_hop import sample
from probes.errors import PromptError
from probes.models.protocol import Model
from probes.prompts import Field, Prompt, tokenize


@dataclass(frozen=True)
class Watched:
    """One name of one prompt: its spellings, and where it is looked for."""

    prompt: int
    name: str
    spellings: tuple[str, ...]
    token_ids: tuple[int, ...]
    """The first token of each spelling."""
    places: Mapping[str, int]
    """Position name to position."""


check_watch = must(
    'be names with spellings, such as {"bridge": [" France"]}',
    named(some(lambda w: isinstance(w, str | int) and w != "")),
)


check_places = must('be names with positions, such as {"entity": 7, "end": -1}', named(is_whole))


def watched_ids(value: Mapping[str, Sequence[Any]]) -> Iterator[int]:
    """Yield the token ids of a `watch` field."""
    return (word for words in value.values() for word in words if isinstance(word, int))


FIELDS: Mapping[str, Field] = {
    "watch": Field(
        'Tokens to look for, by name: {"bridge": [" France", "France"]}; a text counts by its first token.', check_watch,
        ids=watched_ids,
    ),
    "named_positions": Field('Where they are looked for: {"entity": 7, "end": -1}; the last by default.', check_places),
}  # fmt: skip


def watched_of(prompts: Sequence[Prompt], model: Model) -> tuple[list[Watched], list[str]]:
    """Return what is looked for in every prompt, and a note where spellings have several tokens.

    Raises:
        PromptError: words without a tokenizer, or a position outside its prompt.
    """
    watched, several = [], 0
    for index, prompt in enumerate(prompts):
        places = _places(prompt, index)
        for name, words in prompt.fields.get("watch", {}).items():
            ids = []
            for word in words:
                tokens = [word] if isinstance(word, int) else _tokens(model, word)
                ids.append(tokens[0])
                several += len(tokens) > 1
            watched.append(Watched(index, name, tuple(map(str, words)), tuple(ids), places))
    note = [f"{several} watched spellings have several tokens; each is looked for by its first."] if several else []
    return watched, note


def _places(prompt: Prompt, index: int) -> dict[str, int]:
    n = len(prompt.tokens)
    places = prompt.fields.get("named_positions") or {"end": -1}
    for name, position in places.items():
        if not -n <= position < n:
            raise PromptError(f"prompt {index}: position {name} is {position}: legal are {-n} to {n - 1}")
    return {name: position % n for name, position in places.items()}


def _tokens(model: Model, word: str) -> list[int]:
    if model.tokenizer is None:
        raise PromptError(f"{model.ref} has no tokenizer: watch token ids instead of {word!r}")
    ids = list(model.tokenizer(word, add_special_tokens=False)["input_ids"])
    if not ids:
        raise PromptError(f"watched text {word!r} has no tokens")
    return ids


def two_hop_prompts(model: Model, n: int, seed: int) -> list[Prompt]:
    """Return generated two-hop questions that watch their bridge and their answer at the entity's end and at the end."""
    prompts = []
    for question in sample(n, seed):
        tokens = tokenize([question.prompt], model)[0].tokens
        begin = question.prompt.find(question.entity)
        upto = tokenize([question.prompt[: begin + len(question.entity)]], model)[0].tokens
        if tokens[: len(upto)] != upto:
            continue
        watch = {"bridge": [f" {question.bridge}"], "answer": [f" {question.answer}"]}
        fields = {"watch": watch, "named_positions": {"entity": len(upto) - 1, "end": len(tokens) - 1}}
        prompts.append(Prompt(tokens, question.prompt, fields))
    return prompts


def others(watched: Sequence[Watched], draws: int, seed: int) -> list[list[tuple[int, ...]]]:
    """Return for each name of a prompt the tokens of the same name in other prompts, where they differ; `draws` of each."""
    rng = np.random.default_rng(seed)
    by_name: dict[str, list[tuple[int, ...]]] = {}
    for item in watched:
        if item.token_ids not in by_name.setdefault(item.name, []):
            by_name[item.name].append(item.token_ids)
    drawn = []
    for item in watched:
        pool = [ids for ids in by_name[item.name] if not set(ids) & set(item.token_ids)]
        drawn.append([pool[int(i)] for i in rng.integers(0, len(pool), draws)] if pool else [])
    return drawn
