"""Readers of the nine data sets of concept depth, in their published file formats."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analyses.concept_depth.datasets_shipped import Example
from probes.errors import PromptError


def _stacked(classes: Iterable[Sequence[tuple[str, str]]], first: int | None = None) -> list[Example]:
    """The first rows of class 0 above those of class 1, each (text, group), as the released code stacks them."""
    return [Example(text, label, group) for label, rows in enumerate(classes) for text, group in list(rows)[:first]]


def _of(table: pd.DataFrame, text: str, kept: Any, group: str) -> list[tuple[str, str]]:
    rows = table[kept]
    named = rows[group] if group in rows else rows[text]
    return [(str(t), str(g)) for t, g in zip(rows[text], named, strict=True)]


def cities(path: Path) -> list[Example]:
    """`cities.csv`: statement, label (1 true), city; label 0 is true."""
    table = pd.read_csv(path)
    return _stacked(_of(table, "statement", table["label"] == truth, "city") for truth in (1, 0))


def common_claim(path: Path) -> list[Example]:
    """`common_claim.csv`: examples, label (True, False, Neither); label 0 is true, 3,000 of each."""
    table = pd.read_csv(path, dtype=str)
    return _stacked((_of(table, "examples", table["label"] == truth, "examples") for truth in ("True", "False")), 3000)


def counterfact(path: Path) -> list[Example]:
    """`counterfact.csv`: statement, label (1 true), subject; label 0 is true, 2,000 of each."""
    table = pd.read_csv(path)
    return _stacked((_of(table, "statement", table["label"] == truth, "subject") for truth in (1, 0)), 2000)


def hateeval(path: Path) -> list[Example]:
    """`hateeval.tsv`: text, HS; label 0 is hate speech, 3,000 of each."""
    table = pd.read_csv(path, sep="\t")
    return _stacked((_of(table, "text", kept, "text") for kept in (table["HS"] == 1, table["HS"] != 1)), 3000)


def stsa(path: Path) -> list[Example]:
    """`stsa.binary.train`: lines of a label and a review; label 1 is positive."""
    lines = [line.strip().split(" ", 1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return _stacked([(text, text) for label, text in lines if int(label) == label_value] for label_value in (0, 1))


def imdb(path: Path) -> list[Example]:
    """The test part as a table of text and label (parquet or CSV); label 1 is positive, 1,000 of each."""
    table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    return _stacked((_of(table, "text", table["label"] == label, "text") for label in (0, 1)), 1000)


def sarcasm(path: Path) -> list[Example]:
    """`sarcasm.json`: JSON lines with headline and is_sarcastic; label 0 is sarcastic, 3,000 of each."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = [(str(line["headline"]), int(line["is_sarcastic"])) for line in lines]
    return _stacked(
        ([(text, text) for text, sarcastic in rows if (sarcastic == 1) == is_so] for is_so in (True, False)), 3000
    )


def strategy_qa(path: Path) -> list[Example]:
    """`StrategyQA_task.json` of BIG-bench: each question with its explanation; label 0 is yes."""
    examples = json.loads(path.read_text(encoding="utf-8"))["examples"]
    rows = [(_explained(e), str(e["input"]), e["target_scores"].get("Yes") == 1) for e in examples]
    return _stacked(
        [(text, question) for text, question, yes in rows if yes == label_value] for label_value in (True, False)
    )


def _explained(example: Any) -> str:
    target = str(example["target"])
    for answer in ("Yes.", "No."):
        target = target.removeprefix(answer).strip()
    return f"{example['input']} {target}"


def coin_flip(path: Path) -> list[Example]:
    """`coin_flip.json`: examples with question and answer; label 0 is yes."""
    examples = json.loads(path.read_text(encoding="utf-8"))["examples"]
    rows = [(str(e["question"]), str(e["answer"]).strip().lower()) for e in examples]
    return _stacked([(text, text) for text, answer in rows if answer == label_value] for label_value in ("yes", "no"))


def read_published(read: Callable[[Path], list[Example]], name: str, file: str, path: Path) -> list[Example]:
    """The examples of a published file, which may be named itself or by its folder.

    Raises:
        PromptError: the file is not there or not in that format.
    """
    source = path / file if path.is_dir() else path
    if not source.is_file():
        raise PromptError(
            f"data set {name!r}: no file {str(source)!r}; give the folder or path of {file} ({_format(read)})"
        )
    try:
        return read(source)
    except (KeyError, ValueError, TypeError, OSError) as error:
        raise PromptError(
            f"data set {name!r}: {source} is not in the published format ({error}): {_format(read)}"
        ) from None


def _format(read: Callable[[Path], list[Example]]) -> str:
    return (read.__doc__ or "").strip().rstrip(".")
