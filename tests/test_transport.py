"""The asynchronous path on a device made of threads: right elements whatever the delays, bounded memory, no deadlock."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from stand_in import ThreadEngine
from tiny import PROMPTS, native
from torch import Tensor

from probes.capture import forward as forward_module
from probes.capture import run as capture_module
from probes.capture.needs import Need
from probes.capture.run import capture, plan_capture
from probes.device_to_host import HostEngine, HostRing, Lane, PendingTensor, StreamRing, Transport, aligned
from probes.errors import StoreError
from probes.reducers import Reducer
from probes.store import ActivationStore


def packets(n: int, largest: int = 3000) -> Iterator[tuple[int, Tensor]]:
    """Tensors of random length, each filled with its own number."""
    draw = random.Random(0)
    for i in range(n):
        yield i, torch.full((draw.randrange(1, largest),), float(i))


def stress(lane: Lane, n: int, slow_reader: float = 0.0) -> int:
    """Sends n tensors while a second thread reads them in bunches out of order; how many elements came out wrong."""
    wrong, draw = 0, random.Random(1)
    bunch: list[tuple[int, int, PendingTensor]] = []

    def receive(pendings: list[tuple[int, int, PendingTensor]]) -> int:
        errors = 0
        for number, size, pending in pendings:
            time.sleep(draw.random() * slow_reader)
            values = pending.read()
            errors += int((values != float(number)).sum()) + abs(len(values) - size)
            pending.release()
        return errors

    with ThreadPoolExecutor(1) as reader:
        results = []
        for number, values in packets(n):
            scratch = values.clone()
            bunch.append(
                (number, len(values), lane.send(values.shape, values.dtype, lambda out, s=scratch: out.copy_(s)))
            )
            scratch.fill_(-1)
            if len(bunch) == 3:
                draw.shuffle(bunch)
                results.append(reader.submit(receive, bunch))
                bunch = []
        results.append(reader.submit(receive, bunch))
        wrong = sum(result.result(timeout=60) for result in results)
    lane.close()
    return wrong


@pytest.mark.parametrize("poison", [False, True])
def test_no_element_is_wrong_whatever_the_delays(poison: bool) -> None:
    engine = ThreadEngine(delay=0.0005)
    assert stress(Lane(engine, 40_000, 80_000, poison), 2000, slow_reader=0.0002) == 0
    assert engine.copied == 2000
    assert engine.unfinished > 0, "the ring never came round to a copy still running: the test tests nothing"


def test_poison_shows_a_broken_barrier() -> None:
    """The same stress without barriers reads rows before they came, and finds NaN there."""
    engine = ThreadEngine(delay=0.0005, barrier=False)
    assert stress(Lane(engine, 40_000, 80_000, poison=True), 300) > 1000


def test_a_parcel_is_what_was_sent_when_its_source_is_overwritten() -> None:
    lane, source = Lane(ThreadEngine(delay=0.01), 4096, 8192), torch.arange(12.0).bfloat16().view(3, 4)
    pending = lane.send((3, 4), torch.bfloat16, lambda out: out.copy_(source))
    source.zero_()
    assert torch.equal(pending.read(), torch.arange(12.0).bfloat16().view(3, 4))
    pending.release()
    pending.release()
    with pytest.raises(RuntimeError, match="after its memory was given back"):
        pending.read()


def test_a_full_host_ring_makes_the_sender_wait_until_a_reader_is_done() -> None:
    lane, sent = Lane(ThreadEngine(), 1024, 1024), []

    def send_all() -> None:
        for i in range(6):
            sent.append(lane.send((128,), torch.float32, lambda out, i=i: out.fill_(i)))

    thread = threading.Thread(target=send_all, daemon=True)
    thread.start()
    time.sleep(0.2)
    assert len(sent) == 2
    for i in range(6):
        while len(sent) <= i:
            time.sleep(0.005)
        assert len(sent) <= i + 2
        assert sent[i].read().eq(i).all()
        sent[i].release()
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_a_readers_fault_reaches_a_waiting_sender() -> None:
    transport = Transport(256, ring_bytes=1024, make_engine=lambda _: ThreadEngine())
    device = torch.device("cpu")
    for _ in range(4):
        transport.send(device, (64,), torch.float32, lambda out: out.zero_())
    threading.Timer(0.1, transport.fail, [StoreError("the disk is full")]).start()
    with pytest.raises(StoreError, match="the disk is full"):
        transport.send(device, (64,), torch.float32, lambda out: out.zero_())
    with pytest.raises(StoreError, match="the disk is full"):
        transport.send(torch.device("meta"), (64,), torch.float32, lambda out: out.zero_())


def test_making_a_tensor_may_fail_without_losing_room() -> None:
    lane = Lane(ThreadEngine(), 1024, 1024)

    def broken(_: Tensor) -> None:
        raise RuntimeError("no kernel")

    for _ in range(10):
        with pytest.raises(RuntimeError, match="no kernel"):
            lane.send((200,), torch.float32, broken)
    assert lane.send((200,), torch.float32, lambda out: out.fill_(3)).read().eq(3).all()


def test_a_tensor_too_large_for_the_rings_goes_by_itself() -> None:
    transport = Transport(256, poison=True, make_engine=lambda _: ThreadEngine(delay=0.01))
    large = transport.send(torch.device("cpu"), (5000,), torch.float32, lambda out: out.fill_(5))
    small = transport.send(torch.device("cpu"), (50,), torch.float32, lambda out: out.fill_(6))
    assert large.nbytes == 0
    assert large.read().eq(5).all()
    assert small.read().eq(6).all()
    large.release()
    with pytest.raises(RuntimeError, match="after its memory was given back"):
        large.read()


def test_each_device_has_its_own_rings() -> None:
    devices_built: list[torch.device] = []

    def make(device: torch.device) -> ThreadEngine:
        devices_built.append(device)
        return ThreadEngine()

    transport = Transport(256, make_engine=make)
    devices = [torch.device("cuda", i % 2) for i in range(6)]
    pendings = [transport.send(d, (64,), torch.float32, lambda out, i=i: out.fill_(i)) for i, d in enumerate(devices)]
    assert devices_built == devices[:2]
    assert [float(pending.read()[0]) for pending in pendings] == [0, 1, 2, 3, 4, 5]
    transport.close()


def test_what_never_fits_is_refused_at_once() -> None:
    for ring in (HostRing(HostEngine(), 512), StreamRing(HostEngine(), 512)):
        with pytest.raises(ValueError, match="600 bytes do not fit a ring of 512"):
            ring.reserve(600)


def test_regions_of_a_host_ring_never_overlap() -> None:
    ring, draw, regions = HostRing(HostEngine(), 16 * 256), random.Random(2), []
    for _ in range(3000):
        needed = aligned(draw.randrange(0, 1200))
        if ring._room(needed) is None or draw.random() < 0.3:
            if regions:
                ring.release(regions.pop(draw.randrange(len(regions)))[0])
            continue
        region, _ = ring.reserve(needed)
        assert region.stop <= len(ring.buffer)
        assert not any(region.overlaps(other.start, other.stop) for other, _ in regions)
        regions.append((region, None))
    for region, _ in regions:
        ring.release(region)
    assert ring._room(16 * 256) == 0


def test_gathered_pendings_never_fill_the_ring() -> None:
    """The rule of `Transport`: whatever the sizes, a forward that hands over at `gather` bytes does not wait forever."""
    draw, largest = random.Random(3), 1024
    transport = Transport(largest, ring_bytes=1, make_engine=lambda _: ThreadEngine())
    bunch: list[PendingTensor] = []

    def receive(pendings: list[PendingTensor]) -> None:
        for pending in pendings:
            pending.read()
            pending.release()

    with ThreadPoolExecutor(1) as reader:

        def sender() -> None:
            nonlocal bunch
            for _ in range(3000):
                size = draw.choice([1, 100, 700, largest])
                bunch.append(transport.send(torch.device("cpu"), (size,), torch.uint8, lambda out: out.zero_()))
                if sum(pending.nbytes for pending in bunch) >= transport.gather:
                    reader.submit(receive, bunch)
                    bunch = []

        thread = threading.Thread(target=sender, daemon=True)
        thread.start()
        thread.join(timeout=30)
        assert not thread.is_alive()


@pytest.fixture
def asynchronous(monkeypatch: pytest.MonkeyPatch) -> list[ThreadEngine]:
    """Captures on the CPU take the asynchronous path, over devices made of threads and rings that come round."""
    engines: list[ThreadEngine] = []

    def make(_: torch.device) -> ThreadEngine:
        engines.append(ThreadEngine(delay=0.003, seed=len(engines)))
        return engines[-1]

    def transport(largest: int, poison: bool = False) -> Transport:
        return Transport(min(largest, 4096), ring_bytes=1, poison=True, make_engine=make)

    for module in (capture_module, forward_module):
        monkeypatch.setattr(module, "asynchronous", lambda _: True)
    monkeypatch.setattr(capture_module, "Transport", transport)
    return engines


BASIS = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
NEEDS = [
    Need(("resid_pre.0", "resid_mid.*", "z.1")),
    Need("pattern.*"),
    Need("resid_post.*", Reducer("int8")),
    Need("resid_post.*", Reducer("norm")),
    Need("resid_post.*", Reducer("moments", "last")),
    Need("resid_post.*", Reducer("mean")),
    Need("resid_post.*", Reducer("mean_square")),
    Need("resid_post.*", Reducer("project", basis=BASIS)),
    Need("resid_post.*", Reducer("lens_ids", ids=(3, 50))),
    Need("resid_post.*", Reducer("lens_ids", "last", ids=(3, 50))),
    Need(("resid_post.0", "resid_post.1"), Reducer("lens_top", "last", top_k=4)),
]


def test_the_asynchronous_path_stores_what_the_reference_stores(
    asynchronous: list[ThreadEngine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = native()
    activations = capture(model, PROMPTS, NEEDS, ActivationStore(tmp_path / "a"), batch_tokens=8)
    copied = asynchronous[0].copied
    monkeypatch.undo()
    expected = capture(model, PROMPTS, NEEDS, ActivationStore(tmp_path / "b"), batch_tokens=8)
    assert activations.done.forwards == expected.done.forwards == 4
    assert copied > 50
    features = [feature for need in NEEDS for feature in need.features(3)]
    for feature in features:
        pairs = zip(
            activations.get(feature.address, feature.reducer),
            expected.get(feature.address, feature.reducer),
            strict=True,
        )
        for got, reference in pairs:
            torch.testing.assert_close(got, reference, atol=1e-5, rtol=1e-5, msg=feature.key)
    assert len(asynchronous) == 1


def test_lens_rows_are_read_together(
    asynchronous: list[ThreadEngine], monkeypatch: pytest.MonkeyPatch, store: ActivationStore
) -> None:
    """One pass through the unembedding for all layers of a batch, not one a layer."""
    from probes.capture import device_capture

    seen: list[int] = []
    original = device_capture.reduce_rows

    def watch(tensor: Tensor, index: Tensor, counts: object, reducer: Reducer, *rest: object) -> Tensor:
        if reducer.kind == "lens_ids":
            seen.append(len(index))
        return original(tensor, index, counts, reducer, *rest)

    monkeypatch.setattr(device_capture, "reduce_rows", watch)
    capture(native(), PROMPTS, [Need("resid_post.*", Reducer("lens_ids", ids=(3, 4)))], store)
    assert seen == [3 * sum(map(len, PROMPTS))]


def test_a_full_disk_stops_the_forward_and_keeps_what_was_committed(
    asynchronous: list[ThreadEngine], store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, original, puts = native(), ActivationStore.put, []

    def full(self: ActivationStore, packet: object) -> object:
        puts.append(packet)
        if len(puts) > 2:
            raise StoreError("the disk is full: committed rows stay; free 9 bytes and run again")
        return original(self, packet)  # type: ignore[arg-type]

    monkeypatch.setattr(ActivationStore, "put", full)
    prompts = [(i, i + 1, i + 2, i + 3) for i in range(1, 60)]
    with pytest.raises(StoreError, match="disk is full"):
        capture(model, prompts, [Need("resid_post.*")], store, batch_tokens=4)
    monkeypatch.setattr(ActivationStore, "put", original)
    left = plan_capture(model, prompts, [Need("resid_post.*")], store)
    assert 0 < left.rows < 59 * 4 * 3
    assert store.verify().damaged == ()


def test_memory_that_does_not_suffice_halves_an_asynchronous_batch_too(
    asynchronous: list[ThreadEngine], store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = native()
    original = model.run

    def small(tokens: Tensor, reads: object, *args: object, **kwargs: object) -> None:
        original(tokens, reads, *args, **kwargs)  # type: ignore[arg-type]
        if len(tokens) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "run", small)
    activations = capture(model, PROMPTS, [Need("resid_post.*", Reducer("norm"))], store)
    monkeypatch.undo()
    for sequence, norms in zip(PROMPTS, activations.get("resid_post.2", Reducer("norm")), strict=True):
        assert norms.shape == (len(sequence),)
        assert norms.isfinite().all()
