"""No damaged byte is ever handed out: it is named, set aside and asked for again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import xxhash
from store_makers import CONTEXT, FEATURES, check_rows, make, numbered, shard_files

from probes.errors import StoreError
from probes.store import PROTOCOL, ActivationStore, DamagedShard, MissingRows, Packet, Ragged
from probes.store.layout import BLOCK, parse


def only_shard(store: ActivationStore) -> Path:
    (path,) = store.root.glob("shards/*/*.safetensors")
    return path


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def place(path: Path, tensor: str) -> tuple[int, int]:
    """First and last byte of a tensor in the file."""
    data = path.read_bytes()
    header = parse(data[: 8 + int.from_bytes(data[:8], "little")])
    return header.data + header.slots[tensor].start, header.data + header.slots[tensor].stop - 1


def expect_recapture(store: ActivationStore, name: str) -> None:
    """The shard is set aside, its rows are missing, and putting them again heals the store."""
    assert (store.root / "quarantine" / f"{name}.safetensors").exists()
    assert shard_files(store) == []
    assert not store.contains(CONTEXT, [numbered(0)], FEATURES).any()
    with pytest.raises(MissingRows):
        store.read(CONTEXT, [numbered(0)], FEATURES[0])
    assert store.put(make([numbered(0)])).rows_written == 3
    check_rows(store, [numbered(0)])


@pytest.mark.parametrize("end", [0, 1])
@pytest.mark.parametrize("tensor", [FEATURES[0], "sequences/lengths"])
def test_a_flipped_byte_in_what_is_read_is_found(store: ActivationStore, tensor: str, end: int) -> None:
    store.put(make([numbered(0)]))
    path = only_shard(store)
    flip(path, place(path, tensor)[end])
    with pytest.raises(DamagedShard, match=f"{path.stem}.*{tensor}") as refusal:
        store.read(CONTEXT, [numbered(0)], FEATURES[0])
    assert refusal.value.shard == path.stem
    expect_recapture(store, path.stem)


@pytest.mark.parametrize("offset", [0, 7, 8, 100, -70])
def test_a_flipped_byte_in_the_header_is_found(store: ActivationStore, offset: int) -> None:
    store.put(make([numbered(0)]))
    path = only_shard(store)
    first, _ = place(path, "sequences/counts/0")
    flip(path, offset if offset >= 0 else first + offset)
    with pytest.raises(DamagedShard, match=path.stem):
        store.read(CONTEXT, [numbered(0)], FEATURES[0])
    expect_recapture(store, path.stem)


@pytest.mark.parametrize("size", [0, 5, 200, -1])
def test_a_truncated_shard_is_found(store: ActivationStore, size: int) -> None:
    store.put(make([numbered(0)]))
    path = only_shard(store)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DamagedShard, match=path.stem):
        store.read(CONTEXT, [numbered(0)], FEATURES[0])
    expect_recapture(store, path.stem)


def test_a_lengthened_shard_is_found(store: ActivationStore) -> None:
    store.put(make([numbered(0)]))
    path = only_shard(store)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(DamagedShard, match="bytes long instead of"):
        store.read(CONTEXT, [numbered(0)], FEATURES[0])


def test_a_partial_read_depends_on_its_own_bytes_only(store: ActivationStore) -> None:
    store.put(make([numbered(0)]))
    path = only_shard(store)
    flip(path, place(path, FEATURES[1])[0])
    check_rows(store, [numbered(0)], [FEATURES[0], FEATURES[2]])
    assert store.verify().damaged == (path.stem,)
    expect_recapture(store, path.stem)


def test_a_partial_read_depends_on_its_own_blocks_only(store: ActivationStore) -> None:
    rows = torch.arange(3 * BLOCK, dtype=torch.uint8)[:, None]
    store.put(Packet(CONTEXT, (numbered(0), numbered(1)), {"f": Ragged(rows, (BLOCK, 2 * BLOCK))}))
    path = only_shard(store)
    flip(path, place(path, "f")[0] + BLOCK)
    assert torch.equal(store.read(CONTEXT, [numbered(0)], "f")[0], rows[:BLOCK])
    (last,) = store.read_positions(CONTEXT, [numbered(1)], "f", [[-1, BLOCK]])
    assert torch.equal(last, rows[[-1, 2 * BLOCK]])
    with pytest.raises(DamagedShard, match="block 1 of 'f'"):
        store.read_positions(CONTEXT, [numbered(1)], "f", [[-1, BLOCK - 1]])


def test_a_block_is_checked_once(store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put(make([numbered(0)]))
    check_rows(store, [numbered(0)])

    def refuse(_: object) -> str:
        raise AssertionError("checked again")

    monkeypatch.setattr(xxhash, "xxh3_64_hexdigest", refuse)
    check_rows(store, [numbered(0)])
    with pytest.raises(AssertionError, match="checked again"):
        store.verify()


def test_a_renamed_shard_is_set_aside_and_its_rows_are_missing(store: ActivationStore) -> None:
    store.put(make([numbered(0)]))
    path = only_shard(store)
    wrong = path.parent / f"{path.stem[:-1]}{'0' if path.stem[-1] != '0' else '1'}.safetensors"
    path.rename(wrong)
    assert not ActivationStore(store.root).contains(CONTEXT, [numbered(0)], FEATURES).any()
    expect_recapture(store, wrong.stem)


def test_a_shard_in_the_wrong_folder_is_set_aside(store: ActivationStore) -> None:
    store.put(make([numbered(0)]))
    path = only_shard(store)
    folder = store.root / "shards" / ("00" if path.stem[:2] != "00" else "01")
    folder.mkdir()
    path.rename(folder / path.name)
    expect_recapture(ActivationStore(store.root), path.stem)


def test_a_shard_removed_by_hand_is_missing_and_nothing_worse(store: ActivationStore) -> None:
    store.put(make([numbered(0)]))
    store.put(make([numbered(1)]))
    (gone,) = store.shards_of(CONTEXT, [numbered(0)], FEATURES)
    store._backing.folder.shard(gone).unlink()
    with pytest.raises(MissingRows, match="1 of 2"):
        store.read(CONTEXT, [numbered(0), numbered(1)], FEATURES[0])
    check_rows(store, [numbered(1)])
    assert store.put(make([numbered(0)])).rows_written == 3


def test_verify_reads_every_byte_even_after_reads(store: ActivationStore) -> None:
    for i in range(3):
        store.put(make([numbered(i)]))
    check_rows(store, [numbered(i) for i in range(3)])
    (bad,) = store.shards_of(CONTEXT, [numbered(1)], FEATURES)
    path = store._backing.folder.shard(bad)
    flip(path, path.stat().st_size - 1)
    size = store.bytes_held()
    report = store.verify()
    assert (report.checked, report.bytes, report.damaged) == (3, size, (bad,))
    assert store.verify().checked == 2
    check_rows(store, [numbered(0), numbered(2)])


def test_gc_deletes_what_was_set_aside(store: ActivationStore) -> None:
    store.put(make([numbered(0)]))
    path = only_shard(store)
    size = path.stat().st_size
    flip(path, size - 1)
    store.verify()
    report = store.gc()
    assert (report.quarantined, report.bytes_freed, report.bytes_held) == (1, size, 0)
    assert list((store.root / "quarantine").iterdir()) == []


def test_a_newer_protocol_is_refused(store: ActivationStore) -> None:
    (store.root / "store.json").write_text(json.dumps({"protocol": PROTOCOL + 1}))
    with pytest.raises(StoreError, match=f"protocol {PROTOCOL + 1}.*reads {PROTOCOL}: upgrade"):
        ActivationStore(store.root)


def test_a_strange_store_json_is_refused(store: ActivationStore) -> None:
    (store.root / "store.json").write_text("[]")
    with pytest.raises(StoreError, match=r"store\.json"):
        ActivationStore(store.root)


def test_a_root_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError, match="choose a writable folder"):
            ActivationStore(root)
    with pytest.raises(StoreError, match="max_bytes 0"):
        ActivationStore(tmp_path / "store", max_bytes=0)


def test_an_unwritable_root_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StoreError, match=r"Permission denied.*choose a writable folder"):
        ActivationStore(tmp_path / "store")
