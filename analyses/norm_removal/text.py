"""Text to train on: from a file, a folder or the hub, as blocks of token ids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from probes.errors import PromptError, TrainingError
from probes.prompts import read_prompts

SUFFIXES = (".txt", ".md", ".rst", ".jsonl")
"""Files of a folder that are read."""
HELD_OUT = 0.1
"""Share of the blocks, the last ones, that no training sees."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """Token ids cut into blocks of one length, documents joined by the token that ends a text."""

    training: Tensor
    """[n, block]."""
    held_out: Tensor
    """[m, block]."""
    end_of_text: int | None

    def batch(self, step: int, size: int, seed: int) -> Tensor:
        """Return the blocks [size, block] of a training step, which depend on nothing but these arguments.

        Every pass over the text draws a new order.
        """
        n = len(self.training)
        places = range(step * size, (step + 1) * size)
        orders = {epoch: _order(n, seed, epoch) for epoch in {place // n for place in places}}
        return self.training[torch.stack([orders[place // n][place % n] for place in places])]


def _order(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def make_blocks(source: str, tokenizer: Any, block: int, enough: int) -> Blocks:
    """Make blocks from a text source.

    Args:
        source: a file (text, or JSON lines with `text` or `tokens`), a folder of them, or a data set on the hub as
            `owner/name`, with `:split` for another than `train`.
        enough: tokens after which reading stops.

    Raises:
        PromptError: the source does not exist, cannot be read, or has text and there is no tokenizer.
        TrainingError: the text is shorter than two blocks, one to train on and one held out.
    """
    end = getattr(tokenizer, "eos_token_id", None)
    ids: list[int] = []
    for document in _documents(source):
        ids += _encode(document, tokenizer, source)
        if end is not None:
            ids.append(end)
        if len(ids) >= enough:
            break
    n = len(ids) // block
    if n < 2:
        raise TrainingError(
            f"the text of {source!r} has {len(ids)} tokens, fewer than two blocks of {block}, one to train on and one held "
            "out; give more text or a smaller --block"
        )
    blocks = torch.tensor(ids[: n * block]).view(n, block)
    n_held_out = max(1, round(n * HELD_OUT))
    return Blocks(blocks[:-n_held_out], blocks[-n_held_out:], end)


def _encode(document: str | tuple[int, ...], tokenizer: Any, source: str) -> list[int]:
    if isinstance(document, tuple):
        return list(document)
    if tokenizer is None:
        raise PromptError(f'{source!r} is text, but the model has no tokenizer; give JSON lines with "tokens"')
    ids: list[int] = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _documents(source: str) -> Iterator[str | tuple[int, ...]]:
    path = Path(source)
    if path.is_file():
        yield from _file(path)
    elif path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if p.suffix in SUFFIXES and p.is_file()]
        if not files:
            raise PromptError(f"folder {source!r} holds no text: it needs files ending in {', '.join(SUFFIXES)}")
        for file in files:
            yield from _file(file)
    else:
        yield from _hub(source)


def _file(path: Path) -> Iterator[str | tuple[int, ...]]:
    if path.suffix == ".jsonl":
        for line in read_prompts(path):
            yield line.tokens if line.text is None else line.text  # type: ignore[misc]
        return
    try:
        yield path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def _hub(source: str) -> Iterator[str]:
    name, _, split = source.partition(":")
    if "/" not in name or name.startswith((".", "/", "~")):
        raise PromptError(f"text {source!r} is no file or folder; a data set on the hub is written owner/name")
    try:
        from datasets import load_dataset
    except ImportError:
        raise PromptError("text from the hub needs the data set library: pip install 'bathyscope[datasets]'") from None
    try:
        rows = load_dataset(name, split=split or "train", streaming=True)
        for row in rows:
            if "text" not in row:
                raise PromptError(f"data set {name!r} has no column 'text', but {', '.join(row)}")
            yield row["text"]
    except PromptError:
        raise
    except Exception as error:  # The hub's transport has changed its error classes from release to release.
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PromptError(f"text {source!r} is no file or folder, and the hub does not give it: {line}") from None
