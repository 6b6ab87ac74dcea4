"""The transport of a capture: one lane per device."""

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
    """Sends tensors of any device to the host, each device through rings of its own.

    A sender may gather pending tensors before it hands them to a reader, but hands them over as soon as they take `gather`
    bytes. Otherwise they could fill the ring while no reader knows of them, and `send` would wait for ever. With this bound
    `send` always finds room once readers have released the rest: what is gathered and the next tensor each take at most a
    quarter of the ring, so at least a quarter of it lies free in one piece.

    Args:
        largest: bytes of the largest tensor that goes through the rings; a larger one goes by itself, in memory of its
            own.
        ring_bytes: size of a host ring, where it is to be larger than four of these.
        poison: debug mode; see `Lane`.
        make_engine: makes the engine of a device.
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
        """Queue a tensor of a device, as `Lane.send` does."""
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
        """Make a waiting or later `send` raise `error`, so that a reader's fault stops the forward."""
        self._error = error
        for lane in list(self._lanes.values()):
            lane.fail(error)

    def close(self) -> None:
        """Return once all copies have ended."""
        for lane in self._lanes.values():
            lane.close()
