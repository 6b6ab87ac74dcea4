"""The cells of a study: every combination, checked, and named by the hash of what it is."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analyses.base import Analysis
from analyses.options import types_of
from analyses.registry import get_analysis
from analyses.studies import fingerprint
from analyses.studies.cell_options import Setting, make
from analyses.studies.definition import AnalysisSpec, Override, PromptSet, Study, StudyModel
from analyses.studies.file_lines import Key, Origin, fault, located
from probes.errors import unknown
from probes.prompts import PromptLine, check_fields

MAX_CELLS = 10_000
"""The largest study accepted."""
FORMAT = 1
"""Raised when cells of earlier versions must not be taken for those of this one."""


@dataclass(frozen=True)
class Prompts:
    """A prompt set that has been read."""

    label: str
    lines: tuple[PromptLine, ...]
    digest: str
    file: Path | None = None
    """The prompt file whose lines these are, all of them."""


@dataclass(frozen=True)
class Cell:
    """One analysis with its options on one model and one prompt set."""

    name: str
    """`ANALYSIS-HASH`; what decides the result is hashed, labels are not."""
    analysis: Analysis
    model: StudyModel
    model_bytes: int
    """Bytes of the model's weights on disk."""
    prompts: Prompts | None
    """None where the analysis makes its own."""
    entry: str
    """What the study calls the analysis."""
    varied: Mapping[str, Any] = field(default_factory=dict)
    """The options in which cells of one entry differ, without the seed."""
    seed: int | None = None
    """None where the analysis draws nothing."""

    @property
    def lines(self) -> Sequence[PromptLine]:
        """The prompt lines it is given; none where it makes its own."""
        return self.prompts.lines if self.prompts else ()

    @property
    def label(self) -> str:
        """The cell as a reader knows it."""
        parts = [self.entry, self.model.label, self.prompts.label if self.prompts else "own prompts"]
        parts += [f"{name}={shown(value)}" for name, value in self.varied.items()]
        return " · ".join(parts if self.seed is None else [*parts, f"seed {self.seed}"])


def shown(value: Any) -> str:
    """Return an option's value in few words."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def expand(study: Study) -> tuple[Cell, ...]:
    """Return every cell of a study, once each, in the order of its file; all of it checked, nothing loaded.

    Models that are not on this machine are fetched.

    Raises:
        StudyError: a fault, with file and line where the study came from a file.
    """
    check_names(study)
    _check_size(study)
    models, prompts = _Models(), {prompts.label: _read(prompts) for prompts in study.prompts}
    cells = {cell.name: cell for spec in study.analyses for cell in _cells_of(study, spec, models, prompts)}
    if not cells:
        lacks = f"study {study.name!r} has no cell: give at least one of [[models]] and of [[analyses]]"
        raise fault(lacks, study.origin)
    return tuple(cells.values())


def check_names(study: Study) -> None:
    """Refuse names that are unknown or given twice.

    Raises:
        StudyError: the first fault.
    """
    kinds: dict[str, tuple[Any, ...]] = {"model": study.models, "prompts": study.prompts, "analysis": study.analyses}
    first: dict[tuple[str, str], Origin | None] = {}
    for kind, spec in ((kind, spec) for kind, specs in kinds.items() for spec in specs):
        if (kind, spec.label) in first:
            place = f", first at {first[kind, spec.label]}" if spec.origin else ""
            twice = f"{kind} {spec.label!r} is named twice{place}: give each a name of its own"
            raise fault(twice, spec.origin, "name")
        first[kind, spec.label] = spec.origin
    for analysis in study.analyses:
        with located(analysis.origin, "analysis"):
            get_analysis(analysis.analysis)
    for origin, keys, kind, name in _names_used(study):
        if (kind, name) not in first:
            raise fault(unknown(kind, name, [label for other, label in first if other == kind]), origin, *keys)


def _names_used(study: Study) -> Iterator[tuple[Origin | None, tuple[Key, ...], str, str]]:
    """Yield each name that stands for a model, prompt set or analysis, with its place and kind."""
    for spec in study.analyses:
        for key, kind in (("models", "model"), ("prompts", "prompts")):
            yield from ((spec.origin, (key, i), kind, name) for i, name in enumerate(getattr(spec, key) or ()))
    for override in study.overrides:
        for kind in ("model", "prompts", "analysis"):
            if (name := getattr(override, kind)) is not None:
                yield override.origin, (kind,), kind, name


def _check_size(study: Study) -> None:
    """Refuse a matrix that is too large before it is written out."""
    sizes = [_size(study, spec) for spec in study.analyses]
    if sum(sizes) > MAX_CELLS:
        largest = study.analyses[sizes.index(max(sizes))]
        raise fault(
            f"study {study.name!r} is a matrix of {sum(sizes):,} cells, {max(sizes):,} of them of analysis {largest.label!r}; "
            f"at most {MAX_CELLS:,} are accepted: shorten its lists, or split the study",
            largest.origin,
        )


def _size(study: Study, spec: AnalysisSpec) -> int:
    models = len(study.models if spec.models is None else spec.models)
    prompts = len(study.prompts if spec.prompts is None else spec.prompts)
    varied = math.prod(len(values) for values in spec.vary.values())
    return models * max(1, prompts) * varied * len(_seeds(study, spec))


def _seeds(study: Study, spec: AnalysisSpec) -> tuple[int | None, ...]:
    """The seeds of an entry's cells; those it fixes itself, and analyses without one, are not multiplied."""
    given = "seed" in spec.options or "seed" in spec.vary
    return study.seeds if "seed" in types_of(get_analysis(spec.analysis)) and not given else (None,)


