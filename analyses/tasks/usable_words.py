"""The words of a task that a tokenizer can serve."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from probes.errors import PromptError


def usable(words: Sequence[str], keeps: Callable[[str], bool], least: int, what: str) -> list[str]:
    """Those of `words` that `keeps` takes.

    Raises:
        PromptError: fewer than the task needs.
    """
    kept = [word for word in words if keeps(word)]
    if len(kept) < least:
        listed = ", ".join(kept) or "none"
        raise PromptError(
            f"the task needs {least} {what} that are one token each, and under this tokenizer {len(kept)} of its {len(words)} "
            f"are ({listed}): give prompts of your own"
        )
    return kept
