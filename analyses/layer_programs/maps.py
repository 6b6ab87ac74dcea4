"""The programs of each map: every jump, exchanges and replacements of neighbours, and pairs of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analyses.layer_programs.chance import cross_fitted, family_p, grouped_interval
from analyses.layer_programs.engine import Engine, OpenQuestions, Scores
from analyses.layer_programs.reading import Metric
from analyses.results.statistics import Array
from probes.edits.programs import Program, interchange, jump, replacement, side_by_side

Protocol = Literal["interchange", "replacement"]


def kind_of(leave: int, enter: int) -> str:
    """Return what a jump does: `skip`, `repeat` or `plain`."""
    return "plain" if leave == enter else "skip" if enter > leave else "repeat"


def jump_cells(n_layers: int, stride: int = 1) -> list[tuple[int, int]]:
    """Return (leave, enter) of every cell of the jump map but the plain diagonal; of every `stride`-th place only."""
    places = range(0, n_layers + 1, stride)
    return [(leave, enter) for leave in places for enter in places if leave != enter]


def jump_formula(n_layers: int) -> int:
    """Return the block-runs of a whole jump map of one prompt, L^2 (L + 1) / 2."""
    return n_layers * n_layers * (n_layers + 1) // 2


def naive_runs(programs: Sequence[Program]) -> int:
    """Return the block-runs of programs that are each run whole."""
    return sum(program.runs for program in programs)


def jump_tables(
    engine: Engine, n_layers: int, stride: int, metrics: Sequence[Metric], groups: Sequence[str], seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the jump map and, for each metric, its best cell with what such a choice gains on other questions.

    Returns:
        Columns metric, leave, enter, kind, span, program, runs, mean, ci_low, ci_high, p_family, mended, broken, n,
        norm_ratio: the mean is of the change of the metric over questions, intervals are over groups of questions. And
        metric, leave, enter, program, mean, held_out, held_out_low, held_out_high, p_family: gains, more being better.
    """
    cells = jump_cells(n_layers, stride)
    programs = [jump(n_layers, *cell) for cell in cells]
    scores = engine.scores(programs)
    plain = np.array([readings.values["correct"][0] > 0 for readings in engine.plain()])
    places = {
        "leave": [leave for leave, _ in cells], "enter": [enter for _, enter in cells], "kind": [kind_of(*cell) for cell in cells],
        "span": [abs(leave - enter) for leave, enter in cells], "program": [program.text() for program in programs],
        "runs": [program.runs for program in programs],
    }  # fmt: skip
    maps, best = [], []
    for metric in metrics:
        measured = _measured(scores, metric, plain, groups, seed)
        maps.append(pd.DataFrame({"metric": metric, **places, **measured}))
        cell, elsewhere = cross_fitted(scores.gain(metric), groups, seed)
        best.append(
            {
                "metric": metric, "leave": cells[cell][0], "enter": cells[cell][1], "program": programs[cell].text(),
                "mean": scores.gain(metric)[:, cell].mean(), "held_out": elsewhere.mean[0], "held_out_low": elsewhere.low[0],
                "held_out_high": elsewhere.high[0], "p_family": measured["p_family"][cell],
            }
        )  # fmt: skip
    return pd.concat(maps, ignore_index=True), pd.DataFrame(best)


def _measured(scores: Scores, metric: Metric, plain: np.ndarray, groups: Sequence[str], seed: int) -> dict[str, Array]:
    change = scores.change[metric]
    mean = grouped_interval(change, groups, seed)
    return {
        "mean": mean.mean, "ci_low": mean.low, "ci_high": mean.high, "p_family": family_p(change, groups, seed),
        "mended": (scores.right & ~plain[:, None]).sum(0), "broken": (~scores.right & plain[:, None]).sum(0),
        "n": np.full(change.shape[1], len(change)), "norm_ratio": scores.norm_ratio.mean(0),
    }  # fmt: skip


