"""The copies from one device to the host: a ring on either side, and a copy queue between them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod

import torch
from torch import Tensor

from probes.device_to_host.copy_engine import Engine, Event
from probes.device_to_host.ring_buffers import HostRing, StreamRing


class PendingTensor:
    """A tensor on its way to the host. Its memory belongs to the reader from `read` until `release`."""

    def __init__(self, values: Tensor, arrived: Event, nbytes: int, give_back: Callable[[], None]) -> None:
        self.nbytes = nbytes
        """Bytes of the ring that it takes."""
        self._values, self._arrived, self._give_back = values, arrived, give_back
        self._released = False

    def read(self) -> Tensor:
        """Wait until the copy has ended, then return the tensor in page-locked host memory.

        There is no other way to the values, so nobody can see a row that has not arrived. The tensor is a view of
        the ring: it must not be used after `release`.
        """
        if self._released:
            raise RuntimeError("a pending tensor cannot be read after its memory was given back")
        self._arrived.wait()
        return self._values

    def release(self) -> None:
        """Give the memory back to the ring; a second call does nothing."""
        if not self._released:
            self._released = True
            # The copy may still be writing where a reader gave up early.
            self._arrived.wait()
            self._give_back()


class Lane:
    """Sends tensors from one device to the host.

    The kernel that makes a tensor writes it straight into the device's ring; a copy queued behind it moves it to the
    host's ring; the compute queue waits for a copy only when the ring has come round to the same bytes.

    Args:
        engine: the device.
        device_bytes: size of the ring on the device.
        host_bytes: size of the ring on the host, which bounds what readers can be behind.
        poison: fill bytes with NaN before they are reused, so that a broken barrier shows as NaN.
    """

    def __init__(self, engine: Engine, device_bytes: int, host_bytes: int, poison: bool = False) -> None:
        self.engine = engine
        self._device = StreamRing(engine, device_bytes, poison)
        self._host = HostRing(engine, host_bytes, poison)

    def send(self, shape: tuple[int, ...], dtype: torch.dtype, fill: Callable[[Tensor], object]) -> PendingTensor:
        """Queue a tensor; return at once unless readers are a whole host ring behind.

        Args:
            shape: the tensor's shape.
            dtype: the tensor's type.
            fill: gives the compute queue the work that writes the tensor, of `shape` and `dtype`, on the device.
        """
        size = prod(shape) * dtype.itemsize
        region, host = self._host.reserve(size)
        try:
            tenant, device = self._device.reserve(size)
            try:
                fill(device.view(dtype).view(shape))
            finally:
                # The region must have an end even where making the tensor failed.
                tenant.event = self.engine.mark()
            tenant.event = self.engine.copy(device, host, tenant.event)
        except BaseException:
            self._host.release(region)
            raise
        values = host.view(dtype).view(shape)
        return PendingTensor(values, tenant.event, region.stop - region.start, partial(self._host.release, region))

    def send_alone(self, shape: tuple[int, ...], dtype: torch.dtype, fill: Callable[[Tensor], object]) -> PendingTensor:
        """Queue a tensor that is too large for the rings, in memory of its own that is freed when it is released."""
        size = prod(shape) * dtype.itemsize
        with torch.inference_mode(False):
            buffers = [self.engine.device_buffer(size), self.engine.host_buffer(size)]
        device, host = buffers
        fill(device.view(dtype).view(shape))
        arrived = self.engine.copy(device, host, self.engine.mark())
        # The device's buffer lives until the copy has read it.
        return PendingTensor(host.view(dtype).view(shape), arrived, 0, buffers.clear)

    def fail(self, error: BaseException) -> None:
        """Make a waiting or later `send` raise `error`."""
        self._host.fail(error)

    def close(self) -> None:
        """Return once nothing writes to the rings any more."""
        self.engine.finish()
