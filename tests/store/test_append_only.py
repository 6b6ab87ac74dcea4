"""Shards written without the catalogue, from many processes, and taken in by whoever opens the store."""

from __future__ import annotations

from pathlib import Path

import pytest
from store_makers import CONTEXT, FEATURES, check_rows, make, numbered, shard_files
from tiny import native

from probes.capture import Need, capture, plan_capture
from probes.errors import StoreError
from probes.store import ActivationStore, AppendOnlyWriter, MissingRows


def test_opening_the_store_takes_in_what_was_left(tmp_path: Path) -> None:
    writer = AppendOnlyWriter(tmp_path)
    put = writer.put(make([numbered(0), numbered(1)]))
    assert (put.rows_written, put.already_held) == (2 * len(FEATURES), 0)
    assert put.bytes_written == sum(path.stat().st_size for path in tmp_path.glob("shards/*/*"))
    assert not (tmp_path / "catalogue.sqlite").exists(), "no database is touched"
    assert list((tmp_path / "tmp").iterdir()) == []
    store = ActivationStore(tmp_path)
    check_rows(store, [numbered(0), numbered(1)])
    assert store.verify().damaged == ()


def test_the_same_packet_twice_is_one_shard(tmp_path: Path) -> None:
    """As from a task that is repeated because its process died after the write."""
    for _ in range(2):
        put = AppendOnlyWriter(tmp_path).put(make([numbered(0), numbered(1)]))
    assert (put.bytes_written, put.rows_written) == (0, 0)
    assert len(list(tmp_path.glob("shards/*/*"))) == 1


def test_rows_that_are_all_held_elsewhere_are_dropped(tmp_path: Path) -> None:
    """As from a task whose repetition gave other bytes for the same rows."""
    for group in ([0, 1, 2], [2, 1, 0], [3]):
        AppendOnlyWriter(tmp_path).put(make([numbered(i) for i in group]))
    store = ActivationStore(tmp_path)
    check_rows(store, [numbered(i) for i in range(4)])
    with store._backing.catalogue.reading() as connection:
        query = "SELECT s.digest, f.feature FROM sequences s JOIN features f ON f.shard = s.shard"
        rows = connection.execute(query).fetchall()
    assert len(rows) == len(set(rows)) == 4 * len(FEATURES)
    assert len(shard_files(store)) == 2


def test_a_writer_knows_of_nothing(tmp_path: Path) -> None:
    ActivationStore(tmp_path).put(make([numbered(0)]))
    writer = AppendOnlyWriter(tmp_path)
    assert not writer.contains(CONTEXT, [numbered(0)], FEATURES).any()
    assert writer.shards_of(CONTEXT, [numbered(0)], FEATURES) == []
    with pytest.raises(MissingRows):
        writer.read(CONTEXT, [numbered(0)], FEATURES[0])
    with writer.pin():
        writer.check_space(10**18)


def test_a_whole_capture_goes_through_a_writer(tmp_path: Path) -> None:
    sequences, needs = [(1, 2, 3), (4, 5)], [Need("resid_post.1")]
    done = capture(native(), sequences, needs, AppendOnlyWriter(tmp_path)).done
    assert done.forwards > 0
    assert done.bytes_written > 0
    assert plan_capture(native(), sequences, needs, ActivationStore(tmp_path)).forwards == 0


def test_a_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be used"):
        AppendOnlyWriter(tmp_path / "file")
