"""The tokens of an answer, as they continue its own prompt; one rule for every analysis and every tokenizer."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from probes.errors import PromptError
from probes.models.protocol import Model
from probes.prompts import Prompt

Tokens = tuple[int, ...]

ANCHORS = ('"', "\n", "")
"""What an answer is put behind where the prompt's own end would merge with it."""
_QUOTES = "\"'`"
_WIDE = ("W", "F")


@dataclass(frozen=True)
class Answer:
    """A text and the tokens that say it right after its prompt."""

    text: str
    """With the white space it begins with there."""
    tokens: Tokens

    @property
    def first(self) -> int:
        """The token whose probability stands for the answer's where one next token is read."""
        return self.tokens[0]


def encode(tokenizer: Any, text: str) -> Tokens:
    """The tokens of a text, nothing added."""
    return tuple(int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"])


def spaced(context: str, answer: str) -> str:
    """The answer as it stands after `context`: behind a space, unless the context ends in one, opens a quote or a
    bracket, or is written without spaces; white space that the answer itself begins with stays.
    """
    bare = answer.strip()
    if not context or context[-1].isspace() or not bare:
        return bare
    if answer[0].isspace():
        return answer.rstrip()
    end = context[-1]
    opens = unicodedata.category(end) in ("Ps", "Pi") or (end in _QUOTES and _opens(context))
    wide = unicodedata.east_asian_width(end) in _WIDE or unicodedata.east_asian_width(bare[0]) in _WIDE
    return bare if opens or wide else f" {bare}"


def _opens(context: str) -> bool:
    """Whether the quote that ends the context follows no word."""
    return len(context) == 1 or not (context[-2].isalnum() or context[-2] in ".,!?…")


def as_merged(tokenizer: Any, context: str, text: str) -> Tokens | None:
    """The tokens of `context + text` after those of `context`; None where the tokenizer joins the two."""
    before, both = encode(tokenizer, context), encode(tokenizer, context + text)
    return both[len(before) :] if len(both) > len(before) and both[: len(before)] == before else None


def continuation(tokenizer: Any, context: str, text: str) -> Tokens:
    """The tokens that say `text` right after the tokens of `context`.

    Those of the two together, where they begin with the context's. Where a token spans the boundary (a context that ends
    in a space, a number cut in two), the text's tokens as they follow a sign that joins nothing, provided that they read the same.

    Raises:
        PromptError: no such tokens.
    """
    plain = as_merged(tokenizer, context, text)
    if plain is not None:
        return plain
    before = encode(tokenizer, context)
    meant = tokenizer.decode(list(encode(tokenizer, context + text)))
    for anchor in ANCHORS:
        tokens = as_merged(tokenizer, anchor, text)
        if tokens and tokenizer.decode([*before, *tokens]) == meant:
            return tokens
    raise PromptError(
        f"the tokenizer joins the end of the prompt, {context[-20:]!r}, with {text!r}: end the prompt elsewhere, or give token ids"
    )


def context_of(tokenizer: Any, prompt: Prompt) -> str:
    """The text that the prompt's tokens stand for: its own, unless a chat template or given ids say more."""
    if prompt.text is not None and tuple(tokenizer(prompt.text)["input_ids"]) == prompt.tokens:
        return prompt.text
    return str(tokenizer.decode(list(prompt.tokens)))


def answer_after(model: Model, prompt: Prompt, text: str) -> Answer:
    """`text` as the model would have to write it after `prompt`.

    Raises:
        PromptError: no tokenizer, or a first token that any other answer could begin with.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise PromptError(f"{model.ref} has no tokenizer for {text!r}: give answer_tokens")
    context = context_of(tokenizer, prompt)
    written = spaced(context, text)
    tokens = continuation(tokenizer, context, written)
    if not str(tokenizer.decode([tokens[0]])).strip():
        raise PromptError(
            f"under the tokenizer of {model.ref}, {text!r} begins with a token that is only a space, which any word can "
            "follow: end the prompt with the space, or give answer_tokens"
        )
    return Answer(written, tokens)


def clashes(answers: Iterable[Answer]) -> list[tuple[str, str]]:
    """Pairs of different answers that begin with the same token, so that no next token tells them apart."""
    firsts: dict[str, Answer] = {}
    for answer in answers:
        firsts.setdefault(answer.text.strip(), answer)
    return [(a, b) for a, b in combinations(firsts, 2) if firsts[a].first == firsts[b].first]


def clash_note(answers: Sequence[Answer]) -> str | None:
    """What to say of answers of one run that their first tokens do not tell apart, and of answers of several tokens; None for neither.

    Raises:
        PromptError: all of several different answers begin with one token.
    """
    texts = list(dict.fromkeys(answer.text.strip() for answer in answers))
    pairs = clashes(answers)
    if len(texts) > 1 and len({answer.first for answer in answers}) == 1:
        raise PromptError(
            f"all {len(texts)} answers, {texts[0]!r} to {texts[-1]!r}, begin with the same token under this tokenizer, so the "
            "next token says nothing of them: give answer_tokens, or ask otherwise"
        )
    several = sum(len(answer.tokens) > 1 for answer in answers)
    said = []
    if several:
        said.append(f"{several} of {len(answers)} answers have more than one token; only their first is read.")
    if pairs:
        a, b = pairs[0]
        said.append(f"{len(pairs)} pairs of answers begin with the same token ({a!r}, {b!r}) and are not told apart.")
    return " ".join(said) or None


def single(tokenizer: Any, word: str) -> bool:
    """Whether a word is one token behind a space inside a text, and a capitalised one also at its start."""
    inside = as_merged(tokenizer, "a", f" {word}")
    begins = not word[:1].isupper() or len(encode(tokenizer, word)) == 1
    return inside is not None and len(inside) == 1 and begins


def forms(tokenizer: Any, word: str) -> set[int]:
    """The single tokens that stand for a word inside a text or at its start."""
    written = (as_merged(tokenizer, "a", f" {word}"), encode(tokenizer, word))
    return {tokens[0] for tokens in written if tokens is not None and len(tokens) == 1}
