"""Whatever lies where the store expects its own files is named, set aside or passed over."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from store_makers import CONTEXT, FEATURES, check_rows, make, numbered

from probes.errors import StoreError
from probes.store import ActivationStore

NAME = "ab" + "0" * 30


def folder(path: Path) -> None:
    path.mkdir()
    (path / "inside").write_text("x")


NODES: dict[str, Callable[[Path], object]] = {
    "folder": folder,
    "loop": lambda path: path.symlink_to(path.name),
    "dangling": lambda path: path.symlink_to("nowhere"),
    "to a folder": lambda path: path.symlink_to(path.parent),
    "pipe": os.mkfifo,
    "empty": Path.touch,
    "text": lambda path: path.write_bytes(b"\xff\xfe text"),
}
PLACES = {
    "shard": f"shards/ab/{NAME}.safetensors",
    "shard folder": "shards/ab",
    "partial": f"tmp/{NAME}.partial",
    "pins": f"tmp/{NAME}.pins",
    "quarantine": f"quarantine/{NAME}.safetensors",
    "catalogue": "catalogue.sqlite",
    "journal": "catalogue.sqlite-journal",
    "marker": "store.json",
}


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("place", PLACES)
def test_a_store_works_around_it(store: ActivationStore, place: str, node: str) -> None:
    """Either all goes on, or one error says what is wrong."""
    sequences = [numbered(i) for i in range(3)]
    store.put(make(sequences[:2]))
    path = store.root / PLACES[place]
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    NODES[node](path)
    if place == "marker" and node not in ("dangling", "loop"):
        with pytest.raises(StoreError, match=r"is not a store's|cannot be used"):
            ActivationStore(store.root)
        return
    again = ActivationStore(store.root)
    with again.pin():
        check_rows(again, sequences[:2])
        again.put(make(sequences))
    check_rows(again, sequences)
    again.ls()
    assert again.verify().damaged == ()
    again.gc(max_bytes=10**9)
    assert list((store.root / "quarantine").iterdir()) == []
    check_rows(ActivationStore(store.root), sequences)


@pytest.mark.parametrize("node", ["folder", "loop", "pipe"])
def test_in_the_place_of_a_shard_it_is_set_aside_by_name(
    store: ActivationStore, node: str, caplog: pytest.LogCaptureFixture
) -> None:
    store.put(make([numbered(0)]))
    (path,) = store.root.glob("shards/*/*")
    path.unlink()
    NODES[node](path)
    with pytest.raises(StoreError, match=f"shard {path.stem} is damaged .*now in quarantine"):
        store.read(CONTEXT, [numbered(0)], FEATURES[0])
    assert os.path.lexists(store.root / "quarantine" / path.name)
    store.put(make([numbered(0)]))
    check_rows(store, [numbered(0)])
    other = store.root / PLACES["shard"]
    other.parent.mkdir(exist_ok=True)
    NODES[node](other)
    with caplog.at_level(logging.WARNING):
        ActivationStore(store.root)
    assert NAME in caplog.text
    assert not os.path.lexists(other)


def test_two_of_the_same_name_are_both_set_aside(store: ActivationStore) -> None:
    for _ in range(2):
        path = store.root / PLACES["shard"]
        path.parent.mkdir(exist_ok=True)
        folder(path)
        ActivationStore(store.root)
    assert len(list((store.root / "quarantine").iterdir())) == 2
    assert store.gc().quarantined == 2
