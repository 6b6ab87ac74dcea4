"""Planted families D, E, F, J, L, M, N and O: exhaustive intervention gives the truth that was built in."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from analyses.ground_truth.bench import further_jobs
from probes.planted.certify.bench import Bench
from probes.planted.certify.certificate import CHECKS, certified, certify, is_of, key_of, shipped
from probes.planted.certify.jumps import guessed
from probes.planted.families.channels import channel_candidates
from probes.planted.record import Interval, Question
from probes.planted.registry import build, tasks
from probes.planted.task import PlantedTask

CASES = {
    "D": ["D1@0", "D2@1", "D3@2", "D4@0", "D5@1", "D6@2"],
    "E": ["E1@0", "E2@1", "E3@2", "E4@0"],
    "F": ["F1@0", "F2@1", "F3@2", "F4@0"],
    "J": ["J1@0", "J2@1", "J1@2"],
    "L": ["L1@0", "L2@1", "L1@2"],
    "M": ["M1@0", "M2@1", "M1@2"],
    "N": ["N1@0", "N2@1", "N1@2"],
    "O": ["O1@0", "O1@1", "O1@2"],
}
"""Every task, and three seeds of every family."""


@cache
def case(name: str) -> PlantedTask:
    """A task that several tests read and none changes."""
    task, seed = name.split("@")
    return build(task, int(seed))


def agree(measured: Any, shipped: Any) -> None:
    """Numbers are another processor's: shares may differ by the last digit that is kept."""
    if isinstance(shipped, dict | list):
        assert len(measured) == len(shipped)
        for key in shipped if isinstance(shipped, dict) else range(len(shipped)):
            agree(measured[key], shipped[key])
    else:
        assert measured == pytest.approx(shipped, abs=2e-4)


@pytest.mark.parametrize("name", [name for names in CASES.values() for name in names])
def test_the_certificate_agrees_with_the_plan(name: str) -> None:
    task = case(name)
    certificate = certify(task)
    assert certificate["refuted"] == []
    agree(certificate, shipped().get(key_of(task), certificate))
    assert {question.kind for question in task.record.questions} <= set(CHECKS)
    examples = task.examples
    assert len(examples) >= 120
    assert {example.split for example in examples} == {"fit", "test"}
    for example in examples:
        assert len(example.partner) == len(example.tokens)


def test_every_task_that_the_benchmark_runs_ships_its_certificate() -> None:
    further = {f"{job.task}@{job.seed}" for job in further_jobs(("compiled",), ())}
    assert {name.rpartition("-")[0] for name in shipped()} == {f"{name}@0" for name in tasks()} | further
    tampered = replace(build("E1"), examples=build("E1").examples[1:])
    assert is_of(shipped()[key_of(build("E1"))], build("E1"))
    assert key_of(tampered) not in shipped()


def test_a_certificate_is_of_weights_that_differ_by_rounding_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATHYSCOPE_CACHE", str(tmp_path))
    task = build("E1")
    for weight in task.module.parameters():
        weight.data.mul_(1 + 1e-6)
    assert certified(task).record.certificate == shipped()[key_of(task)]
    assert not list(tmp_path.rglob("*.json"))
    weight = next(weight for name, weight in task.module.named_parameters() if "attn" in name)
    weight.data.view(-1)[weight.abs().argmax()] *= 1.01
    assert not is_of(shipped()[key_of(task)], task)
    anew = certified(task).record.certificate
    (kept,) = tmp_path.rglob("*.json")
    assert certified(task).record.certificate == anew == json.loads(kept.read_text())


def test_what_jumps_mend_by_chance_is_a_binomial_tail_over_all_of_them() -> None:
    """Two answers but the wrong one, two prompts, one jump: both right in a quarter of the models, which is not rare."""
    bench = SimpleNamespace(answers=torch.tensor([0, 1, 2]))
    assert guessed(bench, SimpleNamespace(examples=(0,) * 2, layers=1)) == 1.0
    # 2 ** -7 < 1 % < 2 ** -6: seven of seven are no chance, six may be.
    assert guessed(bench, SimpleNamespace(examples=(0,) * 7, layers=1)) == 6 / 7
    # Three jumps: 3 * 2 ** -7 is more than 1 %.
    assert guessed(bench, SimpleNamespace(examples=(0,) * 7, layers=2)) == 1.0


