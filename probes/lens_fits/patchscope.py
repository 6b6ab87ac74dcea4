"""A Patchscope: what the model says when a row stands at a placeholder of another prompt.

Ghandeharioun et al. 2024, "Patchscopes", arXiv 2401.06102. Rows enter at the block after the layer they leave, unscaled by
default, and are read where the prompt ends; only the blocks after that layer run, on the positions from the placeholder on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from probes.blocks.cached_prompt import CachedPrompt, Choose, Resumed, greedy
from probes.errors import OptionError
from probes.lenses.card import LensCard, card_of
from probes.lenses.logit import all_logprobs
from probes.models.protocol import Model

Rescale = Literal["none", "target_norm"]
PLACEHOLDER = "?"
WRITTEN_ROWS = 64
"""Rows whose texts are written at once."""


@dataclass(frozen=True)
class Target:
    """The prompt that rows are put into."""

    tokens: tuple[int, ...]
    placeholder: int
    """Position of the row that is replaced, the first of them where there are several."""
    rescale: Rescale = "none"
    """`target_norm` gives a row the norm of the one that it replaces."""
    width: int = 1
    """How many positions in a row are replaced, all by the same row."""

    def __post_init__(self) -> None:
        n = len(self.tokens)
        if not -n <= self.placeholder < n or not 0 < self.width <= n - self.placeholder % n:
            raise OptionError(
                f"placeholder {self.placeholder}, {self.width} wide: legal are positions of a prompt of {n} tokens"
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
        options = {**asdict(target), "tokens": list(target.tokens), "into": into}
        card = card_of("patchscope", model, layers=tuple(range(n_layers - 1)), options=options)
        return cls(card, target, into, CachedPrompt(model, target.tokens, target.placeholder))

    def readable(self, rows: Float[Tensor, "row d_model"], layer: int) -> Float[Tensor, "row d_model"]:
        """Return what leaves the last block at the prompt's end when rows stand at its placeholder; see `Lens.readable`."""
        if layer == self.card.n_layers - 1 and self.into is None:
            return rows
        return self._resumed(rows, layer if self.into is None else self.into)

    def unpatched(self) -> Float[Tensor, "1 d_model"]:
        """Return what leaves the last block at the end of the prompt as it is, the control of every reading."""
        return self._prompt.entering[-1][-1:].float()

    def written(
        self, rows: Float[Tensor, "row d_model"], layer: int, max_new_tokens: int, seed: int | None = None
    ) -> list[list[int]]:
        """Return the tokens that the model writes after the prompt with rows at its placeholder.

        Args:
            rows: of a layer.
            layer: the layer.
            max_new_tokens: how many tokens.
            seed: of tokens drawn by their probabilities; None takes the most probable.
        """
        generator = torch.Generator().manual_seed(seed or 0)

        def drawn(logits: Tensor) -> Tensor:
            return torch.multinomial(logits.float().softmax(-1).cpu(), 1, generator=generator)[:, 0].to(logits.device)

        choose = greedy if seed is None else drawn
        texts = []
        for part in torch.split(rows, WRITTEN_ROWS):
            resumed = self._run(part, layer if self.into is None else self.into, keep=True)
            texts += self._continued(resumed, max_new_tokens, choose)
        return texts

    def unpatched_text(self, max_new_tokens: int) -> list[int]:
        """Return the most probable tokens after the prompt as it is."""
        layers = self.card.n_layers
        resumed = self._prompt.resume([layers], self._prompt.entering[layers][None], keep=True)
        return self._continued(resumed, max_new_tokens, greedy)[0]

    def _continued(self, resumed: Resumed, max_new_tokens: int, choose: Choose) -> list[list[int]]:
        logprobs = all_logprobs(resumed.last.float(), self._prompt.model.unembedding())
        return self._prompt.write(resumed, choose(logprobs.clone()), max_new_tokens, choose)

    def _resumed(self, rows: Tensor, layer: int) -> Tensor:
        return self._run(rows, layer).last.float()

    def _run(self, rows: Tensor, layer: int, keep: bool = False) -> Resumed:
        own = self._prompt.entering[layer + 1]
        width = self.target.width
        rows = rows.to(own)[:, None].expand(-1, width, -1)
        if self.target.rescale == "target_norm":
            norms = own[:width].norm(dim=-1, keepdim=True)
            rows = rows * (norms / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12))
        suffix = own.expand(len(rows), -1, -1).clone()
        suffix[:, :width] = rows
        return self._prompt.resume([layer + 1] * len(rows), suffix, keep)


def identity_target(model: Model, words: Sequence[str], rescale: Rescale = "none") -> Target:
    """Return a prompt of copies, `word -> word` line by line, then a placeholder and the arrow, at which it is read.

    The placeholder stands before the arrow, not after: read at the placeholder itself, early layers answer with the arrow.
    Raises as `few_shot_target` does.
    """
    return few_shot_target(model, [(word, word) for word in words], " ->", rescale)


def few_shot_target(
    model: Model, pairs: Sequence[tuple[str, str]], joint: str, rescale: Rescale = "none", between: str = "\n"
) -> Target:
    """Return a prompt of examples, `left{joint} right` line by line, then a placeholder and the joint, at which it is read.

    Raises:
        OptionError: a model without a tokenizer.
    """
    examples = between.join(f"{left}{joint} {right}" for left, right in pairs)
    tokenize = _tokenizer(model)
    ids = tokenize(f"{examples}{between}{PLACEHOLDER}")["input_ids"]
    return Target((*ids, *tokenize(joint, add_special_tokens=False)["input_ids"]), len(ids) - 1, rescale)


def chat_target(model: Model, question: str, width: int, rescale: Rescale = "none") -> Target:
    """Return a chat turn of `width` placeholders and a question (Chen et al. 2024, "SelfIE"); read where the answer begins.

    Raises:
        OptionError: a model without a tokenizer, or whose tokenizer has no chat template.
    """
    tokenize = _tokenizer(model)
    if not getattr(tokenize, "chat_template", None):
        raise OptionError(f"{model.ref} has no chat template: a SelfIE prompt is a chat turn; use patchscope describe")
    turn = [{"role": "user", "content": f"\0 {question}"}]
    before, after = tokenize.apply_chat_template(turn, tokenize=False, add_generation_prompt=True).split("\0")
    start, end = (tokenize(text, add_special_tokens=False)["input_ids"] for text in (before, after))
    placeholder = tokenize(f" {PLACEHOLDER}", add_special_tokens=False)["input_ids"][-1:]
    return Target((*start, *placeholder * width, *end), len(start), rescale, width)


def _tokenizer(model: Model) -> Any:
    if model.tokenizer is None:
        raise OptionError(f"{model.ref} has no tokenizer for a Patchscope's prompt: give a prompt of token ids")
    return model.tokenizer


def norm_matched_noise(rows: Float[Tensor, "row d_model"], seed: int = 0) -> Float[Tensor, "row d_model"]:
    """Return random rows of the same norms, a control."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows.shape, generator=generator).to(rows)
    return noise * (rows.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))
