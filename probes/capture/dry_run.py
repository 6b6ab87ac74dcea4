"""The dry run of a capture: what it will cost, told before it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from probes.capture.forward import PACKET_BYTES, axis_sizes, batch_tokens_of, row_size
from probes.capture.needs import CapturePlan
from probes.html_card import count, size
from probes.models.protocol import LayerMajor, Model, Shape

PROBE_SECONDS = 2.0
"""How long an estimate measures the device."""
COPY_BYTES = 64 * 2**20
"""Bytes of one copy of the measurement."""


@dataclass(frozen=True)
class Estimate:
    """The cost of a plan; seconds and memory are estimates, the rest is exact."""

    forwards: int
    tokens: int
    rows: int
    bytes: int
    stored: int
    """(sequence, feature) pairs the store already holds."""
    seconds: float
    peak_bytes: int
    speed: DeviceSpeed | None = None
    """What was measured; None where nothing is left to run."""

    def lines(self) -> list[str]:
        """Return the estimate as lines for a user."""
        measured = []
        if self.speed:
            rates = (
                f"{2 * self.speed.multiply_adds / 1e12:,.2f} TFLOP/s, {self.speed.copied / 1e9:,.1f} GB/s to the host"
            )
            measured = [f"measured device    {self.speed.name}: {rates}"]
        return [
            *measured,
            f"forwards           {count(self.forwards, 'prompt')}, {count(self.tokens, 'token')}",
            f"rows to capture    {self.rows:,} ({size(self.bytes)})",
            f"already held       {self.stored:,} (prompt, feature) pairs",
            f"estimated time     {self.seconds:.1f} s",
            f"estimated memory   {size(self.peak_bytes)} at the peak",
        ]


def block_parameters(shape: Shape) -> int:
    """Return the number of weights of one block's attention and gated MLP."""
    attention = shape.d_model * shape.d_head * (2 * shape.n_heads + 2 * shape.n_kv_heads)
    return attention + 3 * shape.d_model * shape.d_mlp


@dataclass(frozen=True)
class DeviceSpeed:
    """The speed of a model's device in a short measurement."""

    name: str
    multiply_adds: float
    """Per second, on this model's MLP shape and dtype."""
    copied: float
    """Bytes per second from the device to the host."""


def measured_speed(model: Model, seconds: float) -> DeviceSpeed:
    """Measure the speed and the bandwidth of the model's device, each for half of `seconds`."""
    device = model.device
    dtype = getattr(torch, model.context.dtype)
    rows = 4096 if device.type == "cuda" else 256
    left = torch.randn(rows, model.shape.d_model, device=device).to(dtype)
    right = torch.randn(model.shape.d_model, model.shape.d_mlp, device=device).to(dtype)
    runs, elapsed = _repeated(lambda: torch.mm(left, right), device, seconds / 2)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    return DeviceSpeed(name, runs * left.numel() * model.shape.d_mlp / elapsed, copy_bandwidth(device, seconds / 2))


def copy_bandwidth(device: torch.device, seconds: float = 1.0) -> float:
    """Measure the bytes per second from `device` to host memory, which is page-locked on CUDA."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.zeros(COPY_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    runs, elapsed = _repeated(lambda: target.copy_(source, non_blocking=True), device, seconds)
    return runs * COPY_BYTES / elapsed


def _repeated(work: Callable[[], object], device: torch.device, seconds: float) -> tuple[int, float]:
    """Repeat work for about `seconds`, after one run that does not count; return (runs, elapsed seconds)."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    wait()
    runs, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds or runs < 2:
        for _ in range(1 if device.type == "cpu" else 8):
            work()
            runs += 1
        wait()
    return runs, elapsed


def estimate(model: Model, plans: Sequence[CapturePlan], speed: DeviceSpeed | None = None) -> Estimate:
    """Return the cost of plans on this model and this machine.

    Args:
        model: the model that will run them.
        plans: what is missing from the store.
        speed: the device's speed where it was measured before; None measures it.
    """
    width, size, shape = axis_sizes(model), row_size(model), model.shape
    tokens, captured = sum(plan.tokens for plan in plans), sum(plan.bytes(width, size) for plan in plans)
    block = block_parameters(shape)
    # A streamed model keeps the block at work and the one being read.
    in_memory = min(2, shape.n_layers) if isinstance(model, LayerMajor) else shape.n_layers
    weights = (in_memory * block + 2 * shape.d_vocab * shape.d_model) * size
    activations = batch_tokens_of(model) * size * (4 * shape.d_model + 3 * shape.d_mlp)
    speed = (speed or measured_speed(model, PROBE_SECONDS)) if tokens else None
    seconds = 0.0
    if speed:
        parts = tokens * shape.n_layers * block / speed.multiply_adds, captured / speed.copied
        # On a GPU the copies run beside the forward.
        seconds = max(parts) if model.device.type == "cuda" else sum(parts)
    return Estimate(
        forwards=sum(plan.forwards for plan in plans),
        tokens=tokens,
        rows=sum(plan.rows for plan in plans),
        bytes=captured,
        stored=sum(plan.stored for plan in plans),
        seconds=seconds,
        peak_bytes=weights + activations + min(captured, 3 * PACKET_BYTES),
        speed=speed,
    )
