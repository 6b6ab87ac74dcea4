"""Back-patching: the resumed grid is the naive one, and planted models behave as they must."""

from __future__ import annotations

import itertools

import pytest
import torch
from families import FAMILIES, prompt, shared
from torch import Tensor, nn

from probes.blocks.cached_prompt import CachedPrompt
from probes.edits import Replace, Values, generate, read
from probes.errors import PointError, PromptError
from probes.models.backends.native import NativeModel
from probes.planted.hosts import Host, weights
from probes.planted.registry import build
from probes.planted.task import PlantedTask
from probes.planted.vocabulary import words
from probes.points import Address

CAUSAL = tuple(family for family in FAMILIES if family != "bert")


def native(module: nn.Module) -> NativeModel:
    return NativeModel(module, ref="tiny", weights="digest")


def grid(
    model: NativeModel, tokens: Tensor, position: int, include_embedding: bool = True
) -> dict[tuple[int, int], Tensor]:
    """(source, target) -> what leaves the last block at the last position, resumed."""
    held = CachedPrompt(model, tokens[0].tolist(), position)
    n = model.shape.n_layers
    cells = list(itertools.product(range(n), range(-1 if include_embedding else 0, n)))
    hidden = torch.stack([held.entering[t + 1] for _, t in cells])
    hidden[:, 0] = torch.stack([held.entering[s + 1][0] for s, _ in cells])
    return dict(zip(cells, held.resume([t + 1 for _, t in cells], hidden).last, strict=True))


def naive(model: NativeModel, tokens: Tensor, position: int, source: int, target: int) -> Tensor:
    n = model.shape.n_layers
    row = read(model, tokens, [Address("resid_post", source)])[Address("resid_post", source)][0, position]
    at = Address("resid_pre", 0) if target < 0 else Address("resid_post", target)
    edit = Replace(address=at, value=Values(row), positions=(position,))
    return read(model, tokens, [Address("resid_post", n - 1)], [edit])[Address("resid_post", n - 1)][0, -1]


@pytest.mark.parametrize("position", [8, 4, 0])
@pytest.mark.parametrize("family", CAUSAL)
def test_the_resumed_grid_is_the_naive_one(family: str, position: int) -> None:
    model, tokens = native(shared(family)), prompt()
    for (s, t), found in grid(model, tokens, position).items():
        expected = naive(model, tokens, position, s, t)
        assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max())), (s, t)
    assert torch.equal(read(model, tokens, [Address("logits")])[Address("logits")], model_logits(model, tokens))


