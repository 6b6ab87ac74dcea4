"""The analysis as a user runs it: prompts with answers, references, tasks, errors, and the saved result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import native
from torch import Tensor

from analyses.circuits import normalised, sizes_of
from analyses.cli import main
from analyses.contextual_decomposition import ContextualDecomposition
from analyses.contextual_decomposition.agreement import agreement_tables
from analyses.contextual_decomposition.cases import case_of, generated_questions
from analyses.contextual_decomposition.circuit import pruned, ranked
from analyses.contextual_decomposition.word_relevance import words_of
from analyses.results.result import Result
from analyses.tasks import docstring, greater_than, ioi
from probes.decomposition import Rules, decompose, head
from probes.errors import OptionError, PromptError
from probes.models import Model
from probes.points import Address

CONTRACT = {
    "relevance": ("prompt", "source", "layer", "position", "head", "score"),
    "edges": (
        *("source_layer", "source_position", "source_head", "target_layer", "target_position", "target_head"),
        "score",
    ),
    "faithfulness": ("size", "faithfulness", "random_mean", "random_share_beaten"),
}
LENGTH = 7


def lines(n: int, length: int = LENGTH, seed: int = 0, **fields: Any) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"tokens": torch.randint(3, 97, (length,), generator=generator).tolist(), **fields} for _ in range(n)]


def write(path: Path, content: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in content), encoding="utf-8")
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write(tmp_path / "prompts.jsonl", lines(3, answer_tokens=[5, 6], distractor_tokens=[7]))


@pytest.fixture
def references(tmp_path: Path) -> Path:
    return write(tmp_path / "references.jsonl", lines(5, seed=1))


@pytest.fixture
def run(prompts: Path, references: Path) -> Result:
    analysis = ContextualDecomposition(reference_prompts=str(references), random_circuits=3, other_preset=True)
    return analysis.run(native("llama"), prompts)


def metric_of(model: Model, tokens: list[int], writes: Any = None) -> float:
    logits: list[Tensor] = []
    model.run(torch.tensor([tokens]), {Address("logits"): lambda t: logits.append(t[0, -1].clone())}, writes)
    return float(logits[0][[5, 6]].mean() - logits[0][7])


def test_the_tables_hold_the_contract_and_a_saved_result_redraws(run: Result, tmp_path: Path) -> None:
    for name, columns in CONTRACT.items():
        assert set(columns) <= set(run.tables[name].columns), name
    loaded = Result.load(run.save(tmp_path / "saved"))
    assert set(loaded.figures) == {
        *("heads", "agreement", "scatter", "circuit", "faithfulness", "words", "tokens", "routed")
    }
    assert all(loaded.figure(name).data for name in loaded.figures)
    heads = run.tables["relevance"].query("kind == 'head'")
    assert len(heads) == 3 * 3 * 4
    profile = loaded.profile("relevance").set_index("layer")
    by_hand = heads.assign(size=heads["score"].abs()).groupby("layer")["size"].sum() / 3
    assert np.allclose(profile["value"], by_hand)
    assert profile["ci_low"].isna().all()  # three prompts support no interval


def test_scores_are_those_of_decompose_against_the_references_mean(
    run: Result, prompts: Path, references: Path
) -> None:
    model = native("llama")
    tokens = [json.loads(line)["tokens"] for line in prompts.read_text().splitlines()]
    others = [json.loads(line)["tokens"] for line in references.read_text().splitlines()]
    means: list[Tensor] = []
    model.run(torch.tensor(others), {Address("z", 1): lambda t: means.append(t.mean(0).clone())})
    mean = means[0]
    parts = decompose(model, tokens[2], [(head(1, 3),)], points=["z.1"], logits=[5, 6, 7])
    base = {Address("z", 1): mean}
    assert parts["z.1"].total.shape == mean.shape
    row = run.tables["relevance"].query("prompt == 2 and source == '1.3'")["score"].item()

    def ablate(z: Tensor) -> Tensor:
        z = z.clone()
        z[0, :, 3] = base[Address("z", 1)][:, 3]
        return z

    effect = metric_of(model, tokens[2]) - metric_of(model, tokens[2], {Address("z", 1): ablate})
    measured = run.tables["heads"].query("layer == 1 and head == 3")["ablation"].item()
    others_effects = [
        metric_of(model, t) - metric_of(model, t, {Address("z", 1): ablate}) for t in tokens[:2]
    ]  # fmt: skip
    assert measured == pytest.approx(np.mean([effect, *others_effects]), abs=1e-5)
    assert row != 0
    assert np.sign(row) == np.sign(effect) or abs(effect) < 0.05


def test_the_whole_model_keeps_all_and_the_empty_circuit_nothing(prompts: Path, references: Path) -> None:
    analysis = ContextualDecomposition(
        reference_prompts=str(references),
        shares=(0.5, 1.0),
        random_circuits=2,
        search_steps=0,
        words="none",
        mlps=False,
    )
    tables = analysis.run(native("gpt2"), prompts).tables
    assert "edges" not in tables
    assert "words" not in tables
    whole = tables["faithfulness"].query("size == 12")
    assert np.allclose(whole["faithfulness"], 1)
    assert np.allclose(whole["random_mean"], 1)
    model, cases = native("gpt2"), tables["cases"]
    tokens = [json.loads(line)["tokens"] for line in prompts.read_text().splitlines()]
    assert cases["metric"].tolist() == pytest.approx([metric_of(model, t) for t in tokens], abs=1e-5)


def test_word_scores_add_up_to_the_phrase_and_its_interaction(run: Result) -> None:
    words = run.tables["words"]
    assert np.allclose(words["interaction"], 0, atol=1e-6)  # every word is one token here
    assert words.groupby("prompt")["word"].max().eq(LENGTH - 1).all()
    assert words_of(["The", " cat", "al", "ogue", " ends"]) == [range(0, 1), range(1, 4), range(4, 5)]


def test_positions_limit_the_sources_and_mean_the_same_in_all_prompts(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [*lines(3, answer_tokens=[5], distractor_tokens=[7], positions=[2, -1]),
                                        *lines(2, length=5, answer_tokens=[5], distractor_tokens=[7])])  # fmt: skip
    analysis = ContextualDecomposition(granularity="position", mode="zero", random_circuits=2, words="head")
    result = analysis.run(native("qwen2"), path)
    table = result.tables["relevance"].query("kind == 'head' and position >= 0")
    assert set(table["position"]) == {2, LENGTH - 1}
    assert set(table["prompt"]) == {0, 1, 2}
    assert any("use 3 of 5 prompts" in note for note in result.notes)
    assert "positions" in result.figures
    assert result.figure("positions").data


@pytest.mark.parametrize("family", ["bert", "opt_post_norm", "mixtral", "gpt_neox", "gemma2"])
def test_other_kinds_of_blocks_run_too(family: str, prompts: Path) -> None:
    analysis = ContextualDecomposition(mode="zero", random_circuits=0, preset="paper", prune=True)
    tables = analysis.run(native(family), prompts).tables
    assert tables["heads"]["score"].abs().max() > 0
    assert "faithfulness" not in tables
    assert ("direct" in tables["heads"]) == (family not in ("bert", "opt_post_norm"))


def test_the_command_line(llama_folder: Path, prompts: Path, references: Path, tmp_path: Path) -> None:
    base = ["run", "contextual_decomposition", "--model", str(llama_folder), "--prompts", str(prompts)]
    out = tmp_path / "out"
    rest = ["--reference", str(references), "--preset", "paper", "--mode", "mean", "--random-circuits", "2"]
    assert main([*base, *rest, "--out", str(out)]) == 0
    assert (out / "report.html").is_file()
    assert Result.load(out).options["reference_prompts"] == str(references)
    assert len(pd.read_parquet(out / "tables" / "relevance.parquet"))


@pytest.mark.parametrize(
    ("content", "arguments", "text"),
    [
        (lines(2), (), 'give "answer_tokens"'),
        (lines(2, answer_tokens=[5], distractor_tokens=[5]), (), "token 5 is both answer and distractor"),
        (lines(2, answer_tokens=[500]), (), "token id 500 is outside the vocabulary"),
        (lines(1, answer_tokens=[5]), (), "no other prompt has its 7 tokens"),
        (lines(2, answer_tokens=[5], positions=[9]), (), "position 9 is outside its 7 tokens"),
        (lines(2, answer_tokens="five"), (), "must be a list of token ids"),
        (lines(2, answer_tokens=[5]), ("--preset", "papers"), "papers"),
        (lines(2, answer_tokens=[5]), ("--reference", "nowhere.jsonl"), "nowhere.jsonl"),
        (lines(2, answer_tokens=[5]), ("--task", "ioi"), "needs a tokenizer"),
    ],
)
def test_a_users_mistakes_are_one_line_and_code_two(
    content: list[dict[str, Any]],
    arguments: tuple[str, ...],
    text: str,
    llama_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write(tmp_path / "bad.jsonl", content)
    base = ["run", "contextual_decomposition", "--model", str(llama_folder), "--prompts", str(path)]
    assert main([*base, "--out", str(tmp_path / "out"), *arguments]) == 2
    said = capsys.readouterr().err
    assert text in " ".join(said.replace("│", " ").split())
    assert "Traceback" not in said


def test_switches_override_the_preset() -> None:
    assert ContextualDecomposition().rules == Rules("irrelevant", "off", "function", "cd", "frozen")
    assert ContextualDecomposition(preset="paper").rules == Rules("shared", "on", "joint", "cd", "joint")
    assert ContextualDecomposition(preset="paper", normalise="off").rules == Rules(
        "shared", "off", "joint", "cd", "joint"
    )
    with pytest.raises(OptionError, match="attention_rule 'own'"):
        ContextualDecomposition(attention_rule="own")  # type: ignore[arg-type]


def test_ranks_follow_magnitude_within_layers_where_asked() -> None:
    nodes = [head(0, 0), head(0, 1), head(1, 0), head(1, 1)]
    scores = torch.tensor([0.2, -0.3, 9.0, 10.0])
    assert ranked(nodes, scores, layer_normalise=False) == [3, 2, 1, 0]
    assert ranked(nodes, scores, layer_normalise=True) == [1, 3, 2, 0]  # 0.6, 10/19, 9/19, 0.4
    assert ranked(nodes, torch.zeros(4), layer_normalise=True) == []


def test_pruning_deletes_what_hurts_most_and_keeps_the_protected() -> None:
    worth = {head(0, 0): 2.0, head(0, 1): -1.0, head(1, 0): -3.0, head(1, 1): -5.0}

    def value(circuits: list[list[Any]]) -> Tensor:
        return torch.tensor([sum(worth[node] for node in circuit) for circuit in circuits])

    assert pruned(list(worth), [head(1, 1)], value) == [head(0, 0), head(1, 1)]


def test_faithfulness_and_agreement_by_hand() -> None:
    full, empty = np.array([4.0, 6.0]), np.array([1.0, 1.0])
    assert normalised(np.array([[1.0, 4.0], [1.0, 8.0]]), full, empty).tolist() == [0, 5 / 4]
    assert np.isnan(normalised(np.array([[1.0], [2.0]]), full, full)).all()
    assert sizes_of((0.01, 0.1, 0.11, 1.0), 10) == [1, 10]
    effects = np.tile([1.0, 2.0, 4.0], (6, 1))
    table, _ = agreement_tables({"same": 2 * effects, "reversed": -effects}, effects, 0)
    table = table.set_index("method")
    assert table.loc["same", ["pearson", "spearman", "slope"]].tolist() == pytest.approx([1, 1, 0.5])
    assert table.loc["reversed", "pearson"] == pytest.approx(-1)
    assert table.loc["same", ["pearson_low", "pearson_high"]].tolist() == pytest.approx([1, 1])


def test_ioi_references_name_three_people_once_each() -> None:
    for item in ioi.items(10, 4, seed=3):
        names = [name for name in ioi.NAMES if f" {name} " in f" {item.text.replace(',', '')} "]
        assert {f" {name}" for name in names} == {*item.answers, *item.distractors}
        for text in item.references:
            words = text.replace(",", "").replace(".", "").split()
            assert sum(words.count(name) for name in ioi.NAMES) == 3
            assert all(words.count(name) <= 1 for name in ioi.NAMES)


def test_later_years_are_answers_and_earlier_ones_distractors() -> None:
    for pairs in (True, False):
        for item in greater_than.items(8, 2, seed=1, pairs=pairs):
            year = item.text.split(" year ")[1].split()[0][2:]
            begins = year if pairs else year[0]
            assert all(answer > begins for answer in item.answers)
            assert all(wrong <= begins for wrong in item.distractors)
            assert all("01 to the year" in text for text in item.references)


def test_the_docstrings_next_parameter_is_the_answer_and_references_do_not_hold_it() -> None:
    for item in docstring.items(8, 3, seed=2):
        names = item.text.split("(self, ")[1].split(")")[0].split(", ")
        described = [
            line.split()[1].rstrip(":") for line in item.text.splitlines() if line.strip().startswith(":param ")
        ]
        following = names[names.index(described[-1]) + 1]
        assert item.answers == (f" {following}",)
        assert set(item.distractors) == {f" {name}" for name in names if name != following}
        assert not any(following in text.split("(self, ")[1].split(")")[0].split(", ") for text in item.references)


@pytest.mark.real
@pytest.mark.parametrize("task", ["ioi", "greater_than", "docstring"])
def test_generated_questions_line_up_with_their_references(real: Model, task: str) -> None:
    pairs = generated_questions(real, task, 10, 4, 0)
    cases = [case_of(real, index, prompt, item) for index, (prompt, item) in enumerate(pairs)]
    lengths = {case.group: set[int]() for case in cases}
    for case in cases:
        lengths[case.group].add(len(case.tokens))
        assert len(case.references) == 4
        assert not set(case.answers) & set(case.distractors)
    assert all(len(group_lengths) == 1 for group_lengths in lengths.values())


def test_a_reference_of_another_length_is_refused(tmp_path: Path, prompts: Path) -> None:
    path = write(tmp_path / "short.jsonl", lines(3, length=5))
    with pytest.raises(PromptError, match="no reference has its 7 tokens"):
        ContextualDecomposition(reference_prompts=str(path)).run(native("llama"), prompts)
