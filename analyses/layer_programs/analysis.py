"""Layer programs: does the model need its blocks in this order, each once?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from analyses.base import Analysis, Measured, PromptsLike, as_prompts
from analyses.interventions import Interventions, Tally
from analyses.layer_programs.alphabet import Alphabet, Move
from analyses.layer_programs.engine import Engine
from analyses.layer_programs.figures import FIGURES
from analyses.layer_programs.given import read_programs
from analyses.layer_programs.maps import (
    Swap,
    jump_cells,
    jump_tables,
    pair_programs,
    pair_table,
    skip_programs,
    skip_table,
    swap_cells,
    swap_table,
)
from analyses.layer_programs.models import check_model
from analyses.layer_programs.notes import run_notes
from analyses.layer_programs.outcomes import Board, question_table
from analyses.layer_programs.profiles import PROFILES
from analyses.layer_programs.questions import FIELDS, Scope, check_reads, questions_of, two_hop_prompts
from analyses.layer_programs.reading import Metric
from analyses.layer_programs.search import Method, TreeRules
from analyses.layer_programs.searching import Searching, SearchPlan
from analyses.options import option
from probes.edits.program_runs import block_runs
from probes.edits.programs import Program, jump
from probes.errors import OptionError
from probes.models.protocol import Model
from probes.progress import Progress
from probes.prompts import Prompt
from probes.store import ActivationStore

Map = Literal["jumps", "swaps", "pairs", "skips"]


@dataclass(frozen=True)
class LayerPrograms(Analysis):
    """Blocks left out, repeated, exchanged and run side by side (Li et al. 2025, "Skip a Layer or Loop It?", arXiv 2507.07996)."""

    n_prompts: int = option(24, "At most so many two-hop questions are made where no prompts are given.", low=1)
    maps: tuple[Map, ...] = option(
        ("jumps", "swaps", "pairs"),
        "jumps: every contiguous skip and repeat; swaps: blocks exchanged or run in a neighbour's place; pairs: how two neighbours interact; "
        "skips: every two blocks left out together, beside each alone.",
    )
    metric: tuple[Metric, ...] = option(
        ("answer", "loss"),
        "answer: log-probability of the whole answer; first_token: of its first token; correct: whether it is the next token, or the likeliest "
        "choice; loss: of the prompt's own text; kl: from the plain prediction. The first is what a search raises.",
    )
    scope: Scope = option(
        "all",
        "Whether programs act on all positions, or on the last alone, as back-patching at the last position does.",
    )
    stride: int = option(1, "Every how many places a jump leaves and enters, and a swap begins.", low=1)
    swap_widths: tuple[int, ...] = option((1,), "Numbers of neighbouring blocks that change places together.", low=1)
    swap_reach: int = option(1, "How many widths apart blocks that change places may lie.", low=1)
    group: Literal["sum", "mean"] = option(
        "sum", "What blocks that run side by side add to the stream: all of what each adds, or its mean."
    )
    search: tuple[Literal["none", Method], ...] = option(
        ("none",),
        "Look for programs that help: exhaustive tries every single change, and every two where the budget pays for all; random and beam "
        "draw up to three changes; mcts searches a tree for each question.",
    )
    budget: int = option(
        0, "Block-runs of each search on a question; 0 is what every program of one change takes.", low=0
    )
    moves: tuple[Move, ...] = option(("skip", "repeat"), "What searches may do; swap exchanges neighbours.")
    max_span: int = option(4, "Blocks that one skip or repeat of a search takes at most.", low=1)
    max_length: float = option(2.0, "Block-runs of a program at most, as a multiple of the model's blocks.", low=1)
    beam: int = option(16, "beam: programs that are grown at each step.", low=1)
    explore: float = option(1.8, "mcts: weight of what was seldom tried.", low=0)
    length_weight: float = option(
        3.0, "mcts: one more block costs this over the number of blocks of mean reward.", low=0
    )
    epsilon: float = option(0.1, "mcts: how often a random child is taken.", low=0, high=1)
    menu: tuple[int, ...] = option((1, 3, 10), "Sizes of menus of programs, chosen on the training half.", low=1)
    splits: int = option(5, "Random halves: one chooses programs, the other judges them.", low=1)
    fragility: bool = option(True, "With a search, also change the programs that mend a question a little.")
    wrong_answer: bool = option(True, "With a search, also look for programs that give another question's answer.")
    programs: str = option("", "A file of programs to score, one a line, such as 0-11,12-15,12-29.")
    loss_positions: int = option(32, "Positions of each prompt at which the loss is read, at most.", low=1)
    seed: int = option(0, "Seed of made questions, sampled positions, splits, searches and intervals.")

    name = "layer_programs"
    title = "Layer programs: skip, repeat, swap, loop"
    reference = (
        'Li, Li and Zhou 2025, "Skip a Layer or Loop It?", arXiv 2507.07996; Sun et al. 2024, '
        '"Transformer Layers as Painters", arXiv 2407.09298'
    )
    prompt_fields = FIELDS
    figures = FIGURES
    profiles = PROFILES
    reads = "own forwards"

    def __post_init__(self) -> None:
        super().__post_init__()
        if "none" in self.search and len(self.search) > 1:
            raise OptionError("option search has none beside a method: give none, or methods")

    @property
    def methods(self) -> tuple[Method, ...]:
        """Return the searches that are run, random ones first, with which the others are compared."""
        chosen = [method for method in self.search if method != "none"]
        return tuple(sorted(dict.fromkeys(chosen), key=lambda method: method != "random"))

    def _plan(self, model: Model) -> SearchPlan:
        n = model.shape.n_layers
        most = int(self.max_length * n)
        return SearchPlan(
            self.methods, Alphabet(n, self.moves, self.max_span, most), self.budget, self.beam, self.menu, self.splits,
            TreeRules(self.explore, self.length_weight, self.epsilon), self.fragility, self.wrong_answer,
            read_programs(self.programs, n, most),
        )  # fmt: skip

    @property
    def makes_prompts(self) -> bool:
        """Yes: where no prompts are given, two-hop questions."""
        return True

    def collect(self, model: Model, prompts: PromptsLike = ()) -> list[Prompt]:
        """Return the prompts that were given, or two-hop questions."""
        given = as_prompts(prompts, model, self.prompt_fields)
        return given or two_hop_prompts(model, self.n_prompts, self.seed)

    def interventions(self, model: Model, prompts: Sequence[Prompt]) -> Interventions:
        """Count the programs of the maps on every prompt, and the block-runs that they take."""
        n, n_layers = len(prompts), model.shape.n_layers
        forwards = self._mapped(model, n)
        runs = sum(block_runs(programs, n_layers) for programs in self._planned(model).values())
        runs += 2 * len(self._pairs(model)) if "pairs" in self.maps else 0
        plan = self._plan(model)
        searched = plan.most(n)
        if searched:
            forwards["programs searched and scored"] = searched
        detail = f"{runs:,} block-runs a prompt, as many as {runs / n_layers:,.0f} plain runs of the model"
        if plan.methods:
            detail += f"; and {plan.ledger().budget:,} of each search"
        return Interventions(forwards, exact=not plan.any, detail=detail)

    def _mapped(self, model: Model, questions: int) -> dict[str, int]:
        """Return how many sequences each map runs."""
        counts = {name: questions * len(programs) for name, programs in self._planned(model).items()}
        if "pairs" in self.maps:
            counts["blocks run on their neighbour's input"] = questions * len(self._pairs(model))
        return counts

    def _planned(self, model: Model) -> dict[str, list[Program]]:
        """Return the programs of each map."""
        n = model.shape.n_layers
        planned: dict[str, list[Program]] = {}
        if "jumps" in self.maps:
            planned["jumps"] = [jump(n, *cell) for cell in jump_cells(n, self.stride)]
        if "swaps" in self.maps:
            planned["swaps"] = [swap.program(n) for swap in self._swaps(model)]
        if "pairs" in self.maps:
            planned["pairs"] = pair_programs(n, self._pairs(model), self.group == "mean")
        if "skips" in self.maps:
            planned["skips"] = skip_programs(n, self._blocks(model))
        return planned

    def _swaps(self, model: Model) -> list[Swap]:
        return swap_cells(model.shape.n_layers, self.swap_widths, self.swap_reach, self.stride)

    def _blocks(self, model: Model) -> list[int]:
        return list(range(0, model.shape.n_layers, self.stride))

    def _pairs(self, model: Model) -> list[int]:
        return list(range(0, model.shape.n_layers - 1, self.stride))

    def measure(self, model: Model, prompts: PromptsLike, store: ActivationStore, progress: Progress) -> Measured:
        """Return the tables `questions` and, as the options say, `jumps`, `swaps`, `pairs` and `skips`.

        Raises:
            PointError: a model whose blocks cannot be run in another order.
            PromptError: prompts without what a metric reads.
        """
        tally = Tally(progress)
        collected = self.collect(model, prompts)
        check_model(model)
        questions = questions_of(model, collected, self.scope, self.loss_positions, self.seed)
        plan = self._plan(model)
        check_reads(questions, self.metric, bool(plan.methods))
        groups = [question.group for question in questions]
        engine = Engine(model, questions, self.metric, tally)
        beside = Engine(model, questions, tuple(dict.fromkeys((*self.metric, "kl"))), tally)
        tally.start(sum(self._mapped(model, len(questions)).values()), "program")
        n, tables = model.shape.n_layers, {}
        if "jumps" in self.maps:
            tables["jumps"], tables["best_jump"] = jump_tables(engine, n, self.stride, self.metric, groups, self.seed)
        if "swaps" in self.maps:
            tables["swaps"] = swap_table(beside, n, self._swaps(model), self.metric[0], groups, self.seed)
        if "pairs" in self.maps:
            mean = self.group == "mean"
            tables["pairs"] = pair_table(engine, n, self._pairs(model), mean, self.metric[0], groups, self.seed)
        if "skips" in self.maps:
            tables["skips"] = skip_table(engine, n, self._blocks(model), self.metric[0], groups, self.seed)
        if plan.any:
            tables |= Searching(Board(engine, self.metric[0], groups, n, self.seed), plan).tables()
        tables["questions"] = question_table(collected, questions, engine)
        counts = {
            "block_runs": engine.block_runs + beside.block_runs, "block_tokens": engine.block_tokens + beside.block_tokens,
        }  # fmt: skip
        return Measured(collected, tables, None, run_notes(tables), counts, tally.forwards)