def model_logits(model: NativeModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.module(tokens).logits  # type: ignore[operator]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "gpt_neox", "mistral"])
def test_continuations_are_the_naive_ones(family: str) -> None:
    model, tokens = native(shared(family)), prompt(6)
    n, unembed = model.shape.n_layers, model.unembedding()
    for position in (5, 2):
        held = CachedPrompt(model, tokens[0].tolist(), position)
        cells = list(itertools.product(range(n), range(n - 1)))
        hidden = torch.stack([held.entering[t + 1] for _, t in cells])
        hidden[:, 0] = torch.stack([held.entering[s + 1][0] for s, _ in cells])
        resumed = held.resume([t + 1 for _, t in cells], hidden, keep=True)
        first = torch.nn.functional.linear(unembed.norm(resumed.last), unembed.weight, unembed.bias).argmax(-1)
        for (s, t), written in zip(cells, held.write(resumed, first, 5), strict=True):
            row = Values(held.entering[s + 1][0].clone())
            edit = Replace(address=Address("resid_post", t), value=row, positions=(position,))
            expected = generate(model, tokens[0].tolist(), 5, [edit])
            assert written[: len(expected)] == expected


def planted(name: str) -> tuple[NativeModel, PlantedTask]:
    task = build(name)
    return native(task.module), task


def patches(task: PlantedTask) -> set[tuple[int, int]]:
    """The patches that mend: (source, target) of the jumps of the record, which enter the block after the target."""
    jumps = task.record.question("mending:e1").truth
    assert isinstance(jumps, frozenset)
    return {(int(a), int(b) - 1) for a, b in (jump.split("->") for jump in jumps)}


def answers(model: NativeModel, task: PlantedTask) -> list[int]:
    return model_logits(model, torch.tensor([example.tokens for example in task.examples]))[:, -1].argmax(-1).tolist()


@pytest.mark.parametrize("name", ["C1", "C3"])
def test_a_model_that_hops_too_late_is_mended_exactly_where_it_must_be(name: str) -> None:
    model, task = planted(name)
    unembed, position = model.unembedding(), task.position(task.examples[0], "e1")
    expected = patches(task)
    assert expected == {(s, t) for s in range(5, 8) for t in range(-1, 2)}
    for example in task.examples[::32]:
        tokens = torch.tensor([example.tokens])
        assert int(model_logits(model, tokens)[0, -1].argmax()) != example.answer
        cells = grid(model, tokens, position)
        named = {cell: int((unembed.norm(last) @ unembed.weight.T).argmax()) for cell, last in cells.items()}
        assert {cell for cell, word in named.items() if word == example.answer} == expected


def test_a_model_with_its_hops_in_order_needs_no_patch() -> None:
    model, task = planted("B1")
    assert answers(model, task) == [example.answer for example in task.examples]


def test_knocking_out_the_only_path_leaves_chance() -> None:
    from probes.edits import KnockOut, logits

    model, task = planted("A3")
    tokens = torch.tensor([example.tokens for example in task.examples])
    right = [example.answer for example in task.examples]
    (mover,) = task.record.question("moved:attribute:r>ask").truth  # type: ignore[misc,union-attr]
    layer, ask, relation = int(mover.split(".")[0]), tokens.shape[1] - 1, task.record.positions["r"]
    cut = KnockOut((layer,), queries=(ask,), keys=(relation,))
    after = logits(model, tokens, [cut])[:, -1].argmax(-1).tolist()
    assert len(set(after)) == 1
    others = tuple(other for other in range(8) if other != layer)
    elsewhere = KnockOut(others, queries=(ask,), keys=(relation,))
    assert logits(model, tokens, [elsewhere])[:, -1].argmax(-1).tolist() == right


def test_the_diagonal_is_a_no_op_and_so_are_identity_blocks() -> None:
    model, tokens = native(shared("llama")), prompt()
    plain = read(model, tokens, [Address("resid_post", 2)])[Address("resid_post", 2)][0, -1]
    for position in (8, 3):
        for (s, t), last in grid(model, tokens, position).items():
            if s == t:
                torch.testing.assert_close(last, plain, atol=1e-5, rtol=1e-5)
    empty = native(weights(Host(4, 32, words(w=32)), 8).module)
    with torch.no_grad():
        empty.module.model.embed_tokens.weight.copy_(torch.eye(32))  # type: ignore[union-attr,operator]
    tokens = torch.tensor([[31, 3]])
    plain = read(empty, tokens, [Address("resid_post", 3)])[Address("resid_post", 3)][0, -1]
    assert plain.norm() > 0
    assert all(torch.equal(last, plain) for last in grid(empty, tokens, 1).values())


def test_impossible_resumptions_are_refused() -> None:
    model = native(shared("llama"))
    with pytest.raises(PromptError, match="position 4"):
        CachedPrompt(model, [5, 6, 7], 4)
    with pytest.raises(PointError, match="both ways"):
        CachedPrompt(native(shared("bert")), [5, 6, 7], 1)
    with pytest.raises(PointError, match="from 2 on"):
        CachedPrompt(model, [5, 6, 7], -1).edited(2, 1, {Address("z", 1): lambda z: z})


def test_edits_while_resuming_are_edits_of_the_last_position() -> None:
    from probes.edits import Scale

    model, tokens = native(shared("qwen2")), prompt()
    halves = torch.tensor([1.0, 0.5, 0.0])

    def each(z: Tensor) -> Tensor:
        out = z.clone()
        out[:, -1, 2] *= halves[:, None]
        return out

    last = CachedPrompt(model, tokens[0].tolist(), -1).edited(1, 3, {Address("z", 1): each})
    for row, factor in zip(last, halves.tolist(), strict=True):
        edit = Scale(address=Address("z", 1), factor=factor, heads=(2,), positions="last")
        expected = read(model, tokens, [Address("resid_post", 2)], [edit])[Address("resid_post", 2)][0, -1]
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-5)


# The analysis


def test_the_generator_makes_questions_enough() -> None:
    from analyses.tasks.two_hop import questions, sample

    made = questions()
    assert len(made) >= 300
    assert len({q.prompt for q in made}) == len(made)
    for q in made:
        assert q.answer not in q.prompt or q.relation == "continent"
        assert q.bridge not in q.prompt
        assert q.bridge in q.second_hop
        assert q.entity in q.prompt
        assert q.entity not in q.relation_shortcut
    assert sample(40, seed=3) == sample(40, seed=3) != sample(40, seed=4)
    assert {q.relation for q in sample(4)} == {"capital", "language", "currency", "continent"}


