"""Layer programs: shared prefixes change nothing, the counts are the formula's, and planted models are mended where they must be."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
import torch
from families import FAMILIES, make, prompt, shared
from torch import nn

from analyses.interventions import Tally
from analyses.layer_programs import LayerPrograms
from analyses.layer_programs.engine import Engine, OpenQuestion
from analyses.layer_programs.maps import jump_cells, jump_formula, naive_runs
from analyses.layer_programs.questions import questions_of
from probes.blocks.cached_prompt import CachedPrompt
from probes.blocks.rerouting import Caller, call_blocks
from probes.edits import BlockPath, Program, logits, read
from probes.edits.program_runs import block_runs, run_programs
from probes.edits.programs import interchange, jump, replacement, side_by_side
from probes.errors import OptionError
from probes.models.backends.native import NativeModel
from probes.models.unembedding import logits_of
from probes.planted.registry import build
from probes.planted.task import PlantedTask
from probes.points import Address
from probes.progress import QUIET
from probes.prompts import Prompt

CAUSAL = tuple(family for family in FAMILIES if family != "bert")


def native(module: nn.Module) -> NativeModel:
    return NativeModel(module, ref="tiny", weights="digest")


def finals(model: NativeModel, tokens: torch.Tensor, programs: list[Program]) -> torch.Tensor:
    """What leaves the last step of each program, [program, pos, d_model]."""
    cached = CachedPrompt(model, tokens[0].tolist(), 0)
    out = torch.empty(len(programs), *cached.entering[0].shape)
    for part, final, _ in run_programs(programs, cached.entering, lambda layer, rows: cached.through(layer, rows, {})):
        out[part] = final
    return out


# Programs as values


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("0-11,12-15,12-29", "0-11,12-15,12-29"),
        ("0-15,12-29", "0-11,12-15,12-29"),
        ("0-13,{15|14},16-29", "0-13,{14|15},16-29"),
        ("{0|1}/2, 2", "{0|1}/2,2"),
        ("0-3,2-3,2-5", "0-1,2-3,2-3,2-5"),
        ("{3},4", "3-4"),
        ("none", "none"),
    ],
)
def test_a_program_has_one_text(text: str, canonical: str) -> None:
    program = Program.parse(text)
    assert program.text() == canonical
    assert Program.parse(program.text()) == program


def test_every_short_program_is_read_back() -> None:
    for steps in itertools.product(range(3), repeat=5):
        program = Program.of(steps)
        assert Program.parse(program.text()) == program == Program.parse(program.listed())


@pytest.mark.parametrize("text", ["", "0-", "3-1", "{1|1}", "0,,1", "{0|1}/3", "{0|1},{2|3}/2", "a", "-1", "0-9999"])
def test_what_is_no_program_is_refused(text: str) -> None:
    with pytest.raises(OptionError):
        Program.parse(text)


def test_jumps_exchanges_and_replacements_by_hand() -> None:
    texts = [jump(4, 3, 1), jump(4, 1, 3), jump(4, 2, 2), jump(4, 0, 4), jump(4, 4, 0)]
    assert [program.text() for program in texts] == ["0,1-2,1-3", "0,3", "0-3", "none", "0-3,0-3"]
    assert interchange(6, 0, 3, 2) == Program.of((3, 4, 2, 0, 1, 5))
    assert replacement(3, 1, 0) == Program.of((0, 0, 2))
    assert side_by_side(4, (1, 2)).text() == "0,{1|2},3"
    for bad in (lambda: jump(4, 5, 0), lambda: interchange(4, 0, 1, 2)):
        with pytest.raises(OptionError):
            bad()


# Many programs at once


def whole(model: NativeModel, tokens: torch.Tensor, program: Program) -> torch.Tensor:
    """What leaves the last step of one program run from the embedding on, without a cache, [pos, d_model]."""

    def work(hidden: torch.Tensor, call: Caller) -> torch.Tensor:
        for step in program.steps:
            added = [call(block, hidden) - hidden for block in step]
            hidden = (
                call(step[0], hidden) if len(step) == 1 else hidden + sum(added) / (len(step) if program.mean else 1)
            )
        return hidden

    with torch.no_grad():
        return call_blocks(model, tokens, work, use_cache=False)[0]


@pytest.mark.parametrize("family", CAUSAL)
def test_the_jump_map_is_that_of_programs_run_whole(family: str) -> None:
    model, tokens = native(shared(family)), prompt()
    programs = [jump(3, *cell) for cell in itertools.product(range(4), repeat=2)]
    programs += [
        interchange(3, 0, 1),
        interchange(3, 0, 2),
        replacement(3, 1, 2),
        side_by_side(3, (1, 2)),
        side_by_side(3, (0, 1), True),
    ]
    for program, final in zip(programs, finals(model, tokens, programs), strict=True):
        expected = whole(model, tokens, program)
        assert (final - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max())), program.text()
    last = Address("resid_post", 2)
    assert torch.equal(finals(model, tokens, [Program.plain(3)])[0], read(model, tokens, [last])[last][0])
    plain = logits(model, tokens, [BlockPath(Program.plain(3))])
    assert torch.equal(plain, logits(model, tokens))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "gpt_neox"])
def test_a_path_gives_the_logits_of_its_program(family: str) -> None:
    model, tokens = native(shared(family)), prompt()
    programs = [jump(3, 3, 1), jump(3, 0, 2), interchange(3, 0, 2), side_by_side(3, (0, 1))]
    for program, final in zip(programs, finals(model, tokens, programs), strict=True):
        expected = logits(model, tokens, [BlockPath(program)])[0]
        torch.testing.assert_close(logits_of(model.unembedding(), final).detach(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
def test_block_runs_are_the_formulas(n: int) -> None:
    skips = [jump(n, a, b) for a, b in jump_cells(n) if b > a]
    repeats = [jump(n, a, b) for a, b in jump_cells(n) if b < a]
    assert block_runs(skips, n) == (n**3 - n) // 6
    assert block_runs(repeats, n) == n * (n + 1) * (2 * n + 1) // 6
    assert block_runs(skips + repeats, n) == jump_formula(n) == n * n * (n + 1) // 2
    singles = [jump(n, layer, layer + 1) for layer in range(n)]
    assert block_runs(singles, n) == n * (n - 1) // 2
    swaps = [interchange(n, i, j) for i in range(n) for j in range(i + 1, n)]
    assert block_runs(swaps, n) == (n**3 - n) // 3
    near = [interchange(n, i, i + 1) for i in range(n - 1)]
    assert block_runs(near, n) == n * (n + 1) // 2 - 1
    others = [replacement(n, i, j) for i in range(n) for j in range(n) if i != j]
    assert block_runs(others, n) == (n - 1) * n * (n + 1) // 2
    pairs = [Program.of(k for k in range(n) if k not in (i, j)) for i in range(n) for j in range(i + 1, n)]
    assert block_runs(pairs + singles, n) - block_runs(singles, n) == n * (n - 1) * (n - 2) // 6
    assert block_runs([Program.plain(n)], n) == 0
    assert naive_runs(skips + repeats) == sum(a + n - b for a, b in jump_cells(n))


def test_what_is_counted_is_what_runs() -> None:
    model = native(shared("llama"))
    questions = questions_of(model, [Prompt((5, 6, 7), None, {}), Prompt((8, 9, 5, 4), None, {})], "all", 4, 0)
    engine = Engine(model, questions, ("loss",), Tally(QUIET))
    calls = []
    inner = OpenQuestion.through

    def counted(self: OpenQuestion, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        calls.append(len(hidden))
        return inner(self, layer, hidden)

    programs = [jump(3, *cell) for cell in jump_cells(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OpenQuestion, "through", counted)
        engine.scores(programs)
        assert sum(calls) == engine.block_runs == 2 * jump_formula(3)
        assert engine.tally.forwards == 2 * len(programs)
        engine.scores(programs)
    assert engine.block_runs == 2 * jump_formula(3)


def test_blocks_that_add_nothing_make_every_program_the_plain_run() -> None:
    module = make("llama")
    with torch.no_grad():
        for block in module.model.layers:  # type: ignore[union-attr]
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    model, tokens = native(module), prompt()
    programs = [jump(3, *cell) for cell in jump_cells(3)] + [interchange(3, 0, 2), side_by_side(3, (0, 1))]
    plain = finals(model, tokens, [Program.plain(3)])[0]
    assert all(torch.equal(final, plain) for final in finals(model, tokens, programs))
    prompts = [Prompt(tuple(prompt(6, seed=i)[0].tolist()), None, {"answer_tokens": [i + 3]}) for i in range(6)]
    tables = LayerPrograms().run(model, prompts).tables
    assert (tables["jumps"]["mean"] == 0).all()
    assert (tables["jumps"]["p_family"] == 1).all()
    assert (tables["swaps"]["delta"] == 0).all()
    assert np.allclose(tables["pairs"][["interaction", "commutator"]], 0)


# Planted models


@cache
def planted(name: str) -> tuple[NativeModel, list[Prompt], PlantedTask]:
    task = build(name)
    prompts = [
        Prompt(example.tokens, None, {"answer_tokens": [example.answer], "group": str(i)})
        for i, example in enumerate(task.examples[:: len(task.examples) // 8])
    ]
    return native(task.module), prompts[:8], task


@pytest.mark.parametrize("name", ["C1", "C3"])
def test_a_model_that_hops_too_late_is_mended_by_exactly_the_jumps_it_must_be(name: str) -> None:
    model, prompts, task = planted(name)
    table = LayerPrograms(maps=("jumps",), metric=("correct",)).run(model, prompts).tables["jumps"]
    truth = task.record.question("mending:e1").truth
    assert isinstance(truth, frozenset)
    assert truth
    mends = table[table["mended"] == len(prompts)]
    # A jump of the record names the block that was left last.
    assert {f"{leave - 1}->{enter}" for leave, enter in zip(mends["leave"], mends["enter"], strict=True)} == truth
    assert table.drop(mends.index)["mended"].sum() == 0
    assert set(mends["kind"]) == {"repeat"}


def test_in_a_model_whose_hops_are_in_order_nothing_is_mended() -> None:
    model, prompts, _ = planted("B1")
    table = LayerPrograms(maps=("jumps",), metric=("correct",)).run(model, prompts).tables["jumps"]
    assert (table["mended"] == 0).all()
    assert (table["mean"] <= 0).all()


@pytest.mark.parametrize("name", ["M1", "M2"])
def test_exactly_the_planted_neighbours_do_not_change_places(name: str) -> None:
    model, prompts, task = planted(name)
    table = LayerPrograms(maps=("swaps", "pairs"), metric=("correct",)).run(model, prompts).tables
    swaps = table["swaps"][table["swaps"]["protocol"] == "interchange"]
    free = {f"{i}+{j}" for i, j, delta in zip(swaps["i"], swaps["j"], swaps["delta"], strict=True) if delta == 0}
    assert free == task.record.question("order").truth
