"""Prompts of several lengths as one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor


def padded(
    prompts: Sequence[Sequence[int]], longest: int | None = None
) -> tuple[Int[Tensor, "prompt pos"], Int[Tensor, "prompt"]]:
    """Return prompts padded with their own first tokens, to the longest unless a length is given, and where each ends."""
    longest = longest or max(map(len, prompts))
    tokens = torch.tensor([[*prompt, *[prompt[0]] * (longest - len(prompt))] for prompt in prompts])
    return tokens, torch.tensor([len(prompt) - 1 for prompt in prompts])
