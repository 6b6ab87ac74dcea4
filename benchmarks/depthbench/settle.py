"""What is asked of a trained model, and its truth: what exhaustive intervention says, where that is unambiguous."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from probes.planted.certify.ablation import TAKES_PART, handled
from probes.planted.certify.bench import Bench
from probes.planted.certify.certificate import CHECKS
from probes.planted.certify.measured import SURE
from probes.planted.families.channels import channel_candidates
from probes.planted.making import jump_cells, nothing
from probes.planted.record import Interval, Question, Truth, node_names
from probes.planted.task import PlantedTask

FEW = 24
"""Wrong answers below which nothing is said of what mends them, unless there are none."""
WINDOWS = ("necessary", "sufficient")


def questions_of(task: str, layers: int, heads: int) -> tuple[Question, ...]:
    """Return what is asked, truths still open (None)."""
    nodes = node_names(layers, heads)
    asked_of_all = (
        Question("nodes", None, candidates=nodes),
        Question("mending", None, candidates=jump_cells(layers)),
        Question("void", None, candidates=tuple(map(str, range(layers)))),
        Question("lens", None, position="ask"),
        nothing("pivot"),
    )
    if task == "T1":
        positions, concepts = ("before", "successor", "ask"), ()
        own: tuple[Question, ...] = (Question("channel", None, candidates=channel_candidates(layers, heads)),)
    elif task in ("T3", "T4"):
        positions, concepts, own = (), ("bridge", "answer"), ()
        own = tuple(Question("written", None, concept=name, position="ask", candidates=nodes) for name in concepts)
    else:
        positions, concepts = ("e", "r", "ask"), ("attribute",)
        own = (
            *(Question("written", None, concept="attribute", position=p, candidates=nodes) for p in ("r", "ask")),
            Question("moved", None, concept="attribute", position="r", to="ask", candidates=nodes),
        )
        if task == "T7":
            own += tuple(Question("readable", None, concept="unused", position=p) for p in ("r", "ask"))
            own += tuple(
                Question("written", None, concept="unused", position=p, candidates=nodes) for p in ("r", "ask")
            )
    return (
        *(Question("readable", None, concept=name, position=p) for name in concepts for p in positions or ("ask",)),
        *own,
        # A model that has learnt nothing gives every prompt one answer, which every stream brings.
        *(Question(kind, None, position=p) for kind in WINDOWS for p in positions if task != "T8"),  # type: ignore[arg-type]
        *asked_of_all,
    )


def settled(task: PlantedTask, question: Question) -> Question | None:
    """Return the question with the truth that intervention gives, or None where that is ambiguous."""
    bench = Bench(task)
    if question.kind in ("written", "moved"):
        return _by_trying(bench, question)
    n_wrong = int((bench.plain != bench.answers).sum())
    if question.kind == "mending" and 0 < n_wrong < FEW:
        return None
    values = CHECKS[question.kind](bench, question).values
    if question.kind in ("nodes", "mending"):
        # What neither takes part nor is idle is not asked about.
        least = TAKES_PART if question.kind == "nodes" else SURE
        shares = {name: values.get(name, 0.0) for name in question.candidates}
        clear = tuple(name for name, share in shares.items() if share >= least or share <= 1 - SURE)
        question = replace(question, candidates=clear)
    guess = replace(question, truth=_truth(question, values))
    return guess if CHECKS[guess.kind](bench, guess).agrees else None


def _by_trying(bench: Bench, question: Question) -> Question | None:
    """The one MLP that writes, or head that moves, if there is one."""
    by_mlp = question.kind == "written"
    nodes = [name for name in question.candidates if name.startswith("mlp") == by_mlp and not _rests(bench, name)]
    trials = [replace(question, truth=frozenset({name})) for name in nodes]
    passing = [trial for trial in trials if CHECKS[question.kind](bench, trial).agrees]
    return passing[0] if len(passing) == 1 else None


def _rests(bench: Bench, name: str) -> bool:
    layer = int(name.removeprefix("mlp.").split(".")[0])
    if name.startswith("mlp"):
        return not bench.blocks[layer].mlp.down_proj.weight.any()
    site, columns = handled(bench, name)
    return not bench.blocks[site[1]].self_attn.o_proj.weight[:, columns].any()


def _truth(question: Question, values: Any) -> Truth:
    if question.kind == "readable":
        return _span(values, SURE * max(values), strictly=0.5)
    if question.kind == "lens":
        first = next((layer - 1 for layer, share in enumerate(values) if share >= SURE), None)
        return None if first is None else Interval(first, first)
    if question.kind in WINDOWS:
        return _span(values, SURE)
    if question.kind == "pivot":
        return None
    return frozenset(_names(question, values))


def _names(question: Question, values: Mapping[str, float]) -> list[str]:
    if question.kind == "void":
        return [name for name, update in values.items() if update <= 3e-3]
    least = SURE if question.kind == "mending" else TAKES_PART
    return [name for name, share in values.items() if share >= least]


def _span(values: Sequence[float], least: float, strictly: float = 0.0) -> Interval | None:
    layers = [layer - 1 for layer, value in enumerate(values) if value >= least and value > strictly]
    return Interval(layers[0], layers[-1]) if layers else None
