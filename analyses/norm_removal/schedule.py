"""Removal schedules as data: which norm sites are frozen at which step, and how the model is trained meanwhile."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from probes.errors import OptionError, unknown
from probes.norms import KINDS, NormSite, choose

END_OF_TEXT, FIRST = "end_of_text", "first"
"""Events that withdraw the special scale of tokens that end a text, and that of position 0."""


@dataclass(frozen=True)
class Phase:
    """Sites frozen one layer after another."""

    sites: str
    """A kind (`mlp`), sites of some layers (`qk.0-3`), `all`, or one of the two withdrawals."""
    start: int
    """The step of its first event, counted from 0."""
    gap: float = 0.0
    """Steps from one layer to the next, rounded for each; 0 freezes them together."""


@dataclass(frozen=True)
class Event:
    """What happens before a step is taken."""

    step: int
    name: str
    sites: tuple[NormSite, ...] = ()


@dataclass(frozen=True)
class Schedule:
    """A training with or without the removal of norms."""

    name: str
    phases: tuple[Phase, ...]
    steps: int
    learning_rate: float
    min_learning_rate: float
    warmup: int
    weight_decay: float = 0.01
    clip: float = 1.0
    aux_weight: float = 0.0
    """Weight of the penalty on the spread of the final norm's input scale (Baroni et al. 2025, section on training)."""
    decay_steps: int = 0
    """The step at which the cosine reaches its end; 0 is the last step."""

    def __post_init__(self) -> None:
        for name, low in (("steps", 1), ("learning_rate", 0), ("min_learning_rate", 0), ("warmup", 0), ("clip", 0)):
            value = getattr(self, name)
            if not low <= value < math.inf:
                raise OptionError(f"schedule {self.name!r}: {name} is {value}; it must be at least {low}")
        for phase in self.phases:
            if phase.start < 0 or not 0 <= phase.gap < math.inf:
                raise OptionError(
                    f"schedule {self.name!r}: phase {phase.sites!r} starts at {phase.start} with gap {phase.gap}; "
                    "both must be 0 or more"
                )

    def events(self, sites: Sequence[NormSite]) -> tuple[Event, ...]:
        """Return everything that happens to a model with these sites, in order.

        Raises:
            OptionError: a phase names a site that the model does not have, or one that is frozen already.
        """
        events: list[Event] = []
        seen: set[NormSite] = set()
        for phase in self.phases:
            if phase.sites in (END_OF_TEXT, FIRST):
                events.append(Event(phase.start, phase.sites))
                continue
            chosen = choose(sites, phase.sites.split(","))
            if twice := [site for site in chosen if site in seen]:
                raise OptionError(f"schedule {self.name!r} freezes {twice[0]} twice")
            seen.update(chosen)
            layers = list(dict.fromkeys(site.layer for site in chosen))
            for index, layer in enumerate(layers if phase.gap else [None]):
                group = tuple(s for s in chosen if not phase.gap or s.layer == layer)
                label = phase.sites if not phase.gap else ",".join(map(str, group))
                events.append(Event(phase.start + round(index * phase.gap), label, group))
        return tuple(sorted(events, key=lambda event: event.step))

    def rate(self, step: int) -> float:
        """Return the learning rate of a step: a linear warm-up, then half a cosine down to the least."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        end = self.decay_steps or self.steps
        done = min(1.0, (step - self.warmup) / max(1, end - self.warmup))
        return (
            self.min_learning_rate + (self.learning_rate - self.min_learning_rate) * (1 + math.cos(math.pi * done)) / 2
        )

    @property
    def control(self) -> Schedule:
        """The same training with every norm kept, and so without the penalty."""
        return replace(self, name="control", phases=(), aux_weight=0.0)

    @property
    def at_once(self) -> Schedule:
        """The same training with all sites frozen at the step of the first event, and nothing special about any position."""
        starts = [phase.start for phase in self.phases]
        return replace(self, name="at_once", phases=(Phase("all", min(starts)),) if starts else ())


@dataclass(frozen=True)
class Released:
    """A run of the released code, for a GPT-2 of `n_layers`."""

    n_layers: int
    start: int
    gaps: tuple[float, float, float]
    """Of MLP input, queries and keys, values."""
    delays: tuple[int, int]
    """From the final norm to the withdrawal of the end-of-text scale, and from there to that of position 0."""
    training: dict[str, Any]

    def schedule(self, name: str, sites: Iterable[NormSite]) -> Schedule:
        """Return the schedule for a model with these sites."""
        have = list(sites)
        return Schedule(name, chained(have, self.start, self.gaps, self.delays), **self.training)


RELEASED: dict[str, Released] = {
    "small": Released(12, 20, (2, 2, 3), (2, 10), {"steps": 300, "learning_rate": 6e-4, "min_learning_rate": 3e-4, "warmup": 25, "aux_weight": 0.1}),
    "medium": Released(24, 20, (2, 2, 3), (2, 10), {"steps": 500, "learning_rate": 6e-4, "min_learning_rate": 3e-4, "warmup": 10, "aux_weight": 0.1}),
    "large": Released(36, 30, (4, 4, 6), (2, 10), {"steps": 1200, "learning_rate": 3e-4, "min_learning_rate": 4e-5, "warmup": 15, "aux_weight": 0.03}),
    "xl": Released(48, 50, (4, 4, 6), (2, 10), {"steps": 1200, "learning_rate": 1e-4, "min_learning_rate": 2e-5, "warmup": 20, "aux_weight": 0.01}),
    "small_2024": Released(
        12, 200, (20, 20, 30), (20, 100),
        {"steps": 3000, "learning_rate": 6e-4, "min_learning_rate": 6e-5, "warmup": 100, "weight_decay": 0.1, "decay_steps": 2000},
    ),
}  # fmt: skip
"""Baroni et al. 2025 (the first four) and Heimersheim 2024, as in their released configurations."""
NAMES = ("proportional", "at_once", *RELEASED)


def chained(
    sites: Sequence[NormSite], start: int, gaps: tuple[float, float, float], delays: tuple[int, int]
) -> tuple[Phase, ...]:
    """Return phases that follow one another without a pause, each kind of site from layer 0 upwards, the final norm last.

    Norms that GPT-2 does not have (of queries and keys per head, of what a part adds) come before the input norms of
    attention, at the pace of queries and keys.
    """
    n_layers = 1 + max((site.layer or 0 for site in sites), default=0)
    have = {site.kind for site in sites}
    mlp, qk, v = gaps
    pace = {"mlp": mlp, "v": v, "final": 0.0}
    phases, step = [], float(start)
    for kind in KINDS:
        if kind in have:
            gap = pace.get(kind, qk)
            phases.append(Phase(kind, round(step), gap))
            step += gap * n_layers
    last = phases[-1].start if phases else start
    return (*phases, Phase(END_OF_TEXT, last + delays[0]), Phase(FIRST, last + sum(delays)))


def proportional(sites: Sequence[NormSite], steps: int) -> Schedule:
    """Stretch the small run's schedule to `steps` and to the model's layers, its last withdrawal at the same share of the run."""
    small = RELEASED["small"]
    kinds = [k for k in KINDS if k in {site.kind for site in sites} and k != "final"]
    n_layers = 1 + max((site.layer or 0 for site in sites), default=0)
    paces = {"mlp": small.gaps[0], "v": small.gaps[2]}
    own = small.n_layers * sum(small.gaps)
    stretch = steps / small.training["steps"]
    by_layer = own / (n_layers * sum(paces.get(k, small.gaps[1]) for k in kinds)) if kinds else 1.0
    gaps = tuple(gap * stretch * by_layer for gap in small.gaps)
    delays = tuple(max(1, round(delay * stretch)) for delay in small.delays)
    training = {**small.training, "steps": steps, "warmup": max(1, round(small.training["warmup"] * stretch))}
    phases = chained(sites, round(small.start * stretch), gaps, delays)  # type: ignore[arg-type]
    return Schedule("proportional", phases, **training)


def get_schedule(name: str, sites: Sequence[NormSite], steps: int = 0) -> Schedule:
    """Return a schedule by name, or from a TOML file, for a model with these sites.

    Args:
        steps: the length of `proportional` and `at_once`, and a bound on the others; 0 leaves their own.

    Raises:
        OptionError: an unknown name, a faulty file, or a site that the model does not have.
    """
    if name in ("proportional", "at_once"):
        stretched = proportional(sites, steps or RELEASED["small"].training["steps"])
        schedule = stretched if name == "proportional" else stretched.at_once
    elif name in RELEASED:
        schedule = RELEASED[name].schedule(name, sites)
    elif name.endswith(".toml"):
        schedule = read_schedule(Path(name))
    else:
        raise OptionError(unknown("schedule", name, [*NAMES, "FILE.toml"]))
    schedule = replace(schedule, steps=steps) if steps else schedule
    late = [event for event in schedule.events(sites) if event.step >= schedule.steps]
    if late:
        raise OptionError(
            f"schedule {schedule.name!r}: {late[0].name} comes at step {late[0].step}, but the training has {schedule.steps} steps"
        )
    return schedule


def read_schedule(path: Path) -> Schedule:
    """Read a schedule file: the fields of `Schedule`, and a list `phases` of tables with `sites`, `start`, `gap`.

    Raises:
        OptionError: the file is missing, no TOML, or has a field that is unknown, missing or of another type.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise OptionError(f"schedule file {str(path)!r} cannot be read: {error}") from None
    legal = {field.name for field in fields(Schedule)}
    if bad := sorted(set(values) - legal):
        raise OptionError(f"{path}: {unknown('field', bad[0], sorted(legal))}")
    try:
        phases = tuple(Phase(**phase) for phase in values.pop("phases", []))
        return Schedule(**{"name": path.stem, **values}, phases=phases)
    except TypeError as error:
        raise OptionError(f"{path}: {error}") from None
