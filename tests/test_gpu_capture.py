"""Fused kernels and asynchronous capture on a real device: `REQUIRE_GPU=1 python -m pytest -m gpu -n 0`."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from families import make
from tiny import PROMPTS
from torch import Tensor, nn

from probes.capture import forward as forward_module
from probes.capture import run as capture_module
from probes.capture.needs import Need
from probes.capture.run import capture
from probes.device_to_host import CudaEngine, Lane, PendingTensor
from probes.kernels import RowOutputs, capture_rows, forced, lens_rows, sequence_means, unpacked
from probes.kernels import eager as reference
from probes.models.backends.native import NativeModel
from probes.reducers import Reducer
from probes.store import ActivationStore

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture
def cuda() -> torch.device:
    """The first GPU; without one a skip, or a failure where REQUIRE_GPU is set."""
    if not torch.cuda.is_available():
        (pytest.fail if os.environ.get("REQUIRE_GPU") else pytest.skip)("no CUDA device here")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        (pytest.fail if os.environ.get("REQUIRE_GPU") else pytest.skip)(
            "the kernels are interpreted: unset TRITON_INTERPRET"
        )
    pytest.importorskip("triton")
    return torch.device("cuda", 0)


def outputs(n: int, width: int, storage: torch.dtype, device: torch.device) -> RowOutputs:
    coded = storage == torch.int8

    def column(*shape: int) -> Tensor:
        return torch.full((n, *shape), 77.0, device=device)

    return RowOutputs(
        packed=torch.full((n, width), 77, dtype=storage, device=device),
        scale=column() if coded else None,
        error=column() if coded else None,
        norm=column(),
        moments=column(3),
        change=column(2),
        coordinates=column(3),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("storage", [*DTYPES, torch.int8], ids=str)
@pytest.mark.parametrize("width", [1, 37, 576, 4096, 14_336])
def test_rows(cuda: torch.device, dtype: torch.dtype, storage: torch.dtype, width: int) -> None:
    tensor = torch.randn(300, width, device=cuda).to(dtype)
    index = torch.randint(-1, 300, (200,), device=cuda)
    previous, basis = torch.randn(200, width, device=cuda), torch.randn(3, width, device=cuda)
    offset, written = torch.tensor([5], device=cuda), []
    for kernels in ("eager", "fused"):
        out = outputs(203, width, storage, cuda)
        with forced(kernels):
            capture_rows(tensor, index, out, previous, basis, offset)
        written.append(out)
    for field in fields(RowOutputs):
        expected, got = (getattr(out, field.name) for out in written)
        if field.name == "packed" and storage != torch.int8:
            assert torch.equal(expected, got)
        elif field.name == "packed":
            # A value half-way between two codes may be rounded either way by the last bit of its division.
            assert int((expected.int() - got.int()).abs().max()) <= 1
            assert float((expected != got).float().mean()) < 1e-4
        elif expected is not None:
            scale = max(1.0, float(expected.abs().max()))
            torch.testing.assert_close(got, expected, atol=2e-5 * scale, rtol=1e-4, msg=field.name)


def test_strided_rows_and_means(cuda: torch.device) -> None:
    heads = torch.randn(4, 6, 50, 64, device=cuda, dtype=torch.bfloat16).transpose(1, 2)[0]
    out, index = torch.empty(20, 6 * 64, device=cuda, dtype=torch.bfloat16), torch.arange(49, 29, -1, device=cuda)
    capture_rows(heads, index, RowOutputs(packed=out))
    assert torch.equal(out, heads.flatten(1)[index])
    means, starts = torch.empty(3, 384, device=cuda), torch.tensor([0, 17, 17, 20], device=cuda)
    sequence_means(heads.flatten(1), index, starts, means)
    assert means[1].isnan().all()
    torch.testing.assert_close(means[0], heads.flatten(1)[index[:17]].float().mean(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 64, 500])
@pytest.mark.parametrize("top_k", [0, 1, 10, 32])
def test_lens(cuda: torch.device, dtype: torch.dtype, n: int, top_k: int) -> None:
    hidden = torch.randn(n, 520, device=cuda).to(dtype)
    weight, bias = (torch.randn(32_017, 520, device=cuda) / 20).to(dtype), torch.randn(32_017, device=cuda).to(dtype)
    ids = torch.tensor([0, 32_016, 7], device=cuda)
    for softcap in (None, 30.0):
        expected = reference.lens_rows(hidden, weight, bias, softcap, ids, top_k)
        fused = lens_rows(hidden, weight, bias, softcap, ids, top_k)
        for name in ("log_z", "entropy_bits", "wanted", "top_logprobs"):
            torch.testing.assert_close(getattr(fused, name), getattr(expected, name), atol=2e-4, rtol=2e-4, msg=name)
        # Logits closer than rounding may swap places.
        if top_k:
            assert float((fused.top_ids == expected.top_ids).float().mean()) > 0.95


def test_the_stress_that_others_fail(cuda: torch.device) -> None:
    """Thousands of packets, random delays on device and host, poisoned buffers: not one wrong element."""
    lane, draw = Lane(CudaEngine(cuda), 4 << 20, 8 << 20, poison=True), random.Random(0)

    def receive(pendings: list[tuple[int, int, PendingTensor]]) -> int:
        wrong = 0
        for number, size, pending in pendings:
            values = pending.read()
            wrong += int((values != number).sum()) + abs(values.numel() - size)
            if draw.random() < 0.02:
                time.sleep(0.002)
            pending.release()
        return wrong

    with ThreadPoolExecutor(1) as reader:
        results, bunch = [], []
        for number in range(5000):
            size = draw.randrange(1, 200_000)
            if draw.random() < 0.1:
                torch.cuda._sleep(draw.randrange(1, 400_000))
            source = torch.full((size,), float(number), device=cuda)
            index = torch.zeros(1, dtype=torch.long, device=cuda)

            def fill(out: Tensor, source: Tensor = source, index: Tensor = index) -> None:
                capture_rows(source[None], index, RowOutputs(packed=out[None]))

            bunch.append((number, size, lane.send((size,), torch.float32, fill)))
            source.fill_(-1)
            if len(bunch) == 4:
                draw.shuffle(bunch)
                results.append(reader.submit(receive, bunch))
                bunch = []
        assert sum(result.result() for result in results) + receive(bunch) == 0
    lane.close()


def test_poison_shows_a_copy_that_is_read_too_early(cuda: torch.device) -> None:
    """The stress above would see a missing barrier: without waiting, the host still holds NaN."""
    lane = Lane(CudaEngine(cuda), 1 << 20, 1 << 20, poison=True)
    first = lane.send((200_000,), torch.float32, lambda out: out.fill_(1))
    first.read()
    first.release()
    torch.cuda._sleep(200_000_000)
    second = lane.send((200_000,), torch.float32, lambda out: out.fill_(2))
    assert second._values.isnan().all()
    assert (second.read() == 2).all()
    lane.close()


BASIS = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
NEEDS = [
    Need(("resid_pre.0", "resid_mid.*", "z.1", "k.1", "pattern.1")),
    Need("resid_post.*", Reducer("int8")),
    Need("resid_post.*", Reducer("norm")),
    Need("resid_post.*", Reducer("moments", "last")),
    Need("resid_post.*", Reducer("mean")),
    Need("resid_post.*", Reducer("mean_square")),
    Need("resid_post.*", Reducer("project", basis=BASIS)),
    Need("resid_post.*", Reducer("lens_ids", "last", ids=(3, 50))),
    Need("resid_post.*", Reducer("lens_top", top_k=4)),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_capture_stores_what_the_reference_stores(
    cuda: torch.device, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`capture` by itself takes the fused kernels and the asynchronous path for a model on CUDA, with SDPA."""
    monkeypatch.setenv("BATHYSCOPE_POISON", "1")
    model = NativeModel(make("llama").to(cuda, dtype), ref="tiny", weights="tiny")
    assert model.context.attention == "sdpa"
    activations = capture(model, PROMPTS, NEEDS, ActivationStore(tmp_path / "a"))
    with monkeypatch.context() as patch, forced("eager"):
        for module in (capture_module, forward_module):
            patch.setattr(module, "asynchronous", lambda _: False)
        expected = capture(model, PROMPTS, NEEDS, ActivationStore(tmp_path / "b"))
    for feature in (feature for need in NEEDS for feature in need.features(3)):
        got, stored_by_reference = (c.get(feature.address, feature.reducer) for c in (activations, expected))
        for a, b in zip(got, stored_by_reference, strict=True):
            assert a.dtype == b.dtype
            if feature.reducer.kind == "int8":
                a, b = unpacked(a).rows, unpacked(b).rows
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3, msg=feature.key)


