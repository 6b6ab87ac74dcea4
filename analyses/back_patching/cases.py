"""What back-patching is tried on: questions with an answer, the two positions, and whether the model solves them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from analyses.answers import Answer, answer_after
from analyses.prompt_fields import is_text, is_whole, must, some
from analyses.tasks.two_hop import TwoHop
from probes.capture.needs import Need
from probes.capture.run import capture
from probes.errors import PromptError
from probes.lenses import logit
from probes.models.protocol import Model
from probes.points import Address
from probes.progress import Progress
from probes.prompts import Prompt, tokenize
from probes.reducers import Reducer
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
    answer_texts: tuple[str, ...]
    positions: Mapping[str, int]
    """`t1`, the last token of the first hop's entity, and `t2`, the last token of the prompt; further ones inside, `t1.1` and so on."""
    bridge_texts: tuple[str, ...] = ()
    bridges: frozenset[int] = frozenset()
    """First tokens of the bridge, as it would follow the prompt."""
    given: frozenset[int] = frozenset()
    """Answer tokens that the prompt gives as ids."""
    written: tuple[Answer, ...] = ()
    """The answer and its aliases as they continue the prompt."""
    text: str | None = None
    verdicts: Mapping[str, bool] = field(default_factory=dict)
    """Whether the model answers the composition and each further prompt."""

    @property
    def set(self) -> Set:
        """`correct` or `incorrect` by the composition where both hops are right and no shortcut is; else `other`."""
        v = self.verdicts
        clean = v.get("first_hop", True) and v.get("second_hop", True)
        clean = clean and not (v.get("entity_shortcut", False) or v.get("relation_shortcut", False))
        return "other" if not clean else "correct" if v["composition"] else "incorrect"


check_texts = must('be a list of texts, such as ["Holland"]', lambda value: value == [] or some(is_text)(value))
check_ints = must("be a list of whole numbers, such as [4, -1]", some(is_whole))


def two_hop_prompts(model: Model, questions: Sequence[TwoHop]) -> list[Prompt]:
    """Turn questions into prompts with the fields that a prompt file would carry."""
    prompts = []
    for question in questions:
        fields = {**question.fields, **{hop: getattr(question, hop) for hop in HOPS}}
        prompt = tokenize([question.prompt], model)[0]
        prompts.append(Prompt(prompt.tokens, prompt.text, fields))
    return prompts


def cases_of(model: Model, prompts: Sequence[Prompt]) -> tuple[list[Case], list[tuple[int, str]]]:
    """Return (the case of each prompt with an answer, (prompt, reason) of each that is left out)."""
    cases, dropped = [], []
    for index, prompt in enumerate(prompts):
        try:
            cases.append(_case(model, index, prompt))
        except PromptError as error:
            dropped.append((index, str(error)))
    return cases, dropped


def _case(model: Model, index: int, prompt: Prompt) -> Case:
    fields = prompt.fields
    given = frozenset(fields.get("answer_tokens", ()))
    texts = _texts(fields)
    # Where ids are given and no tokenizer can write the texts, the ids say enough.
    written = () if given and model.tokenizer is None else tuple(answer_after(model, prompt, text) for text in texts)
    if not given and not written:
        raise PromptError(f"prompt {index} has no answer: give the field answer or answer_tokens")
    bridge_texts = (fields["bridge"],) if "bridge" in fields and model.tokenizer is not None else ()
    return Case(
        index, prompt.tokens, given | {answer.first for answer in written}, texts, _positions(model, index, prompt),
        bridge_texts, firsts(model, prompt, bridge_texts), given, written, prompt.text,
    )  # fmt: skip


def _texts(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the answer and its aliases, without those of one letter: they would make every word with it right."""
    answer = (fields["answer"].strip(),) if "answer" in fields else ()
    return (*answer, *(alias.strip() for alias in fields.get("aliases", ()) if len(alias.strip()) > 1))


def firsts(model: Model, prompt: Prompt, texts: Sequence[str]) -> frozenset[int]:
    """Return the first token of each text as it continues `prompt`."""
    return frozenset(answer_after(model, prompt, text).first for text in texts)


def _positions(model: Model, index: int, prompt: Prompt) -> dict[str, int]:
    n = len(prompt.tokens)
    if "positions" in prompt.fields:
        given = [int(p) for p in prompt.fields["positions"]]
        if bad := [p for p in given if not -n <= p < n]:
            raise PromptError(f"prompt {index}: position {bad[0]} is outside its {n} tokens")
        inside = [p for p in dict.fromkeys(p % n for p in given) if p != n - 1]
        named = {f"t1{'' if i == 0 else f'.{i}'}": p for i, p in enumerate(inside)}
        return named | ({"t2": n - 1} if any(p % n == n - 1 for p in given) else {})
    if "entity" not in prompt.fields:
        return {"t2": n - 1}
    last = _last_token(model, prompt, str(prompt.fields["entity"]))
    if last is None:
        raise PromptError(f"prompt {index}: its entity {prompt.fields['entity']!r} is not in its text")
    return {"t1": last, "t2": n - 1}


def _last_token(model: Model, prompt: Prompt, entity: str) -> int | None:
    """Return the token in which the entity's last occurrence in the prompt ends."""
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
    """Return the cases with verdicts: whether the most probable next token starts the right answer."""
    compositions: dict[tuple[int, ...], None] = dict.fromkeys(case.tokens for case in cases)
    others: dict[tuple[int, str], Prompt] = {}
    for case in cases:
        for hop in HOPS:
            if text := prompts[case.prompt].fields.get(hop):
                others[case.prompt, hop] = tokenize([str(text)], model)[0]
    sequences = list(compositions | dict.fromkeys(prompt.tokens for prompt in others.values()))
    address = Address("resid_post", model.shape.n_layers - 1)
    activations = capture(model, sequences, [Need(str(address), LAST)], store, progress=progress)
    rows = torch.cat(activations.get(address, LAST))
    top = logit.read(rows, model.unembedding(), top_k=1).top_ids[:, 0].tolist()
    said = dict(zip(sequences, top, strict=True))
    judged = []
    for case in cases:
        verdicts = {"composition": said[case.tokens] in case.answers}
        for hop in HOPS:
            if prompt := others.get((case.prompt, hop)):
                verdicts[hop] = said[prompt.tokens] in _right(model, case, hop, prompt)
        judged.append(replace(case, verdicts=verdicts))
    return judged


def _right(model: Model, case: Case, hop: str, prompt: Prompt) -> frozenset[int]:
    """Return the tokens that begin the right answer of a further prompt, as they continue that prompt."""
    if hop == "first_hop":
        return firsts(model, prompt, case.bridge_texts)
    return case.given | firsts(model, prompt, case.answer_texts)
