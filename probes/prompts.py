"""Ragged prompts: read and validated line by line, batched with pad rows that never leave this file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from probes.errors import PromptError
from probes.models.base import Model

MAX_PROMPTS = 1_000_000
"""The longest prompt file accepted, in lines."""

FieldCheck = Callable[[Any], str | None]
"""Returns what is wrong with a field's value, or None."""


@dataclass(frozen=True)
class Field:
    """A further field that a prompt line may carry; called with a value, it says what is wrong with it, or None."""

    help: str
    """What it means and what form it has, in a line."""
    check: FieldCheck

    def __call__(self, value: Any) -> str | None:
        return self.check(value)


@dataclass(frozen=True)
class PromptLine:
    """One validated line of a prompt file, before a tokenizer has seen it."""

    where: str
    """`FILE:LINE`, for messages."""
    text: str | None
    tokens: tuple[int, ...] | None
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model sees it."""

    tokens: tuple[int, ...]
    text: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    content: tuple[bool, ...] | None = None
    """Per token, whether it is the user's own text; None where no chat template was applied."""

    def __post_init__(self) -> None:
        if not self.tokens:
            raise PromptError("a prompt has no tokens")


@dataclass(frozen=True)
class Batch:
    """Sequences padded on the right to one rectangle."""

    indices: tuple[int, ...]
    """Position of each row's sequence in the list that was batched."""
    tokens: Tensor
    """[batch, pos]; pads are id 0."""
    lengths: tuple[int, ...]

    def row_index(self, positions: str | tuple[int, ...] = "all") -> Tensor:
        """Flat indices into [batch * pos] of the real rows wanted, sequence by sequence; [rows]."""
        width = self.tokens.shape[1]
        parts = [row * width + select(n, positions) for row, n in enumerate(self.lengths)]
        return torch.cat(parts)


def select(length: int, positions: str | tuple[int, ...]) -> Tensor:
    """Positions of a sequence of `length` tokens named by `all`, `last`, `after_first` or ints (negative from the end); [n].

    `after_first` leaves out the first token, whose norm can dwarf the others'; a sequence of one token keeps it.

    Raises:
        PromptError: a position outside the sequence.
    """
    if positions == "all":
        return torch.arange(length)
    if positions == "after_first":
        return torch.arange(min(1, length - 1), length)
    wanted = (-1,) if positions == "last" else positions
    for position in wanted:
        if not -length <= int(position) < length:
            raise PromptError(
                f"position {position} is outside a prompt of {length} tokens: legal are {-length} to {length - 1}"
            )
    return torch.tensor([int(p) % length for p in wanted], dtype=torch.long)


def batches(sequences: Sequence[Sequence[int]], max_tokens: int) -> Iterator[Batch]:
    """Batches of similar length whose padded size is at most `max_tokens` (a longer sequence goes alone)."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    group: list[int] = []
    for index in order:
        if group and len(sequences[index]) * (len(group) + 1) > max_tokens:
            yield _pad(sequences, group)
            group = []
        group.append(index)
    if group:
        yield _pad(sequences, group)


def _pad(sequences: Sequence[Sequence[int]], group: list[int]) -> Batch:
    lengths = tuple(len(sequences[i]) for i in group)
    tokens = torch.zeros(len(group), max(lengths), dtype=torch.long)
    for row, index in enumerate(group):
        tokens[row, : lengths[row]] = torch.tensor(sequences[index], dtype=torch.long)
    return Batch(tuple(group), tokens, lengths)


def read_prompts(path: str | Path, checks: Mapping[str, FieldCheck] | None = None) -> list[PromptLine]:
    """The validated lines of a JSON-lines prompt file; needs no model.

    Args:
        checks: further fields a line may carry, each with a check of its value.

    Raises:
        PromptError: the first fault, with file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise PromptError(
            f'prompt file {str(path)!r} does not exist: give a file of JSON lines such as {{"text": "..."}}'
        )
    lines = []
    try:
        with path.open(encoding="utf-8") as handle:
            for number, raw in enumerate(handle, 1):
                if raw.strip():
                    lines.append(_read_line(raw, f"{path}:{number}", checks or {}))
                if len(lines) > MAX_PROMPTS:
                    raise PromptError(f"{path}: more than {MAX_PROMPTS:,} prompts; split the file")
    except UnicodeDecodeError as error:
        raise PromptError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8 JSON lines") from None
    if not lines:
        raise PromptError(f'{path}: holds no prompt; write one JSON object per line, such as {{"text": "..."}}')
    return lines


