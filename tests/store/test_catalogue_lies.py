"""A catalogue that says something else than the shards never decides what is read: it is made anew."""

from __future__ import annotations

import random
import sqlite3
from pathlib import Path

import pytest
from store_makers import CONTEXT, FEATURES, check_rows, make, numbered
from test_catalogue import dump, fill

from probes.errors import StoreError
from probes.store import ActivationStore, MissingRows

LIES = {
    "ordinals": "UPDATE sequences SET ordinal = 1000 - ordinal",
    "ordinals reversed": (
        "CREATE TEMP TABLE t AS SELECT digest, shard, (SELECT max(ordinal) FROM sequences o WHERE o.shard = s.shard) "
        "- ordinal AS ordinal FROM sequences s; DELETE FROM sequences; INSERT INTO sequences SELECT * FROM t"
    ),
    "negative ordinals": "UPDATE sequences SET ordinal = -1 - ordinal",
    "ordinals as text": "UPDATE sequences SET ordinal = 'x' || ordinal",
    "shards exchanged": "UPDATE OR REPLACE sequences SET shard = (SELECT max(id) + min(id) FROM shards) - shard",
    "contexts exchanged": "UPDATE shards SET context = (SELECT max(id) + min(id) FROM contexts) - context",
    "features invented": "INSERT OR IGNORE INTO features SELECT h.id, f.feature FROM shards h, features f",
    "bytes as text": "UPDATE shards SET bytes = 'many'",
    "bytes as fractions": "UPDATE shards SET bytes = 9e999",
    "negative bytes": "UPDATE shards SET bytes = -bytes",
    "names of other files": "UPDATE shards SET digest = '../../' || digest",
    "contexts that are no contexts": "UPDATE contexts SET context = context || '}'",
    "contexts that are no text": "UPDATE contexts SET context = CAST(x'ff00' || context AS TEXT)",
    "blobs": "UPDATE shards SET digest = CAST(digest AS BLOB)",
    "foreign tables": "".join(f"CREATE TABLE other{i} (x);" for i in range(5)),
    "only foreign tables": "DROP TABLE sequences; DROP TABLE features; DROP TABLE shards; DROP TABLE contexts;"
    + "".join(f"CREATE TABLE other{i} (x);" for i in range(5)),
    "other columns": "DROP TABLE features; CREATE TABLE features (a, b, c)",
    "a trigger": "CREATE TRIGGER t AFTER INSERT ON shards BEGIN DELETE FROM shards; END",
}


def lie(store: ActivationStore, script: str) -> None:
    connection = sqlite3.connect(store.root / "catalogue.sqlite")
    connection.executescript(script)
    connection.close()


def works(store: ActivationStore, sequences: list[tuple[int, ...]]) -> None:
    """Everything can be asked; rows are right, or said to be missing, and can then be written."""
    store.contains(CONTEXT, sequences, FEATURES)
    store.bytes_held()
    repr(store)
    store.ls()
    for feature in FEATURES:
        try:
            check_rows(store, sequences, [feature])
        except MissingRows:
            store.put(make(sequences, [feature]))
    check_rows(store, sequences)
    store.put(make([numbered(50)]))
    check_rows(store, [numbered(50)])


@pytest.mark.parametrize("reopened", [False, True])
@pytest.mark.parametrize("name", LIES)
def test_lies_are_found_and_mended(store: ActivationStore, name: str, reopened: bool) -> None:
    sequences = fill(store)
    before = dump(store)
    lie(store, LIES[name])
    tested = ActivationStore(store.root) if reopened else store
    works(tested, sequences)
    tested.verify()
    after = dump(ActivationStore(store.root))
    assert {key: set(rows) >= set(before[key]) for key, rows in after.items()} == dict.fromkeys(before, True)


def test_permuted_ordinals_never_give_another_sequence_s_rows(store: ActivationStore) -> None:
    sequences = [numbered(i) for i in range(40)]
    store.put(make(sequences))
    lie(store, LIES["ordinals reversed"])
    for i, tokens in enumerate(sequences):
        check_rows(store, [tokens])
        (row,) = store.read_positions(CONTEXT, [tokens], FEATURES[0], [[0]])
        assert row[0, 0] == 100 * i * 10 + len(FEATURES[0])


def flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    # Half of them in the header and the first page, where most of the structure is.
    for _ in range(rng.choice((1, 1, 4, 40))):
        changed[rng.randrange(len(data) if rng.random() < 0.5 else 200)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def campaign(root: Path, flips: int, seed: int) -> None:
    """Flips bits of the catalogue of a store, open and reopened; all must go on."""
    rng = random.Random(seed)
    store = ActivationStore(root)
    sequences = fill(store)
    path = root / "catalogue.sqlite"
    for _ in range(flips):
        path.write_bytes(flipped(path.read_bytes(), rng))
        tested = ActivationStore(root) if rng.random() < 0.5 else store
        try:
            works(tested, sequences)
        except StoreError as error:
            raise AssertionError(str(error)) from error
        tested.rebuild()


def test_flipped_bits_of_any_kind_are_lived_through(tmp_path: Path) -> None:
    campaign(tmp_path / "store", 60, seed=0)
