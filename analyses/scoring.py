"""Accuracy on questions with choices: by the choices' logits, and by what the response says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analyses.answers import Answer, answer_after
from analyses.prompt_fields import is_text, must, some
from analyses.results.statistics import wilson
from probes.errors import PromptError
from probes.lenses import logit
from probes.models.protocol import Model
from probes.prompts import Prompt

check_choices = must(
    'be a list of at least two texts, such as ["Paris", "Rome"]', lambda value: some(is_text)(value) and len(value) > 1
)
check_answer = must("be a text, one of the line's choices", is_text)


def score_choices(
    model: Model,
    prompts: Sequence[Prompt],
    rows: Mapping[tuple[float, int, str], Tensor],
    responses: Sequence[tuple[float, int, tuple[int, ...]]] | None,
    gated: str,
) -> dict[str, pd.DataFrame]:
    """Table `accuracy` over the prompts that carry choices and an answer; nothing where none does.

    A choice's logit is that of its first token as it continues the prompt; `tokens_per_choice` says how many it has.

    Args:
        rows: the residual read after each prompt [d_model], by (alpha, prompt, variant).
        responses: (alpha, prompt, response tokens), where there was a response phase.
        gated: what the variant of the responses is called.

    Raises:
        PromptError: an answer that is not among its choices, or choices that start with the same token.
    """
    with_choices = {i: p for i, p in enumerate(prompts) if "choices" in p.fields and "answer" in p.fields}
    if not with_choices:
        return {}
    if model.tokenizer is None:
        raise PromptError(f"choices need a tokenizer, and {model.ref} has none: leave out the field")
    written = {i: choice_answers(model, i, p) for i, p in with_choices.items()}
    unembedding = model.unembedding()
    verdicts: list[tuple[float, str, str, bool, bool]] = []
    for (alpha, i, variant), row in rows.items():
        if i in with_choices:
            hidden = logit.normalized(row[None], unembedding)
            logits = logit.token_logits(hidden, unembedding, torch.tensor([choice.first for choice in written[i]]))[0]
            best = with_choices[i].fields["choices"][int(logits.argmax())]
            verdicts.append((alpha, variant, "choice_logit", best == with_choices[i].fields["answer"], True))
    for alpha, i, tokens in responses or ():
        if i in with_choices:
            said = parse_choice(model.tokenizer.decode(list(tokens)), with_choices[i].fields["choices"])
            verdicts.append((alpha, gated, "response", said == with_choices[i].fields["answer"], said is not None))
    n_tokens = float(np.mean([len(choice.tokens) for choices in written.values() for choice in choices]))
    return {"accuracy": _table(verdicts).assign(tokens_per_choice=n_tokens)}


def parse_choice(response: str, choices: Sequence[str]) -> str | None:
    """The choice that a response names first (the longest where two start together), or None."""
    places = [(response.lower().find(choice.strip().lower()), -len(choice), choice) for choice in choices]
    named = [entry for entry in places if entry[0] >= 0]
    return min(named)[2] if named else None


def choice_answers(model: Model, index: int, prompt: Prompt) -> list[Answer]:
    """The choices as they continue the prompt.

    Raises:
        PromptError: an answer that is not among its choices, or choices that start with the same token.
    """
    choices, answer = prompt.fields["choices"], prompt.fields["answer"]
    if answer not in choices:
        raise PromptError(f"prompt {index}: answer {answer!r} is not among its choices {choices}")
    answers = [answer_after(model, prompt, choice) for choice in choices]
    if len({written.first for written in answers}) < len(answers):
        raise PromptError(
            f"prompt {index}: two of the choices {choices} start with the same token, so their logits cannot differ"
        )
    return answers


def _table(verdicts: Sequence[tuple[float, str, str, bool, bool]]) -> pd.DataFrame:
    frame = pd.DataFrame(verdicts, columns=["alpha", "variant", "scoring", "correct", "parsed"])
    rows = []
    for (alpha, variant, scoring), group in frame.groupby(["alpha", "variant", "scoring"], sort=False):
        low, high = wilson(int(group["correct"].sum()), len(group))
        rows.append(
            (alpha, variant, scoring, len(group), group["correct"].mean(), low, high, float(np.mean(group["parsed"])))
        )
    return pd.DataFrame(
        rows, columns=["alpha", "variant", "scoring", "n", "accuracy", "ci_low", "ci_high", "parse_rate"]
    )
