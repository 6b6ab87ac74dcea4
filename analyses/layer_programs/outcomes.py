"""Tables of what searches brought: one program for all, a menu of several, and one for each question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analyses.layer_programs.chance import grouped_interval, oracle_chance
from analyses.layer_programs.engine import Engine, Scores
from analyses.layer_programs.questions import Question
from analyses.layer_programs.reading import Metric
from analyses.layer_programs.search import Ledger
from analyses.results.statistics import LEVELS, Array, wilson
from analyses.tokens import token_text
from probes.edits.program_edits import changes_of
from probes.edits.programs import Program
from probes.prompts import Prompt

Bools = NDArray[np.bool_]
POINTS = 8
"""Budgets at which a method's best program is read."""
MENUS = 200
"""Random menus whose coverage is the control."""


def question_table(prompts: Sequence[Prompt], questions: Sequence[Question], engine: Engine) -> pd.DataFrame:
    """Return columns prompt, text, group, answer, said, right, and the plain value of every metric."""
    rows = []
    for prompt, question, plain in zip(prompts, questions, engine.plain(), strict=True):
        answer = " ".join(token_text(engine.model, token) for token in question.answer)
        said = token_text(engine.model, int(plain.said[0]))
        right = bool(plain.values["correct"][0] > 0) if question.firsts else None
        values = {name: float(each[0]) for name, each in plain.values.items() if name != "correct"}
        row: dict[str, object] = {
            "prompt": question.prompt, "text": prompt.text, "group": question.group, "answer": answer, "said": said, "right": right,
        }  # fmt: skip
        rows.append(row | values)
    return pd.DataFrame(rows)


@dataclass(frozen=True, eq=False)
class Searched:
    """What a method measured on all questions, and for which split it was guided."""

    method: str
    split: int
    ledger: Ledger
    train: Bools
    """Questions that chose, [question]."""
    before: int = 0
    """Block-runs a question spent on what the ledger's programs were taken from."""


@dataclass(frozen=True, eq=False)
class Board:
    """Everything that tables of searches read."""

    engine: Engine
    metric: Metric
    groups: Sequence[str]
    n_layers: int
    seed: int

    def gains(self, programs: Sequence[Program], rows: Bools) -> Array:
        """Return the gain of each program on some questions, [question, program]."""
        return self.scores(programs, rows).gain(self.metric)

    def scores(self, programs: Sequence[Program], rows: Bools) -> Scores:
        """Return what programs end in on some questions."""
        return self.engine.scores(programs, np.flatnonzero(rows).tolist())

    def plain_right(self) -> Bools:
        """Return which questions the model answers by itself, [question]."""
        return np.array([plain.values["correct"][0] > 0 for plain in self.engine.plain()])

    def plain_written(self) -> Bools:
        """Return which questions' whole answer the model writes greedily, [question]."""
        return np.array([bool(plain.written[0]) for plain in self.engine.plain()])

    def of(self, rows: Bools) -> list[str]:
        """Return the groups of some questions."""
        return [group for group, among in zip(self.groups, rows, strict=True) if among]


def universal_row(board: Board, searched: Searched) -> dict[str, Any]:
    """Return one row of `programs`: the program that is best on the questions that chose, and what it does on the others."""
    programs, train = searched.ledger.programs, searched.train
    on_train = board.gains(programs, train).mean(0)
    # Of programs that do equally well, the simplest.
    equal = [programs[i] for i in np.flatnonzero(on_train >= on_train.max() - 1e-9)]
    best = min(equal, key=lambda program: (len(changes_of(program, board.n_layers)), program.runs))
    return program_row(board, best, searched.method, searched.split, train) | {"train": float(on_train.max())}


