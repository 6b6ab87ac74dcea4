"""Layer programs: shared prefixes change nothing, the counts are the formula's, and planted models are mended where they must be."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from families import _LLAMA, FAMILIES, make, prompt, shared
from torch import nn

from analyses.interventions import Tally
from analyses.layer_programs import LayerPrograms
from analyses.layer_programs.alphabet import Alphabet
from analyses.layer_programs.chance import cross_fitted, family_p, oracle_chance, two_halves
from analyses.layer_programs.engine import Engine, OpenQuestions
from analyses.layer_programs.figures import FIGURES
from analyses.layer_programs.fragility import altered
from analyses.layer_programs.maps import jump_cells, jump_formula, naive_runs, pair_sizes, skip_programs
from analyses.layer_programs.outcomes import chosen_menu
from analyses.layer_programs.questions import Question, questions_of
from analyses.layer_programs.search import Ledger, TreeRules, beam, exhaustive, gains_on, random_programs, tree_search
from probes.blocks.cached_prompt import CachedPrompt
from probes.blocks.rerouting import Caller, call_blocks
from probes.edits import BlockPath, Program, Replace, Values, generate, logits, read
from probes.edits.program_edits import Exchange, Jump, Together, changes_of, program_of
from probes.edits.program_runs import block_runs, run_programs
from probes.edits.programs import interchange, jump, replacement, side_by_side
from probes.errors import OptionError, PointError, PromptError
from probes.models.backends.native import NativeModel
from probes.models.unembedding import logits_of
from probes.planted.registry import build
from probes.planted.task import PlantedTask
from probes.points import Address
from probes.progress import QUIET
from probes.prompts import Prompt
from probes.session import State

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
    assert block_runs(skip_programs(n, range(n)), n) - block_runs(singles, n) == n * (n - 1) * (n - 2) // 6
    assert block_runs([Program.plain(n)], n) == 0
    assert naive_runs(skips + repeats) == sum(a + n - b for a, b in jump_cells(n))


def test_what_is_counted_is_what_runs() -> None:
    model = native(shared("llama"))
    texts = ((5, 6, 7), (8, 9, 5, 4), (5, 6, 4, 3))
    questions = questions_of(model, [Prompt(tokens, None, {}) for tokens in texts], "all", 4, 0)
    engine = Engine(model, questions, ("loss",), Tally(QUIET))
    calls = []
    inner = OpenQuestions.through

    def counted(self: OpenQuestions, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        calls.append(hidden.shape[:2])
        return inner(self, layer, hidden)

    programs = [jump(3, *cell) for cell in jump_cells(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OpenQuestions, "through", counted)
        engine.scores(programs)
        assert 3 * sum(rows for rows, _ in calls) == engine.block_runs == 3 * jump_formula(3)
        # Two of the eleven tokens are a beginning that two texts share.
        assert sum(rows * nodes for rows, nodes in calls) == engine.block_tokens == 9 * jump_formula(3)
        assert engine.tally.forwards == 3 * len(programs)
        engine.scores(programs)
    assert engine.block_runs == 3 * jump_formula(3)


def test_questions_that_are_open_together_read_what_each_reads_alone() -> None:
    model = native(shared("llama"))
    texts = ((5, 6, 7, 2), (5, 6, 7), (8, 9, 5, 4), (5, 6, 4, 3))
    fields = ({"answer_tokens": [8]}, {"answer_tokens": [3, 4]}, {"answer_tokens": [9], "group": "a"}, {})
    prompts = [Prompt(*each) for each in zip(texts, [None] * 4, fields, strict=True)]
    programs = [jump(3, *cell) for cell in jump_cells(3)]
    metrics = ("answer", "first_token", "correct", "loss", "kl")
    for scope in ("all", "last"):
        questions = [replace(each, answer=(2, 7) if scope == "all" else each.answer) if not each.firsts else each
                     for each in questions_of(model, prompts, scope, 4, 0)]  # fmt: skip
        read = metrics if scope == "all" else metrics[:3]
        together = Engine(model, questions, read, Tally(QUIET)).scores(programs)
        for row, question in enumerate(questions):
            alone = Engine(model, [question], read, Tally(QUIET)).scores(programs)
            for name in read:
                np.testing.assert_allclose(together.change[name][row], alone.change[name][0], atol=2e-5)
            np.testing.assert_array_equal(together.said[row], alone.said[0])
            np.testing.assert_array_equal(together.written[row], alone.written[0])
            np.testing.assert_allclose(together.norm_ratio[row], alone.norm_ratio[0], rtol=1e-5)


def test_no_more_is_open_at_once_than_memory_is_kept_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = native(shared("llama"))
    texts = ((5, 6, 7, 2), (8, 9, 5, 4), (5, 6, 4, 3), (5, 6, 7))
    questions = questions_of(model, [Prompt(tokens, None, {}) for tokens in texts], "all", 4, 0)
    engine = Engine(model, questions, ("loss",), Tally(QUIET))
    assert engine.together(range(4)) == [[2, 3, 0, 1]]
    monkeypatch.setattr("analyses.layer_programs.engine.TREE_TOKENS", 6)
    assert engine.together(range(4)) == [[2, 3, 0], [1]]
    assert [engine.open(some).tree.nodes for some in engine.together(range(4))] == [6, 4]


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
        for i, example in enumerate(task.examples[:: len(task.examples) // 6])
    ]
    return native(task.module), prompts[:6], task


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


def test_blocks_that_replace_one_another_cost_nothing_alone_and_everything_together() -> None:
    model, prompts, task = planted("G1")
    table = LayerPrograms(maps=("skips",), metric=("correct",)).run(model, prompts).tables["skips"]
    (pair,) = task.record.question("redundant").truth or ()
    i, j = sorted(int(node.partition(".")[2]) for node in pair.split("+"))
    rows = table.set_index(["i", "j"])
    assert rows.loc[(i, j), ["delta_i", "delta_j"]].tolist() == [0, 0]
    assert rows.loc[(i, j), "excess"] == rows.loc[(i, j), "delta"] < -0.5
    assert (rows.drop(index=[(i, j)])["excess"] >= 0).all()


@pytest.mark.parametrize("name", ["C1"])
def test_every_search_finds_one_change_that_mends_and_undoing_it_mends_nothing(name: str) -> None:
    model, prompts, task = planted(name)
    prompts = prompts[:3]
    analysis = LayerPrograms(
        maps=("pairs",), metric=("correct", "answer"), search=("exhaustive", "random", "beam", "mcts"), max_span=8, budget=300, splits=1
    )  # fmt: skip
    result = analysis.run(model, prompts)
    tables = result.tables
    chosen = tables["programs"].set_index("origin")
    assert (chosen["test"] == 1).all()
    assert (chosen.loc[["exhaustive", "beam"], "edits"] == 1).all()
    truth = {
        jump(8, int(leave) + 1, int(enter)).text()
        for leave, enter in (cell.split("->") for cell in task.record.question("mending:e1").truth or ())
    }  # type: ignore[union-attr,arg-type,misc]
    assert set(chosen.loc[["exhaustive", "beam"], "program"]) <= truth
    items = tables["items"]
    assert items["mended_by"].notna().all()
    assert (items["wrong_answer_mended"] == 0).all()
    assert (tables["budget"]["block_runs"] <= 300 * 2).all()
    survived = tables["fragility"].set_index("change")["survived"]
    assert survived["undone"] == 0
    assert (tables["menu"]["coverage_test"] == 1).all()
    assert result.provenance["counts"]["intervention_forwards"] <= analysis.interventions(model, prompts).total
    for figure in ("cost", "budget", "menu", "items", "fragility"):
        assert result.figure(figure).data


# Searches and what they draw from


def four_blocks() -> tuple[NativeModel, list[Prompt]]:
    torch.manual_seed(3)
    module = hf.LlamaForCausalLM(hf.LlamaConfig(**{**_LLAMA, "num_hidden_layers": 4})).eval()
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(torch.randn(weight.shape) * 0.1)
    prompts = [Prompt((5 + i, 9, 20 - i), None, {"answer_tokens": [3 + i], "group": str(i)}) for i in range(6)]
    return native(module), prompts


def test_a_search_with_a_budget_for_everything_finds_what_trying_everything_finds() -> None:
    model, prompts = four_blocks()
    questions = questions_of(model, prompts, "all", 4, 0)
    engine = Engine(model, questions, ("answer",), Tally(QUIET))
    alphabet = Alphabet(4, ("skip", "repeat"), 4, 8)
    ledger = Ledger(4, 10**6)
    programs = exhaustive(alphabet, ledger)
    single = alphabet.children(())
    double = {program for changes in single.values() for program in alphabet.children(changes)}
    assert set(programs) == set(single) | double
    gain = engine.scores(programs).gain("answer").mean(0)
    grown = beam(alphabet, Ledger(4, 10**6), 10**4, 0, gains_on(engine, "answer", range(6)))
    assert set(programs) <= set(grown)
    assert engine.scores([p for p in grown if p in ledger.known]).gain("answer").mean(0).max() == gain.max()
    rules = TreeRules(explore=1.8, length_weight=0.0, epsilon=0.5)
    few = Alphabet(4, ("skip",), 1, 8)
    visited = tree_search(engine, 0, few, Ledger(4, 10**6), rules, 0, lambda scores, column: False)
    third = {
        q
        for changes in few.children(()).values()
        for more in few.children(changes).values()
        for q in few.children(more)
    }
    assert (
        set(few.children(()))
        <= set(visited)
        <= set(few.children(())) | {p for c in few.children(()).values() for p in few.children(c)} | third
    )


def test_the_alphabet_of_one_change_costs_what_the_formula_says() -> None:
    alphabet = Alphabet(30, ("skip", "repeat"), 4, 60)
    assert len(alphabet.changes) == 8 * 30 - 12
    skips = [program for program in alphabet.children(()) if program.runs < 30]
    assert block_runs(skips, 30) == 1570
    assert block_runs(list(alphabet.children(())), 30) == 3420
    ledger = Ledger(30, 3420)
    assert len(exhaustive(alphabet, ledger)) == 228
    assert ledger.spent == ledger.spent_on(228) == 3420
    random = Ledger(30, 500)
    drawn = random_programs(alphabet, random, 0)
    assert random.spent <= 500
    assert len(set(drawn)) == len(drawn)
    assert drawn == random_programs(alphabet, Ledger(30, 500), 0)


def test_changes_are_read_from_programs_and_make_them() -> None:
    expected = {
        "0-11,12-15,12-29": (Jump(16, 12),), "0,2,1,3-29": (Exchange(1, 2),), "0-1,{2|3},4-29": (Together((2, 3)),), "3-29": (Jump(0, 3),),
        "0-4,8-29": (Jump(5, 8),), "0,0,0,1-29": (Jump(1, 0), Jump(1, 0)), "none": (Jump(0, 30),), "0-29": (),
    }  # fmt: skip
    for text, changes in expected.items():
        assert changes_of(Program.parse(text), 30) == changes
    for steps in itertools.product(range(3), repeat=4):
        program = Program.of(steps)
        assert program_of(3, changes_of(program, 3)) == program
    for i, j in ((0, 1), (0, 2), (1, 3)):
        assert changes_of(interchange(5, i, j), 5) == (Exchange(i, j),)


def test_small_changes_of_a_repeat_by_hand() -> None:
    variants = altered(jump(6, 4, 2), Alphabet(6, ("skip", "repeat"), 4, 12), np.random.default_rng(0))
    assert variants["undone"] == [Program.plain(6)]
    assert set(variants["one block longer or shorter"]) == {jump(6, 5, 2), jump(6, 3, 2), jump(6, 4, 3), jump(6, 4, 1)}
    assert set(variants["shifted by one block"]) == {jump(6, 3, 1), jump(6, 5, 3)}
    assert len(changes_of(variants["one more change"][0], 6)) == 2


# Chance


def test_signs_at_random_are_significant_as_often_as_they_may_be() -> None:
    rng = np.random.default_rng(0)
    groups = [str(i) for i in range(12)]
    hits = sum(bool((family_p(rng.normal(size=(12, 40)), groups, seed) <= 0.05).any()) for seed in range(200))
    assert 3 <= hits <= 19  # the middle 99.8 % of 200 draws at 5 %
    planted_column = rng.normal(size=(12, 40))
    planted_column[:, 7] += 8
    p = family_p(planted_column, groups, 0)
    assert p[7] <= 0.05
    assert (np.delete(p, 7) > 0.05).all()
    assert np.isnan(family_p(planted_column[:5], groups[:5], 0)).all()


def test_what_each_question_likes_alone_is_no_gain_elsewhere() -> None:
    private = np.eye(12) - 0.01
    groups = [str(i) for i in range(12)]
    assert cross_fitted(private, groups, 0)[1].mean[0] < 0
    shared_gain = private + np.eye(1, 12, 5)
    best, elsewhere = cross_fitted(shared_gain, groups, 0)
    assert best == 5
    assert elsewhere.mean[0] > 0.9
    assert chosen_menu(np.eye(4, dtype=bool), 2) == [0, 1]


def test_halves_hold_whole_groups() -> None:
    groups = [str(i // 3) for i in range(18)]
    for seed in range(5):
        first = two_halves(groups, seed)
        assert all(len(set(first[i : i + 3])) == 1 for i in range(0, 18, 3))
        assert 6 <= first.sum() <= 12


def test_the_oracle_of_many_tries_by_hand() -> None:
    assert oracle_chance(np.array([0.01]), 200)[0] == pytest.approx(0.866, abs=1e-3)


# Pairs by hand


def test_interactions_of_linear_blocks_are_products() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    h = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    first, second = (lambda x: x + x @ a), (lambda x: x + x @ b)
    sizes = pair_sizes(h, first(h), second(first(h)), second(h), first(second(h)))
    whole_size = (second(first(h)) - h).norm(dim=-1)
    for at, expected in enumerate((h @ a, h @ b, h @ a @ b, h @ b @ a, h @ (a @ b - b @ a))):
        torch.testing.assert_close(sizes[:, at], expected.norm(dim=-1) / whole_size)


# What is refused


def test_what_cannot_be_run_is_refused(tmp_path: Path) -> None:
    model = native(shared("llama"))
    bare = [Prompt((5, 6, 7), None, {})]
    answered = [Prompt((5, 6, 7), None, {"answer_tokens": [8], "group": "a"}) for _ in range(2)]
    apart = [*answered, Prompt((5, 6, 7), None, {"answer_tokens": [8], "group": "b"})]
    with pytest.raises(PromptError, match="no answer"):
        LayerPrograms().run(model, bare)
    with pytest.raises(PromptError, match="for a search"):
        LayerPrograms(metric=("loss",), search=("random",)).run(model, bare)
    with pytest.raises(PromptError, match="one group"):
        LayerPrograms(maps=("pairs",), search=("random",)).run(model, answered)
    with pytest.raises(OptionError, match="budget is 1"):
        LayerPrograms(maps=("pairs",), search=("random",), budget=1, max_span=1, moves=("swap",)).run(model, apart)
    with pytest.raises(OptionError, match="scope last"):
        LayerPrograms(scope="last").run(model, answered)
    with pytest.raises(OptionError, match="max_length"):
        LayerPrograms(max_length=0.5)
    with pytest.raises(OptionError, match="none beside"):
        LayerPrograms(search=("none", "beam"))
    with pytest.raises(PointError, match="both ways"):
        LayerPrograms(metric=("loss",)).run(native(shared("bert")), bare)
    path = tmp_path / "programs.txt"
    path.write_text("# ours\n0-2\n0-1,5\n")
    with pytest.raises(OptionError, match="line 3: block 5"):
        LayerPrograms(metric=("loss",), programs=str(path)).run(model, bare)


def test_given_programs_are_scored_without_a_search(tmp_path: Path) -> None:
    model, prompts = four_blocks()
    path = tmp_path / "programs.txt"
    path.write_text("0-1,{2|3}\n0-3\n0,2-3\n")
    tables = LayerPrograms(maps=("pairs",), programs=str(path)).run(model, prompts).tables
    table = tables["programs"].set_index("program")
    assert table.loc["0-3", "test"] == 0
    assert table["runs"].to_dict() == {"0-1,{2|3}": 4, "0-3": 4, "0,2-3": 3}
    assert table["depth"].to_dict() == {"0-1,{2|3}": 3, "0-3": 4, "0,2-3": 3}


def test_at_the_last_position_a_jump_is_back_patching() -> None:
    """Jump s+1 -> t+1 of the last position is the stream after block s put in place of that after block t."""
    model, tokens = native(shared("llama")), prompt()
    questions = questions_of(model, [Prompt(tuple(tokens[0].tolist()), None, {"answer_tokens": [7]})], "last", 4, 0)
    engine = Engine(model, questions, ("answer",), Tally(QUIET))
    for s, t in ((2, 0), (2, 1), (1, 0)):
        row = read(model, tokens, [Address("resid_post", s)])[Address("resid_post", s)][0, -1]
        patch = Replace(address=Address("resid_post", t), value=Values(row), positions=(-1,))
        both = [logits(model, tokens, edits)[0, -1].log_softmax(-1)[7] for edits in ([patch], [])]
        change = engine.scores([jump(3, s + 1, t + 1)]).change["answer"][0, 0]
        assert change == pytest.approx(float(both[0] - both[1]), abs=1e-5)


def test_what_a_program_writes_is_what_greedy_decoding_writes() -> None:
    model = native(shared("llama"))
    program = jump(3, 2, 1)
    text = (5, 6, 7)
    wrote = generate(model, list(text), 3, [BlockPath(program)])
    for answer, expected in ((wrote, True), ([*wrote[:2], (wrote[2] + 1) % 97], False)):
        question = Question(0, text, tuple(answer), frozenset(answer[:1]), (), "a", "all", ())
        engine = Engine(model, [question], ("answer",), Tally(QUIET))
        assert engine.scores([program]).written[0, 0] == expected


def test_a_cell_of_the_jump_map_opens_as_a_live_session() -> None:
    figure = FIGURES["jump_map"]
    model, prompts = four_blocks()
    tables = LayerPrograms(maps=("jumps",), metric=("answer",)).run(model, prompts).tables
    tables["questions"]["text"] = 'it\'s "here"'
    (marks,) = [
        trace for trace in figure.drawn(tables).data if trace.type == "scatter" and trace.customdata is not None
    ]
    assert len(marks.customdata) == len(jump_cells(4))
    for name, leave, enter in zip([row[0] for row in marks.customdata], marks.y, marks.x, strict=True):
        assert figure.live is not None
        state = State.parse("\n".join(["model tiny", *figure.live(tables, name)]))
        assert state.text == 'it\'s "here"'
        assert state.steps[0].edit == BlockPath(jump(4, int(leave), int(enter)))
