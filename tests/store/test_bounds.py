"""The store stays within its limit without ever taking a shard from a reader or a run."""

from __future__ import annotations

import errno
import gc
import os
import shutil
from pathlib import Path

import pytest
from store_makers import CONTEXT, FEATURES, check_rows, expected, make, numbered, shard_files

from probes.errors import StoreError
from probes.store import ActivationStore
from probes.store.files import Partial
from probes.store.layout import encode

ONE = encode(make([numbered(0)])).entry.nbytes


def bounded(tmp_path: Path, shards: int) -> ActivationStore:
    """A store with room for so many one-sequence shards."""
    return ActivationStore(tmp_path / "store", max_bytes=shards * ONE)


def whole_sequences(store: ActivationStore, n: int) -> list[int]:
    present = store.contains(CONTEXT, [numbered(i) for i in range(n)], FEATURES)
    return [i for i in range(n) if present[i].all()]


def test_the_least_recently_used_shard_goes_first(tmp_path: Path) -> None:
    store = bounded(tmp_path, 3)
    for i in range(3):
        store.put(make([numbered(i)]))
    check_rows(store, [numbered(0)])
    gc.collect()
    store.put(make([numbered(3)]))
    assert whole_sequences(store, 4) == [0, 2, 3]
    store.put(make([numbered(4)]))
    assert whole_sequences(store, 5) == [0, 3, 4]
    assert store.bytes_held() <= (store.max_bytes or 0)


def test_an_open_reader_keeps_its_shard_and_its_numbers(tmp_path: Path) -> None:
    store = bounded(tmp_path, 2)
    store.put(make([numbered(0)]))
    (rows,) = store.read(CONTEXT, [numbered(0)], FEATURES[0])
    for i in range(1, 5):
        store.put(make([numbered(i)]))
    assert whole_sequences(store, 5) == [0, 4]
    assert rows.equal(expected(numbered(0), FEATURES[0]))
    assert store.gc(max_bytes=1).bytes_held > 0
    assert whole_sequences(store, 5) == [0]
    del rows
    gc.collect()
    assert store.gc(max_bytes=1).bytes_held == 0


def test_a_view_of_a_view_is_a_reader_too(tmp_path: Path) -> None:
    store = bounded(tmp_path, 1)
    store.put(make([numbered(0)]))
    corner = store.read(CONTEXT, [numbered(0)], FEATURES[0])[0][1:, :2].T
    gc.collect()
    with pytest.raises(StoreError, match="in use by open readers"):
        store.put(make([numbered(1)]))
    assert corner.T.equal(expected(numbered(0), FEATURES[0])[1:, :2])


def test_a_run_never_evicts_its_own_rows(tmp_path: Path) -> None:
    store = bounded(tmp_path, 3)
    store.put(make([numbered(0)]))
    store.put(make([numbered(1)]))
    with store.pin():
        assert store.contains(CONTEXT, [numbered(0)], FEATURES).all()
        for i in (2, 3):
            store.put(make([numbered(i)]))
        assert whole_sequences(store, 4) == [0, 2, 3]
        with pytest.raises(StoreError, match=f"raise max_bytes to at least {4 * ONE:,}"):
            store.put(make([numbered(4)]))
        assert store.gc(max_bytes=1).evicted == ()
    assert whole_sequences(store, 5) == [0, 2, 3]
    store.put(make([numbered(4)]))
    assert whole_sequences(store, 5) == [2, 3, 4]


def test_pins_hold_against_other_stores_and_end_with_the_last_run(tmp_path: Path) -> None:
    store, other = bounded(tmp_path, 1), bounded(tmp_path, 1)
    with store.pin():
        with store.pin():
            store.put(make([numbered(0)]))
        with pytest.raises(StoreError, match="or this run"):
            other.put(make([numbered(1)]))
        with pytest.raises(StoreError, match="in use"):
            other.check_space(1)
    other.put(make([numbered(1)]))
    assert whole_sequences(store, 2) == [1]
    assert list((store.root / "tmp").iterdir()) == []


def test_refused_for_lack_of_room_evicts_nothing_and_leaves_nothing_behind(tmp_path: Path) -> None:
    store = bounded(tmp_path, 2)
    store.put(make([numbered(0)]))
    with pytest.raises(StoreError, match="do not fit under the store's limit"):
        store.put(make([numbered(i) for i in range(1, 300)]))
    assert whole_sequences(store, 2) == [0]
    check_rows(store, [numbered(0)])
    assert list((store.root / "tmp").iterdir()) == []


def test_check_space_names_the_bytes_to_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = bounded(tmp_path, 2)
    store.put(make([numbered(0)]))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10 * ONE, 10 * ONE, ONE // 2))
    store.check_space(ONE // 2)
    with pytest.raises(StoreError, match=f"free at least {ONE - ONE // 2:,} bytes"):
        store.check_space(ONE)
    # Above the limit the first shard would be evicted, which frees as much as goes over.
    with pytest.raises(StoreError, match=f"free at least {ONE - ONE // 2:,} bytes"):
        store.check_space(2 * ONE)
    with pytest.raises(StoreError, match=f"raise max_bytes to at least {2 * ONE + 1:,}"):
        store.check_space(2 * ONE + 1)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_keeps_what_was_committed(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    store.put(make([numbered(0)]))

    def full(_: int) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match=r"what was committed stays; free at least [\d,]+ bytes"):
            store.put(make([numbered(1)]))
    assert list((store.root / "tmp").iterdir()) == []
    check_rows(store, [numbered(0)])
    assert whole_sequences(store, 2) == [0]
    assert store.put(make([numbered(1)])).rows_written == 3


def test_a_disk_full_at_the_rename_keeps_what_was_committed(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Partial, "publish", full)
        with pytest.raises(StoreError, match="no room for"):
            store.put(make([numbered(0)]))
    assert list((store.root / "tmp").iterdir()) == []
    assert shard_files(store) == []
    assert store.put(make([numbered(0)])).rows_written == 3
