"""An analysis made from option values of a study, each fault laid to the value that caused it."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from analyses.base import Analysis
from analyses.options import NAMES, types_of
from analyses.studies.origin import Origin, StudyError, fault
from probes.errors import OptionError, shown, unknown


@dataclass(frozen=True)
class Setting:
    """The value of an option, and where it was given."""

    value: Any
    origin: Origin | None = None


def make(cls: type[Analysis], settings: Mapping[str, Setting], origin: Origin | None) -> Analysis:
    """The analysis with these options.

    Raises:
        StudyError: an unknown option, a value of the wrong type or outside its range; with file and line.
    """
    types = types_of(cls)
    values = {}
    for name, setting in settings.items():
        if name not in types:
            raise fault(unknown(f"option of {cls.name}", name, types), setting.origin)
        values[name] = _convert(name, setting, types[name])
    try:
        return cls(**values)
    except OptionError as error:
        raise _placed(cls, values, settings, str(error), origin) from None


def _placed(
    cls: type[Analysis], values: Mapping[str, Any], settings: Mapping[str, Setting], message: str, origin: Origin | None
) -> StudyError:
    """The fault of the one option that is refused alone in the same words, or of the analysis where only several are."""
    for name, value in values.items():
        try:
            cls(**{name: value})
        except OptionError as error:
            if str(error) == message:
                return fault(f"{cls.name}: {message}", settings[name].origin)
    return fault(f"{cls.name}: {message}", origin)


def _convert(name: str, setting: Setting, kind: Any) -> Any:
    if typing.get_origin(kind) is tuple:
        element = typing.get_args(kind)[0]
        many = setting.value if isinstance(setting.value, list | tuple) else [setting.value]
        return tuple(_scalar(name, value, element, setting.origin) for value in many)
    return _scalar(name, setting.value, kind, setting.origin)


def _scalar(name: str, value: Any, kind: Any, origin: Origin | None) -> Any:
    if typing.get_origin(kind) is typing.Literal:
        kind = type(typing.get_args(kind)[0])
    if kind is float and type(value) is int:
        return float(value)
    if kind in NAMES and type(value) is not kind:
        raise fault(f"option {name} is {shown(value)}: give {NAMES[kind]}", origin)
    return value
