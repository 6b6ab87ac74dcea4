"""The activation store: rows of activations looked up by what they are, never by where they came from."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import numpy as np

from probes.cache_folder import cache_root, expanded
from probes.errors import StoreError
from probes.html_card import Fold, card, count, size
from probes.store import eviction, maintenance
from probes.store.backing import Backing, Vanished, read_only
from probes.store.catalogue import Catalogue, DamagedCatalogue
from probes.store.files import Partial, touch
from probes.store.layout import encode
from probes.store.maintenance import GcReport, VerifyReport
from probes.store.names import Names
from probes.store.shard import Shard
from probes.store.values import Context, MissingRows, Packet, Put, Sequences, canonical, sequence_digest

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor


def default_root() -> Path:
    """Return `$BATHYSCOPE_STORE`, or `store` in the cache folder."""
    return Path(os.environ.get("BATHYSCOPE_STORE") or cache_root() / "store")


Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


def healing(
    method: Callable[Concatenate[ActivationStore, Arguments], Result],
) -> Callable[Concatenate[ActivationStore, Arguments], Result]:
    """Wrap a method of the store so that it rebuilds the catalogue, once, where that contradicts the shards."""

    @wraps(method)
    def healed(store: ActivationStore, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            return method(store, *args, **kwargs)
        except DamagedCatalogue as damage:
            maintenance.renew(store._backing, damage)
            return method(store, *args, **kwargs)

    return healed


class ActivationStore:
    """Captured activations in a folder that many processes may share.

    A row is looked up by its context, the digest of its token ids and its feature. Rows are durable when `put` returns;
    every block of a shard is checked against its checksum before it is first read, and what the catalogue says against
    the shard. A store that may only be read is read without writing anything to it.
    """

    def __init__(self, root: str | Path | None = None, max_bytes: int | None = None) -> None:
        """Open or create the store in `root`; `max_bytes` bounds its shards, None leaves only the disk.

        Raises:
            StoreError: a root that cannot be used, a store of a newer protocol, or a limit that is not positive.
        """
        if max_bytes is not None and max_bytes <= 0:
            raise StoreError(f"max_bytes {max_bytes} leaves no room; give a positive number of bytes, or None")
        self.root = expanded(default_root() if root is None else root).absolute()
        self.max_bytes = max_bytes
        self._backing = Backing(self.root)
        self.names = Names(self.root)
        self._open()

    @healing
    def _open(self) -> None:
        self._backing.folder.sweep()
        maintenance.reconcile(self._backing)

    @healing
    def __repr__(self) -> str:
        limit = "" if self.max_bytes is None else f" of {self.max_bytes:,}"
        index = self._index
        return f"ActivationStore({str(self.root)!r}: {index.nbytes():,}{limit} bytes in {len(index.shards())} shards)"

    @healing
    def _repr_html_(self) -> str:
        shards = count(len(self._index.shards()), "shard")
        limit = "no limit but the disk" if self.max_bytes is None else f"at most {size(self.max_bytes)}"
        listing = self.ls().drop(columns="last_used").to_dict("split")
        folds = [Fold(f"Contexts ({len(listing['data'])})", listing["columns"], listing["data"])]
        facts = {"holds": f"{size(self.bytes_held())} in {shards}, {limit}"}
        return card("ActivationStore", str(self.root), facts, folds)

    def __reduce__(self) -> tuple[type[ActivationStore], tuple[Path, int | None]]:
        return ActivationStore, (self.root, self.max_bytes)

    @healing
    def contains(self, context: Context, sequences: Sequences, features: Sequence[str]) -> np.ndarray:
        """Return which rows are here: bool [n_sequences, n_features]. Inside `pin` they stay until its end."""
        digests = [sequence_digest(tokens) for tokens in sequences]
        return self._contains(canonical(context), digests, features)

    @healing
    def put(self, packet: Packet) -> Put:
        """Write the rows of a packet that are not here yet; they are durable on return.

        Raises:
            StoreError: no room on the disk or under `max_bytes`; nothing of this packet was written then.
        """
        packet = packet.unique()
        digests = [sequence_digest(tokens) for tokens in packet.sequences]
        total, text = len(digests) * len(packet.features), canonical(packet.context)
        while True:
            missing = ~self._contains(text, digests, list(packet.features))
            if missing.any() and self._backing.read_only:
                raise read_only(self.root)
            partials: list[Partial] = []
            try:
                for part in packet.parts(missing):
                    partials.append(self._backing.write(encode(part)))
                if self._commit(partials):
                    written = sum(partial.entry.nbytes for partial in partials)
                    return Put(written, int(missing.sum()), total - int(missing.sum()))
            finally:
                for partial in partials:
                    partial.discard()

    @healing
    def read(self, context: Context, sequences: Sequences, feature: str) -> list[Tensor]:
        """Return one tensor [count, ...] per sequence, in the order given, viewing the mapped shards; treat it as read-only.

        Where so many shards are mapped that file descriptors run short, rows are copied instead.

        Raises:
            MissingRows: some are not here.
            DamagedShard: a checksum failed; the shard has been set aside.
        """

        def take(shard: Shard, ordinal: int, _: int) -> Tensor:
            rows = shard.rows(feature, ordinal)
            return rows.clone() if self._backing.crowded else rows

        return self._gather(context, sequences, feature, take)

    @healing
    def read_positions(
        self, context: Context, sequences: Sequences, feature: str, positions: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """Return a copy of chosen rows of each sequence, [n_positions, ...] each, reading no others; -1 is the last.

        Raises:
            MissingRows: some sequences are not here.
            DamagedShard: a checksum failed; the shard has been set aside.
            StoreError: positions that are not one list per sequence, or lie outside it.
        """
        if len(positions) != len(sequences):
            raise StoreError(f"{len(positions)} lists of positions for {len(sequences)} sequences; give one for each")

        def take(shard: Shard, ordinal: int, i: int) -> Tensor:
            try:
                return shard.pick(feature, ordinal, positions[i])
            except IndexError as error:
                raise StoreError(f"{error} (sequence {i}): legal are -n to n-1 for n rows") from error

        return self._gather(context, sequences, feature, take)

    @healing
    def shards_of(self, context: Context, sequences: Sequences, features: Sequence[str]) -> list[str]:
        """Return the names of the shards that reading these rows opens, sorted; rows that are not here are passed over."""
        digests = {sequence_digest(tokens) for tokens in sequences}
        text = canonical(context)
        located = [self._index.locate(text, digests, feature) for feature in features]
        return sorted({places[0].shard for by_sequence in located for places in by_sequence.values()})

    def pin(self) -> AbstractContextManager[None]:
        """Keep every shard whose rows this store writes, reads or reports inside the block from eviction by any process."""
        return self._backing.pins.run()

    @healing
    def check_space(self, n_bytes: int) -> None:
        """Refuse a run that cannot fit.

        Raises:
            StoreError: says how many bytes to free, or how far to raise `max_bytes`.
        """
        eviction.check_space(self._backing, self.max_bytes, n_bytes)

    @healing
    def bytes_held(self) -> int:
        """Return the bytes of all shards."""
        return self._index.nbytes()

    @healing
    def ls(self) -> pd.DataFrame:
        """Return the lines of `contexts` as a table."""
        import pandas as pd

        return pd.DataFrame(self.contexts(), columns=[*maintenance.COLUMNS])

    @healing
    def contexts(self) -> list[dict[str, Any]]:
        """Return of each context: model (what its weights were called), what it says, sequences, features, shards, bytes, last_used (UTC)."""
        known, said = self.names.read(), maintenance.contexts(self._backing)
        lines = [{"model": ", ".join(known.get(line["weights"], ())), **line} for line in said]
        return [{name: line[name] for name in maintenance.COLUMNS} for line in lines]

    @healing
    def verify(self) -> VerifyReport:
        """Check every byte of every shard; damaged ones are set aside and reported."""
        return maintenance.verify(self._backing)

    def rebuild(self) -> int:
        """Rebuild the catalogue from the shards alone; returns how many there are."""
        return maintenance.rebuild(self._backing)

    @healing
    def gc(self, max_bytes: int | None = None) -> GcReport:
        """Remove leftovers and quarantined shards and evict down to `max_bytes` (this store's own if None)."""
        return maintenance.gc(self._backing, self.max_bytes if max_bytes is None else max_bytes)

    @healing
    def export(
        self, dest: str | Path, format: str = "safetensors", context: Context | None = None, features: str = "*"
    ) -> list[Path]:
        """Write rows for other tools: one file per context and feature (and one of tokens, for parquet).

        Args:
            format: `safetensors` (exact dtype), `npz` (bf16 and float8 as float32), `parquet` (also float16), or `datasets`
                (as parquet; a folder for `datasets.load_from_disk`).
            context: export only contexts that say all of this.
            features: glob, for instance `resid_post.*`.

        Raises:
            StoreError: an unknown format, or nothing that matches.
        """
        from probes.store.export import export

        return export(self._backing, Path(dest), format, context or {}, features)

    @property
    def _index(self) -> Catalogue:
        """Return the catalogue; filled first from the shards where its file was replaced under this store."""
        catalogue = self._backing.catalogue
        catalogue.open()
        if not catalogue.complete:
            maintenance.reconcile(self._backing)
        return catalogue

    def _contains(self, context: str, digests: Sequence[bytes], features: Sequence[str]) -> np.ndarray:
        index, pins = self._index, self._backing.pins
        if not pins.active:
            return index.contains(context, digests, features)[0]
        # An evictor reads the pins inside its own transaction, so it sees these or has already taken effect.
        with index.writing():
            present, shards = index.contains(context, digests, features)
            pins.add(shards)
            return present

    def _commit(self, partials: Sequence[Partial]) -> bool:
        """Publish and index the files, unless some of their rows have been committed meanwhile."""
        entries = [partial.entry for partial in partials]
        nbytes = sum(entry.nbytes for entry in entries)
        index = self._index
        with index.writing():
            if not index.complete:
                return False
            if any(index.contains(entry.context, entry.sequences, entry.features)[0].any() for entry in entries):
                return False
            eviction.make_room(self._backing, self.max_bytes, nbytes)
            self._backing.pins.add(entry.digest for entry in entries)
            for partial in partials:
                self._backing.publish(partial)
                index.add(partial.entry)
        return True

    def _gather(
        self, context: Context, sequences: Sequences, feature: str, take: Callable[[Shard, int, int], Tensor]
    ) -> list[Tensor]:
        digests = [sequence_digest(tokens) for tokens in sequences]
        text = canonical(context)
        while True:
            places = self._index.locate(text, digests, feature)
            missing = sum(digest not in places for digest in digests)
            if missing and not self._backing.catalogue.complete:
                continue
            if missing:
                raise MissingRows(feature, missing, len(digests))
            grouped: dict[str, list[int]] = {}
            for i, digest in enumerate(digests):
                grouped.setdefault(places[digest][0].shard, []).append(i)
            self._backing.pins.add(grouped)
            rows: dict[int, Tensor] = {}
            try:
                for name, members in grouped.items():
                    with self._backing.shard(name) as shard:
                        for i in members:
                            ordinal = places[digests[i]][0].ordinal
                            if not shard.holds(text, feature, ordinal, sequences[i]):
                                raise self._backing.catalogue.damaged(f"sequence {ordinal} of shard {name} is another")
                            rows[i] = take(shard, ordinal, i)
                    touch(self._backing.folder.shard(name))
            except Vanished:
                continue
            return [rows[i] for i in range(len(digests))]
