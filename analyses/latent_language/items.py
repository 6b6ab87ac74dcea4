"""What is measured: a prompt and, per language, the token sequences that would answer it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from analyses.latent_language.ids import Collide, Rule, Sets, after_quote, resolve, shuffled_controls
from analyses.latent_language.task_prompts import Framing, Query, culture_prompt
from analyses.word_lists import CULTURE_LANGUAGES, CULTURES, Question
from probes.errors import PromptError
from probes.models.protocol import Model
from probes.prompts import Prompt, tokenize


@dataclass(frozen=True)
class Item:
    """One prompt to be read."""

    prompt: int
    name: str
    """The word asked for, or the prompt's index."""
    pair: str
    """What was asked, for instance `fr→zh`."""
    tokens: tuple[int, ...]
    text: str
    target: str
    """The language of the answer."""
    sets: Sets
    answers: tuple[str, ...] = ()
    """Texts that count as the right answer; empty where only tokens are known."""
    controls: Sets | None = None

    @property
    def events(self) -> Mapping[str, Sets]:
        """The sets measured: `own`, and `control` where there are controls."""
        return {"own": self.sets} if self.controls is None else {"own": self.sets, "control": self.controls}


Dropped = tuple[str, str, str]
"""(pair, item, reason)."""


def check_targets(value: Any) -> str | None:
    """What is wrong with a `targets` field, or None."""
    rule_text = 'must be an object such as {"en": [262], "fr": [1048]} or {"en": ["dog"], "fr": ["chien"]}'
    if not isinstance(value, dict) or not value:
        return rule_text
    for language, values in value.items():
        if not isinstance(values, list) or not values:
            return f"{rule_text}; {language!r} has no list"
        ids = all(isinstance(t, int) and not isinstance(t, bool) and t >= 0 for t in values)
        if not ids and not all(isinstance(t, str) and t.strip() for t in values):
            return f"{rule_text}; {language!r} mixes or has neither token ids from 0 nor words"
    return None


def target_ids(value: Mapping[str, Any]) -> list[int]:
    """The token ids in a `targets` field, words left out."""
    return [token for given in value.values() for token in given if isinstance(token, int)]


def prompt_tokens(model: Model, text: str) -> tuple[int, ...]:
    """The tokens of a prompt, without an end-of-sequence token that the tokenizer puts last."""
    tokens = tokenize([text], model)[0].tokens
    end = getattr(model.tokenizer, "eos_token_id", None)
    return tokens[:-1] if len(tokens) > 1 and tokens[-1] == end else tokens


def given_items(
    prompts: Sequence[Prompt], rule: Rule | None, model: Model, target: str, on_collision: Collide
) -> tuple[list[Item], list[Dropped]]:
    """Items of prompts that carry `targets`; given ids are summed as they are.

    Raises:
        PromptError: words where the model has no tokenizer.
    """
    items, dropped = [], []
    for index, prompt in enumerate(prompts):
        name = f"prompt {index}"
        if "targets" not in prompt.fields:
            dropped.append(("given", name, "the line has no targets"))
            continue
        targets: Mapping[str, list[Any]] = prompt.fields["targets"]
        words = {lang: tuple(values) for lang, values in targets.items() if isinstance(values[0], str)}
        if words and rule is None:
            raise PromptError(f"{name}: targets are words, and {model.ref} has no tokenizer; give token ids")
        sets: Sets = {lang: _given(values, rule) for lang, values in targets.items()}
        if words:
            sets, reason = resolve(sets, on_collision)
            if reason:
                dropped.append(("given", name, reason))
                continue
        last = target if target in sets else list(sets)[-1]
        items.append(Item(index, name, "given", prompt.tokens, prompt.text or "", last, sets, words.get(last, ())))
    kinds = {(item.target, tuple(item.sets)) for item in items}
    if len(kinds) > 1:
        # Curves average over items that ask for the same languages.
        items = [replace(item, pair=f"given {'+'.join(item.sets)}→{item.target}") for item in items]
    return items, dropped


def _given(values: Sequence[Any], rule: Rule | None) -> tuple[tuple[int, ...], ...]:
    if isinstance(values[0], str):
        assert rule is not None
        return rule.sequences(values)
    return tuple((token,) for token in dict.fromkeys(values))


