"""Tasks as files for other tools, without their truth, and the answers that come back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analyses.ground_truth.answers import Answer, from_json, name_of
from probes.errors import OptionError
from probes.planted.record import VERSION, Question
from probes.planted.task import Example, PlantedTask

MANIFEST = "depthbench.json"
ANSWERS = "answers*.json"
"""Files of answers that lie in an exported folder."""


def export(tasks: Sequence[PlantedTask], folder: str | Path) -> Path:
    """Write each task as a Hugging Face folder with `prompts.json` and `questions.json`; return the folder.

    A prompt carries its text, token ids, partner, right answers, named positions and the values of concepts. A question
    carries everything but its truth, and no note.

    Raises:
        OptionError: the folder holds something else.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise OptionError(f"{folder} holds something other than exported tasks: give a new or empty folder")
    for task in tasks:
        own = folder / name_of(task.record)
        own.mkdir(parents=True, exist_ok=True)
        task.module.save_pretrained(own)  # type: ignore[operator]
        task.tokenizer.save_pretrained(own)
        _write(own / "prompts.json", [_prompt(task, example) for example in task.examples if example.split == "fit"])
        _write(own / "questions.json", [_question(question) for question in task.record.questions])
    _write(folder / MANIFEST, {"version": VERSION, "tasks": [name_of(task.record) for task in tasks]})
    return folder


def exported(folder: str | Path) -> list[str]:
    """Return the names of the tasks in an exported folder.

    Raises:
        OptionError: it is none, or one of another version of the planted models.
    """
    try:
        manifest = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))
        version, names = manifest["version"], [str(name) for name in manifest["tasks"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OptionError(f"{folder} holds no exported tasks ({error}); write them with bench depth export") from None
    if version != VERSION:
        raise OptionError(f"{folder} holds planted models of version {version}; this is {VERSION}: export again")
    return names


def handed_in(folder: str | Path) -> list[Answer]:
    """Return the answers in all files of answers of an exported folder.

    Raises:
        OptionError: there is none, or one that cannot be read; names the file.
    """
    files = sorted(Path(folder).glob(ANSWERS))
    if not files:
        raise OptionError(f"{folder} holds no {ANSWERS}: run a peer's script on it first")
    answers = []
    for path in files:
        try:
            answers += from_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeError, OptionError) as error:
            raise OptionError(f"{path}: {error}") from None
    return answers


def _prompt(task: PlantedTask, example: Example) -> dict[str, Any]:
    names = example.positions or task.record.positions
    return {
        "text": task.tokenizer.decode(list(example.tokens)), "tokens": example.tokens, "answer": example.answer,
        "partner": example.partner, "partner_answer": example.partner_answer, "values": example.values,
        "group": example.group, "subset": example.subset,
        "positions": {name: task.position(example, name) for name in names},
    }  # fmt: skip


def _question(question: Question) -> dict[str, Any]:
    return {
        "key": question.key, "kind": question.kind, "concept": question.concept, "position": question.position,
        "to": question.to, "subset": question.subset, "candidates": question.candidates,
    }  # fmt: skip


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
