"""The void rule over all tokens of a run, and the frame that names those tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from analyses.tokens import token_text
from analyses.voids.norm_gates import RunningGate
from probes.models.protocol import Model
from probes.prompts import Prompt


@dataclass(frozen=True)
class Item:
    """One prompt with its response at one alpha."""

    alpha: float
    prompt: int
    sequence: tuple[int, ...]
    prompt_length: int


@dataclass(frozen=True)
class Trace:
    """The rule's quantities for all tokens of all items, packed; float32 but for `active`."""

    norms: Float[Tensor, "layer tokens"]
    """[layer, tokens], the norm of each block's output."""
    steps: Float[Tensor, "layer tokens"]
    """[layer, tokens], the step each block makes (or would have made, where it was masked)."""
    thresholds: Float[Tensor, "layer tokens"]
    """[layer, tokens]."""
    active: Bool[Tensor, "layer tokens"]
    """[layer, tokens], bool."""

    @classmethod
    def joined(cls, parts: Sequence[Trace]) -> Trace:
        """The traces of several items, one after the other."""
        names = ("norms", "steps", "thresholds", "active")
        return cls(*(torch.cat([getattr(part, name) for part in parts], dim=1) for name in names))

    def of(self, kept: np.ndarray) -> Trace:
        """The tokens for which `kept` [tokens] is true."""
        mask = torch.tensor(kept)
        return Trace(self.norms[:, mask], self.steps[:, mask], self.thresholds[:, mask], self.active[:, mask])

    @property
    def exit_layer(self) -> Int[Tensor, " tokens"]:
        """[tokens], the last active layer, or -1 for the embedding."""
        layers = torch.arange(self.active.shape[0])[:, None]
        return torch.where(self.active, layers, -1).amax(dim=0)


def apply_rule(
    steps: Float[Tensor, "layer tokens"],
    alpha: float | Float[Tensor, " tokens"],
    first_layers: Literal["released", "always_active"] = "released",
    threshold0: Float[Tensor, " tokens"] | None = None,
) -> tuple[Bool[Tensor, "layer tokens"], Float[Tensor, "layer tokens"]]:
    """(active, thresholds) for steps [layer, tokens]; alpha is one value or one per token.

    Shemiranifar 2025 (arXiv 2505.14467), the rule as released: block l is active iff its step reaches alpha times the
    range of the steps of blocks 0..l-1.
    """
    gate = RunningGate(alpha, first_layers)
    steps_judged = [gate.step(size, threshold0 if layer == 0 else None) for layer, size in enumerate(steps)]
    return torch.stack([active for active, _ in steps_judged]), torch.stack(
        [threshold for _, threshold in steps_judged]
    )


def batch_threshold(steps: Float[Tensor, " tokens"], items: Sequence[Item]) -> Float[Tensor, " tokens"]:
    """Alpha times the range of layer 0's step over the prompts that have a token at the same position."""
    key = pd.DataFrame(
        {
            "alpha": np.repeat([item.alpha for item in items], [len(item.sequence) for item in items]),
            "position": np.concatenate([np.arange(len(item.sequence)) for item in items]),
            "step": steps.numpy(),
        }
    )
    groups = key.groupby(["alpha", "position"])["step"]
    return torch.from_numpy(
        ((groups.transform("max") - groups.transform("min")) * key["alpha"]).to_numpy(np.float32).copy()
    )


def token_frame(model: Model, prompts: Sequence[Prompt], items: Sequence[Item]) -> pd.DataFrame:
    """One row per token of every item: alpha, prompt, phase, position, token_id, token, token_class."""
    texts: dict[int, str] = {}
    rows: list[tuple[Any, ...]] = []
    for item in items:
        content = prompts[item.prompt].content
        for position, token in enumerate(item.sequence):
            phase = "prompt" if position < item.prompt_length else "response"
            kind = _token_class(position, item.prompt_length, content)
            text = texts.setdefault(token, token_text(model, token))
            rows.append((item.alpha, item.prompt, phase, position, token, text, kind))
    return pd.DataFrame(rows, columns=["alpha", "prompt", "phase", "position", "token_id", "token", "token_class"])


def _token_class(position: int, prompt_length: int, content: tuple[bool, ...] | None) -> str:
    if position >= prompt_length:
        return "response"
    if position == 0:
        return "first"
    if position == prompt_length - 1:
        return "last"
    return "template" if content is not None and not content[position] else "content"
