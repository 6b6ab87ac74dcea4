"""Planted models: exhaustive intervention gives the truth that was built in, disguises keep it, every backend loads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from probes.edits import logits
from probes.errors import ModelError
from probes.models import load_model
from probes.planted import tasks
from probes.planted.certify.ablation import handled
from probes.planted.certify.bench import Bench, Site
from probes.planted.certify.certificate import CHECKS, certified, certify
from probes.planted.noise import matrices, rotation
from probes.planted.record import Interval, Record
from probes.planted.registry import build, parse
from probes.planted.task import PlantedTask

CASES = (
    "A1@0", "A3@1", "A5@2", "B1@0", "B2@1", "B1@2", "C1@0", "C2@1", "C3@2", "C4@1", "G1@0", "G2@1", "G3@2", "G4@0",
    "H1@0", "H2@1", "H3@2", "H4@0", "I1@0", "I2@1", "I3@2", "K1@0", "K2@1", "K3@2",
)  # fmt: skip
"""Three seeds of every family, and every task but the larger of A."""


@cache
def case(name: str) -> PlantedTask:
    """A task that several tests read and none changes."""
    task, seed = name.split("@")
    return build(task, int(seed))


@pytest.mark.parametrize("name", CASES)
def test_the_certificate_agrees_with_the_plan(name: str) -> None:
    task = case(name)
    assert certify(task)["refuted"] == []
    assert {question.kind for question in task.record.questions if question.truth} <= set(CHECKS)
    assert len(task.examples) == 128
    assert not {e.group for e in task.examples if e.split == "fit"} & {
        e.group for e in task.examples if e.split == "test"
    }


@pytest.mark.parametrize(
    ("name", "key", "wrong"),
    [
        ("A1@0", "readable:attribute:r", Interval(3, 7)),
        ("A1@0", "lens:ask", Interval(5, 5)),
        ("A1@0", "written:attribute:r", frozenset({"mlp.3"})),
        ("A1@0", "moved:attribute:r>ask", frozenset({"5.0"})),
        ("A1@0", "necessary:r", Interval(-1, 4)),
        ("A1@0", "sufficient:e", Interval(0, 3)),
        ("A1@0", "nodes", frozenset({"mlp.2"})),
        ("C1@0", "mending", frozenset()),
        ("C1@0", "mending:e1", frozenset({"6->2"})),
        ("G3@0", "redundant", frozenset()),
        ("H1@0", "readable:unused:q", None),
        ("H1@0", "necessary:unused:q", Interval(2, 7)),
        ("I1@0", "readable:attribute:q", Interval(0, 7)),
        ("K1@0", "channel", frozenset()),
    ],
)
def test_a_false_truth_is_refuted(name: str, key: str, wrong: Interval | frozenset[str] | None) -> None:
    task = case(name)
    question = replace(task.record.question(key), truth=wrong)
    assert not CHECKS[question.kind](Bench(task), question).agrees


@pytest.mark.parametrize("name", ["A2@1", "K1@0", "C3@1"])
def test_a_record_survives_its_text(name: str) -> None:
    record = case(name).record
    assert Record.from_json(record.to_json()) == record


@pytest.mark.parametrize("name", ["A3@0", "G1@1", "H1@2", "I2@0"])
def test_every_mixture_of_a_prompt_and_its_partner_has_another_answer(name: str) -> None:
    task = case(name)
    content = [place for place in task.record.positions.values() if place in (1, 2)]
    for place in content:
        mixed = [list(example.tokens) for example in task.examples]
        for row, example in zip(mixed, task.examples, strict=True):
            assert row[place] != example.partner[place]
            row[place] = example.partner[place]
        named = task.module(torch.tensor(mixed)).logits[:, -1].argmax(-1)
        assert not (named == torch.tensor([example.answer for example in task.examples])).any()


@pytest.mark.parametrize("name", ["A1@0", "A2@1", "A5@2", "B2@0", "G2@1", "H3@0", "I2@2", "K3@1"])
def test_the_largest_update_does_not_tell_the_nodes(name: str) -> None:
    bench = Bench(case(name))
    truth = bench.task.record.question("nodes").truth
    assert isinstance(truth, frozenset)
    kinds: tuple[Literal["z"], Literal["mlp"]] = ("z", "mlp")
    passed = bench.read([(kind, layer) for kind in kinds for layer in range(bench.layers)], bench.tokens)
    sizes = {node: float(written(bench, node, passed)[bench.valid].norm(dim=-1).mean()) for node in bench.nodes}
    pairs = [(sizes[node], size) for node in truth for other, size in sizes.items() if other not in truth]
    assert sum((own > other) + 0.5 * (own == other) for own, other in pairs) / len(pairs) < 0.75


def written(bench: Bench, node: str, passed: Mapping[Site, Tensor]) -> Tensor:
    """What a node adds to the stream, of what passed every block's two sites."""
    if node.startswith("mlp."):
        return passed["mlp", int(node.removeprefix("mlp."))]
    site, columns = handled(bench, node)
    return passed[site][..., columns] @ bench.output_weight(site[1])[:, columns].T


