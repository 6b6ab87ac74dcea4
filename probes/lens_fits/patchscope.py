"""A Patchscope: what the model says when a row stands at a placeholder of another prompt.

Ghandeharioun et al. 2024, "Patchscopes", arXiv 2401.06102. Rows enter at the block after the layer they leave, unscaled by
default, and are read where the prompt ends; only the blocks after that layer run, on the positions from the placeholder on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from probes.blocks.cached_prompt import CachedPrompt
from probes.errors import OptionError
from probes.lenses.card import LensCard, card_of
from probes.models.protocol import Model

Rescale = Literal["none", "target_norm"]


@dataclass(frozen=True)
class Target:
    """The prompt that rows are put into."""

    tokens: tuple[int, ...]
    placeholder: int
    """Position of the row that is replaced."""
    rescale: Rescale = "none"
    """`target_norm` gives a row the norm of the one that it replaces."""

    def __post_init__(self) -> None:
        if not -len(self.tokens) <= self.placeholder < len(self.tokens):
            raise OptionError(
                f"placeholder {self.placeholder}: legal are positions of a prompt of {len(self.tokens)} tokens"
            )


@dataclass(frozen=True, eq=False)
class Patchscope:
    """A lens without a matrix, which costs the model's upper blocks for every row."""

    card: LensCard
    target: Target
    into: int | None
    """The layer that every row is put in place of; None puts a row where it comes from."""
    _prompt: CachedPrompt = field(repr=False)

    @classmethod
    def of(cls, model: Model, target: Target, into: int | None = None) -> Patchscope:
        """Return a Patchscope of a model.

        Raises:
            PointError: the model is not causal, or its backend does not hand out its blocks.
            OptionError: a layer outside the model.
        """
        n_layers = model.shape.n_layers
        if into is not None and not 0 <= into < n_layers:
            raise OptionError(f"target layer {into}: legal are 0 to {n_layers - 1}")
        options = {"tokens": list(target.tokens), "placeholder": target.placeholder, "rescale": target.rescale}
        card = card_of("patchscope", model, layers=tuple(range(n_layers - 1)), options={**options, "into": into})
        return cls(card, target, into, CachedPrompt(model, target.tokens, target.placeholder))

    def readable(self, rows: Float[Tensor, "row d_model"], layer: int) -> Float[Tensor, "row d_model"]:
        """Return what leaves the last block at the prompt's end when rows stand at its placeholder; see `Lens.readable`."""
        if layer == self.card.n_layers - 1 and self.into is None:
            return rows
        return self._resumed(rows, layer if self.into is None else self.into)

    def unpatched(self) -> Float[Tensor, "1 d_model"]:
        """Return what leaves the last block at the end of the prompt as it is, the control of every reading."""
        return self._prompt.entering[-1][-1:].float()

    def _resumed(self, rows: Tensor, layer: int) -> Tensor:
        own = self._prompt.entering[layer + 1]
        rows = rows.to(own)
        if self.target.rescale == "target_norm":
            rows = rows * (own[0].norm() / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12))
        suffix = own.expand(len(rows), -1, -1).clone()
        suffix[:, 0] = rows
        return self._prompt.resume([layer + 1] * len(rows), suffix).last.float()


def identity_target(model: Model, words: Sequence[str], rescale: Rescale = "none") -> Target:
    """Return a prompt of copies, `word -> word` line by line, then a placeholder and the arrow, at which it is read.

    The placeholder stands before the arrow, not after: read at the placeholder itself, early layers answer with the arrow.

    Raises:
        OptionError: a model without a tokenizer.
    """
    if model.tokenizer is None:
        raise OptionError(f"{model.ref} has no tokenizer for the identity prompt: give a prompt of token ids")
    text = "\n".join(f"{word} -> {word}" for word in words) + "\n?"
    ids = model.tokenizer(text)["input_ids"]
    arrow = model.tokenizer(" ->", add_special_tokens=False)["input_ids"]
    return Target((*ids, *arrow), len(ids) - 1, rescale)


def norm_matched_noise(rows: Float[Tensor, "row d_model"], seed: int = 0) -> Float[Tensor, "row d_model"]:
    """Return random rows of the same norms, a control."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows.shape, generator=generator).to(rows)
    return noise * (rows.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))
