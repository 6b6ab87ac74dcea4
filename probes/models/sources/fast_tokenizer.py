"""A tokenizer as the record of a load keeps it: it encodes and names tokens without transformers, which loads for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

_SAMPLES = ("A text, of 3 words.", " ünï\n\n\tcode  ▁ 你好", "")
"""Texts that a kept tokenizer has to encode as the one it was kept of."""


class FastTokenizer:
    """The part of a Hugging Face tokenizer that its own library does; whatever else is asked of it loads the whole.

    Args:
        saved: as the tokenizers library writes it.
        special: the ids of its special tokens.
        load: loads the whole tokenizer.
    """

    def __init__(self, saved: str, special: Sequence[int], load: Callable[[], Any]) -> None:
        self.backend_tokenizer, self.all_special_ids = Tokenizer.from_str(saved), list(special)
        self._load = load

    @classmethod
    def of(cls, tokenizer: Any) -> tuple[str, list[int]] | None:
        """Return what keeps a tokenizer, or None where that would not do what it does."""
        if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
            return None
        saved, special = str(backend.to_str()), list(tokenizer.all_special_ids)
        kept = cls(saved, special, lambda: tokenizer)
        texts = [*_SAMPLES, *tokenizer.get_added_vocab()]
        same = all(
            kept(text, add_special_tokens=add)["input_ids"] == tokenizer(text, add_special_tokens=add)["input_ids"]
            for text in (*texts, " ".join(texts))
            for add in (True, False)
        )
        vocabulary = kept.get_vocab() == tokenizer.get_vocab() and kept.get_added_vocab() == tokenizer.get_added_vocab()
        return (saved, special) if same and vocabulary else None

    def __call__(self, text: Any, add_special_tokens: bool = True, **how: Any) -> Any:
        """Return `input_ids` of a text; anything else as the whole tokenizer gives it."""
        if how or not isinstance(text, str):
            return self._whole(text, add_special_tokens=add_special_tokens, **how)
        return {"input_ids": self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids}

    def get_vocab(self) -> dict[str, int]:
        """Return the id of every token, added ones among them."""
        return dict(self._vocabulary)

    @cached_property
    def _vocabulary(self) -> dict[str, int]:
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    def get_added_vocab(self) -> dict[str, int]:
        """Return the ids of tokens that were added to the vocabulary as they are."""
        return {
            token.content: number for number, token in sorted(self.backend_tokenizer.get_added_tokens_decoder().items())
        }

    @cached_property
    def _whole(self) -> Any:
        return self._load()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._whole, name)
