"""The truth of a planted model: what was built, question by question, and what exhaustive intervention said of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

VERSION = 2
"""Grows when any planted model or truth changes."""
Tier = Literal["compiled", "noised", "trained"]
Disguise = Literal["rotated", "noised", "superposed"]
"""How a compiled model is made unlike a toy, for the noised tier."""
Kind = Literal[
    "readable", "lens", "written", "moved", "necessary", "sufficient", "nodes", "channel", "mending", "void", "pivot",
    "redundant", "norm", "order", "subspace",
]  # fmt: skip
"""What can be asked of a model.

- `readable`: from which layer to which a linear probe reads a concept on held-out combinations. Interval.
- `lens`: from which layer on the model's read-out names the answer and keeps it. Interval of one layer.
- `written`: which part first writes a concept. Set of one node.
- `moved`: which head carries a concept from one position to another. Set of one node.
- `necessary`: where replacing the stream by the partner prompt's changes the answer. Interval.
- `sufficient`: where bringing the stream into the partner prompt brings the answer. Interval.
- `nodes`: which heads and MLPs take part. Set of nodes.
- `channel`: which pairs of heads communicate. Set of `1.0->4.2:q` (or `:k`, `:v`).
- `mending`: which jumps mend the wrong answer. Set of `a->b`: the stream after block a enters block b again.
- `void`: which blocks change nothing, for a class of tokens or for all. Set of `3` or `3:function`.
- `pivot`: between which layers the read-out names another language. Interval.
- `redundant`: which nodes replace one another. Set of `mlp.3+mlp.6`.
- `norm`: which norm's scale carries an effect, and where position 0 is massive. Interval, or a set of norm sites.
- `order`: which neighbouring blocks may be exchanged. Set of `3+4`.
- `subspace`: which blocks' keys span one subspace over tokens. Set of `2+5`.

Layers are block indices, "at layer l" is `resid_post.l`, and -1 is the embedding; a node is `7.2` (head 2 of block 7) or
`mlp.4`.
"""


@dataclass(frozen=True)
class Interval:
    """Layers from `first` to `last`, both inside."""

    first: int
    last: int


Truth = Interval | frozenset[str] | None
"""None: there is nothing of the kind; an empty set says the same of a question whose answer is a set."""


@dataclass(frozen=True)
class Question:
    """One thing asked of a model, and the truth that was built into it."""

    kind: Kind
    truth: Truth
    concept: str | None = None
    position: str | None = None
    to: str | None = None
    """For `moved`: the position the concept is carried to."""
    subset: str | None = None
    """Asked of the examples of this `Example.subset` alone."""
    candidates: tuple[str, ...] = ()
    """For sets: all that could be named."""
    ranking_only: bool = False
    """Whether the truth orders the candidates but no threshold tells them apart."""
    note: str = ""

    @property
    def key(self) -> str:
        """Its name within the task, such as `readable:attribute:ask`."""
        where = self.position if self.to is None else f"{self.position}>{self.to}"
        parts = (self.concept, where, self.subset)
        return ":".join((self.kind, *(part for part in parts if part is not None)))

    @property
    def nothing(self) -> bool:
        """Whether the truth is that there is nothing."""
        return not self.truth


@dataclass(frozen=True)
class Record:
    """All that is known of a planted model; written as JSON beside its weights."""

    task: str
    tier: Tier
    seed: int
    model: Mapping[str, Any]
    """Class, layers, width, heads, norm and the digest of the weights."""
    positions: Mapping[str, int]
    """Index of each named position in every prompt; negative from the end. Empty where prompts differ."""
    concepts: Mapping[str, int]
    """Number of values of each concept."""
    accuracy: Mapping[str, float]
    """Share of right answers on the prompts (`plain`) and on their partners (`partner`)."""
    questions: tuple[Question, ...]
    certificate: Mapping[str, Any] = field(default_factory=dict)
    """What `probes.planted.certify` measured, and under `agrees` whether every truth follows from it."""
    version: int = VERSION

    def question(self, key: str) -> Question:
        """Return the question of that key.

        Raises:
            KeyError: none of that key.
        """
        return next(question for question in self.questions if question.key == key)

    def to_json(self) -> str:
        """Return the record as JSON text; `from_json` reads it back to an equal record."""
        return json.dumps(asdict(self), default=_plain, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Record:
        """Read what `to_json` wrote."""
        values = json.loads(text)
        values["questions"] = tuple(_question(entry) for entry in values["questions"])
        return cls(**values)


def _plain(value: object) -> object:
    if isinstance(value, frozenset):
        return {"set": sorted(value)}
    raise TypeError(f"no JSON form of {type(value).__name__}")


def _question(entry: dict[str, Any]) -> Question:
    truth = entry["truth"]
    if truth is not None:
        truth = frozenset(truth["set"]) if "set" in truth else Interval(**truth)
    return Question(**{**entry, "truth": truth, "candidates": tuple(entry["candidates"])})


def span(first: int, last: int) -> Interval | None:
    """Return the interval, or None where it would be empty."""
    return Interval(first, last) if first <= last else None


def node_names(layers: int, heads: int) -> tuple[str, ...]:
    """Return every head and MLP by name, block by block."""
    return tuple(
        name for layer in range(layers) for name in (*(f"{layer}.{head}" for head in range(heads)), f"mlp.{layer}")
    )


def nodes(names: Iterable[str]) -> frozenset[str]:
    """Return a set of nodes as a truth."""
    return frozenset(names)
