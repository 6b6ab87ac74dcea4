"""Searches for programs under one budget of block-runs: every program of few changes, random ones, a beam, and a tree for each question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import log, sqrt
from typing import Literal

import numpy as np

from analyses.layer_programs.alphabet import EDITS, Alphabet
from analyses.layer_programs.engine import Engine, Scores
from analyses.layer_programs.reading import Metric
from analyses.results.statistics import Array
from probes.edits.program_edits import Change
from probes.edits.program_runs import block_runs
from probes.edits.programs import Program

Method = Literal["exhaustive", "random", "beam", "mcts"]
Target = Callable[[Scores, int], bool]
"""Whether a question's program of this column is right."""


@dataclass(eq=False)
class Ledger:
    """What one method may run on a question, and what it has run: programs that it knows are free."""

    n_layers: int
    budget: int
    """Block-runs."""
    spent: int = 0
    batches: list[list[Program]] = field(default_factory=list)
    """Programs that were run together, in order."""
    known: set[Program] = field(default_factory=set)

    @property
    def programs(self) -> list[Program]:
        """Every program that was run, in order."""
        return [program for batch in self.batches for program in batch]

    def take(self, programs: Sequence[Program]) -> list[Program]:
        """Return the unknown programs that the budget still pays for, from the first on, and pay for them."""
        new = [program for program in dict.fromkeys(programs) if program not in self.known]
        low, high = 0, len(new)
        while low < high:
            middle = (low + high + 1) // 2
            if self.spent + block_runs(new[:middle], self.n_layers) <= self.budget:
                low = middle
            else:
                high = middle - 1
        if low:
            self.batches.append(new[:low])
            self.known |= set(new[:low])
            self.spent += block_runs(new[:low], self.n_layers)
        return new[:low]

    def spent_on(self, count: int) -> int:
        """Return the block-runs that the first programs took."""
        spent = 0
        for batch in self.batches:
            spent += block_runs(batch[: max(0, count)], self.n_layers)
            count -= len(batch)
        return spent


def exhaustive(alphabet: Alphabet, ledger: Ledger) -> list[Program]:
    """Return every program of one change, and every one of two where the budget pays for all of them."""
    single = alphabet.children(())
    programs = ledger.take(list(single))
    n = alphabet.n_layers
    # Two changes are counted where they may fit: a pair costs at least one block-run.
    if len(programs) == len(single) and len(single) ** 2 // 2 <= ledger.budget:
        double = list(dict.fromkeys(program for changes in single.values() for program in alphabet.children(changes)))
        new = [program for program in double if program not in ledger.known]
        if ledger.spent + block_runs(new, n) <= ledger.budget:
            programs += ledger.take(new)
    return programs


def random_programs(alphabet: Alphabet, ledger: Ledger, seed: int) -> list[Program]:
    """Return random programs, as many as the budget pays for."""
    rng = np.random.default_rng((seed, 1))
    programs: list[Program] = []
    idle = 0
    while idle < 20:
        draws = dict.fromkeys(alphabet.random(rng) for _ in range(64))
        drawn = [program for program in draws if program not in ledger.known]
        taken = ledger.take(drawn)
        programs += taken
        if len(taken) < len(drawn):
            break
        idle = 0 if taken else idle + 1
    return programs


def beam(
    alphabet: Alphabet, ledger: Ledger, width: int, seed: int, gains: Callable[[Sequence[Program]], Array]
) -> list[Program]:
    """Grow the best programs by one change a step; each step may spend a third of the budget, on candidates drawn at random.

    Args:
        width: programs that are grown.
        gains: returns the mean gain of each program on the questions that choose.
    """
    rng = np.random.default_rng((seed, 2))
    measured: dict[Program, float] = {}
    growing: dict[Program, tuple[Change, ...]] = {Program.plain(alphabet.n_layers): ()}
    changes: dict[Program, tuple[Change, ...]] = {}
    whole = ledger.budget
    for step in range(1, EDITS + 1):
        candidates = {p: c for parent in growing.values() for p, c in alphabet.children(parent).items()}
        order = [list(candidates)[i] for i in rng.permutation(len(candidates))]
        ledger.budget = whole * step // EDITS
        taken = ledger.take(order)
        if not taken:
            break
        changes |= {program: candidates[program] for program in taken}
        measured |= dict(zip(taken, gains(taken).tolist(), strict=True))
        best = sorted(taken, key=lambda program: -measured[program])[:width]
        growing = {program: changes[program] for program in best}
    ledger.budget = whole
    return list(measured)


