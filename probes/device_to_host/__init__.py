"""Copies of captured rows from a device to host memory beside the work of both. Imported by capture."""

from probes.device_to_host.copy_engine import CudaEngine, Engine, Event, HostEngine, engine_for
from probes.device_to_host.copy_lane import Lane, PendingTensor
from probes.device_to_host.ring_buffers import HostRing, StreamRing, aligned
from probes.device_to_host.transport import Transport

__all__ = [
    "CudaEngine",
    "Engine",
    "Event",
    "HostEngine",
    "HostRing",
    "Lane",
    "PendingTensor",
    "StreamRing",
    "Transport",
    "aligned",
    "engine_for",
]
