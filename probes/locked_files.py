"""Files locked for as long as their owner lives, and renames made durable."""

from __future__ import annotations

import fcntl
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class LockedFile:
    """A file of a random name that carries an exclusive lock for as long as its owner lives."""

    def __init__(self, folder: Path, suffix: str) -> None:
        while True:
            self.path = folder / f"{uuid.uuid4().hex}.{suffix}"
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o666)
            fcntl.flock(self.fd, fcntl.LOCK_EX)
            if os.fstat(self.fd).st_nlink:
                return
            # A sweep came between creating and locking.
            os.close(self.fd)

    def release(self) -> None:
        """Unlock and close; unlocking first frees readers even where a forked child inherited the descriptor."""
        if self.fd >= 0:
            fcntl.flock(self.fd, fcntl.LOCK_UN)
            os.close(self.fd)
            self.fd = -1

    def discard(self) -> None:
        """Remove the file and release it; does nothing once released."""
        if self.fd >= 0:
            self.path.unlink(missing_ok=True)
            self.release()


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Shut out others who ask the same of this file, in any process, until the end of the block."""
    fd = _open_file(path)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def lock_for_removal(path: Path) -> int | None:
    """Return a descriptor that locks the file exclusively, or None where it is in use, gone, no file, or out of reach."""
    try:
        fd = _open_file(path)
    except OSError:
        return None
    try:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
    except OSError:
        pass
    os.close(fd)
    return None


def write_whole(path: Path, text: str) -> None:
    """Write a file that is the old or the new one, whatever moment the process is killed at."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Give a draft beside a file, which takes the file's place at the end of the block, and is gone where the block fails."""
    draft = path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex[:12]}")
    try:
        yield draft
        if durable:
            sync(draft)
        draft.replace(path)
        if durable:
            sync(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Make what was written to a file, or the renames in a folder, durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _open_file(path: Path) -> int:
    # Without O_NONBLOCK a named pipe would be waited for.
    flags = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
    try:
        return os.open(path, os.O_RDWR | flags)
    except PermissionError:
        return os.open(path, os.O_RDONLY | flags)
