"""The searches of a run, and the tables that they fill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from analyses.layer_programs.alphabet import EDITS, Alphabet
from analyses.layer_programs.chance import two_halves
from analyses.layer_programs.engine import Scores
from analyses.layer_programs.fragility import fragility_table
from analyses.layer_programs.outcomes import (
    Board,
    Bools,
    Searched,
    Tried,
    budget_rows,
    item_row,
    menu_row,
    program_row,
    rates,
    rivals,
    universal_row,
)
from analyses.layer_programs.questions import Question
from analyses.layer_programs.search import (
    Ledger,
    Method,
    TreeRules,
    beam,
    exhaustive,
    gains_on,
    random_programs,
    tree_search,
)
from probes.edits.program_edits import changes_of
from probes.edits.program_runs import block_runs
from probes.edits.programs import Program
from probes.errors import OptionError, PromptError

ALTERED = 7 * EDITS + 1
"""Programs that small changes make of one, at most."""


@dataclass(frozen=True)
class SearchPlan:
    """Which searches are run, and under which budget."""

    methods: tuple[Method, ...]
    alphabet: Alphabet
    budget: int
    """Block-runs of each method on a question; 0 is what every program of one change takes."""
    beam: int
    menu: tuple[int, ...]
    splits: int
    rules: TreeRules
    fragility: bool
    wrong_answer: bool
    given: tuple[Program, ...]
    """Programs that are scored without a search."""

    @property
    def any(self) -> bool:
        """Whether something is searched or scored."""
        return bool(self.methods or self.given)

    def ledger(self) -> Ledger:
        """Return an empty ledger of one method.

        Raises:
            OptionError: a budget that pays for no program.
        """
        n = self.alphabet.n_layers
        single = list(self.alphabet.children(()))
        if not single:
            raise OptionError("no move of the options makes a program: give more --moves, or a larger --max-length")
        least = min(filter(None, (block_runs([program], n) for program in single)), default=1)
        if self.budget and self.budget < least:
            raise OptionError(f"option budget is {self.budget}: one program takes {least} block-runs or more")
        return Ledger(n, self.budget or block_runs(single, n))

    def most(self, questions: int) -> int:
        """Return how many programs run on all questions together, at most."""
        if not self.methods:
            return questions * len(self.given)
        each = self.ledger().budget + self.alphabet.n_layers
        methods = sum({"beam": self.splits, "mcts": 3}.get(method, 1) for method in self.methods)
        altered = ALTERED if self.fragility else 0
        return questions * (methods * each + altered + len(self.given))


@dataclass(eq=False)
class Searching:
    """One run's searches; `tables` runs them in turn."""

    board: Board
    plan: SearchPlan
    searched: list[Searched] = field(default_factory=list)
    tried: list[Tried] = field(default_factory=list)

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return the tables `programs`, `measured`, and of searches `budget`, `menu`, `items`, `rates` and `fragility`.

        Raises:
            PromptError: questions of one group alone, of which nothing can be held out.
        """
        if self.plan.methods and len(set(self.board.groups)) < 2:
            raise PromptError("all prompts are of one group, so none can be held out: give groups, or no search")
        splits = [two_halves(self.board.groups, self.board.seed + split) for split in range(self.plan.splits)]
        progress = self.board.engine.tally.progress
        self.board.engine.shown = False
        progress.start(len(self.plan.methods) + 1, "search")
        for method in self.plan.methods:
            self._method(method, splits)
            progress.advance()
        rows = [universal_row(self.board, searched) for searched in self.searched if searched.ledger.batches]
        everyone = np.zeros(len(self.board.groups), dtype=bool)
        rows += [program_row(self.board, program, "given", -1, everyone) for program in self.plan.given]
        tables = {"programs": pd.DataFrame(rows), "measured": self._measured()}
        tables |= self._compared() if self.plan.methods else {}
        progress.advance()
        return tables

    def _compared(self) -> dict[str, pd.DataFrame]:
        """Return the tables that stand beside what a search chose."""
        tables: dict[str, pd.DataFrame] = {}
        random = next((s.ledger.programs for s in self.searched if s.method == "random"), [])
        some = [searched for searched in self.searched if searched.ledger.batches]
        tables["budget"] = pd.DataFrame([row for searched in some for row in budget_rows(self.board, searched)])
        menus = [menu_row(self.board, searched, k, random) for searched in some for k in self.plan.menu]
        tables["menu"] = pd.DataFrame(menus)
        tables["items"] = self._items(random)
        if self.tried:
            tables["rates"] = rates(tables["items"], self.board.seed)
        if self.plan.fragility:
            tables["fragility"] = fragility_table(self.board, self._mending(), self.plan.alphabet)
        return tables

    def _method(self, method: Method, splits: Sequence[Bools]) -> None:
        board, plan, engine = self.board, self.plan, self.board.engine
        everyone = range(len(board.groups))
        if method in ("exhaustive", "random"):
            ledger = plan.ledger()
            programs = (
                exhaustive(plan.alphabet, ledger)
                if method == "exhaustive"
                else random_programs(plan.alphabet, ledger, board.seed)
            )
            engine.run(programs)
            self.tried += [Tried(method, index, programs, programs) for index in everyone]
            self.searched += [Searched(method, split, ledger, train) for split, train in enumerate(splits)]
        elif method == "beam":
            for split, train in enumerate(splits):
                ledger, rows = plan.ledger(), np.flatnonzero(train).tolist()
                beam(plan.alphabet, ledger, plan.beam, board.seed + split, gains_on(engine, board.metric, rows))
                self.searched.append(Searched(method, split, ledger, train))
        else:
            self._trees(splits)

    def _trees(self, splits: Sequence[Bools]) -> None:
        board, plan = self.board, self.plan
        best: dict[int, Program] = {}
        others = rivals(board.engine.questions)
        right = board.plain_right()
        for index, rival in enumerate(others):
            programs = self._tree(index, None)
            towards_wrong = programs
            if plan.wrong_answer and rival is not None and not right[index]:
                towards_wrong = self._tree(index, rival)
            self.tried.append(Tried("mcts", index, programs, towards_wrong))
            answers = board.engine.scores(programs, [index]).right[0]
            if answers.any():
                best[index] = min(
                    (p for p, a in zip(programs, answers, strict=True) if a), key=lambda program: program.runs
                )
        for split, train in enumerate(splits):
            ledger = Ledger(board.n_layers, 2**62)
            ledger.take([program for index, program in best.items() if train[index]])
            self.searched.append(Searched("mcts", split, ledger, train, before=plan.ledger().budget))

    def _tree(self, index: int, rival: Question | None) -> list[Program]:
        """Search one question's tree, towards the right answer or towards another question's."""

        def right(scores: Scores, column: int) -> bool:
            return bool(scores.right[0, column] if rival is None else rival.right(int(scores.said[0, column])))

        seed = self.board.seed + (0 if rival is None else 1)
        return tree_search(
            self.board.engine, index, self.plan.alphabet, self.plan.ledger(), self.plan.rules, seed, right
        )

    def _measured(self) -> pd.DataFrame:
        """Return columns method, program, runs, share (of the plain run), gain: every program that all questions were run with."""
        board, rows = self.board, []
        everyone = np.ones(len(board.groups), dtype=bool)
        methods = {s.method: s.ledger.programs for s in self.searched if s.method in ("exhaustive", "random")}
        for method, programs in {**methods, "given": list(self.plan.given)}.items():
            if programs:
                gains = board.gains(programs, everyone).mean(0)
                rows += [
                    (method, program.text(), program.runs, program.runs / board.n_layers, gain)
                    for program, gain in zip(programs, gains, strict=True)
                ]
        return pd.DataFrame(rows, columns=["method", "program", "runs", "share", "gain"])

    def _items(self, random: Sequence[Program]) -> pd.DataFrame:
        board, right = self.board, self.board.plain_right()
        others = rivals(board.engine.questions) if self.plan.wrong_answer else [None] * len(right)
        rows = []
        for tried in self.tried:
            index = tried.question
            p = float(board.engine.scores(random, [index]).right.mean()) if random else np.nan
            rows.append(item_row(board, tried, others[index], p, bool(right[index])))
        return pd.DataFrame(rows)

    def _mending(self) -> dict[int, Program]:
        """Return, for each question that is wrong plainly, the answering program of fewest changes that any method tried."""
        right, mending = self.board.plain_right(), dict[int, Program]()
        for index in np.flatnonzero(~right).tolist():
            programs = list(dict.fromkeys(p for tried in self.tried if tried.question == index for p in tried.programs))
            if programs:
                answers = self.board.engine.scores(programs, [index]).right[0]
                some = [program for program, answer in zip(programs, answers, strict=True) if answer]
                if some:
                    n = self.board.n_layers
                    mending[index] = min(some, key=lambda program: (len(changes_of(program, n)), program.runs))
        return mending
