"""A study as frozen data: models, prompt sets, analyses with their option lists, seeds, and overrides of single cells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analyses.running.model_spec import ModelSpec
from analyses.studies.origin import Origin
from probes.prompts import PromptLine, read_prompts


@dataclass(frozen=True)
class StudyModel:
    """A model of a study, and what its figures and tables call it."""

    spec: ModelSpec
    name: str = ""
    """The reference unless given."""
    origin: Origin | None = field(default=None, compare=False, repr=False)

    @property
    def label(self) -> str:
        return self.name or self.spec.ref


@dataclass(frozen=True)
class PromptSet:
    """Prompts by name: a JSON-lines file, or texts and token ids written out."""

    name: str
    file: Path | None = None
    texts: tuple[str, ...] = ()
    tokens: tuple[tuple[int, ...], ...] = ()
    limit: int = 0
    """At most so many, from the beginning; 0 takes all."""
    origin: Origin | None = field(default=None, compare=False, repr=False)

    @property
    def label(self) -> str:
        return self.name

    def read(self) -> tuple[PromptLine, ...]:
        """Its lines, not yet checked for what an analysis asks of them.

        Raises:
            PromptError: the first fault of the file, with its line.
        """
        if self.file is not None:
            lines = read_prompts(self.file)
        else:
            lines = [PromptLine(f"{self.name}, text {i}", text, None) for i, text in enumerate(self.texts)]
            lines += [PromptLine(f"{self.name}, tokens {i}", None, ids) for i, ids in enumerate(self.tokens)]
        return tuple(lines[: self.limit or None])


@dataclass(frozen=True)
class AnalysisSpec:
    """An analysis and its options; `vary` gives lists, and every combination of their values is a cell."""

    analysis: str
    """The name of a registered analysis."""
    name: str = ""
    """What figures and tables call it; the analysis's name unless given."""
    options: Mapping[str, Any] = field(default_factory=dict)
    vary: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    models: tuple[str, ...] | None = None
    """Models it runs on, by name; None for all."""
    prompts: tuple[str, ...] | None = None
    """Prompt sets it runs on, by name; None for all, or for none where it makes its own prompts."""
    origin: Origin | None = field(default=None, compare=False, repr=False)

    @property
    def label(self) -> str:
        return self.name or self.analysis


@dataclass(frozen=True)
class Override:
    """Other options for the cells of one model, prompt set or analysis, or of a combination of them."""

    model: str | None = None
    prompts: str | None = None
    analysis: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    skip: bool = False
    """Leave these cells out."""
    origin: Origin | None = field(default=None, compare=False, repr=False)

    def matches(self, model: str, prompts: str | None, analysis: str) -> bool:
        """Whether it speaks of the cells with these names."""
        wanted = ((self.model, model), (self.prompts, prompts), (self.analysis, analysis))
        return all(asked is None or asked == found for asked, found in wanted)


@dataclass(frozen=True)
class Study:
    """Models x prompt sets x analyses x option lists x seeds."""

    name: str
    models: tuple[StudyModel, ...]
    analyses: tuple[AnalysisSpec, ...]
    prompts: tuple[PromptSet, ...] = ()
    seeds: tuple[int, ...] = (0,)
    """One cell each, for analyses that draw anything at random."""
    overrides: tuple[Override, ...] = ()
    title: str = ""
    origin: Origin | None = field(default=None, compare=False, repr=False)
