"""Many writers and readers, and writers that die at any moment."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from forked import ForkedWorker
from store_makers import CONTEXT, FEATURES, check_rows, expected, make, numbered, shard_files

from probes.errors import StoreError
from probes.store import ActivationStore, MissingRows, maintenance
from probes.store.catalogue import Catalogue
from probes.store.catalogue_file import DamagedCatalogue


def start(target: Callable[..., None], *args: object) -> ForkedWorker:
    return ForkedWorker(lambda: target(*args))


def finish(*processes: ForkedWorker) -> None:
    """Wait for all; what a process that failed has printed stands under the failure."""
    assert [process.wait() for process in processes] == [0] * len(processes)


def write_in_order(root: Path, order: list[int], acknowledged: Path) -> None:
    """Put one sequence after the other, noting each that has returned."""
    store = ActivationStore(root)
    with acknowledged.open("a") as log:
        for i in order:
            store.put(make([numbered(i)]))
            log.write(f"{i}\n")
            log.flush()


def write_overlapping(root: Path, first: int) -> None:
    store = ActivationStore(root)
    for i in range(first, first + 12, 2):
        store.put(make([numbered(j) for j in range(i, i + 4)]))


def read_whatever_is_there(root: Path, until: Path) -> None:
    store = ActivationStore(root)
    seen = 0
    while seen < 12 or not until.exists():
        i = random.randrange(20)
        try:
            (rows,) = store.read(CONTEXT, [numbered(i)], FEATURES[1])
        except MissingRows:
            continue
        assert rows.equal(expected(numbered(i), FEATURES[1]))
        seen += 1


def pinned_writer(root: Path, ready: Path, done: Path) -> None:
    store = ActivationStore(root)
    with store.pin():
        store.put(make([numbered(0)]))
        ready.touch()
        while not done.exists():
            time.sleep(0.005)


def copies(store: ActivationStore) -> list[tuple[bytes, str]]:
    with store._backing.catalogue.reading() as connection:
        query = "SELECT s.digest, f.feature FROM sequences s JOIN features f ON f.shard = s.shard"
        return connection.execute(query).fetchall()


def test_two_processes_writing_the_same_rows_leave_one_copy(tmp_path: Path) -> None:
    order = list(range(15))
    writers = [start(write_in_order, tmp_path / "store", order, tmp_path / f"log{i}") for i in range(2)]
    finish(*writers)
    store = ActivationStore(tmp_path / "store")
    assert len(shard_files(store)) == len(order)
    assert len(copies(store)) == len(order) * len(FEATURES)
    check_rows(store, [numbered(i) for i in order])


def test_a_row_committed_during_a_write_is_not_written_again(store: ActivationStore, monkeypatch) -> None:
    rival, write = ActivationStore(store.root), store._backing.write

    def write_late(encoded):
        if len(encoded.entry.sequences) == 3:
            rival.put(make([numbered(1)]))
        return write(encoded)

    monkeypatch.setattr(store._backing, "write", write_late)
    put = store.put(make([numbered(i) for i in range(3)]))
    assert (put.rows_written, put.already_held) == (6, 3)
    assert len(copies(store)) == len(set(copies(store))) == 9
    check_rows(store, [numbered(i) for i in range(3)])
    assert list((store.root / "tmp").iterdir()) == []


def test_many_writers_and_readers_at_once(tmp_path: Path) -> None:
    root, until = tmp_path / "store", tmp_path / "until"
    readers = [start(read_whatever_is_there, root, until) for _ in range(2)]
    writers = [start(write_overlapping, root, first) for first in (0, 2, 4)]
    finish(*writers)
    until.touch()
    finish(*readers)
    store = ActivationStore(root)
    rows = copies(store)
    assert len(rows) == len(set(rows)) == 18 * len(FEATURES)
    check_rows(store, [numbered(i) for i in range(18)])
    assert store.verify().damaged == ()


def test_a_store_opened_by_another_while_it_is_created_is_created(tmp_path: Path, monkeypatch) -> None:
    replace = Path.replace

    def replace_late(path: Path, target: Path) -> Path:
        monkeypatch.undo()
        ActivationStore(tmp_path)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", replace_late)
    ActivationStore(tmp_path).put(make([numbered(0)]))
    check_rows(ActivationStore(tmp_path), [numbered(0)])


def test_a_journal_that_ends_while_it_is_looked_at_is_no_damage(store: ActivationStore) -> None:
    index = Catalogue(store._backing.catalogue.path)
    journal = Path(f"{index.path}-journal")
    journal.touch()
    exists = os.path.lexists

    def look(path: Path) -> bool:
        there = exists(path)
        if path == journal:
            journal.unlink(missing_ok=True)
        return there

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os.path, "lexists", look)
        index.open()


def test_a_catalogue_found_damaged_is_replaced_once(store: ActivationStore) -> None:
    """Of two that met the same damage the second finds another's catalogue, and what was written to it, and keeps both."""
    store.put(make([numbered(0)]))
    store._backing.catalogue.path.write_bytes(b"no database at all")
    damages = []
    for _ in range(2):
        with pytest.raises(DamagedCatalogue) as damage:
            Catalogue(store._backing.catalogue.path).open()
        damages.append(damage.value)
    maintenance.renew(store._backing, damages[0])
    kept = store._backing.catalogue.inode()
    maintenance.renew(store._backing, damages[1])
    assert store._backing.catalogue.inode() == kept
    check_rows(store, [numbered(0)])


