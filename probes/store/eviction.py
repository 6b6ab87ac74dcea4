"""Staying within bounds: least-recently-used eviction that leaves alone what is open or pinned."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

from probes.errors import StoreError
from probes.locked_files import lock_for_removal
from probes.store.backing import Backing, disk_full, read_only


def check_space(backing: Backing, max_bytes: int | None, nbytes: int) -> None:
    """Refuse to write `nbytes` more where they do not fit.

    Raises:
        StoreError: says how many bytes to free, or how far to raise the limit.
    """
    if nbytes and backing.read_only:
        raise read_only(backing.folder.root)
    free = shutil.disk_usage(backing.folder.root).free
    reclaimed = 0
    if max_bytes is not None:
        sizes = backing.catalogue.shards()
        kept = sum(sizes.get(name, 0) for name in backing.folder.pinned())
        if kept + nbytes > max_bytes:
            raise _over_limit(max_bytes, nbytes, kept)
        reclaimed = max(0, sum(sizes.values()) + nbytes - max_bytes)
    if nbytes > free + reclaimed:
        raise disk_full(backing.folder.root, nbytes, nbytes - free - reclaimed)


def make_room(backing: Backing, max_bytes: int | None, nbytes: int) -> list[str]:
    """Evict until `nbytes` more fit under the limit; inside a `writing` transaction. Returns the evicted.

    Raises:
        StoreError: what is open or pinned leaves too little; nothing has been evicted then.
    """
    excess = 0 if max_bytes is None else backing.catalogue.nbytes() + nbytes - max_bytes
    if max_bytes is None or excess <= 0:
        return []
    evicted, short = _evict(backing, excess, all_or_nothing=True)
    if short > 0:
        raise _over_limit(max_bytes, nbytes, max_bytes + short - nbytes)
    return evicted


def shrink(backing: Backing, max_bytes: int) -> list[str]:
    """Evict what may be evicted until the store is within the limit; inside a `writing` transaction."""
    return _evict(backing, backing.catalogue.nbytes() - max_bytes, all_or_nothing=False)[0]


def _evict(backing: Backing, excess: int, all_or_nothing: bool) -> tuple[list[str], int]:
    """Remove the least recently used shards; returns their names and how many bytes are still too many."""
    sizes = backing.catalogue.shards()
    victims: dict[str, int] = {}
    try:
        for name in _least_recent(backing):
            if excess <= 0:
                break
            fd = lock_for_removal(backing.folder.shard(name))
            if fd is not None:
                victims[name] = fd
                excess -= sizes[name]
        if excess > 0 and all_or_nothing:
            return [], excess
        for name in victims:
            backing.folder.shard(name).unlink(missing_ok=True)
        backing.catalogue.forget(victims)
        return list(victims), excess
    finally:
        for fd in victims.values():
            os.close(fd)


def _least_recent(backing: Backing) -> Iterator[str]:
    pinned = backing.folder.pinned()
    used: dict[str, int] = {}
    for name in backing.catalogue.shards():
        path = backing.folder.shard(name)
        if name not in pinned and path.exists():
            used[name] = path.stat().st_mtime_ns
    return iter(sorted(used, key=lambda name: (used[name], name)))


def _over_limit(max_bytes: int, nbytes: int, kept: int) -> StoreError:
    return StoreError(
        f"{nbytes:,} bytes do not fit under the store's limit of {max_bytes:,}: {kept:,} are in use by open readers "
        f"or this run; raise max_bytes to at least {kept + nbytes:,}"
    )