def program_row(board: Board, program: Program, origin: str, split: int, train: Bools) -> dict[str, Any]:
    """Return program, changes, runs, depth, origin, split, train, and on the other questions test, its interval, broken and mended."""
    test = ~train
    scores, plain = board.scores([program], test), board.plain_right()[test]
    gain = grouped_interval(scores.gain(board.metric), board.of(test), board.seed)
    right = scores.right[:, 0]
    return {
        "program": program.text(), "edits": len(changes_of(program, board.n_layers)), "runs": program.runs, "depth": program.depth,
        "origin": origin, "split": split, "train": float(board.gains([program], train).mean()) if train.any() else np.nan,
        "test": gain.mean[0], "test_low": gain.low[0], "test_high": gain.high[0],
        "mended": int((right & ~plain).sum()), "broken": int((~right & plain).sum()), "n_test": int(test.sum()), "metric": board.metric,
        "written_test": float(scores.written[:, 0].mean()), "written_plain": float(board.plain_written()[test].mean()),
    }  # fmt: skip


def budget_rows(board: Board, searched: Searched) -> list[dict[str, Any]]:
    """Return how the best program so far does on the questions that chose and on the others, as block-runs are spent."""
    programs, train, test = searched.ledger.programs, searched.train, ~searched.train
    on_train = board.gains(programs, train).mean(0)
    counts = np.unique(np.geomspace(1, len(programs), POINTS).round().astype(int))
    rows = []
    for count in counts:
        best = int(on_train[:count].argmax())
        on_test = grouped_interval(board.gains([programs[best]], test), board.of(test), board.seed)
        rows.append(
            {
                "method": searched.method, "split": searched.split, "block_runs": searched.before + searched.ledger.spent_on(int(count)),
                "programs": int(count), "best_train": float(on_train[best]), "best_test": on_test.mean[0],
                "ci_low": on_test.low[0], "ci_high": on_test.high[0],
            }
        )  # fmt: skip
    return rows


def chosen_menu(right: Bools, k: int) -> list[int]:
    """Return at most k columns of [question, program] chosen one after the other for the questions they answer anew."""
    covered, menu = np.zeros(len(right), dtype=bool), list[int]()
    for _ in range(k):
        new = (right & ~covered[:, None]).sum(0)
        if not new.size or not new.max():
            break
        menu.append(int(new.argmax()))
        covered |= right[:, menu[-1]]
    return menu


def menu_row(board: Board, searched: Searched, k: int, random: Sequence[Program]) -> dict[str, Any]:
    """Return one row of `menu`: at most k programs chosen on the training questions, and what they answer of the others.

    The plain order is among the candidates. `unlabelled_test` picks, for each question, the program that is surest of
    what it says; the band is of random programs, as many and nearest in length.
    """
    plain = Program.plain(board.n_layers)
    programs, train, test = [plain, *searched.ledger.programs], searched.train, ~searched.train
    right = board.scores(programs, train).right
    menu = chosen_menu(right, k) or [0]
    on_test = board.scores([programs[i] for i in menu], test)
    surest = on_test.confidence.argmax(1)
    row = {
        "method": searched.method, "split": searched.split, "k": k, "programs": len(menu),
        "coverage_train": float(right[:, menu].any(1).mean()), "coverage_test": float(on_test.right.any(1).mean()),
        "unlabelled_test": float(on_test.right[np.arange(len(surest)), surest].mean()),
        "plain_test": float(board.plain_right()[test].mean()), "n_test": int(test.sum()),
    }  # fmt: skip
    low, high = random_menus(board, [programs[i] for i in menu], random, test)
    return row | {"random_low": low, "random_high": high}


