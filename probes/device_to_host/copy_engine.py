"""What the transport asks of a device: buffers, a mark in its work, and copies that run beside it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A point in a device's work."""

    def wait(self) -> None:
        """Returns once the device has passed it."""
        ...


class Engine(Protocol):
    """One device with two queues: the compute queue, which runs the model, and the copy queue."""

    def device_buffer(self, size: int) -> Tensor:
        """`size` bytes on the device, uint8."""
        ...

    def host_buffer(self, size: int) -> Tensor:
        """`size` bytes of host memory that the copy queue can write to, uint8."""
        ...

    def mark(self) -> Event:
        """The point after everything that the compute queue was given so far."""
        ...

    def hold(self, event: Event) -> None:
        """The compute queue goes on only when `event` has passed; the host does not wait."""
        ...

    def copy(self, source: Tensor, target: Tensor, after: Event) -> Event:
        """Queues a copy from device to host once `after` has passed; the event of its end."""
        ...

    def finish(self) -> None:
        """Returns once all copies have ended."""
        ...


class _CudaEvent:
    """An event on which a thread sleeps rather than spins."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self.event.record(stream)

    def wait(self) -> None:
        self.event.synchronize()


class CudaEngine:
    """A CUDA device: the compute queue is the stream current at each call, the copy queue a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def device_buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def host_buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def mark(self) -> Event:
        with torch.cuda.device(self.device):
            return _CudaEvent(torch.cuda.current_stream(self.device))

    def hold(self, event: Event) -> None:
        assert isinstance(event, _CudaEvent)
        torch.cuda.current_stream(self.device).wait_event(event.event)

    def copy(self, source: Tensor, target: Tensor, after: Event) -> Event:
        assert isinstance(after, _CudaEvent)
        with torch.cuda.device(self.device), torch.cuda.stream(self.copies):
            self.copies.wait_event(after.event)
            target.copy_(source, non_blocking=True)
            return _CudaEvent(self.copies)

    def finish(self) -> None:
        self.copies.synchronize()


class _Passed:
    """An event of a device that does everything at once."""

    def wait(self) -> None:
        return None


class HostEngine:
    """Host memory in the place of a device: every queue is the calling thread."""

    def device_buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def host_buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def mark(self) -> Event:
        return _Passed()

    def hold(self, event: Event) -> None:
        event.wait()

    def copy(self, source: Tensor, target: Tensor, after: Event) -> Event:
        after.wait()
        target.copy_(source)
        return _Passed()

    def finish(self) -> None:
        return None


def engine_for(device: torch.device) -> Engine:
    """The engine of a device."""
    return CudaEngine(device) if device.type == "cuda" else HostEngine()
