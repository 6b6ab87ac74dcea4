"""What is compared: each prompt with its passage, without it, and with other text in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Literal

import numpy as np

from analyses.answers import answer_after, encode
from analyses.prompt_fields import is_text, is_whole, must, some
from analyses.scoring import check_answer
from analyses.tasks.facts import pairs
from analyses.tokens import character_ends, token_at
from probes.errors import PromptError
from probes.models.protocol import Model
from probes.prompts import Field, Prompt, check_ids, tokenize

Variant = Literal["passage", "without", "neutral", "noise"]
VARIANT, OF = "variant", "of_prompt"
"""Fields of the prompts that are read: which variant, of which prompt as given."""
NEUTRAL = (
    " It was an ordinary day, and nothing happened that anybody would remember later. People went about what they had to do, the light "
    "changed a little, and in the evening it was quiet again."
)
"""What stands in a passage's place, cut to its number of tokens, where a prompt names nothing else."""
TEXT = "Read this note.\n{passage}\nQuestion. According to the note, {question}"
"""A made prompt: the question is begun as a statement, which the answer ends."""


check_passage = must(
    'be a text that stands in the prompt once, or the positions "[first, after the last]"',
    lambda value: is_text(value) or (some(is_whole, 2)(value) and 0 <= value[0] <= value[1]),
)


check_replacement = must(
    "be a text, or a list of token ids",
    lambda value: is_text(value) or (isinstance(value, list) and not check_ids(value)),
)
check_noise = must("be a list of texts, or of lists of token ids", some(lambda value: not check_replacement(value)))


FIELDS: Mapping[str, Field] = {
    "passage": Field("The passage: a text that stands in the prompt once, or its positions, [first, after the last].", check_passage),
    "answer": Field("The right answer, as text; only its first token is read.", check_answer),
    "answer_tokens": Field("Ids of which the first is the answer's first token, in place of a text: [262].", check_ids, ids=tuple),
    "noise": Field("Other passages that say nothing of the answer: a list of texts, or of lists of token ids.", check_noise),
    "neutral": Field("What is repeated in the passage's place for as many tokens: a text or token ids; else a shipped sentence.", check_replacement),
}  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One prompt as given, and where its variants are among the prompts that are read."""

    prompt: int
    tokens: tuple[int, ...]
    span: tuple[int, int]
    """The passage's first position, and that after its last."""
    answer: int
    """The answer's first token."""
    passage: int
    without: int
    neutral: int | None
    """None where there is nothing to put in the passage's place."""
    noise: tuple[int, ...]


def made_prompts(model: Model, n: int, seed: int) -> list[Prompt]:
    """Return prompts about countries whose passage states the answer, in part against what is true, with noise passages.

    In every second prompt the passage says of one country what is true of another, so that the answer can only come from it.

    Raises:
        PromptError: the model has no tokenizer.
    """
    if model.tokenizer is None:
        raise PromptError(f"{model.ref} has no tokenizer to make passages with: give --prompts with token ids")
    facts = pairs(n, seed, lambda text: len(encode(model.tokenizer, text)))
    rng, prompts = np.random.default_rng(seed), []
    for i, fact in enumerate(facts):
        answer = (fact.answers if i % 2 == 0 else fact.distractors)[0]
        question = fact.clean[0].lower() + fact.clean[1:] if fact.clean.startswith("The ") else fact.clean
        others = [other for other in facts if other.group != fact.group]
        noise = [f"{o.clean}{o.answers[0]}." for o in (others[int(k)] for k in rng.permutation(len(others))[:2])]
        passage = f"{fact.clean}{answer}."
        text = TEXT.format(passage=passage, question=question)
        fields = {"passage": passage, "answer": answer.strip(), "noise": noise, "group": fact.group}
        prompts.append(Prompt(tokenize([text], model)[0].tokens, text, fields))
    return prompts


