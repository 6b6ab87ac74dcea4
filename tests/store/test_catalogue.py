"""The catalogue is an index: lost, damaged or behind, it follows from the shards."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from store_makers import CONTEXT, FEATURES, check_rows, make, numbered, shard_files

from probes.locked_files import LockedFile
from probes.store import ActivationStore
from probes.store.catalogue import Catalogue
from probes.store.files import Partial
from probes.store.layout import encode


def dump(store: ActivationStore) -> dict[str, list[tuple[object, ...]]]:
    """The catalogue's content without its row numbers."""
    queries = {
        "shards": "SELECT h.digest, c.context, h.bytes FROM shards h JOIN contexts c ON c.id = h.context",
        "sequences": "SELECT h.digest, s.digest, s.ordinal FROM sequences s JOIN shards h ON h.id = s.shard",
        "features": "SELECT h.digest, f.feature FROM features f JOIN shards h ON h.id = f.shard",
        "contexts": "SELECT context FROM contexts",
    }
    with store._backing.catalogue.reading() as connection:
        return {name: sorted(connection.execute(query).fetchall()) for name, query in queries.items()}


def fill(store: ActivationStore) -> list[tuple[int, ...]]:
    sequences = [numbered(i, 1 + i) for i in range(5)]
    store.put(make(sequences[:2]))
    store.put(make(sequences[1:4], FEATURES[:2]))
    store.put(make(sequences))
    store.put(make(sequences, weights="w1"))
    return sequences


@pytest.mark.parametrize("how", ["rebuild", "reopen", "both"])
def test_a_deleted_catalogue_comes_back_equal(store: ActivationStore, how: str) -> None:
    sequences = fill(store)
    before, table = dump(store), store.ls()
    (store.root / "catalogue.sqlite").unlink()
    again = store if how == "rebuild" else ActivationStore(store.root)
    if how != "reopen":
        assert again.rebuild() == len(shard_files(store))
    assert dump(again) == before
    assert again.ls().equals(table)
    check_rows(again, sequences)


def test_deleting_it_under_an_open_store_goes_unnoticed(store: ActivationStore) -> None:
    sequences = fill(store)
    (store.root / "catalogue.sqlite").unlink()
    assert store.contains(CONTEXT, sequences, FEATURES).all()
    check_rows(store, sequences)


def test_a_damaged_catalogue_is_replaced(store: ActivationStore) -> None:
    sequences = fill(store)
    before = dump(store)
    (store.root / "catalogue.sqlite").write_bytes(b"no database at all" * 1000)
    again = ActivationStore(store.root)
    assert dump(again) == before
    check_rows(again, sequences)


def test_rebuild_drops_what_never_was(store: ActivationStore) -> None:
    fill(store)
    before = dump(store)
    with store._backing.catalogue.writing() as connection:
        connection.execute("INSERT INTO features SELECT id, 'invented' FROM shards")
    assert dump(store) != before
    store.rebuild()
    assert dump(store) == before


def publish_without_catalogue(store: ActivationStore, sequences: list[tuple[int, ...]]) -> str:
    """What a writer leaves that is killed between the rename and its commit."""
    partial = Partial(store._backing.folder.tmp, encode(make(sequences)))
    partial.publish(store._backing.folder.shard(partial.entry.digest))
    return partial.entry.digest


def test_a_shard_published_but_not_committed_is_found_at_the_next_open(store: ActivationStore) -> None:
    publish_without_catalogue(store, [numbered(0)])
    assert not store.contains(CONTEXT, [numbered(0)], FEATURES).any()
    check_rows(ActivationStore(store.root), [numbered(0)])
    assert store.contains(CONTEXT, [numbered(0)], FEATURES).all()


def test_a_second_copy_left_by_a_killed_writer_is_removed(store: ActivationStore) -> None:
    store.put(make([numbered(0), numbered(1)]))
    kept = shard_files(store)
    extra = publish_without_catalogue(store, [numbered(1)])
    assert extra in shard_files(store)
    check_rows(ActivationStore(store.root), [numbered(0), numbered(1)])
    assert shard_files(store) == kept


def test_a_row_is_named_only_after_its_bytes_are_durable(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsync of the file, rename, fsync of its folder, COMMIT: in this order."""
    steps: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(fd: int) -> None:
        steps.append("fsync folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "fsync file")
        fsync(fd)

    def note_replace(path: Path, target: Path) -> Path:
        steps.append(f"rename {path.suffix} {target.suffix}")
        return replace(path, target)

    store.put(make([numbered(0)], FEATURES[:1]))
    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    with store._backing.catalogue.reading() as connection:
        connection.set_trace_callback(lambda sql: steps.append(sql) if sql in ("BEGIN IMMEDIATE", "COMMIT") else None)
    store.put(make([numbered(0)], FEATURES[1:]))
    # The two-digit folder may be new, and is then made durable as well.
    assert [step for step in steps if step != "fsync folder"] == [
        "fsync file",
        "BEGIN IMMEDIATE",
        "rename .partial .safetensors",
        "COMMIT",
    ]
    assert steps[-2:] == ["fsync folder", "COMMIT"]


def test_only_files_whose_writer_is_gone_are_swept(store: ActivationStore) -> None:
    tmp = store.root / "tmp"
    dead = [tmp / f"{'0' * 32}.partial", tmp / f"{'1' * 32}.pins"]
    for path in dead:
        path.write_bytes(b"left")
    stranger = tmp / "notes.txt"
    stranger.write_text("not ours")
    living = LockedFile(tmp, "partial")
    ActivationStore(store.root)
    assert not any(path.exists() for path in dead)
    assert living.path.exists()
    assert stranger.exists()
    living.release()
    assert store.gc().temporary == 1


def test_a_transaction_that_fails_leaves_no_trace(store: ActivationStore) -> None:
    fill(store)
    before = dump(store)

    def clear_and_fail() -> None:
        with store._backing.catalogue.writing():
            store._backing.catalogue.clear()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        clear_and_fail()
    assert dump(store) == before


def test_a_forked_child_uses_a_connection_of_its_own(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "catalogue.sqlite")
    with catalogue.reading() as connection:
        own = id(connection)
    child = os.fork()
    if child == 0:
        with catalogue.reading() as connection:
            os._exit(0 if id(connection) != own else 1)
    assert os.waitpid(child, 0)[1] == 0