class Tapped(nn.Module):
    """A block whose output is packed at a place that the device itself counts."""

    def __init__(self, device: torch.device, capacity: int) -> None:
        super().__init__()
        self.block = nn.Linear(64, 64).to(device)
        self.index = torch.tensor([3, 0], device=device)
        self.offset = torch.zeros(1, dtype=torch.int64, device=device)
        self.out = RowOutputs(
            packed=torch.full((capacity, 64), 77.0, device=device), norm=torch.full((capacity,), 77.0, device=device)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        capture_rows(y, self.index, self.out, offset=self.offset)
        self.offset += 2
        return y


@torch.inference_mode()
def test_kernels_are_recorded_in_a_cuda_graph(cuda: torch.device) -> None:
    """Each replay packs the rows of its own input behind those of the one before."""
    tapped, x = Tapped(cuda, 12), torch.zeros(5, 64, device=cuda)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            tapped(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tapped(x)
    tapped.offset.zero_()
    expected = []
    for step in range(5):
        x.copy_(torch.randn(5, 64, generator=torch.Generator().manual_seed(step)))
        graph.replay()
        expected.append(tapped.block(x)[[3, 0]])
    packed, norm = tapped.out.packed, tapped.out.norm
    assert packed is not None
    assert norm is not None
    torch.testing.assert_close(packed[:10], torch.cat(expected))
    torch.testing.assert_close(norm[:10], torch.cat(expected).norm(dim=-1))
    assert (packed[10:] == 77).all()


@torch.inference_mode()
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_kernels_stay_in_a_compiled_model(cuda: torch.device, mode: str) -> None:
    tapped = Tapped(cuda, 8)
    compiled: Callable[[Tensor], Tensor] = torch.compile(tapped, fullgraph=True, mode=mode)
    expected = []
    for step in range(4):
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(step)).to(cuda)
        torch.testing.assert_close(compiled(x), tapped.block(x), atol=1e-4, rtol=1e-4)
        expected.append(tapped.block(x)[[3, 0]])
    assert tapped.out.packed is not None
    torch.testing.assert_close(tapped.out.packed, torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_a_forward_never_waits_for_its_copies(cuda: torch.device) -> None:
    """Sending returns while the device is still busy with what came before."""
    lane = Lane(CudaEngine(cuda), 1 << 20, 1 << 20)
    lane.send((1000,), torch.float32, lambda out: out.fill_(0)).read()
    torch.cuda.synchronize()
    torch.cuda._sleep(500_000_000)
    started = time.perf_counter()
    pending = lane.send((1000,), torch.float32, lambda out: out.fill_(1))
    queued = time.perf_counter() - started
    assert (pending.read() == 1).all()
    assert queued < (time.perf_counter() - started) / 2
    lane.close()
