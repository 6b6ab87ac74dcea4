"""What the first example showed, kept for the next time the dashboard is opened, to be seen while the model loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from app.live.named_model import model_line
from probes.cache_folder import cache_root
from probes.file_state import file_states
from probes.locked_files import replacing
from probes.models.sources.bundled import BUNDLED
from probes.models.sources.model_cache import installed

FORMAT = 1
"""Of the file."""
MOST = 8
"""Files kept."""


@dataclass(frozen=True)
class Kept:
    """Answers about one session."""

    session: str
    """Its text, as the model's process prints it."""
    data: dict[str, Any]
    """What `view` answered, and under `grids` what `grids` did."""
    when: datetime


def at_hand(session: str) -> bool:
    """Return whether the model of a session is on this machine, among those that a name alone stands for."""
    return _weights(session) is not None


def recall(session: str) -> Kept | None:
    """Return what was kept of a session with the same weights by this version, or None."""
    path = _path(session)
    try:
        record = json.loads(path.read_text(encoding="utf-8")) if path else {}
        when = datetime.fromtimestamp(path.stat().st_mtime) if path else datetime.min
        return Kept(record["session"], _decoded(record["data"]), when)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def keep(session: str, kept: str, data: Mapping[str, Any]) -> None:
    """Keep what was answered of a session whose text came back as `kept`; a cache that cannot be written is left alone."""
    path = _path(session)
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as draft:
            Path(draft).write_text(json.dumps({"session": kept, "data": data}, default=_encoded), encoding="utf-8")
        files = sorted(path.parent.glob("*.json"), key=lambda file: file.stat().st_mtime)
        for old in files[:-MOST]:
            old.unlink(missing_ok=True)
    except OSError:
        return


def _weights(session: str) -> Path | None:
    """The folder of a session's model, where its name stands for pinned weights that are here."""
    entry = BUNDLED.get(model_line(session))
    return installed(entry.name, entry.sha256) if entry else None


def _path(session: str) -> Path | None:
    """Where answers are kept: elsewhere for other weights, another text and another version."""
    folder = _weights(session)
    if folder is None:
        return None
    files = file_states(folder.iterdir())
    name = sha256(repr((FORMAT, version("bathyscope"), session, files)).encode()).hexdigest()[:32]
    return cache_root() / "live" / f"{name}.json"


def _encoded(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {"dtype": str(value.dtype), "values": value.tolist()}
    raise TypeError(f"{type(value).__name__} is not kept")


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"dtype", "values"}:
            return np.array(value["values"], dtype=value["dtype"])
        return {name: _decoded(inner) for name, inner in value.items()}
    return [_decoded(inner) for inner in value] if isinstance(value, list) else value
