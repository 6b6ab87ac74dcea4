"""Pairs that tasks make, as the model's tokenizer sees them."""

from __future__ import annotations

from analyses.causal_patching.pairs import resolved
from probes.errors import PromptError
from probes.models.protocol import Model
from probes.prompts import Prompt


def generated(model: Model, task: str, n: int, corruption: str, seed: int) -> list[Prompt]:
    raise PromptError(task)