class _Models(dict[StudyModel, tuple[dict[str, str], int]]):
    """Each model's fingerprint and size, looked up once."""

    def __missing__(self, spec: StudyModel) -> tuple[dict[str, str], int]:
        with located(spec.origin, "ref"):
            checkpoint = fingerprint.find(spec)
            self[spec] = fingerprint.of_model(spec, checkpoint), fingerprint.weight_bytes(checkpoint)
        return self[spec]


def _read(spec: PromptSet) -> Prompts:
    with located(spec.origin, "file" if spec.file else "name"):
        lines = spec.read()
    return Prompts(spec.label, lines, fingerprint.of_lines(lines), None if spec.limit else spec.file)


def _cells_of(study: Study, spec: AnalysisSpec, models: _Models, prompts: Mapping[str, Prompts]) -> Iterator[Cell]:
    cls = get_analysis(spec.analysis)
    fixed = {name: _setting(spec, value, "options", name) for name, value in spec.options.items()}
    lists = [
        [(name, _setting(spec, value, "vary", name, i)) for i, value in enumerate(values)]
        for name, values in spec.vary.items()
    ]
    on = [model for model in study.models if spec.models is None or model.label in spec.models]
    for chosen in itertools.product(*lists):
        settings = {**fixed, **dict(chosen)}
        for label in _prompt_labels(study, spec, make(cls, settings, spec.origin).makes_prompts):
            given = None if label is None else prompts[label]
            with located(None):
                for line in given.lines if given else ():
                    check_fields(line.fields, line.where, cls.prompt_fields)
            for model, seed in itertools.product(on, _seeds(study, spec)):
                changed = _overridden(study, spec, model, label)
                if changed is not None:
                    drawn = {} if seed is None else {"seed": Setting(seed)}
                    analysis = make(cls, {**drawn, **settings, **changed}, spec.origin)
                    yield _cell(spec, analysis, [name for name, _ in chosen], model, models[model], given)


def _setting(spec: AnalysisSpec | Override, value: Any, *keys: Key) -> Setting:
    return Setting(value, spec.origin and spec.origin.child(*keys))


def _cell(
    spec: AnalysisSpec,
    analysis: Any,
    varied: Sequence[str],
    model: StudyModel,
    weights: tuple[dict[str, str], int],
    prompts: Prompts | None,
) -> Cell:
    options = dataclasses.asdict(analysis)
    identity = {
        "format": FORMAT,
        "analysis": analysis.name,
        "options": options,
        "files": fingerprint.of_named_files(options.items()),
        "model": weights[0],
        "prompts": prompts.digest if prompts else None,
    }
    labels = {name: options[name] for name in varied if name != "seed"}
    name = f"{analysis.name}-{fingerprint.digest(identity)[:16]}"
    return Cell(name, analysis, model, weights[1], prompts, spec.label, labels, options.get("seed"))


def _prompt_labels(study: Study, spec: AnalysisSpec, makes_prompts: bool) -> Sequence[str | None]:
    labels = spec.prompts
    if labels is None and not makes_prompts:
        labels = tuple(prompts.label for prompts in study.prompts)
    if not labels and not makes_prompts:
        raise fault(
            f"{spec.analysis} needs prompts: add [[prompts]], or an option that has it make its own", spec.origin
        )
    return labels or (None,)


def _overridden(study: Study, spec: AnalysisSpec, model: StudyModel, prompts: str | None) -> dict[str, Setting] | None:
    """Return the options that overrides give these cells, later ones winning; None where they are left out."""
    changed: dict[str, Setting] = {}
    for override in study.overrides:
        if override.matches(model.label, prompts, spec.label):
            if override.skip:
                return None
            changed |= {name: _setting(override, value, "options", name) for name, value in override.options.items()}
    return changed