def test_rows_committed_to_a_catalogue_thrown_away_meanwhile_are_found(store: ActivationStore, monkeypatch) -> None:
    store.put(make([numbered(0)]))
    rival, index = ActivationStore(store.root), store._backing.catalogue
    add = index.add

    def add_early(entry) -> None:
        add(entry)
        index.path.unlink()
        check_rows(rival, [numbered(0)])

    monkeypatch.setattr(index, "add", add_early)
    store.put(make([numbered(1)]))
    check_rows(rival, [numbered(0), numbered(1)])
    assert len(copies(store)) == len(set(copies(store))) == 2 * len(FEATURES)


def test_threads_share_one_store(store: ActivationStore) -> None:
    def put_and_read(i: int) -> None:
        store.put(make([numbered(j) for j in range(i, i + 3)]))
        check_rows(store, [numbered(i)])

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(put_and_read, range(12)))
    assert len(copies(store)) == len(set(copies(store))) == 14 * len(FEATURES)


def test_a_writer_killed_at_any_moment_loses_nothing_it_had_committed(tmp_path: Path) -> None:
    root, log, generator = tmp_path / "store", tmp_path / "log", random.Random(0)
    ActivationStore(root)
    order, done = list(range(1200)), 0
    for _ in range(10):
        log.touch()
        before = log.read_text().count("\n")
        writer = start(write_in_order, root, order[done:], log)
        while log.read_text().count("\n") == before and writer.poll() is None:
            time.sleep(0.002)
        time.sleep(generator.uniform(0, 0.15))
        writer.kill()
        writer.wait()
        committed = [int(line) for line in log.read_text().split("\n")[:-1]]
        store = ActivationStore(root)
        assert list((root / "tmp").iterdir()) == []
        present = store.contains(CONTEXT, [numbered(i) for i in order], FEATURES).all(1)
        assert present[committed].all()
        report = store.verify()
        assert report.damaged == ()
        assert report.checked == int(present.sum()) == len(shard_files(store))
        # Resuming at the first missing row: at most the packet in flight had been written but not noted.
        done = int(present.argmin())
        assert 0 <= done - (max(committed) + 1) <= 1
        assert present[:done].all()
    check_rows(store, [numbered(i) for i in range(done)])


def test_a_pin_of_another_process_ends_when_it_is_killed(tmp_path: Path) -> None:
    root, ready, done = tmp_path / "store", tmp_path / "ready", tmp_path / "done"
    writer = start(pinned_writer, root, ready, done)
    while not ready.exists():
        assert writer.poll() is None
        time.sleep(0.005)
    store = ActivationStore(root)
    assert store.gc(max_bytes=1).evicted == ()
    writer.kill()
    writer.wait()
    assert len(store.gc(max_bytes=1).evicted) == 1


def test_a_forked_child_reads_and_writes_on(store: ActivationStore) -> None:
    store.put(make([numbered(0)]))
    (rows,) = store.read(CONTEXT, [numbered(0)], FEATURES[0])
    child = os.fork()
    if child == 0:
        try:
            check_rows(store, [numbered(0)])
            store.put(make([numbered(1)]))
            os._exit(0)
        except BaseException:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    check_rows(store, [numbered(0), numbered(1)])
    assert rows.equal(expected(numbered(0), FEATURES[0]))


def write_bounded(root: Path, first: int, limit: int) -> None:
    """Write past the limit, reading back at once; a row may be evicted in between but never be wrong."""
    store = ActivationStore(root, max_bytes=limit)
    for i in range(first, first + 15):
        try:
            store.put(make([numbered(i)]))
            (rows,) = store.read(CONTEXT, [numbered(i)], FEATURES[0])
        except (MissingRows, StoreError):
            continue
        assert rows.equal(expected(numbered(i), FEATURES[0]))


def test_writers_under_one_limit_stay_below_it(tmp_path: Path) -> None:
    limit = 4 * ActivationStore(tmp_path / "probe").put(make([numbered(0)])).bytes_written + 200
    finish(*[start(write_bounded, tmp_path / "store", first, limit) for first in (0, 10, 20)])
    store = ActivationStore(tmp_path / "store")
    assert 0 < store.bytes_held() <= limit
    assert store.bytes_held() == sum(path.stat().st_size for path in store.root.glob("shards/*/*"))
    assert store.verify().damaged == ()
