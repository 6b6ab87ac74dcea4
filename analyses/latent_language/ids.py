"""Which token ids say a word: rules for any tokenizer, variants of writing, collisions, and controls of equal size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, Literal

import numpy as np

from analyses.answers import as_merged, encode
from analyses.tokens import token_bytes

Tokens = tuple[int, ...]
Sets = Mapping[str, tuple[Tokens, ...]]
"""Language to the token sequences that say the word in it."""

SetRule = Literal["prefix", "first_token", "multi_token"]
Collide = Literal["drop", "keep", "subtract"]

_QUOTE = '"'


def after_quote(tokenizer: Any, text: str) -> Tokens:
    """The tokens of `text` where it follows an open quote."""
    return as_merged(tokenizer, _QUOTE, text) or encode(tokenizer, text)


def prefix_free(sequences: Iterable[Tokens]) -> tuple[Tokens, ...]:
    """The sequences none of which starts with another, so that their probabilities add up without counting twice."""
    kept: list[Tokens] = []
    for sequence in sorted(set(sequences), key=lambda s: (len(s), s)):
        if sequence and not any(sequence[: len(k)] == k for k in kept):
            kept.append(sequence)
    return tuple(kept)


def clash(a: Tokens, b: Tokens) -> bool:
    """Whether one sequence is the other or starts it, so that text can begin with both."""
    n = min(len(a), len(b))
    return a[:n] == b[:n]


@dataclass(frozen=True)
class Rule:
    """How words become sets of token sequences.

    `prefix` takes every single token whose bytes, after one optional leading space, start the word (Wendler 2024);
    `first_token` the first token of the word as the tokenizer writes it, unless that is a space alone; `multi_token` the whole word (Zhong 2024).
    """

    tokenizer: Any
    kind: SetRule = "prefix"
    spaces: bool = True
    """Whether forms with a leading space count."""
    case: bool = False
    """Whether the word in lower case and with a capital counts too."""
    byte_tokens: bool = True
    """Whether a token that cuts a character counts, for `prefix`."""

    @cached_property
    def _bytes(self) -> Mapping[int, bytes]:
        return token_bytes(self.tokenizer)

    @cached_property
    def _by_bytes(self) -> Mapping[bytes, tuple[int, ...]]:
        numbers: dict[bytes, tuple[int, ...]] = {}
        for number, piece in self._bytes.items():
            numbers[piece] = (*numbers.get(piece, ()), number)
        return numbers

    def sequences(self, words: Iterable[str]) -> tuple[Tokens, ...]:
        """The prefix-free token sequences that say any of `words`."""
        forms: list[Tokens] = []
        for variant in dict.fromkeys(variant for word in words for variant in self._variants(word)):
            forms += self._prefixes(variant) if self.kind == "prefix" else self._written(variant)
        return prefix_free(forms)

    def _variants(self, word: str) -> list[str]:
        return [word, word.lower(), word[:1].upper() + word[1:]] if self.case else [word]

    def _prefixes(self, word: str) -> list[Tokens]:
        whole = word.encode()
        starts = [whole[:n] for n in range(1, len(whole) + 1)]
        if not self.byte_tokens:
            starts = [word[:n].encode() for n in range(1, len(word) + 1)]
        forms = [form for start in starts for form in ((start, b" " + start) if self.spaces else (start,))]
        return [(number,) for form in forms for number in self._by_bytes.get(form, ())]

    def _written(self, word: str) -> list[Tokens]:
        forms = [after_quote(self.tokenizer, text) for text in ((word, " " + word) if self.spaces else (word,))]
        if self.kind == "multi_token":
            return forms
        return [form[:1] for form in forms if form and self._bytes.get(form[0], b"").removeprefix(b" ")]


def resolve(sets: Sets, how: Collide) -> tuple[Sets, str | None]:
    """The sets after collisions between languages are dealt with, and the reason to drop the item, or None."""
    for language, sequences in sets.items():
        if not sequences:
            return sets, f"no token says the word in {language}"
    shared = {
        name: {a for a in own for other, theirs in sets.items() if other != name for b in theirs if clash(a, b)}
        for name, own in sets.items()
    }
    clashing = [name for name, common in shared.items() if common]
    if how == "keep" or not clashing:
        return sets, None
    if how == "drop":
        n = len(set().union(*shared.values()))
        return sets, f"{' and '.join(clashing)} share {n} token{'s' if n > 1 else ''}"
    left = {name: tuple(s for s in own if s not in shared[name]) for name, own in sets.items()}
    empty = [name for name, own in left.items() if not own]
    return left, f"nothing is left of {' and '.join(empty)} without the shared tokens" if empty else None


def shuffled_controls(items: Sequence[Sets], seed: int, d_vocab: int) -> list[Sets]:
    """For each item and language, as many sequences as its own set has, taken from other items' sets of that language.

    None of them can begin with the item's own words. Random tokens fill up where the other items do not suffice.
    """
    rng = np.random.default_rng(seed)
    controls: list[Sets] = []
    for index, own in enumerate(items):
        order = [int(i) for i in rng.permutation(len(items)) if i != index]
        own_sequences = [sequence for sequences in own.values() for sequence in sequences]
        control = {}
        for language, sequences in own.items():
            others = (s for i in order for s in items[i].get(language, ()))
            fill = ((int(token),) for token in rng.permutation(d_vocab))
            control[language] = _first_free(chain(others, fill), own_sequences, len(sequences))
        controls.append(control)
    return controls


def _first_free(candidates: Iterable[Tokens], own: Sequence[Tokens], size: int) -> tuple[Tokens, ...]:
    """The first `size` candidates that collide neither with `own` nor with each other."""
    whole = set(own)
    starts = {s[:i] for s in own for i in range(1, len(s))}
    taken: list[Tokens] = []
    for sequence in candidates:
        if len(taken) == size:
            break
        heads = {sequence[:i] for i in range(1, len(sequence) + 1)}
        if sequence not in starts and not heads & whole:
            taken.append(sequence)
            whole.add(sequence)
            starts |= heads - {sequence}
    return tuple(taken)
