"""The shipped data sets are balanced and true; the published formats are read with the paper's labels."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from analyses.concept_depth.datasets import SETS, SHIPPED, get_set, load_set
from analyses.concept_depth.datasets_shipped import facts
from probes.errors import OptionError, PromptError


def rows(name: str, **how: object) -> list[tuple[str, int, str]]:
    """(example without its template, label, group) of each row."""
    lines = load_set(name, template="{text}", **how)  # type: ignore[arg-type]
    return [(str(line.text), line.fields["label"], line.fields["group"]) for line in lines]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_sets_are_balanced_distinct_stacked_and_follow_the_seed(name: str) -> None:
    statements = rows(name)
    labels = [label for _, label, _ in statements]
    assert sum(labels) * 2 == len(labels)
    assert labels == sorted(labels)
    assert len({text for text, _, _ in statements}) == len(statements)
    assert rows(name) == statements
    assert name == "sentiment" or rows(name, seed=1) != statements


@pytest.mark.parametrize("name", SHIPPED)
def test_limit_keeps_whole_groups(name: str) -> None:
    whole, some = Counter(group for *_, group in rows(name)), Counter(group for *_, group in rows(name, limit=50))
    assert 45 <= sum(some.values()) <= 50
    assert all(whole[group] == n for group, n in some.items())


def test_city_statements_are_many_true_as_labelled_and_countries_tell_nothing() -> None:
    truth = {row["city"]: row["country"] for row in facts("cities")}
    statements = rows("city_country")
    assert len(statements) >= 1000
    parts = [(re.fullmatch(r"The city of (.+) is in (.+)\.", text), label) for text, label, _ in statements]
    assert all(match and (truth[match[1]] == match[2]) == label for match, label in parts)
    by_label = [Counter(match[2] for match, label in parts if match and label == truth_value) for truth_value in (0, 1)]
    assert by_label[0] == by_label[1]


def test_neither_the_negation_nor_the_pair_alone_tells_the_truth_of_a_capital() -> None:
    truth = {row["country"]: row["capital"] for row in facts("capitals")}
    counts: Counter[tuple[bool, bool, int]] = Counter()
    for text, label, _ in rows("capital_negation"):
        match = re.fullmatch(r"The capital of (.+?) is (not )?(.+)\.", text)
        assert match
        right, negated = truth[match[1]] == match[3], match[2] is not None
        assert label == (right != negated)
        counts[right, negated, label] += 1
    assert set(counts.values()) == {len(truth)}
    assert len(counts) == 4


def test_numbers_and_coins_are_as_labelled() -> None:
    for text, label, group in rows("number_comparison"):
        a, word, b = re.fullmatch(r"(\d+) is (larger|smaller) than (\d+)\.", text).groups()  # type: ignore[union-attr]
        assert label == (int(a) > int(b) if word == "larger" else int(a) < int(b))
        assert group == "-".join(map(str, sorted((int(a), int(b)))))
    for text, label, _ in rows("coin_flip"):
        assert label == (len(re.findall(r" flips the coin", text)) % 2 == 0)


def test_every_set_has_a_template_and_two_answers_that_differ() -> None:
    for entry in SETS:
        assert entry.template.count("{text}") == 1
        assert entry.answers is None or entry.answers[0] != entry.answers[1]
        assert (entry.make is None) != (entry.read is None)


FILES = {
    "paper_cities": ("cities.csv", "statement,label,city\nA is in B.,1,A\nA is in C.,0,A\n", [("A is in B.", 0, "A"), ("A is in C.", 1, "A")]),
    "paper_common_claim": (
        "common_claim.csv", "examples,label\ngrass is green,True\nmaybe,Neither\ngrass is red,False\n",
        [("grass is green", 0, "grass is green"), ("grass is red", 1, "grass is red")],
    ),
    "paper_counterfact": (
        "counterfact.csv", "statement,label,subject\nx is y,0,x\nx is z,1,x\n", [("x is z", 0, "x"), ("x is y", 1, "x")],
    ),
    "paper_hateeval": ("hateeval.tsv", "text\tHS\tTR\tAG\nkind\t0\t0\t0\nvile\t1\t0\t0\n", [("vile", 0, "vile"), ("kind", 1, "kind")]),
    "paper_stsa": ("stsa.binary.train", "1 good film\n0 bad film\n", [("bad film", 0, "bad film"), ("good film", 1, "good film")]),
    "paper_imdb": ("imdb.csv", "text,label\nbad,0\ngood,1\n", [("bad", 0, "bad"), ("good", 1, "good")]),
    "paper_sarcasm": (
        "sarcasm.json", '{"headline": "sure", "is_sarcastic": 1}\n{"headline": "rain", "is_sarcastic": 0}\n',
        [("sure", 0, "sure"), ("rain", 1, "rain")],
    ),
    "paper_strategy_qa": (
        "StrategyQA_task.json",
        json.dumps({"examples": [
            {"input": "Is it?", "target": "No. Because.", "target_scores": {"Yes": 0, "No": 1}},
            {"input": "Was it?", "target": "Yes. It was.", "target_scores": {"Yes": 1, "No": 0}},
        ]}),
        [("Was it? It was.", 0, "Was it?"), ("Is it? Because.", 1, "Is it?")],
    ),
    "paper_coin_flip": (
        "coin_flip.json", json.dumps({"examples": [{"question": "q1", "answer": "no"}, {"question": "q2", "answer": "yes"}]}),
        [("q2", 0, "q2"), ("q1", 1, "q1")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_published_formats_are_read_with_the_papers_labels(name: str, tmp_path: Path) -> None:
    file, content, expected = FILES[name]
    (tmp_path / file).write_text(content)
    assert rows(name, path=tmp_path / file) == expected
    if get_set(name).file == file:
        assert rows(name, path=tmp_path) == expected


def test_there_are_nine_published_sets_and_each_can_be_read_from_a_file() -> None:
    assert len(FILES) == 9
    assert set(FILES) == {entry.name for entry in SETS if entry.read}


def test_bad_names_templates_and_paths_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="Did you mean 'sentiment'"):
        load_set("sentiments")
    with pytest.raises(OptionError, match=r"does not hold \{text\}"):
        load_set("sentiment", template="no place")
    with pytest.raises(PromptError, match=r"give the path of cities\.csv"):
        load_set("paper_cities")
    with pytest.raises(PromptError, match=r"no file .*cities\.csv"):
        load_set("paper_cities", path=tmp_path)
    (tmp_path / "cities.csv").write_text("a,b\n1,2\n")
    with pytest.raises(PromptError, match="published format"):
        load_set("paper_cities", path=tmp_path)
