"""A study as frozen data: models, prompt sets, analyses with their option lists, seeds, and overrides of single cells."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, MinLen
from pydantic import AfterValidator, ConfigDict, InstanceOf, Strict, ValidationInfo, field_validator, model_validator
from pydantic.dataclasses import dataclass

from analyses.running.model_spec import ModelSpec
from analyses.studies.file_lines import Origin
from probes.errors import shown
from probes.prompts import PromptLine, read_prompts

MAX_NAME = 200
"""Characters of the longest name of a study, which names its folder."""


def without_nul(value: Any) -> Any:
    """Return the value, unless it is a text that holds a NUL."""
    if isinstance(value, str) and "\0" in value:
        raise ValueError(f"{shown(value)} holds a NUL: leave it out")
    return value


Text = Annotated[str, Strict(), AfterValidator(without_nul)]
Name = Annotated[Text, MinLen(1)]
Count = Annotated[int, Strict(), Ge(0)]
Options = dict[Text, Any]
CLOSED = ConfigDict(extra="forbid")


def _origin() -> Any:
    """The field that says where a part of a study was written; it decides nothing."""
    return dataclasses.field(default=None, compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class StudyModel:
    """A model of a study, and what its figures and tables call it."""

    spec: ModelSpec
    name: str = ""
    """The reference unless given."""
    origin: Origin | None = _origin()

    @property
    def label(self) -> str:
        """What figures and tables call it."""
        return self.name or self.spec.ref


@dataclass(frozen=True, config=CLOSED)
class PromptSet:
    """Prompts by name: a JSON-lines file, or texts and token ids written out."""

    name: Name
    file: Path | None = None
    texts: tuple[Name, ...] = ()
    tokens: tuple[Annotated[tuple[Count, ...], MinLen(1)], ...] = ()
    limit: Count = 0
    """At most so many, from the beginning; 0 takes all."""
    origin: InstanceOf[Origin] | None = _origin()

    @field_validator("file", mode="before")
    @classmethod
    def _beside_the_study(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str) and info.context:
            return info.context / without_nul(value) if value else None
        return value

    @model_validator(mode="after")
    def _has_one_source(self) -> PromptSet:
        if (self.file is not None) == bool(self.texts or self.tokens):
            raise ValueError(f"prompts {self.name!r} need either file or texts or tokens")
        return self

    @property
    def label(self) -> str:
        """What figures and tables call it."""
        return self.name

    def read(self) -> tuple[PromptLine, ...]:
        """Return its lines, not yet checked for what an analysis asks of them.

        Raises:
            PromptError: the first fault of the file, with its line.
        """
        if self.file is not None:
            lines = read_prompts(self.file)
        else:
            lines = [PromptLine(f"{self.name}, text {i}", text, None) for i, text in enumerate(self.texts)]
            lines += [PromptLine(f"{self.name}, tokens {i}", None, ids) for i, ids in enumerate(self.tokens)]
        return tuple(lines[: self.limit or None])


@dataclass(frozen=True, config=CLOSED)
class AnalysisSpec:
    """An analysis and its options; `vary` gives lists, and every combination of their values is a cell."""

    analysis: Name
    """The name of a registered analysis."""
    name: Text = ""
    """What figures and tables call it; the analysis's name unless given."""
    options: Options = dataclasses.field(default_factory=dict)
    vary: dict[Text, Annotated[tuple[Any, ...], MinLen(1)]] = dataclasses.field(default_factory=dict)
    models: tuple[Text, ...] | None = None
    """Models it runs on, by name; None for all."""
    prompts: tuple[Text, ...] | None = None
    """Prompt sets it runs on, by name; None for all, or for none where it makes its own prompts."""
    origin: InstanceOf[Origin] | None = _origin()

    @property
    def label(self) -> str:
        """What figures and tables call it."""
        return self.name or self.analysis


@dataclass(frozen=True, config=CLOSED)
class Override:
    """Other options for the cells of one model, prompt set or analysis, or of a combination of them."""

    model: Text | None = None
    prompts: Text | None = None
    analysis: Text | None = None
    options: Options = dataclasses.field(default_factory=dict)
    skip: Annotated[bool, Strict()] = False
    """Leave these cells out."""
    origin: InstanceOf[Origin] | None = _origin()

    @model_validator(mode="after")
    def _changes_something(self) -> Override:
        if not self.options and not self.skip:
            raise ValueError("an override changes nothing: give options, or skip = true")
        return self

    def matches(self, model: str, prompts: str | None, analysis: str) -> bool:
        """Whether it speaks of the cells with these names."""
        names = ((self.model, model), (self.prompts, prompts), (self.analysis, analysis))
        return all(chosen is None or chosen == name for chosen, name in names)


@dataclass(frozen=True, config=CLOSED)
class Study:
    """Models x prompt sets x analyses x option lists x seeds."""

    name: Name
    models: tuple[StudyModel, ...]
    analyses: tuple[AnalysisSpec, ...]
    prompts: tuple[PromptSet, ...] = ()
    seeds: tuple[Annotated[int, Strict()], ...] = (0,)
    """One cell each, for analyses that draw anything at random."""
    overrides: tuple[Override, ...] = ()
    title: Text = ""
    origin: InstanceOf[Origin] | None = _origin()

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        if Path(name).name != name or len(name) > MAX_NAME:
            raise ValueError(f"name is {shown(name)}: give one of at most {MAX_NAME} characters without /")
        return name

    @field_validator("seeds")
    @classmethod
    def _differ(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if not seeds:
            raise ValueError("seeds is empty: give at least one, [0]")
        if twice := [seed for i, seed in enumerate(seeds) if seed in seeds[:i]]:
            raise ValueError(f"seed {twice[0]} is given twice")
        return seeds
