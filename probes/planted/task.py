"""A planted task: a model, its tokenizer, its prompts with their partners, and the truth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from probes.planted.record import Record

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Example:
    """One prompt and its partner: a prompt of the same form in which every content token differs.

    The partner's answer, and the answer of every mixture of the two, differ from the prompt's own.
    """

    tokens: tuple[int, ...]
    answer: int
    """The token that is right; the model gives it unless the task is about a model that is wrong."""
    partner: tuple[int, ...] = ()
    partner_answer: int = -1
    values: Mapping[str, int] | None = None
    """Value of each concept of the record."""
    group: str = ""
    """What is held out together: the combination of tokens that decides the concept."""
    split: Literal["fit", "test"] = "fit"
    subset: str | None = None
    """The class of prompts it belongs to, where a truth differs between classes."""
    positions: Mapping[str, int] | None = None
    """Index of each named position, where prompts differ in it; else those of the record hold."""


@dataclass(frozen=True)
class PlantedTask:
    """What a method is given, and the record it is scored by."""

    record: Record
    module: nn.Module
    """A Hugging Face causal language model in float32, in evaluation mode."""
    tokenizer: Any
    """A fast tokenizer of one word a token."""
    examples: tuple[Example, ...]

    @property
    def ref(self) -> str:
        """The name under which `load_model` builds the same model, such as `planted:A2@0`."""
        return f"planted:{self.record.task}@{self.record.seed}"

    def position(self, example: Example, name: str) -> int:
        """Return the index of a named position in the tokens of an example, from the start."""
        index = (example.positions or self.record.positions)[name]
        return index if index >= 0 else len(example.tokens) + index
