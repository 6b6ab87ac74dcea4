"""Interventions on a model whose blocks are on disk: the same numbers, each block read once for all cells together."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conformance import close
from families import make, prompt
from forked import forked
from tiny import PROMPTS
from torch import Tensor

from analyses.back_patching import BackPatching
from analyses.base import Analysis
from analyses.causal_patching import CausalPatching
from probes import edits
from probes.blocks.cached_prompt import CachedPrompt
from probes.blocks.schedule import BlockSchedule
from probes.blocks.together import together
from probes.cache_folder import cache_root
from probes.capture.needs import Need
from probes.capture.run import capture
from probes.edits import Edit, FreezeNorm, HeadWriteEdit, KnockOut, Replace, Scale, Source, Texts, Values, repeat, skip
from probes.errors import OptionError
from probes.models import load_model
from probes.models.backends.streamed import StreamedModel
from probes.models.protocol import Model
from probes.points import Address
from probes.prompts import Prompt
from probes.store import ActivationStore

LAYERS = 5
CAUSAL = ["gpt2", "llama", "gemma2", "mistral"]


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATHYSCOPE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("grids") / "model"
    make("llama", num_hidden_layers=LAYERS).save_pretrained(path)
    return path


def both(folder: Path, **how: Any) -> tuple[Model, StreamedModel]:
    streamed = load_model(str(folder), device="cpu", streamed=True, **how)
    assert isinstance(streamed, StreamedModel)
    streamed.blocks.ledger.blocks.clear()
    return load_model(str(folder), device="cpu", **how), streamed


def reads(model: StreamedModel) -> dict[int, int]:
    counted = dict(model.blocks.ledger.blocks)
    model.blocks.ledger.blocks.clear()
    return counted


EDITS: dict[str, list[Edit]] = {
    "skip": [skip(LAYERS, 1, 3)],
    "repeat": [repeat(LAYERS, 1, 2)],
    "knock-out": [KnockOut((1, 2), queries="last", keys=(0,))],
    "head weights": [HeadWriteEdit(2, 1, Values(torch.eye(32)[:3]))],
    "scale": [Scale(address=Address("mlp_out", 1), factor=0.0)],
    "patch": [Replace(address=Address("resid_post", 1), positions=(-1,), value=Source((9, 8, 7), Address("resid_post", 3), (-1,)))],
    "several": [skip(LAYERS, 1), HeadWriteEdit(2, 0, Values(torch.eye(32)[:2])), Scale(address=Address("attn_out", 3), factor=2.0)],
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_every_edit_gives_what_it_gives_in_memory(folder: Path, name: str, tmp_path: Path) -> None:
    model, streamed = both(folder)
    right, logits = (edits.logits(m, prompt(rows=2), EDITS[name]) for m in (model, streamed))
    close(logits, right)
    assert not torch.allclose(right, edits.logits(model, prompt(rows=2)), atol=1e-3)
    needs = [Need("resid_post.4")]
    rows = capture(streamed, PROMPTS, needs, ActivationStore(tmp_path), edits=EDITS[name])
    assert capture(model, PROMPTS, needs, ActivationStore(tmp_path), edits=EDITS[name]).done.forwards == 0
    close(rows.packed("resid_post.4"), capture(model, PROMPTS, needs, ActivationStore(tmp_path / "b"), edits=EDITS[name]).packed("resid_post.4"))  # fmt: skip


def test_a_frozen_norm_is_measured_and_frozen_block_by_block(folder: Path) -> None:
    tokens = (5, 6, 7, 8)
    rows = []
    for model in both(folder):
        frozen = FreezeNorm("mlp.*").resolved(model, Texts(tokens))
        rows.append(edits.logits(model, torch.tensor([tokens]), [frozen]))
    close(*rows)
    assert not torch.allclose(rows[0], edits.logits(both(folder)[0], torch.tensor([tokens])), atol=1e-3)


def test_a_grid_of_edits_reads_each_block_once(folder: Path) -> None:
    model, streamed = both(folder)
    cells = [
        *([skip(LAYERS, layer)] for layer in range(LAYERS)),
        *([KnockOut((layer,), queries="last", keys=(0,))] for layer in range(LAYERS)),
        *([HeadWriteEdit(layer, 0, Values(torch.eye(32)[:2]))] for layer in range(LAYERS)),
    ]

    def grid(m: Model) -> list[Tensor]:
        return together(m, [lambda cell=cell: edits.logits(m, prompt(), cell) for cell in cells])  # type: ignore[misc]

    for logits, right in zip(grid(streamed), grid(model), strict=True):
        close(logits, right)
    assert reads(streamed) == dict.fromkeys(range(LAYERS), 1)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("memory_bytes", [None, 0])
def test_prompts_resume_as_they_do_in_memory(family: str, memory_bytes: int | None, tmp_path: Path) -> None:
    make(family).save_pretrained(tmp_path / "model")
    model, streamed = both(tmp_path / "model", attention="eager" if family == "gemma2" else "sdpa")
    if memory_bytes is not None:
        streamed.shelf.memory_bytes = memory_bytes
    sequences = [(5, 6, 7, 8, 9), (9, 8, 7), (5, 5, 6, 7)]
    first = [0, 1, 1, 2, 3]

    def resumed(m: Model, tokens: tuple[int, ...]) -> tuple[Tensor, list[list[int]]]:
        base = CachedPrompt(m, tokens, 1)
        hidden = torch.stack([base.entering[block] * (1 + row) for row, block in enumerate(first)])
        narrow = base.narrowed(2)
        end = base.resume(first, hidden, keep=True)
        by_write = narrow.edited(1, 2, {Address("mlp_out", 1): lambda t: t * 2})
        return torch.cat([end.last, by_write]), base.write(end, torch.arange(5, 10), 3)

    rows = together(streamed, [lambda s=s: resumed(streamed, s) for s in sequences])  # type: ignore[misc]
    for (last, written), tokens in zip(rows, sequences, strict=True):
        right, right_written = resumed(model, tokens)
        close(last, right)
        assert written == right_written
    # The prompts, the resumed rows, the edited ones from block 1 on, and two more tokens.
    assert reads(streamed) == {0: 4, 1: 5, 2: 5}
    assert (streamed.shelf.most_on_disk > 0) == (memory_bytes == 0)


def test_a_streamed_model_writes_as_one_in_memory(folder: Path) -> None:
    model, streamed = both(folder)
    texts = [(5, 6, 7), (9, 8)]
    written = together(streamed, [lambda t=t: streamed.generate(t, 3) for t in texts])  # type: ignore[misc]
    assert written == [model.generate(t, 3) for t in texts]
    assert set(reads(streamed).values()) == {3}


QUESTIONS = [
    Prompt((5, 6, 7, 8, 9), None, {"answer_tokens": [11, 12], "positions": [1, -1]}),
    Prompt((9, 8, 7, 6), None, {"answer_tokens": [13], "positions": [1, -1]}),
    Prompt((5, 5, 6, 7, 8, 8), None, {"answer_tokens": [14], "positions": [2, -1]}),
]


def test_back_patching_is_the_same_in_three_passes(folder: Path, tmp_path: Path) -> None:
    model, streamed = both(folder)
    right, result = (
        BackPatching(window=1).run(m, QUESTIONS, store=ActivationStore(tmp_path / name))
        for m, name in ((model, "a"), (streamed, "b"))
    )
    # The questions are asked, their prompts opened, and all cells of all prompts resumed.
    assert set(reads(streamed).values()) == {3}
    assert result.tables.keys() == right.tables.keys()
    for name, table in right.tables.items():
        pd.testing.assert_frame_equal(result.tables[name], table, rtol=1e-5, atol=1e-5)


def pair_of(model: Model, clean: tuple[int, ...], corrupted: tuple[int, ...]) -> Prompt:
    """A pair whose answers are the tokens that the two runs tell apart best."""
    change = edits.logits(model, torch.tensor([clean]))[0, -1] - edits.logits(model, torch.tensor([corrupted]))[0, -1]
    answers = {"answer_tokens": [int(change.argmax())], "distractor_tokens": [int(change.argmin())]}
    return Prompt(clean, None, {"corrupted_tokens": list(corrupted), **answers})


def pairs_of(model: Model) -> list[Prompt]:
    return [
        pair_of(model, clean, corrupted)
        for clean, corrupted in (
            ((5, 6, 7, 8, 9), (5, 6, 17, 8, 19)),
            ((5, 9, 7, 8), (5, 9, 3, 8)),
            ((4, 6, 8, 9, 9, 7), (4, 6, 2, 9, 9, 7)),
            ((8, 6, 7, 5, 9), (8, 6, 1, 5, 9)),
        )
    ]


def test_causal_patching_reads_as_often_for_four_pairs_as_for_two(folder: Path, tmp_path: Path) -> None:
    model, streamed = both(folder)
    pairs = pairs_of(model)
    analysis = CausalPatching(min_gap=0.0, min_pairs=1)
    right, result = (
        analysis.run(m, pairs, store=ActivationStore(tmp_path / name)) for m, name in ((model, "a"), (streamed, "b"))
    )
    four = reads(streamed)
    for name, table in right.tables.items():
        pd.testing.assert_frame_equal(result.tables[name], table, rtol=1e-5, atol=1e-4)
    analysis.run(streamed, pairs[:2], store=ActivationStore(tmp_path / "c"))
    assert four == reads(streamed)
    # What is gauged, opened and copied from, in one pass; MLPs and rows past attention, cells put in and resumed; the noise floor.
    assert max(four.values()) <= 11


def test_the_memory_of_activations_is_an_option(folder: Path) -> None:
    assert load_model(str(folder), device="cpu", streamed=True, stream_memory="3KiB").shelf.memory_bytes == 3072  # type: ignore[attr-defined]
    with pytest.raises(OptionError, match="such as 4GiB"):
        load_model(str(folder), device="cpu", streamed=True, stream_memory="much")
    with pytest.raises(OptionError, match="load it streamed"):
        load_model(str(folder), device="cpu", stream_memory="3KiB")


def test_tasks_share_blocks_and_end_together() -> None:
    fetched: list[int] = []
    inside: list[int] = []

    class Placed:
        def __init__(self, layer: int, weights: int) -> None:
            self.layer = layer

        def __enter__(self) -> None:
            inside.append(self.layer)

        def __exit__(self, *_: object) -> None:
            inside.remove(self.layer)

    schedule = BlockSchedule(lambda layer: fetched.append(layer) or layer, Placed)  # type: ignore[func-returns-value, arg-type]

    def walk(start: int, name: str) -> str:
        for layer in range(start, 4):
            with schedule.at(layer, layer + 1 if layer < 3 else None):
                assert inside == [layer]
        return name

    def nested(name: str) -> list[str]:
        with schedule.at(1):
            pass
        return schedule.together([lambda: walk(2, f"{name}1"), lambda: walk(3, f"{name}2")])

    assert schedule.together([lambda: walk(0, "a"), lambda: nested("b"), lambda: walk(2, "c")]) == [
        "a",
        ["b1", "b2"],
        "c",
    ]
    assert fetched == [0, 1, 2, 3]
    before = threading.active_count()
    ended: list[str] = []

    def fails() -> None:
        with schedule.at(2):
            raise ZeroDivisionError

    def waits() -> None:
        try:
            walk(0, "d")
            walk(0, "e")
        finally:
            ended.append("d")

    with pytest.raises(ZeroDivisionError):
        schedule.together([waits, fails])
    assert (ended, inside) == (["d"], [])
    assert threading.active_count() == before, "no thread of a task outlives it"


def test_what_one_task_puts_in_place_no_other_one_sees() -> None:
    around: list[str] = []

    class Sign:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            around.append(self.name)

        def __exit__(self, *_: object) -> None:
            around.remove(self.name)

    class Nothing:
        def __init__(self, *_: object) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    schedule = BlockSchedule(lambda layer: layer, Nothing)  # type: ignore[arg-type]

    def task(name: str) -> None:
        with schedule.during(lambda: Sign(name)), schedule.altering(1, lambda: Sign(f"{name}1")):
            for layer in range(3):
                with schedule.at(layer):
                    assert around == ["outside", name, *([f"{name}1"] if layer == 1 else [])]
        with schedule.at(2):
            assert around == ["outside"]

    with schedule.during(lambda: Sign("outside")):
        schedule.together([lambda: task("a"), lambda: task("b")])
        assert around == ["outside"]
    assert around == []


def killed(analysis: Analysis, prompts: list[Prompt], reads_before: int, folder: Path, store: Path) -> None:
    """Run an analysis, and die where it wants to read one more block than so many."""
    model = load_model(str(folder), device="cpu", streamed=True)
    read, layers = model.blocks.read, list[int]()  # type: ignore[attr-defined]

    def killing(layer: int) -> Any:
        layers.append(layer)
        if len(layers) > reads_before:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(layer)

    model.blocks.read = killing  # type: ignore[attr-defined]
    analysis.run(model, prompts, store=ActivationStore(store))


def gone_on_with(
    analysis: Analysis, prompts: list[Prompt], reads_before: int, folder: Path, store: Path
) -> dict[int, int]:
    """Kill an analysis, run it again, hold its tables against a run never killed; return how often blocks were read again."""
    model, streamed = both(folder)
    assert forked(lambda: killed(analysis, prompts, reads_before, folder, store)) == -signal.SIGKILL
    unfinished = cache_root() / "unfinished"
    assert len(list(unfinished.iterdir())) == 1
    result = analysis.run(streamed, prompts, store=ActivationStore(store))
    assert list(unfinished.iterdir()) == [], "nothing is kept of finished work"
    right = analysis.run(model, prompts, store=ActivationStore(store.with_name("other")))
    for name, table in right.tables.items():
        pd.testing.assert_frame_equal(result.tables[name], table, rtol=1e-5, atol=1e-4)
    return reads(streamed)


def test_a_killed_grid_goes_on_from_its_last_finished_group(folder: Path, tmp_path: Path) -> None:
    # Killed in block 3 of the third pass: what was asked and opened is there, and of the grid blocks 0 and 1 were done.
    again = gone_on_with(BackPatching(window=1), QUESTIONS, 2 * LAYERS + 3, folder, tmp_path / "store")
    assert again == {2: 1, 3: 1, 4: 1}


@pytest.mark.parametrize(("reads_before", "spared"), [(19, 0), (23, 2)])
def test_killed_causal_patching_goes_on(folder: Path, tmp_path: Path, reads_before: int, spared: int) -> None:
    # Killed where the MLPs of a run are read, which is read again, and in the pass of the cells put in, which is not.
    model, streamed = both(folder)
    pairs, analysis = pairs_of(model), CausalPatching(min_gap=0.0, min_pairs=1)
    analysis.run(streamed, pairs, store=ActivationStore(tmp_path / "whole"))
    again = gone_on_with(analysis, pairs, reads_before, folder, tmp_path / "store")
    assert sum(again.values()) == sum(reads(streamed).values()) - spared
