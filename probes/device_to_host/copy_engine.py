"""What the transport needs of a device: buffers, marks in its work, and copies that run beside it."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Event(Protocol):
    """A point in a device's work."""

    def wait(self) -> None:
        """Return once the device has passed it."""
        ...


@runtime_checkable
class Engine(Protocol):
    """One device with two queues: the compute queue, which runs the model, and the copy queue."""

    def device_buffer(self, size: int) -> Tensor:
        """Return `size` bytes on the device, uint8."""
        ...

    def host_buffer(self, size: int) -> Tensor:
        """Return `size` bytes of host memory that the copy queue can write to, uint8."""
        ...

    def mark(self) -> Event:
        """Return the point after everything that the compute queue was given so far."""
        ...

    def hold(self, event: Event) -> None:
        """Let the compute queue go on only when `event` has passed; the host does not wait."""
        ...

    def copy(self, source: Tensor, target: Tensor, after: Event) -> Event:
        """Queue a copy from device to host once `after` has passed; return the event of its end."""
        ...

    def finish(self) -> None:
        """Return once all copies have ended."""
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
        """Return `size` bytes on the device, uint8."""
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def host_buffer(self, size: int) -> Tensor:
        """Return `size` bytes of host memory, uint8."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def mark(self) -> Event:
        """Return the point after the work queued so far."""
        with torch.cuda.device(self.device):
            return _CudaEvent(torch.cuda.current_stream(self.device))

    def hold(self, event: Event) -> None:
        """Let the compute queue wait for `event`."""
        assert isinstance(event, _CudaEvent)
        torch.cuda.current_stream(self.device).wait_event(event.event)

    def copy(self, source: Tensor, target: Tensor, after: Event) -> Event:
        """Queue a copy behind `after`; return the event of its end."""
        assert isinstance(after, _CudaEvent)
        with torch.cuda.device(self.device), torch.cuda.stream(self.copies):
            self.copies.wait_event(after.event)
            target.copy_(source, non_blocking=True)
            return _CudaEvent(self.copies)

    def finish(self) -> None:
        """Wait for all copies."""
        self.copies.synchronize()


class _Passed:
    """An event of a device that does everything at once."""

    def wait(self) -> None:
        return None


class HostEngine:
    """Host memory in the place of a device: every queue is the calling thread."""

    def device_buffer(self, size: int) -> Tensor:
        """Return `size` bytes on the device, uint8."""
        return torch.empty(size, dtype=torch.uint8)

    def host_buffer(self, size: int) -> Tensor:
        """Return `size` bytes of host memory, uint8."""
        return torch.empty(size, dtype=torch.uint8)

    def mark(self) -> Event:
        """Return the point after the work queued so far."""
        return _Passed()

    def hold(self, event: Event) -> None:
        """Let the compute queue wait for `event`."""
        event.wait()

    def copy(self, source: Tensor, target: Tensor, after: Event) -> Event:
        """Queue a copy behind `after`; return the event of its end."""
        after.wait()
        target.copy_(source)
        return _Passed()

    def finish(self) -> None:
        """Wait for all copies."""
        return


def engine_for(device: torch.device) -> Engine:
    """Return the engine of a device."""
    return CudaEngine(device) if device.type == "cuda" else HostEngine()
