"""Rows of the other prompt, which a patch copies."""

from __future__ import annotations

from dataclasses import dataclass

from probes.edits.directions import Place
from probes.edits.positions import At, Texts, indices, need_texts, place
from probes.edits.values import Source
from probes.errors import PromptError
from probes.models.protocol import Model


@dataclass(frozen=True)
class Other:
    """The rows of the other prompt at the same point: what a patch copies."""

    positions: At | None = None
    """Of the other prompt; None for those that are edited."""

    def text(self) -> str:
        """Return the words."""
        return "from other" + ("" if self.positions is None else f"@{place(self.positions)}")

    def source(self, model: Model, texts: Texts | None, where: Place) -> Source:
        """Return the rows to read.

        Raises:
            OptionError: no second prompt.
            PromptError: positions that it does not have, or another number of them.
        """
        here = need_texts(texts, "a patch from the other prompt")
        tokens = here.other_or_refuse("a patch from the other prompt")
        own = indices(where.positions, model.tokenizer, here.tokens)
        at = own if self.positions is None else indices(self.positions, model.tokenizer, tokens)
        if len(at) != len(own) and len(at) != 1:
            raise PromptError(
                f"{len(own)} positions are patched from {len(at)} of the other prompt: name as many, or one"
            )
        if max(at, default=0) >= len(tokens):
            raise PromptError(
                f"position {max(at)} is outside the other prompt of {len(tokens)} tokens: write from other@POS"
            )
        return Source(tokens, where.address, at, where.heads)
