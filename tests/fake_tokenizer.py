"""Tokenizers small enough to check by hand: whole words where they are known, bytes elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

FIRST_BYTE = 3
WORDS = ('"', "▁", "▁d", "d", "do", "dog", "▁dog", "Hu", "Hund", "▁Hund", "h", "ch", "chien", "ca", "cane", "Dog")


class FakeTokenizer:
    """SentencePiece's way of writing: a low line for a space, `<0xE4>` for a byte; ids 0 to 2 are special."""

    all_special_ids = (0, 1, 2)
    eos_token_id = 2

    def __init__(self, words: Sequence[str] = WORDS) -> None:
        self.pieces = ["<pad>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words]
        self.ids = {piece: number for number, piece in enumerate(self.pieces)}

    def get_vocab(self) -> dict[str, int]:
        return dict(self.ids)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids: list[int] = []
        text = text.replace(" ", "▁")
        longest = max(map(len, self.pieces))
        while text:
            size = next((n for n in range(longest, 0, -1) if text[:n] in self.ids), 0)
            ids += [self.ids[text[:size]]] if size else [FIRST_BYTE + b for b in text[0].encode()]
            text = text[max(1, size) :]
        return {"input_ids": ids}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        parts = [
            bytes([i - FIRST_BYTE]) if FIRST_BYTE <= i < FIRST_BYTE + 256 else self.pieces[i].replace("▁", " ").encode()
            for i in ids
            if i > 2 or not skip_special_tokens
        ]
        return b"".join(parts).decode("utf-8", "replace")

    def id(self, piece: str) -> int:
        return self.ids[piece]


class FakeByteLevel(FakeTokenizer):
    """Byte-level BPE's way of writing: every byte has a printable stand-in, a space is `Ġ`."""

    def __init__(self, words: Sequence[str] = ("Ġ", "Ġd", "d", "do", "dog", "Ġdog", "ä", "ä¹", "ä¹¦")) -> None:
        self.pieces = ["<pad>", "<s>", "</s>", *words]
        self.ids = {piece: number for number, piece in enumerate(self.pieces)}
