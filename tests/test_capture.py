"""Capture and the store together: the right rows, once, whatever the batch, the reducer or the interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import PROMPTS, native

from analyses.voids.norm_gates import NormGate
from probes.batches import select
from probes.capture import forward as forward_module
from probes.capture.needs import Need
from probes.capture.run import capture, context_of, plan_capture
from probes.errors import ModelError, PointError, StoreError
from probes.kernels import reduce_rows, unpacked
from probes.models.backends.native import NativeModel
from probes.points import Address
from probes.progress import Progress
from probes.reducers import Reducer
from probes.store import ActivationStore

NORM = Reducer("norm")
BASIS = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
REDUCERS = [
    Reducer(),
    Reducer(positions="last"),
    Reducer(positions=(0, -1)),
    Reducer("mean"),
    Reducer("mean", "after_first"),
    Reducer("mean_square", "after_first"),
    Reducer(positions="after_first"),
    NORM,
    Reducer("norm", "last"),
    Reducer("moments"),
    Reducer("project", basis=BASIS),
    Reducer("lens_ids", ids=(3, 50)),
    Reducer("lens_top", "last", top_k=4),
]


def alone(model: NativeModel, sequence: tuple[int, ...], address: str) -> torch.Tensor:
    """The tensor of one prompt by itself, without pads or store."""
    seen: list[torch.Tensor] = []
    model.run(torch.tensor([sequence]), {Address.parse(address): lambda t: seen.append(t[0].clone())})
    return seen[0]


@pytest.mark.parametrize(
    "point",
    [
        "resid_post.1",
        "resid_pre.0",
        "resid_mid.2",
        "z.1",
        "k.0",
        "mlp_post.2",
        "attn_scale.1",
        "final_norm",
        "logits",
        "pattern.1",
    ],
)
def test_stored_rows_are_the_models_own(tiny: NativeModel, store: ActivationStore, point: str) -> None:
    rows = capture(tiny, PROMPTS, [Need(point)], store).get(point)
    for sequence, stored in zip(PROMPTS, rows, strict=True):
        torch.testing.assert_close(stored, alone(tiny, sequence, point), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi", "falcon_grouped", "opt", "bert"])
def test_batching_does_not_change_a_row(family: str, tmp_path: Path) -> None:
    model = native(family)
    one_by_one = capture(model, PROMPTS, [Need("resid_post.*")], ActivationStore(tmp_path / "a"), batch_tokens=1)
    together = capture(model, PROMPTS, [Need("resid_post.*")], ActivationStore(tmp_path / "b"))
    for layer in range(model.shape.n_layers):
        address = f"resid_post.{layer}"
        torch.testing.assert_close(one_by_one.packed(address), together.packed(address), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reducer", REDUCERS, ids=str)
def test_reduced_at_the_source_equals_derived_from_rows(tiny: NativeModel, tmp_path: Path, reducer: Reducer) -> None:
    source = capture(tiny, PROMPTS, [Need("resid_post.1", reducer)], ActivationStore(tmp_path / "a"))
    rows = capture(tiny, PROMPTS, [Need("resid_post.1")], ActivationStore(tmp_path / "b"))
    for reduced, derived in zip(source.get("resid_post.1", reducer), rows.get("resid_post.1", reducer), strict=True):
        assert reduced.shape == derived.shape
        torch.testing.assert_close(reduced, derived, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("point", ["resid_post.1", "z.0"])
def test_rows_kept_as_codes_are_within_their_own_error_and_follow_from_rows(
    tiny: NativeModel, tmp_path: Path, point: str
) -> None:
    coded = Reducer("int8")
    small, store = ActivationStore(tmp_path / "a"), ActivationStore(tmp_path / "b")
    packed = capture(tiny, PROMPTS, [Need(point, coded)], small).packed(point, coded)
    rows = capture(tiny, PROMPTS, [Need(point)], store).packed(point).flatten(1)
    restored = unpacked(packed)
    off = (restored.rows - rows).abs().amax(-1)
    assert (off <= restored.error * (1 + 1e-4)).all()
    torch.testing.assert_close(off, restored.error, rtol=1e-3, atol=1e-6)
    assert (restored.error <= restored.scale * 0.501).all()
    again = capture(tiny, PROMPTS, [Need(point, coded)], store)
    assert again.done.forwards == 0
    assert unpacked(again.packed(point, coded)).rows.sub(restored.rows).abs().max() <= restored.scale.max()
    assert capture(tiny, PROMPTS, [Need(point, Reducer("norm"))], small).done.forwards == len(PROMPTS)


def test_codes_by_hand() -> None:
    rows = torch.tensor([[127.0, -63.4, 0.0], [0.0, 0.0, 0.0]])
    packed = reduce_rows(rows, torch.arange(2), [2], Reducer("int8"))
    assert (packed.dtype, packed.shape) == (torch.int8, (2, 3 + 8))
    restored = unpacked(packed)
    assert restored.codes.tolist() == [[127, -63, 0], [0, 0, 0]]
    assert restored.scale.tolist() == [1.0, 0.0]
    assert restored.error.tolist() == pytest.approx([0.4, 0.0], abs=1e-5)


def test_reducers_by_hand() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, -1.0]])
    index = torch.arange(3)
    assert reduce_rows(rows, index, [3], NORM).tolist() == pytest.approx([5.0, 0.0, 2**0.5])
    assert reduce_rows(rows, index, [2, 1], Reducer("mean")).tolist() == [[1.5, 2.0], [1.0, -1.0]]
    assert reduce_rows(rows, index, [2, 1], Reducer("mean_square")).tolist() == [[4.5, 8.0], [1.0, 1.0]]
    assert reduce_rows(rows, index, [3], Reducer("moments")).tolist() == [
        [3.5, 0.25, 4.0],
        [0.0, 0.0, 0.0],
        [0.0, 1.0, 1.0],
    ]
    basis = torch.tensor([[1.0, 1.0]])
    assert reduce_rows(rows, index, [3], Reducer("project", basis=basis)).tolist() == [[7.0], [0.0], [0.0]]


def test_statistics_are_float32_and_rows_keep_the_models_dtype(store: ActivationStore) -> None:
    from families import make

    half = NativeModel(make("llama").to(torch.bfloat16), ref="half", weights="half")
    activations = capture(half, PROMPTS, [Need("resid_post.1"), Need("resid_post.2", NORM)], store)
    assert activations.packed("resid_post.1").dtype == torch.bfloat16
    assert activations.packed("resid_post.2", NORM).dtype == torch.float32
    exact = activations.packed("resid_post.1").float().norm(dim=-1)
    torch.testing.assert_close(activations.packed("resid_post.1", NORM), exact)


def test_a_second_capture_runs_nothing(tiny: NativeModel, store: ActivationStore, count_forwards: Any) -> None:
    capture(tiny, PROMPTS, [Need("resid_post.*")], store)
    seen = count_forwards(tiny)
    again = capture(
        tiny, PROMPTS, [Need("resid_post.*"), Need("resid_pre.1", NORM), Need("resid_post.0", Reducer("mean"))], store
    )
    assert again.done.forwards == 0
    assert again.packed("resid_post.2", Reducer("lens_ids", ids=(1,))).shape == (14, 1)
    assert again.keys()
    assert seen == []


def test_only_missing_layers_and_prompts_are_run(
    tiny: NativeModel, store: ActivationStore, count_forwards: Any
) -> None:
    capture(tiny, PROMPTS[:2], [Need("resid_post.0")], store)
    seen = count_forwards(tiny)
    activations = capture(tiny, PROMPTS, [Need("resid_post.0")], store)
    assert (activations.done.forwards, sum(seen)) == (2, 2)
    wider = capture(tiny, PROMPTS, [Need("resid_post.*")], store)
    assert wider.done.plan.forwards == 4
    assert wider.done.plan.rows == 2 * sum(map(len, PROMPTS))


def test_mixed_sources_are_read_together(tiny: NativeModel, store: ActivationStore) -> None:
    capture(tiny, PROMPTS[:2], [Need("resid_post.1")], store)
    activations = capture(tiny, PROMPTS, [Need("resid_post.1", NORM)], store)
    assert activations.done.forwards == 2
    expected = [alone(tiny, s, "resid_post.1").norm(dim=-1) for s in PROMPTS]
    torch.testing.assert_close(activations.packed("resid_post.1", NORM), torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_a_prompt_is_found_in_its_continuation(tiny: NativeModel, store: ActivationStore, count_forwards: Any) -> None:
    whole = [(5, 6, 7, 8, 40, 41), (9, 10, 42)]
    capture(tiny, whole, [Need(("resid_post.*", "pattern.1"))], store, prompt_lengths=[4, 2])
    seen = count_forwards(tiny)
    prompts = [sequence[:n] for sequence, n in zip(whole, (4, 2), strict=True)]
    needs = [
        Need(("resid_post.*", "pattern.1")),
        Need("resid_post.0", Reducer("mean")),
        Need("resid_post.1", Reducer(positions="last")),
    ]
    activations = capture(tiny, prompts, needs, store)
    assert (activations.done.forwards, seen) == (0, [])
    for i, prompt in enumerate(prompts):
        for point in ("resid_post.2", "pattern.1"):
            torch.testing.assert_close(activations.get(point)[i], alone(native(), prompt, point), atol=1e-5, rtol=1e-5)
        last = activations.get("resid_post.1", Reducer(positions="last"))[i]
        torch.testing.assert_close(last[0], activations.get("resid_post.1")[i][-1])


def test_the_last_row_of_a_continuation_is_not_the_prompts(tiny: NativeModel, store: ActivationStore) -> None:
    last, mean = Need("resid_post.1", Reducer(positions="last")), Need("resid_post.1", Reducer("mean"))
    capture(tiny, [(5, 6, 7, 8)], [last, mean], store, prompt_lengths=[2])
    assert plan_capture(tiny, [(5, 6)], [last], store).forwards == 1
    assert plan_capture(tiny, [(5, 6)], [mean], store).forwards == 1


def test_a_continuation_never_serves_a_model_that_looks_ahead(store: ActivationStore) -> None:
    bert = native("bert")
    capture(bert, [(5, 6, 7, 8)], [Need("resid_post.1")], store, prompt_lengths=[2])
    assert plan_capture(bert, [(5, 6)], [Need("resid_post.1")], store).forwards == 1


def test_a_pattern_keeps_no_pads(tiny: NativeModel, store: ActivationStore) -> None:
    for sequence, pattern in zip(
        PROMPTS, capture(tiny, PROMPTS, [Need("pattern.1")], store).get("pattern.1"), strict=True
    ):
        assert pattern.shape == (4, len(sequence), len(sequence))
        torch.testing.assert_close(pattern.sum(-1), torch.ones(4, len(sequence)), atol=1e-5, rtol=0)


def test_rows_are_found_by_content_not_by_name(store: ActivationStore) -> None:
    first, twin, other = native(), native(), native("gpt2")
    twin.ref = "another name"
    capture(first, PROMPTS, [Need("resid_post.1")], store)
    assert plan_capture(twin, PROMPTS, [Need("resid_post.1")], store).forwards == 0
    assert plan_capture(other, PROMPTS, [Need("resid_post.1")], store).forwards == 4


def test_edits_enter_the_key(tiny: NativeModel, store: ActivationStore) -> None:
    capture(tiny, PROMPTS, [Need("resid_post.2")], store)
    gate = NormGate(0.8)
    assert context_of(tiny, [gate])["edits"] != context_of(tiny)["edits"]
    assert plan_capture(tiny, PROMPTS, [Need("resid_post.2")], store, [gate]).forwards == 4
    assert plan_capture(tiny, PROMPTS, [Need("resid_post.2")], store, [NormGate(0.7)]).forwards == 4


def test_damage_is_recaptured_not_read(tiny: NativeModel, store: ActivationStore) -> None:
    activations = capture(tiny, PROMPTS, [Need("resid_post.1")], store)
    expected = activations.packed("resid_post.1").clone()
    del activations
    for shard in (store.root / "shards").rglob("*.safetensors"):
        data = bytearray(shard.read_bytes())
        data[-5] ^= 0xFF
        shard.write_bytes(data)
    again = capture(tiny, PROMPTS, [Need("resid_post.1")], ActivationStore(store.root))
    assert again.done.forwards == 0
    torch.testing.assert_close(again.packed("resid_post.1"), expected)
    assert again.done.forwards == 4


def test_memory_that_does_not_suffice_halves_the_batch(
    tiny: NativeModel, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, notes = tiny.run, []

    class Notes(Progress):
        def note(self, line: str) -> None:
            notes.append(line)

    def small(tokens: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        if len(tokens) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        original(tokens, *args, **kwargs)

    monkeypatch.setattr(tiny, "run", small)
    activations = capture(tiny, PROMPTS, [Need("resid_post.1")], store, progress=Notes())
    assert any("batch halved from 4 to 2" in line for line in notes)
    assert activations.packed("resid_post.1").shape == (14, 32)


def test_memory_that_never_suffices_is_refused(
    tiny: NativeModel, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr(tiny, "run", full)
    with pytest.raises(ModelError, match=r"out of memory on one prompt of .* tokens may fit"):
        capture(tiny, PROMPTS, [Need("resid_post.1")], store)


def test_a_fault_in_the_model_is_not_mistaken_for_memory(
    tiny: NativeModel, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(tiny, "run", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        capture(tiny, PROMPTS, [Need("resid_post.1")], store)


def test_an_interruption_keeps_what_was_committed(
    tiny: NativeModel, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = tiny.run, []

    def interrupted(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        original(*args, **kwargs)

    monkeypatch.setattr(tiny, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        capture(tiny, PROMPTS, [Need("resid_post.1")], store, batch_tokens=1)
    assert plan_capture(tiny, PROMPTS, [Need("resid_post.1")], store).forwards == 2


def test_space_is_checked_before_a_forward(tiny: NativeModel, tmp_path: Path, count_forwards: Any) -> None:
    seen = count_forwards(tiny)
    with pytest.raises(StoreError, match="bytes"):
        capture(tiny, PROMPTS, [Need("resid_post.*")], ActivationStore(tmp_path / "s", max_bytes=100))
    assert seen == []


def test_a_full_disk_stops_cleanly(tiny: NativeModel, store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    capture(tiny, PROMPTS[:1], [Need("resid_post.1")], store)

    def full(self: ActivationStore, _: object) -> None:
        raise StoreError("the disk is full: committed rows stay; free 9 bytes and run again")

    monkeypatch.setattr(ActivationStore, "put", full)
    with pytest.raises(StoreError, match="disk is full"):
        capture(tiny, PROMPTS, [Need("resid_post.1")], store)
    monkeypatch.undo()
    assert plan_capture(native(), PROMPTS, [Need("resid_post.1")], store).forwards == 3
    assert store.verify().damaged == ()


def test_refused_points_are_named_with_their_reason(store: ActivationStore) -> None:
    with pytest.raises(PointError, match=r"tiny-phi has no point 'resid_mid.0': .+"):
        plan_capture(native("phi"), PROMPTS, [Need("resid_mid.0")], store)


def test_packets_are_bounded(
    tiny: NativeModel, store: ActivationStore, monkeypatch: pytest.MonkeyPatch, count_forwards: Any
) -> None:
    monkeypatch.setattr(forward_module, "PACKET_BYTES", 32 * 4 * 3 * 8)
    seen = count_forwards(tiny)
    capture(tiny, [(i, i + 1, i + 2, i + 3) for i in range(1, 9)], [Need("resid_post.*")], store)
    assert seen == [2, 2, 2, 2]


def test_positions_outside_a_prompt_are_refused(tiny: NativeModel, store: ActivationStore) -> None:
    from probes.errors import PromptError

    with pytest.raises(PromptError, match="position 3 is outside a prompt of 1 tokens"):
        capture(tiny, PROMPTS, [Need("resid_post.1", Reducer(positions=(3,)))], store)
    assert select(4, (3,)).tolist() == [3]
