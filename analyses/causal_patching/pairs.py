"""Pairs of prompts that differ in one fact, with the tokens whose logits tell the two answers apart."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from analyses.answers import answer_after
from analyses.prompt_fields import check_text, is_text, is_whole, must, named, some
from probes.errors import PromptError
from probes.models.protocol import Model
from probes.prompts import Field, Prompt, PromptLine, check_ids, tokenize

Direction = Literal["denoise", "noise"]
"""Denoising copies from the clean run into the corrupted one, noising the other way."""


check_alignment = must(
    "be a list of [clean, corrupted] positions, both rising, such as [[0, 0], [2, 3]]", lambda value: _rising(value)
)
check_named = must('be an object of names and positions, such as {"subject": 4, "end": -1}', named(is_whole))
check_span = must(
    "be two positions, the first and the one after the last, such as [2, 5]",
    lambda value: _ints(value, 2) and 0 <= value[0] < value[1],
)
check_texts = must("be a list of texts that are not empty", some(is_text))
check_id_lists = must(
    "be a list of lists of token ids, such as [[262, 318], [262, 290]]", some(lambda ids: not check_ids(ids))
)


def _rising(value: Any) -> bool:
    pairs = isinstance(value, list) and value and all(_ints(item, 2) and min(item) >= 0 for item in value)
    return bool(pairs) and all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(value))


def _ints(value: Any, n: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == n and all(type(v) is int for v in value)


FIELDS: Mapping[str, Field] = {
    "corrupted": Field("The other prompt, as text.", check_text),
    "corrupted_tokens": Field("The other prompt, as token ids.", check_ids, ids=tuple),
    "answer": Field("What follows the prompt, as text; its first token counts.", check_text),
    "corrupted_answer": Field("What follows the other prompt, as text; its first token counts against.", check_text),
    "answer_tokens": Field("Ids whose mean logit counts for the metric: [262].", check_ids, ids=tuple),
    "distractor_tokens": Field("Ids whose mean logit counts against it: [318].", check_ids, ids=tuple),
    "alignment": Field("[clean, corrupted] positions that correspond; needed where lengths differ.", check_alignment),
    "named_positions": Field('Names of positions in the prompt: {"subject": 4, "end": -1}.', check_named),
    "span": Field("The subject's positions, for noise: [first, after the last].", check_span),
    "references": Field("Prompts of its form in which the answer is not determined, for --ablation mean.", check_texts),
    "reference_tokens": Field(
        "The same as token ids: [[262, 318], [262, 290]].", check_id_lists, ids=itertools.chain.from_iterable
    ),
    "group": Field("Pairs of one group are resampled together.", check_text),
}  # fmt: skip
"""What a prompt line may carry beside its text or tokens."""

WHERE = "_where"
"""The field in which a pair keeps the line that it was read from; one that has it holds token ids already."""


@dataclass(frozen=True)
class Pair:
    """A clean and a corrupted prompt, and the tokens that the metric compares."""

    index: int
    where: str
    """The line it was read from, for messages."""
    clean: tuple[int, ...]
    corrupted: tuple[int, ...]
    """The same as `clean` where noise on the embeddings makes the other run."""
    answers: tuple[int, ...]
    distractors: tuple[int, ...]
    group: str
    named: Mapping[str, int] = field(default_factory=dict)
    """Names of positions in the clean prompt."""
    aligned: tuple[tuple[int, int], ...] = ()
    """[clean, corrupted] positions that correspond; every position where none are given."""
    span: tuple[int, int] | None = None
    """Positions whose embeddings are made noisy; None where the corrupted prompt has other tokens."""
    text: str = ""
    corrupted_text: str = ""
    references: tuple[tuple[int, ...], ...] = ()
    """Prompts of the clean one's form and length in which the answer is not determined."""
    reason: str = ""
    """Why it cannot be patched; empty where it can."""

    @property
    def ids(self) -> tuple[int, ...]:
        """Tokens whose logits the metric compares, answers first."""
        return (*self.answers, *self.distractors)

    @property
    def first_difference(self) -> int:
        """The first position at which the two runs differ; before it every activation is the same in both."""
        if self.span is not None:
            return self.span[0]
        same = [a == b for a, b in zip(self.clean, self.corrupted, strict=False)]
        return same.index(False) if False in same else len(same)

    @property
    def shifted(self) -> bool:
        """Whether the alignment moves some position."""
        return any(clean != corrupted for clean, corrupted in self.aligned)

    def base(self, direction: Direction) -> tuple[int, ...]:
        """Return the tokens of the run that is patched."""
        return self.corrupted if direction == "denoise" else self.clean

    def source(self, direction: Direction) -> tuple[int, ...]:
        """Return the tokens of the run that is copied from."""
        return self.clean if direction == "denoise" else self.corrupted

    def sources(self, direction: Direction) -> dict[int, int]:
        """Return the position that each position of the patched run is given, as {patched: source}."""
        if not self.aligned:
            return {position: position for position in range(len(self.clean))}
        return {d: c for c, d in self.aligned} if direction == "denoise" else dict(self.aligned)

    def roles(self, direction: Direction) -> dict[int, str]:
        """Return the role of each position of the patched run that corresponds to one of the clean prompt.

        A name where the prompt line gives one, else the distance from the end (`-1` is the last).
        """
        names = {position: name for name, position in self.named.items()}
        n = len(self.clean)
        clean = self.sources("denoise") if direction == "denoise" else {p: p for p in range(n)}
        return {patched: names.get(position, str(position - n)) for patched, position in clean.items()}


