"""Labelled prompts: checks of their fields, and their division into data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from analyses.base import as_prompts
from analyses.concept_depth.token_types import TokenTypes, token_types
from analyses.prompt_fields import must, some
from probes.errors import ProbeError, PromptError
from probes.models.protocol import Model
from probes.prompts import Field, Prompt, PromptLine

NOISE = ("aaa", "bbb")
"""What is glued in front of an example under text noise."""
DEFAULT_SET = "prompts"
"""The data set of lines that name none."""


def check_label(value: Any) -> str | None:
    """What is wrong with a `label` field, or None."""
    return None if type(value) is int and value in (0, 1) else f"is {value!r}: legal labels are 0 and 1"


check_name = must(
    "be a text or an int", lambda value: isinstance(value, str | int) and not isinstance(value, bool) and value != ""
)
check_answers = must(
    'be two texts, the answer of label 0 and that of label 1, such as [" no", " yes"]',
    some(lambda value: isinstance(value, str) and value, 2),
)
check_template = must("be a text that holds {text}", lambda value: isinstance(value, str) and "{text}" in value)


FIELDS: Mapping[str, Field] = {
    "label": Field("The class that a probe learns to tell: 0 or 1. Every line needs one.", check_label),
    "group": Field("Lines of one group are never divided between training and test: a text or an int.", check_name),
    "dataset": Field("Which data set the line is of, where a file has several: a text or an int.", check_name),
    "answers": Field('How the model would say labels 0 and 1, such as [" no", " yes"].', check_answers),
    "template": Field("The text around the example, with {text} in its place.", check_template),
}


@dataclass(frozen=True)
class LabelledSet:
    """The prompts of one data set."""

    name: str
    index: tuple[int, ...]
    """Where each prompt is in the list of all prompts."""
    prompts: tuple[Prompt, ...]

    @property
    def labels(self) -> list[int]:
        """The label of each prompt."""
        return [prompt.fields["label"] for prompt in self.prompts]

    @property
    def groups(self) -> list[str]:
        """A prompt without a group is a group of its own, unless its tokens occur twice."""
        return [str(prompt.fields.get("group", f"tokens {prompt.tokens}")) for prompt in self.prompts]

    @cached_property
    def types(self) -> TokenTypes | None:
        """What the control task deals its labels to; None where too few tokens recur between groups."""
        return token_types([prompt.tokens for prompt in self.prompts], self.groups)

    @property
    def template(self) -> str:
        """The text around each prompt's own, which stands at `{text}`."""
        return str(self.prompts[0].fields.get("template", "{text}"))

    @property
    def answers(self) -> tuple[str, str] | None:
        """The answers of label 0 and label 1, where every prompt has the same."""
        answer_sets = {tuple(prompt.fields.get("answers", ())) for prompt in self.prompts}
        only = next(iter(answer_sets)) if len(answer_sets) == 1 else ()
        return (only[0], only[1]) if only else None


def labelled_sets(prompts: Sequence[Prompt]) -> list[LabelledSet]:
    """The data sets among the prompts, in order of first appearance.

    Raises:
        PromptError: no prompt, or one without a label.
    """
    if not prompts:
        raise PromptError("no labelled prompts: give prompts with a label, or name shipped data sets")
    members: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        problem = check_label(prompt.fields.get("label"))
        if problem:
            raise PromptError(
                f"prompt {i}: field 'label' {problem if 'label' in prompt.fields else 'is missing; give 0 or 1'}"
            )
        members.setdefault(str(prompt.fields.get("dataset", DEFAULT_SET)), []).append(i)
    labelled = [LabelledSet(name, tuple(index), tuple(prompts[i] for i in index)) for name, index in members.items()]
    for one in labelled:
        if len(set(one.labels)) < 2:
            raise ProbeError(
                f"data set {one.name!r}: all {len(one.labels)} prompts have label {one.labels[0]}; a probe tells two classes apart"
            )
    return labelled


def noisy(prompts: Sequence[Prompt], model: Model, seed: int, chat: bool) -> list[Prompt]:
    """The prompts with `aaa` or `bbb` glued in front of each example, inside its template.

    Raises:
        PromptError: a prompt given as token ids, which has no text to change.
    """
    rng = np.random.default_rng(seed)
    lines = []
    for i, prompt in enumerate(prompts):
        if prompt.text is None:
            raise PromptError(f"prompt {i} is given as token ids: text noise needs its text")
        before = str(prompt.fields.get("template", "{text}")).split("{text}")[0]
        at = len(before) if prompt.text.startswith(before) else 0
        text = prompt.text[:at] + str(rng.choice(NOISE)) + prompt.text[at:]
        lines.append(PromptLine(f"prompt {i}", text, None, prompt.fields))
    return as_prompts(lines, model, FIELDS, chat=chat)