@pytest.mark.parametrize("name", ["A2", "A5", "C2"])
def test_seeds_draw_other_models_and_one_seed_the_same(name: str) -> None:
    first, again, other = case(f"{name}@1"), build(name, 1), case(f"{name}@2")
    assert (first.record, first.examples) == (again.record, again.examples)
    assert other.record.model["digest"] != first.record.model["digest"]


def test_sharp_attention_is_the_same_circuit_of_saturated_heads() -> None:
    soft, sharp = build("A3"), build("A3-sharp")
    assert sharp.record.questions == soft.record.questions
    assert certify(sharp)["refuted"] == []
    assert sharp.record.model["digest"] != soft.record.model["digest"]


# Disguises


@pytest.mark.parametrize("name", ["A2", "K2"])
def test_a_rotated_model_is_the_same_function_in_another_basis(name: str) -> None:
    plain, turned = build(name), build(f"{name}-rotated")
    tokens = Bench(plain).tokens
    expected = plain.module(tokens).logits
    assert (turned.module(tokens).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    writes = next(matrix.weight for matrix in matrices(turned.module) if not matrix.reads)
    assert float((writes.abs() < 1e-6).float().mean()) < 0.01
    assert turned.record.questions == plain.record.questions


def test_a_rotation_leaves_the_vector_of_all_ones() -> None:
    turn = rotation(24, torch.Generator().manual_seed(0))
    torch.testing.assert_close(turn @ turn.T, torch.eye(24, dtype=turn.dtype))
    torch.testing.assert_close(turn.sum(1), torch.ones(24, dtype=turn.dtype))


@pytest.mark.parametrize("name", ["C2", "I1"])
def test_noise_reaches_every_matrix_and_leaves_the_answers(name: str) -> None:
    plain, noised = Bench(build(name)), Bench(build(f"{name}-noised"))
    assert all(float((matrix.weight == 0).float().mean()) < 0.01 for matrix in matrices(noised.module))
    assert float((plain.plain == noised.plain).float().mean()) >= 0.9


def test_superposed_features_share_fewer_dimensions_and_keep_their_truth() -> None:
    task = certified(build("I1-superposed"))
    share = task.record.model["dimensions"]
    written = next(matrix.weight for matrix in matrices(task.module) if not matrix.reads)
    assert int(torch.linalg.matrix_rank(written, rtol=1e-5)) <= share * 96 < 96
    assert 0 < task.record.model["interference"] < task.record.model["largest_interference"] < 1
    assert {"readable:attribute:q", "nodes", "lens:ask"} <= {question.key for question in task.record.questions}


# Loading


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder, whose models and certificates serve every backend."""
    return tmp_path_factory.mktemp("kept")


@pytest.mark.parametrize("backend", ["native", "transformer_lens", "nnsight"])
@pytest.mark.parametrize("name", ["B1@1", "K1@0"])
def test_every_backend_loads_it_by_name(name: str, backend: str, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATHYSCOPE_CACHE", str(kept))
    task = case(name)
    model = load_model(task.ref, backend=backend)
    tokens = torch.tensor([task.examples[0].tokens])
    expected = task.module(tokens).logits
    torch.testing.assert_close(logits(model, tokens, []), expected, rtol=1e-4, atol=1e-4)
    record = Record.from_json((kept / "models" / f"planted-{name}" / "truth.json").read_text())
    assert record.questions == task.record.questions
    assert record.certificate["agrees"]
    text = " ".join(task.tokenizer.convert_ids_to_tokens(task.examples[0].tokens)).removeprefix("<bos> ")
    assert tuple(model.tokenizer(text)["input_ids"]) == task.examples[0].tokens  # type: ignore[attr-defined]


@pytest.mark.parametrize("ref", ["planted:A9@0", "planted:A2@x", "planted:", "planted:T1-noised"])
def test_an_unknown_name_is_refused_with_the_legal_ones(ref: str) -> None:
    with pytest.raises(ModelError, match=r"planted:A2@0|Legal ids: A1, A2"):
        load_model(ref)


def test_half_precision_is_refused() -> None:
    with pytest.raises(ModelError, match="float32 alone"):
        load_model("planted:B1@0", dtype="bfloat16")


def test_ids_have_tiers_and_a_seed_is_zero_unless_given() -> None:
    assert parse("planted:A2") == ("A2", 0)
    assert parse("planted:A2-rotated@12") == ("A2-rotated", 12)
    assert len(tasks("compiled")) == 48
    assert len(tasks("noised")) == 24
    assert len(tasks("trained")) == 8


def test_a_model_that_was_tampered_with_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATHYSCOPE_CACHE", str(tmp_path))
    task = build("B1")
    with torch.no_grad():
        task.module.model.layers[1].mlp.down_proj.weight.zero_()  # type: ignore[union-attr,index,operator]
    with pytest.raises(ModelError, match=r"readable:bridge:e1.*another"):
        certified(task)
