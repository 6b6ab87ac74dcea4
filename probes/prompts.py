"""Prompts: read and validated line by line, and tokenized."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from probes.errors import PromptError, shown
from probes.input_files import opened
from probes.models.protocol import Model
from probes.strict_json import JsonFault, parse, text_fault

MAX_PROMPTS = 1_000_000
"""The longest prompt file accepted, in lines."""
MAX_LINE = 16 * 2**20
"""The longest line accepted, in characters."""

FieldCheck = Callable[[Any], str | None]
"""Returns what is wrong with a field's value, or None."""


def check_ids(value: Any) -> str | None:
    """Return what is wrong with a list of token ids, or None."""
    good = isinstance(value, list | tuple) and value and all(type(v) is int and v >= 0 for v in value)
    return None if good else "must be a list of token ids that is not empty, such as [262]"


@dataclass(frozen=True)
class Field:
    """A further field that a prompt line may carry; called with a value, it says what is wrong with it, or None."""

    help: str
    """What it means and what form it has, in a line."""
    check: FieldCheck
    ids: Callable[[Any], Iterable[int]] | None = None
    """The token ids in a value that passes the check; they are held against the vocabulary once a model is known."""

    def __call__(self, value: Any) -> str | None:
        """Return what is wrong with a value, or None."""
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


def read_prompts(path: str | Path, checks: Mapping[str, FieldCheck] | None = None) -> list[PromptLine]:
    """Return the validated lines of a JSON-lines prompt file; no model is needed.

    Args:
        path: the file.
        checks: further fields a line may carry, each with a check of its value.

    Raises:
        PromptError: the first fault, with file and line.
    """
    lines: list[PromptLine] = []
    with opened(path, "prompt file", PromptError) as handle:
        for number, raw in enumerate(iter(lambda: handle.readline(MAX_LINE + 1), ""), 1):
            if len(raw) > MAX_LINE:
                raise PromptError(f"{path}:{number}: a line of more than {MAX_LINE:,} characters; one object per line")
            if raw.strip():
                lines.append(_read_line(raw, f"{path}:{number}", checks or {}))
            if len(lines) > MAX_PROMPTS:
                raise PromptError(f"{path}: more than {MAX_PROMPTS:,} prompts; split the file")
    if not lines:
        raise PromptError(f'{path}: holds no prompt; write one JSON object per line, such as {{"text": "..."}}')
    return lines


def _read_line(raw: str, where: str, checks: Mapping[str, FieldCheck]) -> PromptLine:
    try:
        line = parse(raw)
    except JsonFault as error:
        raise PromptError(f"{where}: {error}; one object per line") from None
    if not isinstance(line, dict) or ("text" in line) == ("tokens" in line):
        raise PromptError(f'{where}: a line is an object with either "text" or "tokens"')
    text, tokens = None, None
    if "text" in line:
        text = _text(line.pop("text"), where)
    else:
        tokens = _token_ids(line.pop("tokens"), where)
    check_fields(line, where, checks)
    return PromptLine(where, text, tokens, line)


def check_fields(
    fields: Mapping[str, Any], where: str, checks: Mapping[str, FieldCheck], model: Model | None = None
) -> None:
    """Refuse fields that are not what an analysis asks for, or token ids that `model` does not have.

    Raises:
        PromptError: the first fault.
    """
    for name, value in fields.items():
        if name not in checks:
            continue
        if problem := checks[name](value):
            said = problem if problem.startswith("is ") else f"is {shown(value)}: {problem}"
            raise PromptError(f"{where}: field {name!r} {said}")
        check = checks[name]
        if model is not None and isinstance(check, Field) and check.ids is not None:
            _check_vocabulary(check.ids(value), f"{where}: field {name!r}", model)


def _check_vocabulary(tokens: Iterable[int], where: str, model: Model) -> None:
    for token in tokens:
        if not 0 <= token < model.shape.d_vocab:
            raise PromptError(
                f"{where}: token id {shown(token)} is outside the vocabulary of {model.ref}: "
                f"legal are 0 to {model.shape.d_vocab - 1}"
            )


def _text(text: Any, where: str) -> str:
    if not isinstance(text, str) or not text:
        raise PromptError(f'{where}: "text" is {shown(text)}: it must be a string that is not empty')
    if problem := text_fault(text):
        raise PromptError(f"{where}: {problem}")
    return text


def _token_ids(tokens: Any, where: str) -> tuple[int, ...]:
    if not isinstance(tokens, list) or not tokens:
        raise PromptError(f'{where}: "tokens" is {shown(tokens)}: it must be a list of token ids that is not empty')
    for token in tokens:
        if type(token) is not int or token < 0:
            raise PromptError(f"{where}: token id {shown(token)} is not a whole number from 0")
    return tuple(tokens)


def tokenize(lines: Sequence[PromptLine | str | Sequence[int]], model: Model, *, chat: bool = False) -> list[Prompt]:
    """Return prompts as `model` sees them: texts as its tokenizer encodes them, ids as given.

    Args:
        lines: lines of a prompt file, texts, or lists of token ids.
        model: the model.
        chat: wrap each text as one user turn of the tokenizer's chat template.

    Raises:
        PromptError: no tokenizer for a text, an id outside the vocabulary, or a prompt past the context window.
    """
    return [_tokenize(as_line(line, i), model, chat) for i, line in enumerate(lines)]


def token_ids(lines: Sequence[PromptLine | str | Sequence[int]], model: Model) -> list[tuple[int, ...]]:
    """Return the token ids of texts, as `model`'s tokenizer encodes them, or ids as given.

    Raises:
        PromptError: as `tokenize`, or one text where a list of them belongs.
    """
    if isinstance(lines, str):
        raise PromptError(f"one text {lines[:40]!r} where a list belongs: give [{lines[:40]!r}]")
    return [prompt.tokens for prompt in tokenize(lines, model)]


def as_line(line: PromptLine | str | Sequence[int], index: int) -> PromptLine:
    """Return a prompt in any of its forms as a line; `index` names it in messages.

    Raises:
        PromptError: an empty text, half a character, or ids that are none.
    """
    if isinstance(line, PromptLine):
        return line
    where = f"prompt {index}"
    if isinstance(line, str):
        return PromptLine(where, _text(line, where), None)
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
    _check_vocabulary(tokens, line.where, model)
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
