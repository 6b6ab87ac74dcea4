"""Reading needs no write: a store that this process may not write is read all the same."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from store_makers import CONTEXT, FEATURES, check_rows, make, numbered, shard_files

from probes.errors import StoreError
from probes.store import ActivationStore, AppendOnlyWriter, MissingRows
from probes.store.shard import Shard

SEQUENCES = [numbered(i) for i in range(4)]
NOBODY = 65534
CLONE_NEWNS, MS_BIND, MS_REMOUNT, MS_RDONLY, MS_REC, MS_PRIVATE = 0x20000, 4096, 32, 1, 16384, 1 << 18


def mounted_read_only(root: Path) -> None:
    """Mounts a folder read-only over itself, seen by this process alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    path = os.fsencode(root)
    for done in (
        libc.unshare(CLONE_NEWNS),
        libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None),
        libc.mount(path, path, None, MS_BIND, None),
        libc.mount(path, path, None, MS_BIND | MS_REMOUNT | MS_RDONLY, None),
    ):
        if done:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def as_somebody_else(root: Path) -> None:
    """Gives up root, or without it, the right to write."""
    if os.geteuid() == 0:
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    else:
        for path in [root, *root.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)


WAYS: dict[str, Callable[[Path], None]] = {"another owner": as_somebody_else}
if os.geteuid() == 0:
    WAYS["a read-only mount"] = mounted_read_only


@pytest.fixture(autouse=True)
def imported(tmp_path: Path) -> None:
    """Imports all that reading needs, which somebody else may not be able to."""
    ActivationStore(tmp_path / "first").put(make(SEQUENCES))
    reads_all(tmp_path / "first")


@pytest.fixture(params=WAYS)
def deprived(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Path, Callable[[], None]], None]:
    """Runs a check in a child that may read a folder but not write it."""
    common = Path(tempfile.gettempdir()).resolve()
    for folder in (tmp_path, *tmp_path.parents):
        if folder == common:
            break
        folder.chmod(0o755)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    temporary.chmod(0o777)

    def run(root: Path, check: Callable[[], None]) -> None:
        child = os.fork()
        if not child:
            try:
                os.environ["TMPDIR"] = str(temporary)
                WAYS[request.param](root)
                with pytest.raises(OSError, match=r"Permission denied|Read-only"):
                    (root / "tmp" / "new").touch()
                check()
                os._exit(0)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    return run


def state(root: Path) -> dict[Path, tuple[int, int, int]]:
    return {path: (s.st_ino, s.st_size, s.st_mtime_ns) for path in root.rglob("*") if (s := path.lstat())}


def reads_all(root: Path) -> None:
    store = ActivationStore(root)
    with store.pin():
        assert store.contains(CONTEXT, SEQUENCES, FEATURES).all()
        store.check_space(0)
        assert store.put(make(SEQUENCES)).already_held == len(SEQUENCES) * len(FEATURES)
        check_rows(store, SEQUENCES)
        assert store.read_positions(CONTEXT, SEQUENCES[:1], FEATURES[0], [[-1]])[0].shape == (1, 4)
    assert len(store.ls()) == 1
    assert store.verify().damaged == ()
    assert "bytes in 1 shards" in repr(store)


def test_held_rows_are_read_and_nothing_is_written(store: ActivationStore, deprived: Callable[..., None]) -> None:
    store.put(make(SEQUENCES))
    before = state(store.root)
    deprived(store.root, lambda: reads_all(store.root))
    assert state(store.root) == before


def test_writing_is_refused_before_any_work(store: ActivationStore, deprived: Callable[..., None]) -> None:
    store.put(make(SEQUENCES))

    def check() -> None:
        reader = ActivationStore(store.root)
        for refuse in (
            lambda: reader.put(make([numbered(9)])),
            lambda: reader.check_space(1),
            lambda: reader.gc(),
            lambda: AppendOnlyWriter(store.root).put(make([numbered(9)])),
        ):
            with pytest.raises(StoreError, match=r"can be read here but not written|writing to the store"):
                refuse()
        with pytest.raises(MissingRows):
            reader.read(CONTEXT, [numbered(9)], FEATURES[0])

    deprived(store.root, check)


@pytest.mark.parametrize("damage", ["gone", "behind", "damaged", "journal"])
def test_without_a_usable_catalogue_the_shards_are_read(
    store: ActivationStore, deprived: Callable[..., None], damage: str
) -> None:
    store.put(make(SEQUENCES[:2]))
    path = store.root / "catalogue.sqlite"
    if damage == "behind":
        AppendOnlyWriter(store.root).put(make(SEQUENCES[2:]))
    else:
        store.put(make(SEQUENCES[2:]))
    if damage == "gone":
        path.unlink()
    if damage == "damaged":
        path.write_bytes(b"no database" * 500)
    if damage == "journal":
        Path(f"{path}-journal").write_bytes(b"\xd9\xd5\x05\xf9 \xa1c\xd7" + bytes(2000))

    def check() -> None:
        check_rows(ActivationStore(store.root), SEQUENCES)

    deprived(store.root, check)


def test_a_damaged_shard_is_passed_over(store: ActivationStore, deprived: Callable[..., None]) -> None:
    store.put(make(SEQUENCES))
    (name,) = shard_files(store)
    path = store.root / "shards" / name[:2] / f"{name}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    last = next(
        f
        for f in FEATURES
        if Shard(path).header.slots[f].stop == max(s.stop for s in Shard(path).header.slots.values())
    )

    def check() -> None:
        reader = ActivationStore(store.root)
        with pytest.raises(StoreError, match=f"{name}.*could not be moved to quarantine"):
            reader.read(CONTEXT, SEQUENCES[-1:], last)
        with pytest.raises(MissingRows):
            reader.read(CONTEXT, SEQUENCES[-1:], last)

    deprived(store.root, check)
    assert path.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a second owner")
def test_a_shard_of_which_one_may_not_read_is_named(store: ActivationStore, deprived: Callable[..., None]) -> None:
    store.put(make(SEQUENCES))
    (name,) = shard_files(store)
    path = store.root / "shards" / name[:2] / f"{name}.safetensors"
    path.chmod(0)

    def check() -> None:
        if os.geteuid() == 0:
            return
        with pytest.raises(StoreError, match=f"{name} cannot be read.*Permission denied.*make .* readable"):
            check_rows(ActivationStore(store.root), SEQUENCES)

    deprived(store.root, check)


def test_a_copy_of_the_catalogue_goes_with_its_store(store: ActivationStore, deprived: Callable[..., None]) -> None:
    store.put(make(SEQUENCES))

    def check() -> None:
        reader = ActivationStore(store.root)
        own = reader._backing.catalogue.path
        assert own.exists()
        if not os.fork():
            del reader
            os._exit(0)
        os.wait()
        assert own.exists(), "a child's end is not its parent's"
        del reader
        assert not own.parent.exists()

    deprived(store.root, check)