def resolved(model: Model, prompts: Sequence[Prompt], wheres: Sequence[str], noise: bool) -> list[Prompt]:
    """Return prompts whose fields hold the pair as token ids, and where it was read.

    Raises:
        PromptError: a line without a corrupted prompt or an answer, positions outside the prompt, or two equal prompts.
    """
    return [_resolved(model, prompt, where, noise) for prompt, where in zip(prompts, wheres, strict=True)]


def _resolved(model: Model, prompt: Prompt, where: str, noise: bool) -> Prompt:
    if WHERE in prompt.fields:
        return prompt
    fields = dict(prompt.fields)
    other = _corrupted(model, prompt, where, noise)
    if other.tokens == prompt.tokens and not noise:
        raise PromptError(f"{where}: the clean and the corrupted prompt are the same: nothing can be patched")
    if noise and "span" not in fields:
        raise PromptError(f'{where}: noise needs "span", the positions of the subject, such as [2, 5]')
    answers = _ids(model, prompt, fields, "answer_tokens", "answer")
    distractors = _ids(model, other, fields, "distractor_tokens", "corrupted_answer")
    if not answers:
        raise PromptError(f'{where}: give "answer" or "answer_tokens", what follows the clean prompt')
    if not distractors:
        raise PromptError(f'{where}: give "corrupted_answer" or "distractor_tokens", what follows the corrupted prompt')
    _check_places(fields, where, len(prompt.tokens), len(other.tokens))
    if "references" in fields and "reference_tokens" not in fields:
        lines = [PromptLine(where, str(text), None) for text in fields["references"]]
        fields["reference_tokens"] = [list(reference.tokens) for reference in tokenize(lines, model)]
    fields |= {
        WHERE: where, "corrupted_tokens": list(other.tokens), "corrupted": other.text or "",
        "answer_tokens": list(answers), "distractor_tokens": list(distractors),
    }  # fmt: skip
    return replace(prompt, fields=fields)


def _corrupted(model: Model, prompt: Prompt, where: str, noise: bool) -> Prompt:
    fields = prompt.fields
    if noise:
        return prompt
    if "corrupted_tokens" in fields:
        return tokenize([PromptLine(where, None, tuple(fields["corrupted_tokens"]))], model)[0]
    if "corrupted" not in fields:
        raise PromptError(f'{where}: give "corrupted" or "corrupted_tokens", the prompt that differs in one fact')
    return tokenize([PromptLine(where, str(fields["corrupted"]), None)], model)[0]


def _ids(model: Model, prompt: Prompt, fields: Mapping[str, Any], ids: str, text: str) -> tuple[int, ...]:
    """Return the tokens given as ids, or the first token of the text given, as it continues `prompt`."""
    if ids in fields:
        return tuple(fields[ids])
    return (answer_after(model, prompt, str(fields[text])).first,) if text in fields else ()


def _check_places(fields: Mapping[str, Any], where: str, clean: int, corrupted: int) -> None:
    for name, position in fields.get("named_positions", {}).items():
        if not -clean <= position < clean:
            raise PromptError(
                f"{where}: named position {name!r} is {position}: legal are {-clean} to {clean - 1}, positions of the prompt"
            )
    for a, b in fields.get("alignment", ()):
        if a >= clean or b >= corrupted:
            raise PromptError(
                f"{where}: alignment [{a}, {b}] is outside the prompts: legal are positions below {clean} and {corrupted}"
            )
    if "span" in fields and fields["span"][1] > clean:
        raise PromptError(f"{where}: span {fields['span']} ends outside the prompt: legal are positions up to {clean}")


def pair_of(index: int, prompt: Prompt, noise: bool) -> Pair:
    """Return the pair that a resolved prompt carries; one that cannot be patched says why."""
    fields, n = prompt.fields, len(prompt.tokens)
    answers, distractors = tuple(fields["answer_tokens"]), tuple(fields["distractor_tokens"])
    corrupted = tuple(fields["corrupted_tokens"])
    aligned = tuple((int(a), int(b)) for a, b in fields.get("alignment", ()))
    ends = (n - 1, len(corrupted) - 1)
    if aligned and aligned[-1] != ends:
        # The last positions always correspond: the metric is read there.
        aligned = (*(pair for pair in aligned if pair[0] < ends[0] and pair[1] < ends[1]), ends)
    references = tuple(tuple(tokens) for tokens in fields.get("reference_tokens", ()) if len(tokens) == n)
    reason = ""
    if len(corrupted) != n and not aligned:
        reason = f"{n} and {len(corrupted)} tokens without an alignment"
    elif set(answers) & set(distractors):
        reason = "an answer and a distractor begin with the same token"
    return Pair(
        index, str(fields[WHERE]), prompt.tokens, corrupted, answers, distractors,
        str(fields.get("group", f"pair {index}")), {name: p % n for name, p in fields.get("named_positions", {}).items()},
        aligned, tuple(fields["span"]) if noise else None, prompt.text or "", str(fields.get("corrupted", "")),
        references, reason,
    )  # fmt: skip
