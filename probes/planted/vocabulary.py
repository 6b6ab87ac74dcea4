"""Words of planted models: each kind is a prefix and a number."""

from __future__ import annotations


def words(**sizes: int) -> tuple[str, ...]:
    """Return the words of each kind in order, such as `words(e=2, ask=0)` for e0, e1, ask; size 0 is a word of its own."""
    return tuple(
        word
        for kind, size in sizes.items()
        for word in ([f"{kind}{index}" for index in range(size)] if size else [kind])
    )


def word_class(word: str) -> str | None:
    """Return whether a word is a content or a function word; None of words of another kind."""
    return {"c": "content", "w": "function"}.get(word[0]) if word[1:].isdigit() else None