def test_held_out_never_sees_its_own_question() -> None:
    import numpy as np

    from analyses.back_patching.tables import held_out

    # Each question is solved by a cell of its own: the oracle is 1, a cell chosen elsewhere never helps.
    assert not held_out(np.eye(5, dtype=bool), np.zeros((5, 5))).any()
    shared_cell = np.zeros((5, 4), dtype=bool)
    shared_cell[:, 2] = True
    assert held_out(shared_cell, np.zeros((5, 4))).all()


def test_the_analysis_finds_the_planted_hop(tmp_path: object) -> None:
    from analyses.back_patching import BackPatching
    from analyses.back_patching.grid import cells_of, mirrored
    from probes.prompts import Prompt
    from probes.store import ActivationStore

    model, task = planted("C1")
    chosen = task.examples[::24]
    fields = [{"answer_tokens": [example.answer], "positions": [-1]} for example in chosen]
    prompts = [Prompt(example.tokens, None, field) for example, field in zip(chosen, fields, strict=True)]
    analysis = BackPatching(include_embedding=True, cells="full")
    result = analysis.run(model, prompts, store=ActivationStore(tmp_path))  # type: ignore[arg-type]
    grid_table = result.tables["grid"]
    hits = grid_table[grid_table["success"]]
    assert set(zip(hits["source_layer"], hits["target_layer"], strict=True)) == patches(task)
    assert set(grid_table["position"]) == {3}
    row = result.tables["summary"].iloc[0]
    assert (row["set"], row["n"], row["baseline_rate"]) == ("incorrect", 6, 0.0)
    assert row["oracle_rate"] == row["best_cell_rate"] == row["held_out_rate"] == 1.0
    assert row["control_rate"] == 0.0
    rates = result.tables["control_rates"].set_index("variant")["oracle_rate"]
    assert rates["wrong_answer"] == rates["forward"] == 0.0
    assert result.provenance["counts"]["intervention_forwards"] == analysis.interventions(model, prompts).total
    assert cells_of(4, "upper", 2, False) == [(1, 0), (3, 0), (3, 2)]
    assert cells_of(4, "upper", 1, False, (0, 3)) == [(3, 0)]
    assert cells_of(4, "upper", 1, False) == [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]
    assert mirrored([(2, 0), (3, -1)], 4) == [(0, 2), (0, 3)]


@pytest.mark.parametrize("mode", ["first_token", "generate"])
def test_prompts_without_an_answer_are_refused(mode: str, tmp_path: object) -> None:
    from analyses.back_patching import BackPatching
    from probes.store import ActivationStore

    with pytest.raises(PromptError, match="no answer"):
        BackPatching(mode=mode).run(native(shared("llama")), [[5, 6]], store=ActivationStore(tmp_path))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("positions", "named"),
    [
        ([1], {"t1": 1}),
        ([-1, 1], {"t1": 1, "t2": 3}),
        ([2, -1, 0, 3], {"t1": 2, "t1.1": 0, "t2": 3}),
        ([-1], {"t2": 3}),
    ],
)
def test_every_inner_position_is_named_in_order_and_knocked_out(
    positions: list[int], named: dict[str, int], tmp_path: object
) -> None:
    from analyses.back_patching import BackPatching
    from probes.prompts import Prompt
    from probes.store import ActivationStore

    model = native(shared("llama"))
    prompts = [Prompt((5, 6, 7, 8), None, {"answer_tokens": [9], "positions": positions})]
    result = BackPatching(window=1).run(model, prompts, store=ActivationStore(tmp_path))  # type: ignore[arg-type]
    grid_table, cut = result.tables["grid"], result.tables["knockout"]
    assert dict(zip(grid_table["position_name"], grid_table["position"], strict=True)) == named
    inside = [name for name in named if name != "t2"]
    assert list(zip(cut["position_name"], cut["layer"], strict=True)) == list(itertools.product(inside, range(3)))


