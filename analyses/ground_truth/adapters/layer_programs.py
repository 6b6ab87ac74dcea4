"""Layer programs: which jumps mend a wrong answer, which neighbours may change places, which blocks replace one another."""

from __future__ import annotations

from collections.abc import Sequence

from analyses.ground_truth.adapters.adapter import Adapter, Run, examples_of, prompt_to, set_answer
from analyses.ground_truth.answers import Answer, name_of
from analyses.layer_programs import LayerPrograms
from analyses.results.result import Result
from analyses.results.statistics import wilson
from probes.planted.record import Question
from probes.planted.task import PlantedTask

METHOD = "layer_programs"
PROMPTS = 12
"""Enough for a rate of one to stand clear of one half."""
HALF = 0.5
"""A share of answers beyond this is told: by its interval where mended or kept, and beside an interval below 0 where lost."""
MAPS = {"mending": "jumps", "order": "swaps", "redundant": "skips"}


def runs(task: PlantedTask, questions: Sequence[Question]) -> list[Run]:
    """One run a question, of the map that answers it; a question of the last position is of programs that act there alone."""
    out = []
    for question in questions:
        analysis = LayerPrograms(
            maps=(MAPS[question.kind],),  # type: ignore[arg-type]
            metric=("correct",),
            scope="last" if question.position else "all",
        )
        prompts = tuple(
            prompt_to(task, example, None, answer_tokens=[example.answer], group=str(number))
            for number, example in enumerate(examples_of(task, question.subset, PROMPTS))
        )
        out.append(Run(analysis, prompts, (question,)))
    return out


def read(result: Result, task: PlantedTask, questions: Sequence[Question]) -> list[Answer]:
    """Jumps that mend more wrong answers than not, exchanges that keep more than not, both by their intervals; and pairs by what
    is lost without both blocks that is not lost without each.
    """
    (question,) = questions
    scores, chosen = READ[question.kind](result, question)
    if chosen is None:
        return [Answer(METHOD, name_of(task.record), question.key, "answered", scores=scores)]
    return [set_answer(METHOD, task, question, scores, chosen)]


Read = tuple[dict[str, float], frozenset[str] | None]
"""Scores, and what is chosen; None where it only ranks."""


def _mending(result: Result, question: Question) -> Read:
    """A jump of the record names the block that was left last."""
    table = result.tables["jumps"]
    table = table[table["kind"] == "repeat"]
    cells = (table["leave"] - 1).astype(str) + "->" + table["enter"].astype(str)
    wrong = int((~result.tables["questions"]["right"].astype(bool)).sum())
    if not wrong:
        return dict.fromkeys(cells, 0.0), frozenset()
    low = [wilson(int(mended), wrong)[0] for mended in table["mended"]]
    chosen = frozenset(cell for cell, bound in zip(cells, low, strict=True) if bound > HALF)
    return dict(zip(cells, table["mended"] / wrong, strict=True)), chosen & set(question.candidates)


def _order(result: Result, question: Question) -> Read:
    """An exchange that moves the prediction less is ranked higher, whether or not the answer stays."""
    table = result.tables["swaps"]
    table = table[table["protocol"] == "interchange"]
    pairs = table["i"].astype(str) + "+" + table["j"].astype(str)
    n = len(result.tables["questions"])
    kept = [wilson(round(n * (1 + delta)), n)[0] for delta in table["delta"]]
    chosen = frozenset(pair for pair, bound in zip(pairs, kept, strict=True) if bound > HALF)
    return dict(zip(pairs, -table["kl"], strict=True)), chosen


def _redundant(result: Result, question: Question) -> Read:
    """A program leaves out whole blocks, so that every part of one block stands with every part of the other.

    Which of these pairs it is cannot be said, so none is chosen; where no pair of blocks is sure by its interval, none at all.
    """
    table = result.tables["skips"]
    harm = dict(zip(zip(table["i"], table["j"], strict=True), -table["excess"], strict=True))
    blocks = {name: sorted(map(block_of, name.split("+"))) for name in question.candidates}
    scores = {name: float(harm[first, last]) for name, (first, last) in blocks.items() if first != last}
    sure = (table["excess_high"] < 0) & (-table["excess"] > HALF)
    return scores, None if sure.any() else frozenset()


def block_of(node: str) -> int:
    """Return the block of a node, `7.2` or `mlp.4`."""
    front, _, back = node.partition(".")
    return int(back if front == "mlp" else front)


READ = {"mending": _mending, "order": _order, "redundant": _redundant}


def _at_last(question: Question) -> bool:
    return question.kind != "mending" or question.position in (None, "ask")


ADAPTER = Adapter(METHOD, (METHOD,), ("mending", "order", "redundant"), runs, read, only=_at_last)
