"""What a method says of one question about a planted model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite, nan
from typing import Any, Literal, get_args

from probes.errors import OptionError, unknown
from probes.planted.record import Record

Decision = Literal["answered", "none", "declined"]
"""`none` claims that there is nothing of the kind; `declined` claims nothing."""
Ends = tuple[float, float]
"""Of the first and the last layer of an interval; NaN where nothing is said of one."""
UNKNOWN: Ends = (nan, nan)
LEVEL = 0.95
"""What the intervals of this workbench claim to hold, as a share of all cases."""
DIGITS = 6
"""Significant digits of a number in a digest: what is left is the same on one machine, whatever ran beside it."""


@dataclass(frozen=True)
class Answer:
    """One method's answer to one question.

    Raises:
        OptionError: a decision that does not exist, an answer that names nothing, or bounds without a level.
    """

    method: str
    task: str
    """Task and seed, such as `A2@0`."""
    question: str
    """`Question.key`, such as `readable:attribute:ask`."""
    decision: Decision
    estimate: Ends = UNKNOWN
    """First and last layer, for questions whose answer is an interval."""
    low: Ends = UNKNOWN
    """Lower bounds of the two layers, where the method claims any."""
    high: Ends = UNKNOWN
    level: float = LEVEL
    """Share of cases in which the method claims that its bounds hold the truth."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """For questions whose answer is a set: how strongly each candidate is named."""
    chosen: frozenset[str] | None = None
    """The method's own set; None where it only ranks."""
    seconds: float = 0.0
    forwards: int = 0
    """Sequences run through the model, edited or not."""
    reason: str = ""
    """Why it was declined."""

    def __post_init__(self) -> None:
        if self.decision not in get_args(Decision):
            raise OptionError(unknown("decision", self.decision, get_args(Decision)))
        if self.decision == "answered" and not (any(map(isfinite, self.estimate)) or self.scores or self.chosen):
            raise OptionError(
                f"{self.method} answers {self.task} {self.question} with nothing: give an estimate, scores or a chosen "
                "set, or decide none or declined"
            )
        if not 0 < self.level < 1:
            raise OptionError(f"level {self.level} of {self.method} is no share: legal are numbers between 0 and 1")

    @property
    def claimed(self) -> frozenset[str]:
        """Return the chosen set, empty where the method claims that there is nothing or only ranks."""
        return frozenset() if self.decision != "answered" or self.chosen is None else self.chosen

    def record(self) -> dict[str, Any]:
        """Return the answer as JSON values; NaN becomes None."""
        return {
            "method": self.method,
            "task": self.task,
            "question": self.question,
            "decision": self.decision,
            **{name: [_number(v) for v in getattr(self, name)] for name in ("estimate", "low", "high")},
            "level": self.level,
            "scores": {name: _number(self.scores[name]) for name in sorted(self.scores)},
            "chosen": None if self.chosen is None else sorted(self.chosen),
            "seconds": self.seconds,
            "forwards": self.forwards,
            "reason": self.reason,
        }

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Answer:
        """Return the answer that `record` made, or a peer wrote by hand; what is left out is unknown.

        Raises:
            OptionError: an entry that no answer has, or one that is missing or of another type.
        """
        legal = set(cls.__dataclass_fields__)
        if extra := sorted(set(record) - legal):
            raise OptionError(unknown("entry of an answer", extra[0], sorted(legal)))
        try:
            values = dict(record)
            for name in ("estimate", "low", "high"):
                first, last = values.get(name, UNKNOWN)
                values[name] = (_float(first), _float(last))
            values["scores"] = {str(name): _float(v) for name, v in values.get("scores", {}).items()}
            chosen = values.get("chosen")
            values["chosen"] = None if chosen is None else frozenset(map(str, chosen))
            return cls(**values)
        except (TypeError, ValueError, AttributeError) as error:
            raise OptionError(f"{str(record)[:80]} is no answer: {error}") from None


def _number(value: float) -> float | None:
    return float(value) if isfinite(value) else None


def _float(value: Any) -> float:
    return nan if value is None else float(value)


def name_of(record: Record) -> str:
    """Return what answers call a task: its name and seed."""
    return f"{record.task}@{record.seed}"


def with_cost(answers: Sequence[Answer], seconds: float, forwards: int) -> list[Answer]:
    """Return answers that share one run, its cost divided among them."""
    n = max(1, len(answers))
    return [replace(answer, seconds=seconds / n, forwards=round(forwards / n)) for answer in answers]


def to_json(answers: Sequence[Answer]) -> str:
    """Return answers as JSON text that `from_json` reads back."""
    return json.dumps([answer.record() for answer in answers], indent=1)


def from_json(text: str) -> list[Answer]:
    """Read what `to_json` wrote.

    Raises:
        OptionError: no list of answers.
    """
    try:
        records = json.loads(text)
    except ValueError as error:
        raise OptionError(f"the answers are no JSON: {error}") from None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise OptionError("the answers are no list of objects; write one object for each answer")
    return [Answer.of(record) for record in records]


def digest(answers: Iterable[Answer]) -> str:
    """Return a digest of all that was answered, in any order; without seconds, and numbers to `DIGITS` digits."""
    lines = []
    for answer in answers:
        record = answer.record()
        del record["seconds"]
        lines.append(json.dumps(_rounded(record), sort_keys=True))
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.{DIGITS}g}") + 0.0 if isinstance(value, float) else value
