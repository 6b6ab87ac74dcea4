"""Prompts as a user gives them: typed, uploaded or shipped, checked line by line before any model is loaded."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import xxhash

from app.places import prompts_root
from probes.errors import PromptError
from probes.locked_files import write_whole

MAX_LINES = 10_000
"""The most lines taken here; the command line takes more."""
MAX_BYTES = 20_000_000


@dataclass(frozen=True)
class PromptSet:
    """Checked prompts, as the text of a JSON-lines file."""

    source: str
    """Where they come from, for a reader."""
    text: str
    count: int

    def save(self) -> Path:
        """The file that holds them, named by its content; the command line can be given the same."""
        folder = prompts_root()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{xxhash.xxh3_64_hexdigest(self.text.encode())}.jsonl"
        if not path.is_file():
            write_whole(path, self.text)
        return path


def shipped() -> dict[str, Path]:
    """The prompt files that come with the package, by name."""
    folder = Path(str(files("analyses").joinpath("data")))
    return {path.stem: path for path in sorted(folder.glob("*.jsonl"))}


def typed(text: str, fields: Mapping[str, object]) -> PromptSet:
    """One prompt a line: plain text, or a JSON object as in a prompt file.

    Raises:
        PromptError: the first fault, with its line.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    records = [line if line.startswith("{") else json.dumps({"text": line}, ensure_ascii=False) for line in lines]
    return check("\n".join(records) + "\n", "typed", fields)


def uploaded(name: str, data: bytes, fields: Mapping[str, object]) -> PromptSet:
    """A file of JSON lines, or of plain text with one prompt a line where its name ends in .txt.

    Raises:
        PromptError: the first fault, with file and line.
    """
    shown = Path(name.replace("\\", "/")).name or "upload"
    if len(data) > MAX_BYTES:
        raise PromptError(f"{shown}: {len(data):,} bytes; at most {MAX_BYTES:,} are taken here: use the command line")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"{shown}: not UTF-8 text (byte {error.start}); save it as UTF-8 JSON lines") from None
    if shown.lower().endswith(".txt"):
        text = "".join(json.dumps({"text": line}, ensure_ascii=False) + "\n" for line in text.splitlines() if line)
    return check(text, shown, fields)


def check(text: str, source: str, fields: Mapping[str, object]) -> PromptSet:
    """The prompts of a JSON-lines text.

    Raises:
        PromptError: the first fault, as `SOURCE:LINE`.
    """
    from probes.prompts import read_prompts

    n_lines = text.count("\n") + (not text.endswith("\n"))
    if n_lines > MAX_LINES:
        raise PromptError(
            f"{source}:{MAX_LINES + 1}: {n_lines:,} lines; at most {MAX_LINES:,} prompts are taken here: split the file, or use "
            "bathyscope run on the command line"
        )
    with tempfile.TemporaryDirectory(prefix="bathyscope-") as folder:
        path = Path(folder) / "prompts.jsonl"
        path.write_text(text, encoding="utf-8")
        try:
            lines = read_prompts(path, fields)  # type: ignore[arg-type]
        except PromptError as error:
            raise PromptError(str(error).replace(str(path), source)) from None
    return PromptSet(source, text, len(lines))
