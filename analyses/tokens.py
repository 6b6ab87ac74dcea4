"""Tokens as bytes and as text, whatever the tokenizer's way of writing them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

from probes.models.protocol import Model

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SHOWN = re.compile(r"(?:\\x[0-9a-f]{2})+")


@dataclass(frozen=True, eq=False)
class Pieces:
    """How a tokenizer writes its tokens.

    Covers SentencePiece (a low line for a space, `<0xE4>` for a byte), byte-level BPE, and vocabularies of bytes.
    """

    tokenizer: Any

    @cached_property
    def by_id(self) -> Mapping[int, str | bytes]:
        """Each token as the vocabulary writes it."""
        return {number: piece for piece, number in self.tokenizer.get_vocab().items()}

    @cached_property
    def special(self) -> frozenset[int]:
        """Ids that stand for no text."""
        return frozenset(getattr(self.tokenizer, "all_special_ids", ()))

    @cached_property
    def literal(self) -> frozenset[str]:
        """Pieces that were added to the vocabulary as they are."""
        return (
            frozenset(self.tokenizer.get_added_vocab()) if hasattr(self.tokenizer, "get_added_vocab") else frozenset()
        )

    @cached_property
    def alphabet(self) -> Mapping[str, int]:
        """The byte behind each character under byte-level BPE; empty elsewhere."""
        return _byte_table() if _is_byte_level(self.tokenizer, self.by_id.values()) else {}

    def bytes_of(self, token: int) -> bytes:
        """The bytes a token stands for; those of its name where it is special."""
        piece = self.by_id[token]
        if isinstance(piece, bytes):
            return piece
        if token in self.special or piece in self.literal:
            return piece.encode()
        if self.alphabet:
            known = all(character in self.alphabet for character in piece)
            return bytes(self.alphabet[c] for c in piece) if known else piece.encode()
        byte = _BYTE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()


@lru_cache(maxsize=8)
def pieces(tokenizer: Any) -> Pieces:
    """How a tokenizer writes its tokens, worked out once."""
    return Pieces(tokenizer)


def token_bytes(tokenizer: Any) -> dict[int, bytes]:
    """The bytes each ordinary token stands for, by id; special tokens are left out."""
    known = pieces(tokenizer)
    return {token: known.bytes_of(token) for token in known.by_id if token not in known.special}


def tokens_text(model: Model, tokens: Sequence[int]) -> str:
    r"""Tokens as text, each with its leading space; bytes that are no whole character read `\xe2\x96`.

    Without a tokenizer, and for an id that the tokenizer lacks, the id stands in angle brackets.
    """
    if model.tokenizer is None:
        return "".join(f"<{token}>" for token in tokens)
    known = pieces(model.tokenizer)
    return b"".join(known.bytes_of(t) if t in known.by_id else f"<{t}>".encode() for t in tokens).decode(
        "utf-8", "backslashreplace"
    )


def token_text(model: Model, token: int) -> str:
    r"""One token as text with its leading space; bytes that are no whole character read `\xe2\x96`."""
    return tokens_text(model, [token])


def token_texts(model: Model, tokens: Sequence[int]) -> list[str]:
    """Each of many tokens as `token_text` has it."""
    texts = {token: token_text(model, token) for token in set(tokens)}
    return [texts[token] for token in tokens]


def character_ends(model: Model, tokens: Sequence[int]) -> list[int]:
    """Return how many characters of the text the tokens up to each one stand for, special tokens left out."""
    decode = partial(model.tokenizer.decode, skip_special_tokens=True)
    return [len(str(decode(list(tokens[: n + 1])))) for n in range(len(tokens))]


def token_at(ends: Sequence[int], place: int) -> int:
    """Return the token in which the character before a place lies.

    Args:
        ends: as `character_ends` gives them.
        place: how many characters of the text stand before it.
    """
    return next((i for i, end in enumerate(ends) if end >= place), len(ends) - 1)


def joined(texts: Iterable[str]) -> str:
    """The text of tokens in order, from that of each: bytes of one character that were apart are one again."""
    return _SHOWN.sub(_read_bytes, "".join(texts))


def _read_bytes(shown: re.Match[str]) -> str:
    return bytes.fromhex(shown[0].replace("\\x", "")).decode("utf-8", "backslashreplace")


def _is_byte_level(tokenizer: Any, vocabulary: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return "ByteLevel" in f"{backend.decoder!r}{backend.pre_tokenizer!r}"
    return any(isinstance(token, str) and token.startswith("Ġ") for token in vocabulary)


def _byte_table() -> dict[str, int]:
    """GPT-2's alphabet: each byte's printable stand-in, to the byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
