"""What back-patching is tried on: questions with an answer, the two positions, and whether the model solves them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from analyses.tasks.two_hop import TwoHop
from probes import lens
from probes.capture import capture
from probes.errors import PromptError
from probes.models.base import Model
from probes.needs import Need, Reducer
from probes.points import Address
from probes.progress import Progress
from probes.prompts import Prompt, tokenize
from probes.store import ActivationStore

LAST = Reducer(positions="last")
HOPS = {
    "first_hop": "A prompt whose answer is the bridge.",
    "second_hop": "A prompt that names the bridge and has the question's answer.",
    "entity_shortcut": "The question without its relations: answered right, the entity alone gives the answer away.",
    "relation_shortcut": "The question without its entity: answered right, the relations give the answer away.",
}
"""Further prompts of a question, by which it is sorted into a set; texts in a prompt file's fields."""

Set = Literal["correct", "incorrect", "other"]


@dataclass(frozen=True)
class Case:
    """One question as the model sees it."""

    prompt: int
    tokens: tuple[int, ...]
    answers: frozenset[int]
    """First tokens of the answer and its aliases; any of them is right."""
    bridges: frozenset[int]
    answer_texts: tuple[str, ...]
    positions: Mapping[str, int]
    """`t1`, the last token of the first hop's entity, and `t2`, the last token of the prompt."""
    text: str | None = None
    verdicts: Mapping[str, bool] = field(default_factory=dict)
    """Whether the model answers the composition and each further prompt."""

    @property
    def set(self) -> Set:
        """Correct or incorrect: both hops right and no shortcut, and the composition right or not."""
        v = self.verdicts
        clean = v.get("first_hop", True) and v.get("second_hop", True)
        clean = clean and not (v.get("entity_shortcut", False) or v.get("relation_shortcut", False))
        return "other" if not clean else "correct" if v["composition"] else "incorrect"


def check_text(value: Any) -> str | None:
    """What is wrong with a field that holds one text, or None."""
    return None if isinstance(value, str) and value.strip() else "must be a text that is not empty"


def check_texts(value: Any) -> str | None:
    """What is wrong with a list of texts, or None."""
    good = isinstance(value, list) and all(isinstance(v, str) and v.strip() for v in value)
    return None if good else 'must be a list of texts, such as ["Holland"]'


def check_ints(value: Any) -> str | None:
    """What is wrong with a list of ints, or None."""
    good = isinstance(value, list) and value and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    return None if good else "must be a list of whole numbers, such as [4, -1]"


def two_hop_prompts(model: Model, questions: Sequence[TwoHop]) -> list[Prompt]:
    """Questions as prompts with the fields that a prompt file would carry."""
    found = []
    for question in questions:
        fields = {**question.fields, **{hop: getattr(question, hop) for hop in HOPS}}
        prompt = tokenize([question.prompt], model)[0]
        found.append(Prompt(prompt.tokens, prompt.text, fields))
    return found


def cases_of(model: Model, prompts: Sequence[Prompt]) -> tuple[list[Case], list[tuple[int, str]]]:
    """(a case for each prompt with an answer, (prompt, reason) for those left out)."""
    cases, dropped = [], []
    for index, prompt in enumerate(prompts):
        try:
            cases.append(_case(model, index, prompt))
        except PromptError as error:
            dropped.append((index, str(error)))
    return cases, dropped


def _case(model: Model, index: int, prompt: Prompt) -> Case:
    fields = prompt.fields
    texts = tuple(t for t in (fields.get("answer"), *fields.get("aliases", ())) if t)
    answers = frozenset(fields.get("answer_tokens", ())) | first_tokens(model, texts)
    if not answers:
        raise PromptError(f"prompt {index} has no answer: give the field answer or answer_tokens")
    bridges = first_tokens(model, [fields["bridge"]] if "bridge" in fields else [])
    return Case(index, prompt.tokens, answers, bridges, texts, _positions(model, index, prompt), prompt.text)


def first_tokens(model: Model, texts: Sequence[str]) -> frozenset[int]:
    """The first token of each text as it follows a word; empty texts and single letters are left out."""
    if texts and model.tokenizer is None:
        raise PromptError(f"{model.ref} has no tokenizer for {texts[0]!r}: give answer_tokens")
    wanted = [t.strip() for t in texts if len(t.strip()) > 1]
    return frozenset(model.tokenizer(" " + t, add_special_tokens=False)["input_ids"][0] for t in wanted)


def _positions(model: Model, index: int, prompt: Prompt) -> dict[str, int]:
    n = len(prompt.tokens)
    if "positions" in prompt.fields:
        given = [int(p) for p in prompt.fields["positions"]]
        if bad := [p for p in given if not -n <= p < n]:
            raise PromptError(f"prompt {index}: position {bad[0]} is outside its {n} tokens")
        return {"t2" if p % n == n - 1 else f"t1{'' if i == 0 else f'.{i}'}": p % n for i, p in enumerate(given)}
    if "entity" not in prompt.fields:
        return {"t2": n - 1}
    last = _last_token(model, prompt, str(prompt.fields["entity"]))
    if last is None:
        raise PromptError(f"prompt {index}: its entity {prompt.fields['entity']!r} is not in its text")
    return {"t1": last, "t2": n - 1}


def _last_token(model: Model, prompt: Prompt, entity: str) -> int | None:
    """The token in which the entity's last occurrence in the prompt ends."""
    text = prompt.text or ""
    start = text.lower().rfind(entity.lower())
    if start < 0:
        return None
    end = start + len(entity)
    ends, so_far = [], ""
    for n in range(1, len(prompt.tokens) + 1):
        so_far = str(model.tokenizer.decode(list(prompt.tokens[:n]), skip_special_tokens=True))
        ends.append(len(so_far))
    return next((i for i, reached in enumerate(ends) if reached >= end), None)


def judge(
    model: Model, prompts: Sequence[Prompt], cases: Sequence[Case], store: ActivationStore, progress: Progress
) -> list[Case]:
    """The cases with verdicts: whether the most probable next token starts the right answer."""
    asked: dict[tuple[int, ...], None] = dict.fromkeys(case.tokens for case in cases)
    others: dict[tuple[int, str], tuple[int, ...]] = {}
    for case in cases:
        for hop in HOPS:
            if text := prompts[case.prompt].fields.get(hop):
                others[case.prompt, hop] = tokenize([str(text)], model)[0].tokens
    sequences = list(asked | dict.fromkeys(others.values()))
    address = Address("resid_post", model.shape.n_layers - 1)
    activations = capture(model, sequences, [Need(str(address), LAST)], store, progress=progress)
    rows = torch.cat(activations.get(address, LAST))
    top = lens.read(rows, model.unembedding(), top_k=1).top_ids[:, 0].tolist()
    said = dict(zip(sequences, top, strict=True))
    judged = []
    for case in cases:
        verdicts = {"composition": said[case.tokens] in case.answers}
        for hop in HOPS:
            if (case.prompt, hop) in others:
                right = case.bridges if hop == "first_hop" else case.answers
                verdicts[hop] = said[others[case.prompt, hop]] in right
        judged.append(Case(**{**vars(case), "verdicts": verdicts}))
    return judged
