"""Keeping catalogue and shards in step: listing, verifying, rebuilding, collecting."""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from probes.errors import StoreError
from probes.locked_files import exclusive
from probes.store.backing import Backing, Vanished, read_only
from probes.store.catalogue import DamagedCatalogue
from probes.store.eviction import shrink
from probes.store.files import remove, remove_if_unlocked
from probes.store.shard import Damage, Shard, Unreadable
from probes.store.values import DamagedShard, Entry

LOG = logging.getLogger("probes.store")
SAID = ("weights", "backend", "dtype", "attention", "edits")
"""What a context usually says, in the order it is shown."""
COLUMNS = ("model", *SAID, "sequences", "features", "shards", "bytes", "last_used")
"""What is listed of each context."""


@dataclass(frozen=True)
class VerifyReport:
    """The outcome of a check of every byte."""

    checked: int
    """Shards read."""
    bytes: int
    damaged: tuple[str, ...]
    """Shards that failed and were set aside."""


@dataclass(frozen=True)
class GcReport:
    """What a collection removed."""

    evicted: tuple[str, ...]
    """Shards, least recently used first."""
    bytes_freed: int
    """Of evicted and quarantined shards."""
    temporary: int
    """Files left by writers that died."""
    quarantined: int
    """Damaged shards deleted for good."""
    bytes_held: int


def reconcile(backing: Backing) -> None:
    """Index shards the catalogue lacks (their writer died before its commit) and forget those that are gone."""
    known = backing.catalogue.shards()
    listing = backing.folder.listing()
    placed = {path.stem for path in listing if path == backing.folder.shard(path.stem)}
    strange = [path for path in listing if path.stem not in known or path != backing.folder.shard(path.stem)]
    fresh = [entry for path in strange if (entry := _scan(backing, path))]
    lost = known.keys() - placed
    if fresh or lost:
        with backing.catalogue.writing():
            now = backing.catalogue.shards()
            for entry in fresh:
                if entry.digest not in now:
                    _index(backing, entry)
            backing.catalogue.forget(name for name in lost if not backing.folder.shard(name).exists())
    if not backing.catalogue.complete:
        backing.catalogue.mark_complete()


def renew(backing: Backing, damage: DamagedCatalogue) -> None:
    """Throw an unusable catalogue away, unless another process has, and index every shard in a new one.

    Raises:
        StoreError: it cannot be replaced.
    """
    path = backing.catalogue.path
    LOG.warning("the catalogue %s is damaged and is rebuilt from the shards", path)
    try:
        with nullcontext() if backing.read_only else exclusive(backing.folder.root / "store.json"):
            for folder in backing.catalogue.discard(damage):
                backing.folder.set_aside(folder)
    except OSError as error:
        raise StoreError(f"the catalogue {str(path)!r} is damaged and cannot be replaced: {error}") from error
    reconcile(backing)


def rebuild(backing: Backing) -> int:
    """Empty the catalogue and fill it from the shards alone; returns how many shards it holds."""
    # Reading headers takes long and needs no lock; only shards committed meanwhile are read inside.
    scanned = {path: _scan(backing, path) for path in backing.folder.listing()}
    try:
        with backing.catalogue.writing():
            backing.catalogue.clear()
            for path in backing.folder.listing():
                entry = scanned[path] if path in scanned else _scan(backing, path)
                if entry:
                    _index(backing, entry)
    except DamagedCatalogue as damage:
        renew(backing, damage)
    return len(backing.catalogue.shards())


def verify(backing: Backing) -> VerifyReport:
    """Check every byte of every shard against its checksums, and the catalogue against the shards.

    Damaged shards are set aside; a catalogue that contradicts the shards is rebuilt.
    """
    reconcile(backing)
    checked, nbytes, damaged, differing = 0, 0, [], False
    for name, size in backing.catalogue.shards().items():
        try:
            with backing.shard(name, fresh=True) as shard:
                shard.verify()
                differing |= backing.catalogue.entry(name) != shard.entry()
        except Vanished:
            continue
        except DamagedShard:
            damaged.append(name)
        checked += 1
        nbytes += size
    if differing:
        renew(backing, backing.catalogue.damaged("it contradicts the shards"))
    return VerifyReport(checked, nbytes, tuple(damaged))


def gc(backing: Backing, max_bytes: int | None) -> GcReport:
    """Remove leftovers and quarantined shards, then evict down to `max_bytes` where it is given."""
    if backing.read_only:
        raise read_only(backing.folder.root)
    temporary = backing.folder.sweep()
    reconcile(backing)
    freed, quarantined = 0, 0
    for path in backing.folder.quarantine.iterdir():
        freed += remove(path)
        quarantined += 1
    with backing.catalogue.writing():
        sizes = backing.catalogue.shards()
        evicted = [] if max_bytes is None else shrink(backing, max_bytes)
    freed += sum(sizes[name] for name in evicted)
    return GcReport(tuple(evicted), freed, temporary, quarantined, backing.catalogue.nbytes())


def contexts(backing: Backing) -> list[dict[str, Any]]:
    """Return one line per context: what it says, sequences, features, shards, bytes, last_used (UTC)."""
    sizes = backing.catalogue.shards()
    lines = []
    for context, shards in backing.catalogue.contexts().items():
        paths = [path for name in shards if (path := backing.folder.shard(name)).exists()]
        used = max((path.stat().st_mtime for path in paths), default=0)
        lines.append(
            dict.fromkeys(SAID, "")
            | json.loads(context)
            | {
                "sequences": backing.catalogue.count("sequences", context),
                "features": backing.catalogue.count("features", context),
                "shards": len(shards),
                "bytes": sum(sizes.get(name, 0) for name in shards),
                "last_used": datetime.fromtimestamp(used, UTC),
            }
        )
    return lines


def _scan(backing: Backing, path: Path) -> Entry | None:
    try:
        if path != backing.folder.shard(path.stem):
            raise Damage("it lies in the wrong folder", path.lstat().st_ino)
        return Shard(path).entry()
    except FileNotFoundError:
        return None
    except Unreadable as error:
        LOG.warning("shard %s cannot be read and is passed over (%s)", path.stem, error)
        return None
    except Damage as error:
        gone = backing.folder.set_aside(path, error.inode)
        where = "it is now in quarantine/" if gone else "it is passed over"
        LOG.warning("shard %s is damaged (%s); %s", path.stem, error, where)
        return None


def _index(backing: Backing, entry: Entry) -> None:
    """Add a shard, or remove it where all its rows lie in other shards already."""
    present, _ = backing.catalogue.contains(entry.context, entry.sequences, entry.features)
    if not present.all():
        backing.catalogue.add(entry)
        return
    if not backing.read_only:
        remove_if_unlocked(backing.folder.shard(entry.digest))
