"""What a model, a prompt set or a file is, without loading a model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import xxhash

from analyses.studies.definition import StudyModel
from probes.cache_folder import expanded
from probes.models.sources.locate import Located, locate
from probes.prompts import PromptLine


def digest(value: Any) -> str:
    """Return the xxh3_128 of the JSON of a value, 32 hex digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return xxhash.xxh3_128_hexdigest(text.encode())


def of_lines(lines: Sequence[PromptLine]) -> str:
    """Return the digest of what prompts say, whatever file they came from."""
    return digest([[line.text, line.tokens, dict(line.fields)] for line in lines])


def of_path(path: Path) -> str:
    """Return the digest of a file or folder by names, sizes and modification times: a copy counts as another."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return digest([[str(f.relative_to(path)), f.stat().st_size, f.stat().st_mtime_ns] for f in files])


def of_model(model: StudyModel, checkpoint: Located) -> dict[str, str]:
    """Return what tells a model and its numbers from others: the commit or pinned digest, or the files of a folder."""
    spec = model.spec
    weights = checkpoint.revision or of_path(checkpoint.folder)
    return {"weights": weights, "backend": spec.backend, "dtype": spec.dtype, "attention": spec.attention}


def find(model: StudyModel) -> Located:
    """Return the model's folder; what is not on this machine is fetched.

    Raises:
        ModelError: no such model; the message says what is at hand.
    """
    return locate(model.spec.ref, revision=model.spec.revision, trust_remote_code=model.spec.trust_remote_code)


def weight_bytes(checkpoint: Located) -> int:
    """Return the bytes of the weights on disk, by which models are ordered."""
    return sum(file.stat().st_size for file in checkpoint.folder.glob("*.safetensors"))


def of_named_files(options: Iterable[tuple[str, Any]]) -> dict[str, str]:
    """Return the digests of files and folders that text options name, so that a changed one is another cell."""
    named = [(name, expanded(value)) for name, value in options if isinstance(value, str) and value]
    return {name: of_path(path) for name, path in named if path.exists()}
