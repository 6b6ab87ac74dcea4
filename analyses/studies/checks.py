"""What is checked of a study before its cells are written out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from analyses.registry import get_analysis
from analyses.studies.definition import AnalysisSpec, PromptSet, Study, StudyModel
from analyses.studies.origin import Key, Origin, StudyError, fault
from probes.errors import UserError, unknown
from probes.prompts import FieldCheck, PromptLine, check_fields


@contextmanager
def located(origin: Origin | None, *path: Key) -> Iterator[None]:
    """Errors of the user inside get the place of the study that led to them."""
    try:
        yield
    except StudyError:
        raise
    except UserError as error:
        raise fault(str(error), origin, *path) from error


def check_names(study: Study) -> None:
    """Refuses names that are unknown or given twice.

    Raises:
        StudyError: the first fault.
    """
    for kind, specs in (("model", study.models), ("prompts", study.prompts), ("analysis", study.analyses)):
        _check_once(kind, specs)
    models, prompts = [m.label for m in study.models], [p.label for p in study.prompts]
    for spec in study.analyses:
        with located(spec.origin, "analysis"):
            get_analysis(spec.analysis)
        for key, kind, names, legal in (
            ("models", "model", spec.models, models),
            ("prompts", "prompts", spec.prompts, prompts),
        ):
            for i, name in enumerate(names or ()):
                if name not in legal:
                    raise fault(unknown(kind, name, legal), spec.origin, key, i)
    _check_overrides(study, models, prompts)


def _check_once(kind: str, specs: Sequence[StudyModel] | Sequence[PromptSet] | Sequence[AnalysisSpec]) -> None:
    first: dict[str, Origin | None] = {}
    for spec in specs:
        if spec.label in first:
            before = first[spec.label]
            place = f", first at {before}" if before else ""
            raise fault(
                f"{kind} {spec.label!r} is named twice{place}: give each a name of its own", spec.origin, "name"
            )
        first[spec.label] = spec.origin


def _check_overrides(study: Study, models: Sequence[str], prompts: Sequence[str]) -> None:
    analyses = [spec.label for spec in study.analyses]
    for override in study.overrides:
        for key, name, legal in (
            ("model", override.model, models),
            ("prompts", override.prompts, prompts),
            ("analysis", override.analysis, analyses),
        ):
            if name is not None and name not in legal:
                raise fault(unknown(key, name, legal), override.origin, key)


def check_lines(lines: Sequence[PromptLine], checks: Mapping[str, FieldCheck]) -> None:
    """Refuses prompt lines whose fields are not what an analysis asks for.

    Raises:
        PromptError: the first fault, with file and line.
    """
    for line in lines:
        check_fields(line.fields, line.where, checks)