def _read_line(raw: str, where: str, checks: Mapping[str, FieldCheck]) -> PromptLine:
    try:
        line = json.loads(raw)
    except json.JSONDecodeError as error:
        raise PromptError(f"{where}: not JSON ({error.msg} at column {error.colno}); one object per line") from None
    if not isinstance(line, dict) or ("text" in line) == ("tokens" in line):
        raise PromptError(f'{where}: a line is an object with either "text" or "tokens"')
    text, tokens = line.pop("text", None), line.pop("tokens", None)
    if text is not None and (not isinstance(text, str) or not text):
        raise PromptError(f'{where}: "text" must be a string that is not empty')
    if tokens is not None:
        tokens = _token_ids(tokens, where)
    for name, value in line.items():
        problem = checks[name](value) if name in checks else None
        if problem:
            raise PromptError(f"{where}: field {name!r}: {problem}")
    return PromptLine(where, text, tokens, line)


def _token_ids(tokens: Any, where: str) -> tuple[int, ...]:
    if not isinstance(tokens, list) or not tokens:
        raise PromptError(f'{where}: "tokens" must be a list of token ids that is not empty')
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise PromptError(f"{where}: token id {token!r} is not an int from 0")
    return tuple(tokens)


def tokenize(lines: Sequence[PromptLine | str | Sequence[int]], model: Model, *, chat: bool = False) -> list[Prompt]:
    """Prompts as `model` sees them: texts as its tokenizer encodes them, ids as given.

    Args:
        lines: lines of a prompt file, texts, or lists of token ids.
        chat: wrap each text as one user turn of the tokenizer's chat template.

    Raises:
        PromptError: no tokenizer for a text, an id outside the vocabulary, or a prompt past the context window.
    """
    return [_tokenize(_as_line(line, i), model, chat) for i, line in enumerate(lines)]


def _as_line(line: PromptLine | str | Sequence[int], index: int) -> PromptLine:
    if isinstance(line, PromptLine):
        return line
    where = f"prompt {index}"
    if isinstance(line, str):
        if not line:
            raise PromptError(f"{where}: the text is empty")
        return PromptLine(where, line, None)
    return PromptLine(where, None, _token_ids(list(line), where))


def _tokenize(line: PromptLine, model: Model, chat: bool) -> Prompt:
    tokens, content = line.tokens, None
    if tokens is None:
        assert line.text is not None
        if model.tokenizer is None:
            raise PromptError(f'{line.where}: {model.ref} has no tokenizer; give "tokens" instead of "text"')
        if chat:
            tokens, content = _chat(line, model)
        else:
            tokens = tuple(model.tokenizer(line.text)["input_ids"])
    if not tokens:
        raise PromptError(f"{line.where}: the text has no tokens")
    for token in tokens:
        if token >= model.shape.d_vocab:
            raise PromptError(
                f"{line.where}: token id {token} is outside the vocabulary of {model.ref}: legal are 0 to {model.shape.d_vocab - 1}"
            )
    if len(tokens) > model.shape.n_ctx:
        raise PromptError(
            f"{line.where}: {len(tokens)} tokens, but the context window of {model.ref} is {model.shape.n_ctx}; shorten the prompt"
        )
    return Prompt(tokens, line.text, line.fields, content)


def _chat(line: PromptLine, model: Model) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    tokenizer = model.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError(f"{line.where}: the tokenizer of {model.ref} has no chat template; run without it")
    turn = [{"role": "user", "content": line.text}]
    rendered = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    start = rendered.rfind(str(line.text).strip())
    end = start + len(str(line.text).strip())
    inside = tuple(start <= a and b <= end and b > a for a, b in encoded["offset_mapping"])
    return tuple(encoded["input_ids"]), inside
