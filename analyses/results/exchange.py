"""Putting a folder in the place of another in one step, and keeping whatever else lay in the old one.

A draft is written in a workspace beside the folder, `.bathyscope-<32 hex>/`, which its process keeps locked. A process
that is killed leaves a workspace that nobody locks: whoever opens a folder beside it ends the exchange, or discards it.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from probes.errors import OptionError
from probes.locked_files import LockedFile, lock_for_removal, sync

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NOT_HERE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
_WORKSPACE = re.compile(r"\.bathyscope-[0-9a-f]{32}")


def swap(one: Path, other: Path) -> bool:
    """Exchange two paths in one step; False, with nothing done, where system or file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NOT_HERE:
        return False
    raise OSError(code, os.strerror(code), str(other))


@dataclass(frozen=True)
class Plan:
    """What an exchange is about to do, so that anyone can tell how far it came."""

    folder: str
    """The name of the folder to be replaced, which lies beside the workspace."""
    draft: int
    """Inode of the folder that is to stand there."""
    replaced: int
    """Inode of the folder that stood there."""
    files: tuple[str, ...]
    """Files of the replaced folder that may be deleted, relative to it; all others are kept."""


@dataclass(frozen=True)
class Workspace:
    """A folder for one draft, beside the folder it is for."""

    root: Path

    @property
    def draft(self) -> Path:
        """Where the new folder is written."""
        return self.root / "new"

    @property
    def old(self) -> Path:
        """Where the replaced folder is put, if the two cannot be exchanged in one step."""
        return self.root / "old"

    @property
    def plan(self) -> Path:
        """The file that says which exchange is under way."""
        return self.root / "plan.json"

    def exchange(self, folder: Path, files: frozenset[str]) -> bool:
        """Put the draft in the place of `folder`; False where something else has come to stand there meanwhile.

        Raises:
            OptionError: the draft has a file at the path of one that is not among `files`.
            OSError: the system refuses.
        """
        _persist(self.draft)
        if not os.path.lexists(folder):
            # Replaces nothing but an empty folder, whatever may have come there meanwhile.
            self.draft.rename(folder)
            sync(folder.parent)
            return True
        for name in _others(folder, self.draft, files):
            if os.path.lexists(self.draft / name):
                raise OptionError(
                    f"{str(folder / name)!r} was not written by the result that it lies in, and would be replaced: "
                    "move it away, or give another folder"
                )
        shutil.copymode(folder, self.draft)
        plan = Plan(folder.name, _inode(self.draft), _inode(folder), tuple(sorted(files)))
        self.plan.write_text(json.dumps(asdict(plan)), encoding="utf-8")
        if not swap(self.draft, folder):
            folder.rename(self.old)
        return self.settle()

    def settle(self) -> bool:
        """End an exchange that was begun, wherever it was stopped; return whether the draft stands at its place."""
        plan = self._read_plan()
        if plan is None:
            return False
        folder = self.root.parent / plan.folder
        aside = self.old if os.path.lexists(self.old) else self.draft
        if _inode(aside) in (plan.draft, 0):
            return False
        if _inode(aside) != plan.replaced:
            self._give_back(aside, folder)
            return False
        if not os.path.lexists(folder):
            self.draft.rename(folder)
        _carry(aside, folder, frozenset(plan.files))
        sync(folder.parent)
        return True

    def discard(self) -> None:
        """Remove all but the locks; once the plan is gone, nothing here is worth keeping."""
        self.plan.unlink(missing_ok=True)
        shutil.rmtree(self.draft, ignore_errors=True)
        shutil.rmtree(self.old, ignore_errors=True)

    def _read_plan(self) -> Plan | None:
        try:
            return Plan(**json.loads(self.plan.read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            # A plan that was not written to its end: the exchange had not begun.
            return None

    def _give_back(self, aside: Path, folder: Path) -> None:
        if not os.path.lexists(folder):
            aside.rename(folder)
        elif not swap(aside, folder):
            folder.rename(self.draft)
            aside.rename(folder)


@contextmanager
def replacing(folder: Path, check: Callable[[Path], frozenset[str]]) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` at the end; after a fault, nothing has changed.

    Whatever `check` does not name stays in the folder, other folders and their contents too.

    Args:
        check: the files in a folder that may be replaced; it refuses a folder that may not be, now and at the end.

    Raises:
        OptionError: as `check` does.
        OSError: the system refuses, for instance for lack of room.
    """
    check(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder = folder.parent.resolve() / folder.name
    sweep(folder.parent)
    workspace, lock = _open_workspace(folder.parent)
    try:
        workspace.draft.mkdir()
        yield workspace.draft
        while not workspace.exchange(folder, check(folder)):
            workspace.plan.unlink(missing_ok=True)
    finally:
        _close(workspace, lock)


def sweep(parent: Path) -> None:
    """End or discard the exchanges of processes that were killed, in so far as this one may."""
    with suppress(OSError):
        for entry in list(os.scandir(parent)):
            if _WORKSPACE.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                with suppress(OSError):
                    _take_over(Workspace(Path(entry.path)))


def _take_over(workspace: Workspace) -> None:
    locks = list(workspace.root.glob("*.lock"))
    locked = [fd for path in locks if (fd := lock_for_removal(path)) is not None]
    try:
        if len(locked) == len(locks) and locks:
            workspace.settle()
            workspace.discard()
            for path in locks:
                path.unlink(missing_ok=True)
        # Without a lock it is being made or removed; only an empty one can be.
        if len(locked) == len(locks):
            workspace.root.rmdir()
    finally:
        for fd in locked:
            os.close(fd)


def _open_workspace(parent: Path) -> tuple[Workspace, LockedFile]:
    while True:
        root = parent / f".bathyscope-{uuid.uuid4().hex}"
        root.mkdir()
        try:
            return Workspace(root), LockedFile(root, "lock")
        except FileNotFoundError:
            # Swept between being made and being locked.
            continue


def _close(workspace: Workspace, lock: LockedFile) -> None:
    try:
        # After a fault in the middle of the exchange, what was put aside goes where it belongs first.
        workspace.settle()
        workspace.discard()
        lock.discard()
        with suppress(OSError):
            workspace.root.rmdir()
    finally:
        lock.release()


def _others(source: Path, target: Path, files: frozenset[str], inside: str = "") -> Iterator[str]:
    """Paths in `source` that are not among `files`: a folder as one, unless `files` or `target` have a part in it."""
    for entry in sorted(os.scandir(source / inside), key=lambda entry: entry.name):
        path = f"{inside}{entry.name}"
        is_folder = entry.is_dir(follow_symlinks=False)
        shared = any(name.startswith(f"{path}/") for name in files) or _is_folder(target / path)
        if is_folder and shared:
            yield from _others(source, target, files, f"{path}/")
        elif is_folder or path not in files:
            yield path


def _carry(source: Path, target: Path, files: frozenset[str]) -> None:
    """Move what is not among `files` to where it lay."""
    for name in list(_others(source, target, files)):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).rename(_free(target / name))


def _free(path: Path) -> Path:
    """The path, or where something has come there meanwhile, one like it."""
    number, choice = 0, path
    while os.path.lexists(choice):
        number += 1
        choice = path.with_name(f"{path.name}.kept{number}")
    return choice


def _persist(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            with (Path(root) / name).open("rb") as file:
                os.fsync(file.fileno())
        sync(Path(root))


def _inode(path: Path) -> int:
    """0 where nothing is."""
    try:
        return os.lstat(path).st_ino
    except FileNotFoundError:
        return 0


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
