"""Studies of tiny models for tests."""

from __future__ import annotations

import json
from pathlib import Path

from families import make

IDS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]

BASE = """
name = "small"
[[models]]
ref = "model"
[[prompts]]
name = "ids"
file = "ids.jsonl"
"""


def model_folder(folder: Path, layers: int = 3, seed: int = 0) -> Path:
    """A tiny Llama checkpoint without a tokenizer."""
    make("llama", seed=seed, num_hidden_layers=layers).save_pretrained(folder)
    return folder


def prompt_file(path: Path, ids: list[list[int]] = IDS) -> Path:
    path.write_text("".join(json.dumps({"tokens": one}) + "\n" for one in ids))
    return path


def study_file(folder: Path, text: str, name: str = "study.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def line_of(path: Path, part: str, occurrence: int = 1) -> str:
    """`FILE:LINE` of the line that contains `part`."""
    lines = [i for i, line in enumerate(path.read_text().split("\n"), 1) if part in line]
    return f"{path}:{lines[occurrence - 1]}"
