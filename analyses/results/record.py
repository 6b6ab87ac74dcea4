"""`result.json` and `profiles.json`: what they must say to be believed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from probes.errors import OptionError

FORMAT = 1
"""Version of the folder layout of a saved result."""
_LARGEST = 1 << 63
_COUNTS = dict.fromkeys(("prompts", "tokens", "forwards", "held_before"), int)
_SHAPE: Mapping[Any, Any] = {
    "analysis": str,
    "options": {},
    "notes": [str],
    "tables": {...: [str]},
    "card?": {
        **dict.fromkeys(("title", "about", "reference"), str),
        "figures": {...: dict.fromkeys(("title", "caption", "data"), str)},
    },
    "provenance": {
        "model": {"ref": str, "layers": int},
        **dict.fromkeys(("backend", "dtype", "attention", "device"), str),
        "seconds": float,
        "counts": {**_COUNTS, ...: float},
        "loaded?": {"ref": str, **dict.fromkeys(("backend", "dtype", "attention", "device"), str)},
        "faithfulness": {"holds": bool, "identities": [{"name": str, "error": float, "holds": bool}]},
    },
}
"""A type, [shape of each item], or {key: shape}, where `...` stands for every other key, and `key?` may be missing."""
_PROFILES: Mapping[Any, Any] = {
    ...: {
        **dict.fromkeys(("title", "unit", "caption"), str),
        "columns": {key: [float] for key in ("layer", "value", "ci_low?", "ci_high?")},
    }
}


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Refuse a folder of which something cannot be read inside.

    Raises:
        OptionError: the folder holds no readable result.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        raise OptionError(f"{folder} holds no readable result ({error}); give a folder that a run wrote") from None


def read_record(folder: Path) -> dict[str, Any]:
    """What `result.json` says, everything in its place and of its type.

    Raises:
        OptionError: it says something else than a result would; names the entry.
        OSError: there is none.
        ValueError: it is no JSON, or holds half of a surrogate pair.
    """
    record = parse(folder / "result.json")
    if record.get("format") != FORMAT:
        raise OptionError(f"{folder} has result format {record.get('format')!r}; this version reads {FORMAT}")
    if fault := _fault(record, _SHAPE) or _misnamed(record):
        raise OptionError(f"{folder} holds no readable result (result.json: {fault}); give a folder that a run wrote")
    json.dumps(record, ensure_ascii=False).encode("utf-8")
    return record


def read_profiles(folder: Path) -> dict[str, Any]:
    """Return the depth profiles saved with a result, by name; none of a result saved before there were any.

    Raises:
        OSError: they cannot be read.
        ValueError: they are not as a result saves them; names the entry.
    """
    path = folder / "profiles.json"
    profiles = parse(path) if path.exists() else {}
    if fault := _fault(profiles, _PROFILES):
        raise ValueError(f"{path.name}: {fault}")
    return profiles


def parse(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        OSError: there is no such file.
        ValueError: it is no JSON object.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path.name} is no object")
    return record


def _fault(value: Any, shape: Any, path: str = "") -> str:
    """What is wrong with a value, in words; empty where nothing is."""
    if isinstance(shape, Mapping):
        return _fault_inside(value, shape, path)
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{path} is no list"
        return next((fault for i, item in enumerate(value) if (fault := _fault(item, shape[0], f"{path}[{i}]"))), "")
    if shape is str or shape is bool:
        return "" if isinstance(value, shape) else f"{path} is {value!r:.60}, which is no {shape.__name__}"
    number = isinstance(value, int if shape is int else int | float) and not isinstance(value, bool)
    return "" if number and not abs(value) > _LARGEST else f"{path} is {value!r:.60}, which is no number that fits"


def _fault_inside(value: Any, shape: Mapping[Any, Any], path: str) -> str:
    if not isinstance(value, dict):
        return f"{path} is no object"
    missing = [key for key in shape if key is not ... and not key.endswith("?") and key not in value]
    if missing:
        return f"{path}.{missing[0]} is missing".lstrip(".")
    shapes = {key: shape.get(key, shape.get(f"{key}?", shape.get(...))) for key in value}
    checked = [(key, of) for key, of in shapes.items() if of is not None]
    return next((fault for key, of in checked if (fault := _fault(value[key], of, f"{path}.{key}".lstrip(".")))), "")


def _misnamed(record: Mapping[str, Any]) -> str:
    """Names of tables and figures are names of files in the result's own folder."""
    named = {"tables": record["tables"], "card.figures": record.get("card", {}).get("figures", {})}
    pairs = [(path, name) for path, names in named.items() for name in names]
    wrong = [(path, name) for path, name in pairs if not name or name[0] == "." or "/" in name or "\0" in name]
    return f"{wrong[0][0]} has {wrong[0][1]!r}, which is no name of a file" if wrong else ""
