"""Files in the cache that keep what a load established: facts as JSON, and tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from probes.locked_files import replacing


def read_record(path: Path, names: Sequence[str] = ()) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Return (facts, tensors of these names or all), or None where the file is missing, damaged or lacks one of them."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in names or file.keys()}
            return json.loads((file.metadata() or {})["facts"]), tensors
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def write_record(path: Path, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Keep facts and tensors; a cache that cannot be written is left alone."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as draft:
            save_file(dict(tensors), draft, metadata={"facts": json.dumps(facts)})
    except OSError:
        return