@pytest.mark.parametrize(
    ("name", "key", "wrong"),
    [
        ("D1@0", "void", frozenset({"3"})),
        ("D2@0", "void", frozenset()),
        ("E1@0", "channel", frozenset()),
        ("F1@0", "pivot:x:ask", Interval(3, 7)),
        ("J1@0", "norm:bos", Interval(1, 7)),
        ("J2@0", "norm", frozenset({"mlp.7", "final"})),
        ("M2@0", "order", frozenset({"4+5"})),
        ("O1@0", "subspace", frozenset({"2+4"})),
        ("N2@0", "readable:attribute:ask", Interval(7, 11)),
    ],
)
def test_a_false_truth_is_refuted(name: str, key: str, wrong: Interval | frozenset[str]) -> None:
    task = case(name)
    question = replace(task.record.question(key), truth=wrong)
    assert not CHECKS[question.kind](Bench(task), question).agrees


@pytest.mark.parametrize("name", ["D6@1", "E2@0", "M1@1", "N1@1"])
def test_a_seed_draws_one_model(name: str) -> None:
    task, seed = name.split("@")
    first, second = case(name), build(task, int(seed))
    assert first.record == second.record
    assert first.examples == second.examples
    assert build(task, int(seed) + 2).record.model["digest"] != first.record.model["digest"]


def test_the_undone_pair_changes_nothing_though_each_alone_does() -> None:
    bench = Bench(case("D5@0"))
    pair = [3, 4]

    def without(blocks: list[int]) -> float:
        order = [layer for layer in range(bench.layers) if layer not in blocks]
        named = bench.run_blocks(order, bench.streams[0], bench.last)
        return float((named == bench.answers).float().mean())

    assert without(pair) == 1.0
    assert all(without([block]) < 0.5 for block in pair)


def test_the_l2_rule_takes_the_turned_block_for_a_void() -> None:
    """At the tokens that decide, the essential block of D4 changes the norm far less than any other."""
    task = case("D4@0")
    sizes = Bench(task).streams.norm(dim=-1)
    rises = (sizes[1:] - sizes[:-1])[:, torch.arange(len(task.examples)), Bench(task).last].mean(1)
    assert int(rises.abs().argmin()) == 3
    assert "mlp.3" in task.record.question("nodes").truth  # type: ignore[operator]


def test_the_decoys_channel_is_as_strong_in_the_weights_as_a_real_one() -> None:
    from probes.models.backends.native import NativeModel
    from probes.weights import composition
    from probes.weights.head_weights import head_weights

    def strongest(name: str) -> tuple[str, float]:
        task = case(name)
        weights = head_weights(NativeModel(task.module, ref=task.ref, weights="w"))
        truth = task.record.question("channel")
        pair = next(iter(truth.truth or {truth.note.split(" ")[0]}))
        writer, reader = (tuple(map(int, part.split("."))) for part in pair.removesuffix(":q").split("->"))
        late = weights.reader("q")
        target = composition.Circuit(late.left[reader], late.right[reader])
        source = composition.Circuit(weights.w_v[writer], weights.w_o[writer])
        return pair, float(composition.component_scores(source, target).max())

    real, decoy = strongest("E1@0"), strongest("E4@0")
    assert decoy[1] > 0.5 * real[1]


def test_channel_candidates_are_all_pairs_of_heads_in_order() -> None:
    names = channel_candidates(2, 2)
    assert len(names) == 12
    assert names[0] == "0.0->1.0:q"
    assert len(set(channel_candidates(4, 4))) == 6 * 16 * 3


def test_rare_answers_are_rare_and_corrected_late() -> None:
    task = case("L1@0")
    subsets = [example.subset for example in task.examples]
    assert subsets.count("frequent") == 12 * subsets.count("rare")
    late = task.record.question("lens:ask:rare").truth
    early = task.record.question("lens:ask:frequent").truth
    assert isinstance(late, Interval)
    assert isinstance(early, Interval)
    assert late.first == task.record.model["layers"] - 1 > early.first


def test_random_labels_are_balanced_in_both_splits() -> None:
    for name in ("N1@0", "N2@0"):
        task = case(name)
        concept = "label" if name.startswith("N1") else "attribute"
        for split in ("fit", "test"):
            labels = [(e.values or {})[concept] for e in task.examples if e.split == split]
            assert len(labels) == 64
            assert min(map(labels.count, range(4))) >= 8


def test_a_question_of_nothing_says_so() -> None:
    assert Question("pivot", None).nothing
    assert all(
        case("N2@0").record.question(key).nothing for key in ("mending", "lens:ask", "readable:attribute:r", "pivot")
    )