def with_variants(model: Model, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return every prompt that is read: each as given, without its passage, and with other tokens in the passage's place.

    Raises:
        PromptError: a prompt whose passage cannot be located, or that ends with it.
    """
    read: list[Prompt] = []
    for index, prompt in enumerate(prompts):
        start, end = span_of(model, index, prompt)
        before, after = prompt.tokens[:start], prompt.tokens[end:]
        replaced: list[tuple[Variant, tuple[int, ...]]] = [("passage", prompt.tokens[start:end]), ("without", ())]
        neutral = _ids(model, prompt.fields.get("neutral", NEUTRAL))
        if neutral:
            replaced.append(("neutral", tuple(islice(cycle(neutral), end - start))))
        replaced += [("noise", _ids(model, text)) for text in prompt.fields.get("noise", ())]
        for variant, tokens in replaced:
            whole = (*before, *tokens, *after)
            if len(whole) > model.shape.n_ctx:
                raise PromptError(
                    f"prompt {index} has {len(whole)} tokens with {variant} text in its passage's place, but {model.ref} reads "
                    f"{model.shape.n_ctx}: give shorter noise"
                )
            text = prompt.text if variant == "passage" else None
            read.append(Prompt(whole, text, {**prompt.fields, VARIANT: variant, OF: index, "passage": [start, end]}))
    return read


def items_of(model: Model, read: Sequence[Prompt]) -> list[Item]:
    """Return the items whose variants `with_variants` gave.

    Raises:
        PromptError: a prompt without an answer.
    """
    places: dict[int, dict[str, list[int]]] = {}
    for i, prompt in enumerate(read):
        places.setdefault(prompt.fields[OF], {}).setdefault(prompt.fields[VARIANT], []).append(i)
    items = []
    for index, at in places.items():
        prompt = read[at["passage"][0]]
        first, end = prompt.fields["passage"]
        items.append(
            Item(
                index, prompt.tokens, (first, end), _answer(model, index, prompt), at["passage"][0], at["without"][0],
                at["neutral"][0] if "neutral" in at else None, tuple(at.get("noise", ())),
            )
        )  # fmt: skip
    return items


def span_of(model: Model, index: int, prompt: Prompt) -> tuple[int, int]:
    """Return the positions of a prompt's passage, the first and the one after the last.

    Raises:
        PromptError: there is no passage, or it cannot be located, or nothing follows it.
    """
    passage = prompt.fields.get("passage")
    if passage is None:
        raise PromptError(f'prompt {index}: give "passage", a text that stands in the prompt or its positions')
    if isinstance(passage, str):
        if prompt.text is None or model.tokenizer is None:
            raise PromptError(
                f"prompt {index} is of token ids: give the positions of its passage, [first, after the last]"
            )
        if prompt.text.count(passage) != 1:
            raise PromptError(
                f"prompt {index}: its passage {passage[:40]!r} stands in it {prompt.text.count(passage)} times: give one that "
                "stands there once, or positions"
            )
        ends = character_ends(model, prompt.tokens)
        begin = prompt.text.index(passage)
        start, end = token_at(ends, begin + 1), token_at(ends, begin + len(passage)) + 1
    else:
        start, end = passage
    if end >= len(prompt.tokens):
        raise PromptError(
            f"prompt {index} has {len(prompt.tokens)} tokens and its passage ends before {end}: a question must follow it"
        )
    if start == 0 and end > 0:
        raise PromptError(
            f"prompt {index} begins with its passage, so nothing is left to attend to without it: put a word or a "
            "beginning-of-text token before it"
        )
    return start, end


def _ids(model: Model, given: str | Sequence[int]) -> tuple[int, ...]:
    if not isinstance(given, str):
        return tuple(given)
    return () if model.tokenizer is None else encode(model.tokenizer, given)


def _answer(model: Model, index: int, prompt: Prompt) -> int:
    if given := prompt.fields.get("answer_tokens"):
        return int(given[0])
    if "answer" not in prompt.fields:
        raise PromptError(f'prompt {index}: give "answer" or "answer_tokens", what follows the prompt')
    return answer_after(model, prompt, str(prompt.fields["answer"])).first
