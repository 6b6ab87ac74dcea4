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
from analyses.studies.definition import AnalysisSpec, PromptSet, Study, StudyModel
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
    def label(self) -> str:
        """The cell as a reader knows it."""
        parts = [self.entry, self.model.label, self.prompts.label if self.prompts else "own prompts"]
        parts += [f"{name}={shown(value)}" for name, value in self.varied.items()]
        return " · ".join(parts if self.seed is None else [*parts, f"seed {self.seed}"])


def shown(value: Any) -> str:
    """An option's value in few words."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def expand(study: Study) -> tuple[Cell, ...]:
    """Every cell of a study, once each, in the order of its file; all of it checked, nothing loaded.

    Models that are not on this machine are fetched.

    Raises:
        StudyError: a fault, with file and line where the study came from a file.
    """
    check_names(study)
    _check_size(study)
    models, prompts = _Models(), {found.label: _read(found) for found in study.prompts}
    cells = {cell.name: cell for spec in study.analyses for cell in _cells_of(study, spec, models, prompts)}
    if not cells:
        raise fault(
            f"study {study.name!r} has no cell: give at least one of [[models]] and of [[analyses]]", study.origin
        )
    return tuple(cells.values())


def check_names(study: Study) -> None:
    """Refuse names that are unknown or given twice.

    Raises:
        StudyError: the first fault.
    """
    kinds = {"model": study.models, "prompts": study.prompts, "analysis": study.analyses}
    first: dict[tuple[str, str], Origin | None] = {}
    for kind, spec in ((kind, spec) for kind, specs in kinds.items() for spec in specs):  # type: ignore[attr-defined]
        if (kind, spec.label) in first:
            before = first[kind, spec.label]
            place = f", first at {before}" if before else ""
            raise fault(
                f"{kind} {spec.label!r} is named twice{place}: give each a name of its own", spec.origin, "name"
            )
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
    """Refuses a matrix that is too large before it is written out."""
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


class _Models:
    """Each model's fingerprint and size, found once."""

    def __init__(self) -> None:
        self._found: dict[StudyModel, tuple[dict[str, str], int]] = {}

    def __getitem__(self, spec: StudyModel) -> tuple[dict[str, str], int]:
        if spec not in self._found:
            with located(spec.origin, "ref"):
                found = fingerprint.find(spec)
                self._found[spec] = fingerprint.of_model(spec, found), fingerprint.weight_bytes(found)
        return self._found[spec]


def _read(spec: PromptSet) -> Prompts:
    with located(spec.origin, "file" if spec.file else "name"):
        lines = spec.read()
    return Prompts(spec.label, lines, fingerprint.of_lines(lines), None if spec.limit else spec.file)


def _cells_of(study: Study, spec: AnalysisSpec, models: _Models, prompts: Mapping[str, Prompts]) -> Iterator[Cell]:
    cls = get_analysis(spec.analysis)
    fixed = {name: Setting(v, spec.origin and spec.origin.child("options", name)) for name, v in spec.options.items()}
    lists = [
        [(name, Setting(value, spec.origin and spec.origin.child("vary", name, i))) for i, value in enumerate(values)]
        for name, values in spec.vary.items()
    ]
    for chosen in itertools.product(*lists):
        settings = {**fixed, **dict(chosen)}
        makes = make(cls, settings, spec.origin).makes_prompts
        for label in _prompt_labels(study, spec, makes):
            given = None if label is None else prompts[label]
            with located(None):
                for line in given.lines if given else ():
                    check_fields(line.fields, line.where, cls.prompt_fields)
            for model in _models_of(study, spec):
                changed = _overridden(study, spec, model, label)
                if changed is None:
                    continue
                for seed in _seeds(study, spec):
                    yield _cell(cls, spec, {**settings, **changed}, [n for n, _ in chosen], model, models, given, seed)


def _cell(
    cls: type[Analysis],
    spec: AnalysisSpec,
    settings: dict[str, Setting],
    varied: Sequence[str],
    model: StudyModel,
    models: _Models,
    prompts: Prompts | None,
    seed: int | None,
) -> Cell:
    if seed is not None:
        settings = {"seed": Setting(seed), **settings}
    analysis = make(cls, settings, spec.origin)
    weights, size = models[model]
    options: dict[str, Any] = dataclasses.asdict(analysis)  # type: ignore[call-overload]
    what = {
        "format": FORMAT,
        "analysis": cls.name,
        "options": options,
        "files": fingerprint.of_named_files(options.items()),
        "model": weights,
        "prompts": prompts.digest if prompts else None,
    }
    labels = {name: options[name] for name in varied if name != "seed"}
    name = f"{cls.name}-{fingerprint.digest(what)[:16]}"
    return Cell(name, analysis, model, size, prompts, spec.label, labels, options.get("seed"))


def _prompt_labels(study: Study, spec: AnalysisSpec, makes_prompts: bool) -> Sequence[str | None]:
    asked = spec.prompts
    if asked is None and not makes_prompts:
        asked = tuple(found.label for found in study.prompts)
    if asked:
        return asked
    if makes_prompts:
        return (None,)
    raise fault(f"{spec.analysis} needs prompts: add [[prompts]], or an option that has it make its own", spec.origin)


def _models_of(study: Study, spec: AnalysisSpec) -> list[StudyModel]:
    return [model for model in study.models if spec.models is None or model.label in spec.models]


def _overridden(study: Study, spec: AnalysisSpec, model: StudyModel, prompts: str | None) -> dict[str, Setting] | None:
    """The options that overrides give these cells, later ones winning; None where they are left out."""
    changed: dict[str, Setting] = {}
    for override in study.overrides:
        if override.matches(model.label, prompts, spec.label):
            if override.skip:
                return None
            for name, value in override.options.items():
                changed[name] = Setting(value, override.origin and override.origin.child("options", name))
    return changed