def random_menus(board: Board, menu: Sequence[Program], random: Sequence[Program], test: Bools) -> tuple[float, float]:
    """Return the middle 95 % of the coverage of menus of random programs whose lengths are those of a menu."""
    if not random:
        return np.nan, np.nan
    rng = np.random.default_rng((board.seed, 4))
    right = board.scores(random, test).right
    runs = np.array([program.runs for program in random], dtype=np.float64)
    plain = board.plain_right()[test]
    coverages = []
    for _ in range(MENUS):
        covered = np.zeros(len(right), dtype=bool)
        for program in menu:
            if program.is_plain(board.n_layers):
                covered |= plain
            else:  # among the programs nearest in length, one at random
                near = np.argsort(np.abs(runs - program.runs) + 1e-6 * rng.random(len(runs)))[: max(1, len(runs) // 10)]
                covered |= right[:, int(near[rng.integers(len(near))])]
        coverages.append(covered.mean())
    low, high = np.quantile(coverages, LEVELS)
    return float(low), float(high)


@dataclass(frozen=True, eq=False)
class Tried:
    """What a method tried on one question."""

    method: str
    question: int
    programs: Sequence[Program]
    towards_wrong: Sequence[Program]
    """What it tried towards a wrong answer: the same programs, unless the answer guides the method."""


def item_row(board: Board, tried: Tried, rival: Question | None, p_random: float, plain_right: bool) -> dict[str, Any]:
    """Return one row of `items`: whether some program answers a question, beside a wrong answer and chance."""
    scores = board.engine.scores(tried.programs, [tried.question])
    right = scores.right[0]
    answers = [program for program, is_right in zip(tried.programs, right, strict=True) if is_right]
    by_length = min(answers, key=lambda program: program.runs, default=None)
    mends = min(answers, key=lambda program: (len(changes_of(program, board.n_layers)), program.runs), default=None)
    wrong = np.nan
    if rival is not None and not plain_right:
        said = board.engine.scores(tried.towards_wrong, [tried.question]).said[0]
        wrong = float(any(rival.right(int(token)) for token in said))
    return {
        "method": tried.method, "prompt": board.engine.questions[tried.question].prompt, "group": board.groups[tried.question],
        "set": "right" if plain_right else "wrong", "programs": len(tried.programs),
        "shortest_right": by_length.text() if by_length else None, "shortest_runs": by_length.runs if by_length else np.nan,
        "mended_by": mends.text() if mends and not plain_right else None,
        "edits": len(changes_of(mends, board.n_layers)) if mends and not plain_right else np.nan,
        "wrong_answer_mended": wrong, "p_random": p_random,
        "predicted_by_chance": float(oracle_chance(np.array([p_random]), len(tried.programs))[0]),
    }  # fmt: skip


def rivals(questions: Sequence[Question]) -> list[Question | None]:
    """Return, for each question, the next one round the end with another answer, which stands for a wrong answer."""
    n = len(questions)
    return [
        next(
            (
                other
                for step in range(1, n)
                if not (other := questions[(index + step) % n]).firsts & question.firsts
                and (not question.choices or other.firsts & set(question.choices))
            ),
            None,
        )
        for index, question in enumerate(questions)
    ]


def rates(items: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Return, per method, how many wrong questions are mended, beside a wrong answer, their difference and chance.

    Returns:
        Columns method, n, mended, mended_low, mended_high, wrong_answer, difference, difference_low, difference_high,
        predicted.
    """
    rows = []
    for method, part in items[items["set"] == "wrong"].groupby("method", sort=False):
        mended = part["mended_by"].notna().to_numpy()
        low, high = wilson(int(mended.sum()), len(mended))
        both = part["wrong_answer_mended"].notna().to_numpy()
        apart = mended[both] - part["wrong_answer_mended"].to_numpy(dtype=np.float64)[both]
        difference = grouped_interval(apart[:, None], part["group"].to_numpy()[both].tolist(), seed)
        rows.append(
            {
                "method": method, "n": len(part), "mended": mended.mean(), "mended_low": low, "mended_high": high,
                "wrong_answer": part["wrong_answer_mended"].mean(), "difference": difference.mean[0],
                "difference_low": difference.low[0], "difference_high": difference.high[0],
                "predicted": part["predicted_by_chance"].mean(),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)