def test_the_words_follow_from_intervals() -> None:
    import pandas as pd

    from analyses.back_patching.verdicts import CONTROLS, names, verdicts
    from analyses.results.statistics import wilson

    def rate(hits: int, n: int) -> dict[str, float]:
        low, high = wilson(hits, n)
        return {
            f"{name}_{end}": v
            for name in ("oracle", "held_out")
            for end, v in zip(("rate", "low", "high"), (hits / n, low, high), strict=True)
        }

    def said(hits: int, controls: int, n: int, once: int | None = None) -> str:
        own = rate(hits, n)
        summary = pd.DataFrame([{"position": "t2", "set": "incorrect", "n": n, "cells": 6, **own}])
        one_try = {} if once is None else {k: v for k, v in rate(once, n).items() if k.startswith("held_out")}
        beside = [
            {"position_name": "t2", "set": "incorrect", "variant": v, "n": n, **rate(controls, n), **one_try}
            for v in CONTROLS
        ]
        cases = pd.DataFrame({"composition": [False] * n, "set": ["incorrect"] * n})
        return " ".join(verdicts(summary, pd.DataFrame(beside), cases))

    assert "above every control" in said(30, 3, 40)
    assert "not told apart from forward patches" in said(12, 8, 40)
    many, one = said(38, 30, 40, once=3).split("With one try")
    assert "not told apart from forward patches" in many, "of many cells one answers by chance"
    assert "above every control" in one
    assert "above" not in said(3, 0, 4)  # the intervals of four questions overlap whatever they say
    assert "answers 0 of 40 questions right (95 % interval 0% to 9%)" in said(0, 0, 40)
    assert "at most 9% of such questions" in said(0, 0, 40)
    nothing = verdicts(
        pd.DataFrame(), pd.DataFrame(), pd.DataFrame({"composition": [False, True], "set": ["other", "correct"]})
    )
    assert "nothing for back-patching to mend" in nothing[1]
    assert names("it is 7, say", "7")
    assert not names("it is 17", "7")
    assert names("是书。", "书")


def test_layers_that_leave_no_cell_are_refused(tmp_path: object) -> None:
    from analyses.back_patching import BackPatching
    from probes.errors import OptionError
    from probes.prompts import Prompt
    from probes.store import ActivationStore

    prompts, store = [Prompt((5, 6), None, {"answer_tokens": [9]})], ActivationStore(tmp_path)  # type: ignore[arg-type]
    for layers, message in (
        ((1,), "leave no source above a target"),
        ((0, 7), "layer 7 does not exist: legal are 0 to 2"),
    ):
        with pytest.raises(OptionError, match=message):
            BackPatching(layers=layers).run(native(shared("llama")), prompts, store=store)


@pytest.mark.parametrize("kind", ["llama2", "metaspace_always", "byte_level", "unigram"])
def test_the_answers_log_probability_is_that_of_its_own_token(kind: str, tmp_path: object) -> None:
    from families import make
    from real_tokenizers import tokenizer_of

    from analyses.back_patching import BackPatching
    from probes.prompts import Prompt
    from probes.store import ActivationStore

    tokenizer = tokenizer_of(kind)
    model = NativeModel(make("llama", vocab_size=len(tokenizer)), tokenizer, ref=kind, weights=kind)
    text = "The capital city of France is"
    tokens = tuple(tokenizer(text)["input_ids"])
    prompts = [Prompt(tokens, text, {"answer": word}) for word in ("Paris", "Rome")]
    result = BackPatching(stages=False).run(model, prompts, store=ActivationStore(tmp_path))  # type: ignore[arg-type]
    logprobs = model_logits(model, torch.tensor([tokens]))[0, -1].log_softmax(-1)
    baseline = result.tables["grid"].groupby("prompt")["baseline_logprob"].first()
    for index, word in enumerate(("Paris", "Rome")):
        token = tokenizer(f"{text} {word}")["input_ids"][len(tokens)]
        assert baseline[index] == pytest.approx(float(logprobs[token]), abs=1e-5)
    assert result.tables["cases"]["answer_tokens"].tolist() == [1, 1]


def test_every_control_has_its_rate_of_one_try() -> None:
    import pandas as pd

    from analyses.back_patching.tables import control_rates

    rows = [
        {"position_name": "t2", "set": "incorrect", "variant": variant, "prompt": prompt, "source_layer": 3, "target_layer": target,
         "success": target == (0 if variant == "back_patch" else prompt % 4), "wrong_answer": False, "answer_logprob": -1.0,
         "baseline_logprob": -2.0}
        for variant in ("back_patch", "noise") for prompt in range(8) for target in range(4)
    ]  # fmt: skip
    rates = control_rates(pd.DataFrame(rows)).set_index("variant")
    assert rates.loc[["back_patch", "noise"], "oracle_rate"].tolist() == [1, 1], (
        "noise answers each question in some cell"
    )
    assert rates.loc["back_patch", "held_out_rate"] == 1
    assert rates.loc["noise", "held_out_rate"] == 0, "and in another one for the next"
    assert rates.loc["wrong_answer", "held_out_rate"] == 0
