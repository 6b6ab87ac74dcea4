"""The lanes of a capture, one a device."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from probes.device_to_host.copy_engine import Engine, engine_for
from probes.device_to_host.copy_lane import Lane, PendingTensor
from probes.device_to_host.ring_buffers import aligned

SHARE = 4
"""A host ring holds this many of the largest tensor, a device's ring half as many."""


class Transport:
    """Sends tensors of any device to the host, each device through its own rings, made when first used.

    Who gathers pending tensors before handing them to a reader must not hold more than `gather` bytes at a time, or the ring
    could fill with pending tensors that no reader knows of: with single tensors of at most a quarter of the ring and gathered
    ones of less than a quarter when another is asked for, there is always a free stretch once all others are back.

    Args:
        largest: bytes of the largest tensor that goes through the rings; a larger one goes by itself, in memory of its
            own.
        ring_bytes: a host ring larger than four of them.
        poison: debug mode; see `Lane`.
    """

    def __init__(
        self,
        largest: int,
        ring_bytes: int = 0,
        poison: bool = False,
        make_engine: Callable[[torch.device], Engine] = engine_for,
    ) -> None:
        self.ring_bytes = max(aligned(ring_bytes), SHARE * aligned(largest))
        self.poison, self._largest = poison, aligned(largest)
        self._make_engine = make_engine
        self._lanes: dict[torch.device, Lane] = {}
        self._error: BaseException | None = None

    @property
    def gather(self) -> int:
        """Gathered bytes at which pending tensors must be handed over."""
        return self.ring_bytes // SHARE

    def send(
        self, device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, fill: Callable[[Tensor], object]
    ) -> PendingTensor:
        """See `Lane.send`."""
        if self._error is not None:
            raise self._error
        if device not in self._lanes:
            # On the device one tensor is copied while the next is made; more would only take the model's memory.
            device_bytes = SHARE // 2 * self._largest
            self._lanes[device] = Lane(self._make_engine(device), device_bytes, self.ring_bytes, self.poison)
        lane = self._lanes[device]
        alone = prod(shape) * dtype.itemsize > self._largest
        return lane.send_alone(shape, dtype, fill) if alone else lane.send(shape, dtype, fill)

    def fail(self, error: BaseException) -> None:
        """Makes a waiting or later `send` raise `error`, so that a reader's fault stops the forward."""
        self._error = error
        for lane in list(self._lanes.values()):
            lane.fail(error)

    def close(self) -> None:
        """Returns once all copies have ended."""
        for lane in self._lanes.values():
            lane.close()