@dataclass(frozen=True)
class Swap:
    """Two spans of blocks, and what is done with them."""

    i: int
    j: int
    width: int
    protocol: Protocol

    def program(self, n_layers: int) -> Program:
        """Return the program; a replacement puts block j in the place of block i."""
        if self.protocol == "interchange":
            return interchange(n_layers, self.i, self.j, self.width)
        return replacement(n_layers, self.i, self.j)


def swap_cells(n_layers: int, widths: Sequence[int], reach: int, stride: int = 1) -> list[Swap]:
    """Return interchanges of spans that begin at most `reach` widths apart, and replacements of single blocks as near, both ways."""
    swaps = []
    for width in widths:
        for i in range(0, n_layers, stride):
            for j in range(i + width, min(i + reach * width, n_layers - width) + 1):
                swaps.append(Swap(i, j, width, "interchange"))
                if width == 1:
                    swaps += [Swap(i, j, 1, "replacement"), Swap(j, i, 1, "replacement")]
    return swaps


def swap_table(
    engine: Engine, n_layers: int, swaps: Sequence[Swap], metric: Metric, groups: Sequence[str], seed: int
) -> pd.DataFrame:
    """Return columns i, j, width, protocol, program, kl, kl_low, kl_high, metric, delta, ci_low, ci_high."""
    programs = [swap.program(n_layers) for swap in swaps]
    scores = engine.scores(programs)
    kl, delta = (grouped_interval(scores.change[name], groups, seed) for name in ("kl", metric))  # type: ignore[index]
    return pd.DataFrame(
        {
            "i": [swap.i for swap in swaps], "j": [swap.j for swap in swaps], "width": [swap.width for swap in swaps],
            "protocol": [swap.protocol for swap in swaps], "program": [program.text() for program in programs],
            "kl": kl.mean, "kl_low": kl.low, "kl_high": kl.high, "metric": metric, "delta": delta.mean,
            "ci_low": delta.low, "ci_high": delta.high,
        }
    )  # fmt: skip


def skip_programs(n_layers: int, layers: Sequence[int]) -> list[Program]:
    """Return the programs without one of `layers`, and then those without two of them."""
    left_out = [(layer,) for layer in layers] + list(combinations(layers, 2))
    return [Program.of(block for block in range(n_layers) if block not in out) for out in left_out]


def skip_table(
    engine: Engine, n_layers: int, layers: Sequence[int], metric: Metric, groups: Sequence[str], seed: int
) -> pd.DataFrame:
    """Return, for each pair of blocks, what leaving out both changes, and how far that is from the sum of leaving out each.

    Returns:
        Columns i, j, program, metric, delta_i, delta_j, delta, ci_low, ci_high, excess, excess_low, excess_high, n. Blocks
        that replace one another have small changes alone and a large excess, in the direction of harm.
    """
    programs = skip_programs(n_layers, layers)
    change = engine.scores(programs).change[metric]
    n = len(layers)
    pairs = list(combinations(range(n), 2))
    first, second = ([pair[end] for pair in pairs] for end in (0, 1))
    single, both = change[:, :n], change[:, n:]
    delta = grouped_interval(both, groups, seed)
    excess = grouped_interval(both - single[:, first] - single[:, second], groups, seed)
    return pd.DataFrame(
        {
            "i": [layers[at] for at in first], "j": [layers[at] for at in second], "program": [each.text() for each in programs[n:]],
            "metric": metric, "delta_i": single.mean(0)[first], "delta_j": single.mean(0)[second], "delta": delta.mean,
            "ci_low": delta.low, "ci_high": delta.high, "excess": excess.mean, "excess_low": excess.low,
            "excess_high": excess.high, "n": len(change),
        }
    )  # fmt: skip


SIZES = ("contribution_i", "contribution_j", "interaction", "interaction_reversed", "commutator", "interaction_scale")


