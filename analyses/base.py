"""What an analysis is: a frozen dataclass of options with `needs` and `measure`."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal

from analyses.interventions import Interventions
from analyses.options import validate
from analyses.results.card import Card, FigureSpec, ProfileSpec, Tables
from analyses.results.provenance import describe, prompts_digest
from analyses.results.result import Result
from probes.capture.activations import Activations
from probes.capture.needs import Need
from probes.html_card import count
from probes.models.protocol import Model
from probes.progress import QUIET, Progress
from probes.prompts import Field, FieldCheck, Prompt, PromptLine, as_line, check_fields, read_prompts, tokenize
from probes.saved_directions import SavedDirections
from probes.store import ActivationStore

PromptsLike = str | Path | Sequence[Prompt | PromptLine | str | Sequence[int]]
"""A prompt file, or a list of prompts, texts or token id lists."""
UNSTORED = {
    "weights": "scores are of weights, and prompts whose channels are edited are run anew",
    "own forwards": "activations were used prompt by prompt",
}
"""What is said of an analysis that neither reads from the activation store nor adds to it, by its `reads`."""


@dataclass(frozen=True)
class Measured:
    """What an analysis measured on some prompts, before it is a result."""

    prompts: Sequence[Prompt]
    tables: Tables
    activations: Activations | Sequence[Activations] | None = None
    """The captures that were read; none where nothing was captured."""
    notes: Sequence[str] = ()
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """What was done, beside or in place of what the captures and prompts say: forwards, tokens."""
    interventions: int = 0
    """Forwards that were run with something changed, as `Analysis.interventions` counts them."""
    directions: SavedDirections | None = None
    """Directions of the stream, saved for edits to name."""


class Analysis:
    """A method of a paper; its fields are its options.

    Readers work from the store alone; interventions also use the model.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    reference: ClassVar[str]
    prompt_fields: ClassVar[Mapping[str, Field]] = {}
    """What a prompt line may carry beside its text or tokens, by name."""
    figures: ClassVar[Mapping[str, FigureSpec]]
    reads: ClassVar[Literal["store", "weights", "own forwards"]] = "store"
    """Where its numbers come from: rows of the activation store, or what `UNSTORED` says of the other two."""
    profiles: ClassVar[Mapping[str, ProfileSpec]] = {}
    """Its numbers by layer, for the depth axis that all analyses share."""
    chat: bool = False
    """Whether each text is wrapped as one user turn of the chat template."""
    max_new_tokens: int = 0
    """How many tokens the model may write for each prompt."""

    def __post_init__(self) -> None:
        validate(self)

    @property
    def makes_prompts(self) -> bool:
        """Whether it runs without given prompts: on prompts that it makes, or on weights alone."""
        return False

    def interventions(self, model: Model, prompts: Sequence[Prompt]) -> Interventions:
        """Return how many forwards it runs beside those that capture, on the prompts that `collect` returned."""
        return Interventions()

    def collect(self, model: Model, prompts: PromptsLike) -> list[Prompt]:
        """Return the prompts it will read: those given, and those it makes."""
        return as_prompts(prompts, model, self.prompt_fields, chat=self.chat)

    def needs(self, model: Model) -> list[Need]:
        """Return what must be captured of each prompt; nothing where activations are not read from a store."""
        return []

    def run(
        self,
        model: Model,
        prompts: PromptsLike = (),
        *,
        store: ActivationStore | None = None,
        progress: Progress = QUIET,
    ) -> Result:
        """Return the result on these prompts, with the tables that `measure` names; only what the store lacks is captured."""
        clock = Clock()
        measured = self.measure(model, prompts, store or ActivationStore(), progress)
        return make_result(self, model, clock=clock, **vars(measured))

    def measure(self, model: Model, prompts: PromptsLike, store: ActivationStore, progress: Progress) -> Measured:
        """Return the tables on these prompts, and what was done for them."""
        raise NotImplementedError


def as_prompts(
    prompts: PromptsLike, model: Model, fields: Mapping[str, FieldCheck], *, chat: bool = False
) -> list[Prompt]:
    """Convert any accepted form of prompts to token ids of `model`.

    Raises:
        PromptError: as `tokenize`, or a field that is not what `fields` asks for.
    """
    if isinstance(prompts, str | Path):
        prompts = read_prompts(prompts, fields)
    lines = [p if isinstance(p, Prompt) else as_line(p, i) for i, p in enumerate(prompts)]
    for i, line in enumerate(lines):
        where = line.where if isinstance(line, PromptLine) else f"prompt {i}"
        check_fields(line.fields, where, fields, model)
    return [line if isinstance(line, Prompt) else tokenize([line], model, chat=chat)[0] for line in lines]


@dataclass(frozen=True)
class Clock:
    """When a run began."""

    started: float = dataclasses.field(default_factory=time.perf_counter)


def make_result(
    analysis: Any,
    model: Model,
    prompts: Sequence[Prompt],
    tables: Tables,
    activations: Activations | Sequence[Activations] | None,
    clock: Clock,
    notes: Sequence[str] = (),
    counts: Mapping[str, int] | None = None,
    interventions: int = 0,
    directions: SavedDirections | None = None,
) -> Result:
    """Return the result of `analysis`, with its provenance and card, from what `Measured` says."""
    options = json.loads(json.dumps(dataclasses.asdict(analysis)))
    captures = [activations] if isinstance(activations, Activations) else list(activations or ())
    counted = {
        "prompts": len(prompts),
        "tokens": sum(len(prompt.tokens) for prompt in prompts),
        "forwards": sum(captured.done.forwards for captured in captures),
        "rows_captured": sum(captured.done.plan.rows for captured in captures),
        "held_before": sum(captured.done.plan.stored for captured in captures),
        "intervention_forwards": interventions,
        **(counts or {}),
    }
    keys = list(dict.fromkeys(chain.from_iterable(captured.keys() for captured in captures)))
    provenance = describe(model, started=clock.started, seed=options.get("seed"), store_keys=keys, counts=counted)
    provenance["prompts"] = prompts_digest(prompts)
    if analysis.reads in UNSTORED:
        notes = [*notes, f"Nothing was read from the activation store or added to it: {UNSTORED[analysis.reads]}."]
    card = Card.of(analysis)
    if edits := provenance.get("edits"):
        notes = [f"Read under {count(len(edits), 'edit')} of the model: {'; '.join(edits)}.", *notes]
    return Result(analysis.name, options, dict(tables), provenance, tuple(notes), card, directions=directions)
