"""The folder of converted models: whole folders, put in place by one rename, each with a note of where it came from."""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock

from probes.cache_folder import cache_root
from probes.errors import ModelError

CONVERTER = 1
"""Raised when converted folders must be made anew."""

NOTE = "source.json"


@dataclass(frozen=True)
class Source:
    """Where a converted folder came from."""

    name: str
    digest: str
    """sha256 of the file(s) it was made from."""
    origin: str
    """The packages or the file name."""
    converter: int = CONVERTER


def models_dir() -> Path:
    """Return the folder of converted models."""
    return cache_root() / "models"


def installed(name: str, digest: str) -> Path | None:
    """Return the folder of a model that this converter made from `digest`, or None where there is none."""
    folder = models_dir() / name
    try:
        note = json.loads((folder / NOTE).read_text())
    except (OSError, ValueError):
        return None
    return folder if (note.get("digest"), note.get("converter")) == (digest, CONVERTER) else None


def install(source: Source, build: Callable[[Path, Path], None], *, n_bytes: int, force: bool = False) -> Path:
    """Return the folder of `source`, built by `build(work, folder)` unless it is there; once, however many processes call.

    Args:
        build: fills `folder`; `work` is a scratch folder beside it. Nothing is kept when it raises.
        n_bytes: bytes of disk that building takes, checked before it starts.
        force: make it anew.

    Raises:
        ModelError: the disk is full or the cache cannot be written; whatever `build` raises.
    """
    target = models_dir() / source.name
    # Looked up before the lock, so that a cache the user may only read still serves.
    if not force and installed(source.name, source.digest):
        return target
    with _disk_errors(target.parent, n_bytes):
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f"{source.name}.lock"):
            present = None if force else installed(source.name, source.digest)
            if present:
                return present
            for left in target.parent.glob(f".{source.name}.*"):
                shutil.rmtree(left, ignore_errors=True)
            _check_space(target.parent, n_bytes)
            with tempfile.TemporaryDirectory(prefix=f".{source.name}.", dir=target.parent) as scratch:
                work, folder = Path(scratch) / "work", Path(scratch) / "model"
                work.mkdir()
                folder.mkdir()
                build(work, folder)
                (folder / NOTE).write_text(json.dumps(asdict(source), indent=1))
                if target.exists():
                    target.rename(Path(scratch) / "old")
                folder.rename(target)
    return target


def _check_space(folder: Path, n_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise ModelError(
            f"disk full: {folder} has {free / 1e9:.1f} GB free and this model needs {n_bytes / 1e9:.1f} GB; "
            f"free {(n_bytes - free) / 1e9:.1f} GB, or set BATHYSCOPE_CACHE to a folder with room"
        )


@contextmanager
def _disk_errors(folder: Path, n_bytes: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ModelError(
                f"disk full while writing to {folder}; this model needs {n_bytes / 1e9:.1f} GB; nothing was kept; "
                "free space, or set BATHYSCOPE_CACHE to a folder with room"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR):
            raise ModelError(
                f"cannot write to the cache folder {folder} ({error.strerror}); set BATHYSCOPE_CACHE to one you own"
            ) from error
        raise