@dataclass(eq=False)
class _Node:
    """A program in a tree of programs."""

    changes: tuple[Change, ...]
    program: Program
    visits: int = 0
    reward: float = 0.0
    children: list[Program] = field(default_factory=list)
    untried: list[tuple[Program, tuple[Change, ...]]] | None = None


@dataclass(frozen=True)
class TreeRules:
    """The constants of a tree search; those of CoLa (arXiv 2507.07996) as they were passed on, by default."""

    explore: float
    length_weight: float
    """One more block costs this over the number of blocks of mean reward."""
    epsilon: float


def tree_search(
    engine: Engine, question: int, alphabet: Alphabet, ledger: Ledger, rules: TreeRules, seed: int, target: Target
) -> list[Program]:
    """Search a tree of programs for one question; a node is a program, so that two ways to it are one node.

    Selection is by mean reward + explore sqrt(ln t / N) - length_weight runs / L, a random child with probability epsilon;
    a node is grown by one child a visit, up to the square root of its visits (progressive widening).
    """
    n, rng = alphabet.n_layers, np.random.default_rng((seed, 3, question))
    root = _Node((), Program.plain(n))
    nodes = {root.program: root}
    programs: list[Program] = []
    idle = 0
    while ledger.spent < ledger.budget and idle < 50:
        path = [root]
        while True:
            node = path[-1]
            new = _grow(node, alphabet, nodes, rng) if len(node.children) < 1 + sqrt(node.visits) else None
            if new is not None:
                path.append(new)
                break
            if not node.children or len(path) > EDITS + 1:
                break
            path.append(nodes[_selected(node, nodes, rules, rng, n)])
        leaf = path[-1]
        if leaf.program not in ledger.known and leaf is not root:
            if not ledger.take([leaf.program]):
                break
            programs.append(leaf.program)
            idle = 0
        else:
            idle += 1
        reward = float(target(engine.scores([leaf.program], [question]), 0))
        for each in path:
            each.visits += 1
            each.reward += reward
    return programs


def _grow(node: _Node, alphabet: Alphabet, nodes: dict[Program, _Node], rng: np.random.Generator) -> _Node | None:
    """Return a child that the node has not had, or None where it has all."""
    if node.untried is None:
        children = list(alphabet.children(node.changes).items()) if len(node.changes) < EDITS else []
        node.untried = [children[i] for i in rng.permutation(len(children))]
    if not node.untried:
        return None
    program, changes = node.untried.pop()
    node.children.append(program)
    return nodes.setdefault(program, _Node(changes, program))


def _selected(node: _Node, nodes: dict[Program, _Node], rules: TreeRules, rng: np.random.Generator, n: int) -> Program:
    if rng.random() < rules.epsilon:
        return node.children[int(rng.integers(len(node.children)))]

    def score(program: Program) -> float:
        child = nodes[program]
        seen = max(1, child.visits)
        length = rules.length_weight * program.runs / n
        return child.reward / seen + rules.explore * sqrt(log(max(2, node.visits)) / seen) - length

    return max(node.children, key=score)


def gains_on(engine: Engine, metric: Metric, rows: Sequence[int]) -> Callable[[Sequence[Program]], Array]:
    """Return what gives the mean gain of programs on some questions."""
    return lambda programs: engine.scores(programs, rows).gain(metric).mean(0)