def pair_programs(n_layers: int, layers: Sequence[int], mean: bool) -> list[Program]:
    """Return, for each pair of neighbours that begins at one of `layers`, the two side by side and the two exchanged."""
    return [
        program
        for i in layers
        for program in (side_by_side(n_layers, (i, i + 1), mean), interchange(n_layers, i, i + 1))
    ]


def pair_table(
    engine: Engine, n_layers: int, layers: Sequence[int], mean: bool, metric: Metric, groups: Sequence[str], seed: int
) -> pd.DataFrame:
    """Return columns layer, first_token, the sizes of `SIZES` (with medians), delta_parallel and delta_exchanged with intervals.

    Sizes are shares of what the pair adds to the stream, over positions of the prompts' own text.
    """
    scores = engine.scores(pair_programs(n_layers, layers, mean))
    delta = grouped_interval(scores.change[metric], groups, seed)
    norms: list[list[dict[bool, Array]]] = [[] for _ in layers]
    for some in engine.together(range(len(engine.questions))):
        opened = engine.open(some)
        for at, i in enumerate(layers):
            norms[at] += _anatomy(opened, i)
            engine.count(2, some)
            engine.tally.tick(len(some))
    rows = []
    for at, i in enumerate(layers):
        for first_token in (False, True):
            each = np.concatenate([sizes[first_token] for sizes in norms[at]])
            sizes = dict(zip(SIZES, each.mean(0), strict=True))
            medians = {f"{name}_median": value for name, value in zip(SIZES, np.median(each, axis=0), strict=True)}
            rows.append({"layer": i, "first_token": first_token, "positions": len(each), **sizes, **medians})
    table = pd.DataFrame(rows)
    for offset, name in enumerate(("delta_parallel", "delta_exchanged")):
        for bound, values in (("", delta.mean), ("_low", delta.low), ("_high", delta.high)):
            table[f"{name}{bound}"] = np.repeat(values[offset::2], 2)
    return table.assign(metric=metric, group="mean" if mean else "sum")


@torch.no_grad()
def _anatomy(opened: OpenQuestions, i: int) -> list[dict[bool, Array]]:
    """Return, for each question, sizes [position, size] of a pair's contributions, without and with the first position."""
    h, after_i, after_both = (opened.entering[layer][None] for layer in (i, i + 1, i + 2))
    leaving_j = opened.through(i + 1, h)
    sizes = pair_sizes(h, after_i, after_both, leaving_j, opened.through(i, leaving_j))[0].double().cpu().numpy()
    of_questions = []
    for question, path in zip(opened.questions, opened.tree.paths, strict=True):
        own = sizes[path[: len(question.tokens) - question.start]]
        of_questions.append({False: own[1:] if len(own) > 1 and question.start == 0 else own, True: own})
    return of_questions


def pair_sizes(h: Tensor, after_i: Tensor, after_both: Tensor, after_j: Tensor, after_reversed: Tensor) -> Tensor:
    """Return [..., size] of a pair i, j on the stream h, as shares of what it adds: c_i + c_j + I_ij.

    Args:
        h: what enters the pair, [..., d_model].
        after_i: F_i(h).
        after_both: F_j(F_i(h)).
        after_j: F_j(h).
        after_reversed: F_i(F_j(h)).
    """
    h, after_i, after_both, after_j, after_reversed = (
        t.double() for t in (h, after_i, after_both, after_j, after_reversed)
    )
    c_i, c_j = after_i - h, after_j - h
    forward = after_both - after_i - c_j
    backward = after_reversed - after_j - c_i
    along = (forward * c_j).sum(-1) / torch.linalg.vector_norm(c_j, dim=-1).clamp_min(1e-30)
    whole = torch.linalg.vector_norm(after_both - h, dim=-1)
    sizes = [torch.linalg.vector_norm(part, dim=-1) for part in (c_i, c_j, forward, backward, forward - backward)]
    # Blocks that add nothing have no interaction either.
    return torch.stack([*sizes, along], dim=-1) / whole.clamp_min(1e-30)[..., None]
