"""Two circular buffers of bytes: one on the device, reused in the order of its work; one on the host, released by readers."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from probes.device_to_host.copy_engine import Engine, Event

ALIGNMENT = 256
"""Regions begin at multiples of this many bytes, so that any type can be viewed in them and loads are wide."""
POISON = 0xFF
"""The byte that fills dead memory when debugging: NaN in every floating type."""


def aligned(size: int) -> int:
    """Return `size` rounded up to whole alignments, at least one."""
    return max(1, -(-size // ALIGNMENT)) * ALIGNMENT


@dataclass(eq=False)
class Region:
    """Bytes [start, stop) of a ring."""

    start: int
    stop: int
    event: Event | None = None
    """When the region may be overwritten, on a device ring; None while its copy is not queued."""
    released: bool = field(default=False)

    def overlaps(self, start: int, stop: int) -> bool:
        """Tell whether the region shares a byte with [start, stop)."""
        return self.start < stop and start < self.stop


class StreamRing:
    """The device's ring: a region is reused as soon as the device has passed the copy that read it.

    Nobody waits on the host: the compute queue is held behind that copy, on the device.
    """

    def __init__(self, engine: Engine, size: int, poison: bool = False) -> None:
        self.engine, self.poison = engine, poison
        # Made within a forward, but also written outside its inference mode.
        with torch.inference_mode(False):
            self.buffer = engine.device_buffer(aligned(size))
        self._next = 0
        self._tenants: deque[Region] = deque()

    def reserve(self, size: int) -> tuple[Region, Tensor]:
        """Return a region of `size` bytes and its memory, which the compute queue may write from here on."""
        total, needed = len(self.buffer), aligned(size)
        if needed > total:
            raise ValueError(f"{size} bytes do not fit a ring of {total}")
        start = self._next if self._next + needed <= total else 0
        region = Region(start, start + needed)
        # Copies end in the order in which they were queued, so waiting for the last tenant waits for all.
        last = None
        while any(tenant.overlaps(start, start + needed) for tenant in self._tenants):
            last = self._tenants.popleft()
        if last is not None:
            assert last.event is not None, "a region was reserved and never sent"
            self.engine.hold(last.event)
        self._next = region.stop
        self._tenants.append(region)
        memory = self.buffer[region.start : region.start + size]
        if self.poison:
            memory.fill_(POISON)
        return region, memory


class HostRing:
    """The host's ring: a region is reused once its reader released it; a full ring makes the sender wait."""

    def __init__(self, engine: Engine, size: int, poison: bool = False) -> None:
        self.poison = poison
        with torch.inference_mode(False):
            self.buffer = engine.host_buffer(aligned(size))
        self._changed = threading.Condition()
        self._regions: deque[Region] = deque()
        self._error: BaseException | None = None

    def reserve(self, size: int) -> tuple[Region, Tensor]:
        """Return a region of `size` bytes and its memory; wait for readers while there is no room.

        Raises:
            BaseException: what `fail` was given.
        """
        needed = aligned(size)
        if needed > len(self.buffer):
            raise ValueError(f"{size} bytes do not fit a ring of {len(self.buffer)}")
        with self._changed:
            while self._error is None and (start := self._room(needed)) is None:
                self._changed.wait()
            if self._error is not None:
                raise self._error
            assert start is not None
            region = Region(start, start + needed)
            self._regions.append(region)
        return region, self.buffer[region.start : region.start + size]

    def release(self, region: Region) -> None:
        """Release a region, in any order; its bytes are used again once all older regions are released too."""
        if self.poison:
            self.buffer[region.start : region.stop].fill_(POISON)
        with self._changed:
            region.released = True
            while self._regions and self._regions[0].released:
                self._regions.popleft()
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Make `reserve` raise `error` from now on, also where it is waiting."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def _room(self, needed: int) -> int | None:
        """Where `needed` bytes are free behind the newest region, or at the beginning; None where nowhere."""
        total = len(self.buffer)
        if not self._regions:
            return 0
        first, last = self._regions[0].start, self._regions[-1].stop
        if self._regions[-1].start >= first:
            if last + needed <= total:
                return last
            return 0 if needed <= first else None
        return last if last + needed <= first else None
