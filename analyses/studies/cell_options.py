"""An analysis made from option values of a study, each fault laid to the value that caused it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from analyses.base import Analysis
from analyses.options import types_of, with_options
from analyses.studies.file_lines import Origin, fault
from probes.errors import OptionError, unknown


class Setting(NamedTuple):
    """The value of an option, and where it was given."""

    value: Any
    origin: Origin | None = None


def make(cls: type[Analysis], settings: Mapping[str, Setting], origin: Origin | None) -> Analysis:
    """Return the analysis with these options.

    A fault is that of the one option that is refused alone in the same words, or of the analysis where only several are.

    Raises:
        StudyError: an unknown option, a value of the wrong type or outside its range; with file and line.
    """
    types = types_of(cls)
    for name, setting in settings.items():
        if name not in types:
            raise fault(unknown(f"option of {cls.name}", name, types), setting.origin)
    values = {name: setting.value for name, setting in settings.items()}
    try:
        return with_options(cls, values)
    except OptionError as error:
        message = str(error)
    alone = (settings[name].origin for name, value in values.items() if _refusal(cls, {name: value}) == message)
    raise fault(f"{cls.name}: {message}", next(alone, origin))


def _refusal(cls: type[Analysis], values: Mapping[str, Any]) -> str | None:
    try:
        with_options(cls, values)
    except OptionError as error:
        return str(error)
    return None