def task_items(
    queries: Sequence[Query], rule: Rule, model: Model, pair: str, languages: Sequence[str], on_collision: Collide,
    synonyms: bool, first: int, n_prompts: int = 0, seed: int = 0,
) -> tuple[list[Item], list[Dropped]]:  # fmt: skip
    """Items of a task's prompts; the first of `languages` is the answer's.

    Args:
        first: the index of the first prompt.
        n_prompts: how many to keep, tried in an order drawn by `seed`, in which those that cannot be measured are passed
            over; 0 for all.
    """
    order = np.random.default_rng(seed).permutation(len(queries)) if n_prompts else range(len(queries))
    items: dict[int, Item] = {}
    dropped: list[Dropped] = []
    for place in map(int, order):
        if len(items) == (n_prompts or len(queries)):
            break
        query = queries[place]
        forms = query.word.forms
        missing = [language for language in languages if language not in forms]
        reason = f"the word list has no word in {' and '.join(missing)}" if missing else None
        if reason is None and on_collision == "drop":
            reason = _contained(query, languages)
        sets: Sets = {}
        if reason is None:
            used = {lang: forms[lang] if synonyms else forms[lang][:1] for lang in languages}
            sets, reason = resolve({lang: rule.sequences(words) for lang, words in used.items()}, on_collision)
        if reason:
            dropped.append((pair, query.word.name, reason))
            continue
        tokens = prompt_tokens(model, query.text)
        name, target = query.word.name, languages[0]
        items[place] = Item(0, name, pair, tokens, query.text, target, sets, forms[target])
    return [replace(items[place], prompt=first + i) for i, place in enumerate(sorted(items))], dropped


def _contained(query: Query, languages: Sequence[str]) -> str | None:
    """The reason to drop a word that is spelled inside the target's word, or None (as the released code does)."""
    target, *latents = languages
    for latent in latents:
        if latent != target and query.word.forms[latent][0] in query.word.forms[target][0]:
            return f"the word in {latent} is part of the word in {target}"
    return None


def culture_items(
    questions: Sequence[Question], framing: Framing, language: str, rule: Rule, model: Model, seed: int, n_prompts: int
) -> tuple[list[Item], list[Dropped]]:
    """Items of the culture questions asked in `language`; sets are named `culture/language`.

    An answer written alike in both languages counts in both. Answers of unequal token length, or of which one starts
    the other, are dropped.

    Args:
        n_prompts: the first so many that are not dropped; 0 for all.
    """
    examples = [q for q in questions if q.kind == "example"]
    queries = [q for q in questions if q.kind != "example"]
    items: list[Item] = []
    dropped: list[Dropped] = []
    for index, question in enumerate(queries):
        if len(items) == (n_prompts or len(queries)):
            break
        name = question.text["en"]
        sets = {
            f"{c}/{lang}": rule.sequences([question.answers[c, lang]]) for c in CULTURES for lang in CULTURE_LANGUAGES
        }
        reason = unequal_length(question, rule.tokenizer) or _culture_clash(sets)
        if reason:
            dropped.append((f"culture, {framing}", name, reason))
            continue
        text = culture_prompt(question, examples, language, framing, seed, index)
        tokens = prompt_tokens(model, text)
        answers = (question.answers["us" if framing == "us" else "japan", language],)
        items.append(Item(index, name, f"culture, {framing}", tokens, text, language, sets, answers))
    return items, dropped


def unequal_length(question: Question, tokenizer: Any) -> str | None:
    """Which language's two answers differ in tokens, or None."""
    for language in CULTURE_LANGUAGES:
        counts = [len(after_quote(tokenizer, question.answers[culture, language])) for culture in CULTURES]
        if counts[0] != counts[1]:
            return f"the answers in {language} have {counts[0]} and {counts[1]} tokens"
    return None


def _culture_clash(sets: Sets) -> str | None:
    for language in CULTURE_LANGUAGES:
        ours = {f"{culture}/{language}": sets[f"{culture}/{language}"] for culture in CULTURES}
        _, reason = resolve(ours, "drop")
        if reason:
            return reason
    return None


def with_controls(items: Sequence[Item], seed: int, d_vocab: int) -> list[Item]:
    """The items with shuffled-word controls of equal size, drawn among items of the same pair."""
    controlled: dict[int, Item] = {}
    for pair in dict.fromkeys(item.pair for item in items):
        members = [i for i, item in enumerate(items) if item.pair == pair]
        controls = shuffled_controls([items[i].sets for i in members], seed, d_vocab)
        controlled.update(
            {i: replace(items[i], controls=control) for i, control in zip(members, controls, strict=True)}
        )
    return [controlled[i] for i in range(len(items))]
