"""Rows are found by what they are, and only what is missing is written."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from store_makers import CONTEXT, FEATURES, check_rows, make, numbered, shard_files

from probes.store import ActivationStore, default_root
from probes.store.values import sequence_digest


def test_held_answers_per_sequence_and_feature(store: ActivationStore) -> None:
    store.put(make([numbered(0), numbered(1)], FEATURES[:1]))
    store.put(make([numbered(1), numbered(2)], FEATURES[1:2]))
    sequences = [numbered(i) for i in (2, 0, 1, 3, 1)]
    want = [[0, 1, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 0]]
    np.testing.assert_array_equal(store.contains(CONTEXT, sequences, FEATURES), np.array(want, dtype=bool))


def test_every_part_of_the_context_tells_rows_apart(store: ActivationStore) -> None:
    store.put(make([numbered(0)]))
    for key in CONTEXT:
        assert not store.contains({**CONTEXT, key: "other"}, [numbered(0)], FEATURES).any()
    turned = dict(reversed(CONTEXT.items()))
    assert store.contains(turned, [numbered(0)], FEATURES).all()


def test_ids_and_not_their_text_decide(store: ActivationStore) -> None:
    store.put(make([(1, 23)]))
    assert not store.contains(CONTEXT, [(12, 3), (1, 2, 3), (23, 1), (1, 23, 0), ()], FEATURES).any()
    assert sequence_digest((1, 23)) == sequence_digest(np.array([1, 23], dtype=np.int32))


def test_put_fills_exactly_the_holes(store: ActivationStore) -> None:
    store.put(make([numbered(0), numbered(1)], FEATURES[:1]))
    store.put(make([numbered(1), numbered(2)], FEATURES[1:2]))
    everything = [numbered(i) for i in range(4)]
    put = store.put(make(everything))
    assert (put.rows_written, put.already_held) == (12 - 4, 4)
    assert store.contains(CONTEXT, everything, FEATURES).all()
    check_rows(store, everything)
    with store._backing.catalogue.reading() as connection:
        query = "SELECT s.digest, f.feature FROM sequences s JOIN features f ON f.shard = s.shard"
        rows = connection.execute(query).fetchall()
    assert len(rows) == len(set(rows)) == 12


def test_putting_again_writes_nothing(store: ActivationStore) -> None:
    packet = make([numbered(0), numbered(1)])
    first, again = store.put(packet), store.put(packet)
    assert first.rows_written == again.already_held == 6
    assert (again.bytes_written, again.rows_written) == (0, 0)
    assert len(shard_files(store)) == 1


def test_a_moved_store_is_the_same_store(store: ActivationStore, tmp_path: Path) -> None:
    store.put(make([numbered(0)]))
    shutil.move(store.root, tmp_path / "elsewhere" / "renamed")
    check_rows(ActivationStore(tmp_path / "elsewhere" / "renamed"), [numbered(0)])


def test_shards_from_two_stores_merge_by_copying(store: ActivationStore, tmp_path: Path) -> None:
    other = ActivationStore(tmp_path / "other")
    store.put(make([numbered(0)]))
    other.put(make([numbered(1)]))
    shutil.copytree(other.root / "shards", store.root / "shards", dirs_exist_ok=True)
    check_rows(ActivationStore(store.root), [numbered(0), numbered(1)])


def test_shards_of_names_what_is_read(store: ActivationStore) -> None:
    store.put(make([numbered(0)]))
    (first,) = shard_files(store)
    store.put(make([numbered(1)]))
    assert store.shards_of(CONTEXT, [numbered(0), numbered(7)], FEATURES) == [first]
    assert store.shards_of(CONTEXT, [numbered(0), numbered(1)], FEATURES) == shard_files(store)
    assert store.shards_of(CONTEXT, [numbered(0)], ["other"]) == []


def test_many_sequences_are_found_in_one_question(store: ActivationStore) -> None:
    sequences = [(i,) for i in range(2500)]
    store.put(make(sequences, FEATURES[:1], width=1))
    present = store.contains(CONTEXT, [*sequences, (2500,)], FEATURES[:1])
    assert present[:-1].all()
    assert not present[-1].any()
    check_rows(store, sequences[::-500], FEATURES[:1])


def test_ls_has_a_line_per_context(store: ActivationStore) -> None:
    assert store.ls().empty
    store.put(make([numbered(0), numbered(1)]))
    store.put(make([numbered(1), numbered(2)], FEATURES[:1], weights="w0"))
    store.put(make([numbered(0)], FEATURES[:2], weights="w1"))
    table = store.ls().set_index("weights")
    assert table.loc["w0", ["sequences", "features", "shards"]].tolist() == [3, 3, 2]
    assert table.loc["w1", ["sequences", "features", "shards"]].tolist() == [1, 2, 1]
    assert table["bytes"].sum() == store.bytes_held()
    assert table.loc["w1", "last_used"] >= table.loc["w0", "last_used"]
    assert "3 shards" in repr(store)


def test_the_default_root_follows_the_environment(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BATHYSCOPE_STORE", str(tmp_path / "here"))
    assert default_root() == tmp_path / "here" == ActivationStore().root
    monkeypatch.delenv("BATHYSCOPE_STORE")
    monkeypatch.setenv("BATHYSCOPE_CACHE", str(tmp_path / "cache"))
    assert default_root() == tmp_path / "cache" / "store"
    monkeypatch.delenv("BATHYSCOPE_CACHE")
    assert default_root().parts[-2:] == ("bathyscope", "store")
