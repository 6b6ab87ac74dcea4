"""Captured rows on their way from a device to host memory, without the host or the device waiting for each other."""

from probes.transport.engine import CudaEngine, Engine, Event, HostEngine, engine_for
from probes.transport.lane import Lane, Parcel
from probes.transport.ring import HostRing, StreamRing, aligned
from probes.transport.transport import Transport

__all__ = [
    "CudaEngine",
    "Engine",
    "Event",
    "HostEngine",
    "HostRing",
    "Lane",
    "Parcel",
    "StreamRing",
    "Transport",
    "aligned",
    "engine_for",
]
