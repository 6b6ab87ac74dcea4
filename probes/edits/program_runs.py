"""Many programs of one prompt run at once: what two of them share from the start runs once, and rows of a block run together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from probes.blocks.rerouting import Caller, rerouted
from probes.edits.programs import Program, Step, departure
from probes.models.protocol import Model

RunBlock = Callable[[int, Tensor], Tensor]
"""Returns what leaves a block [row, pos, d_model] where rows [row, pos, d_model] enter it."""
ROW_TOKENS = 4096
"""Tokens that run through a block in one call."""
HELD_TOKENS = 65_536
"""Tokens of the streams that one part of the programs holds at once, which bounds memory."""


def run_step(run: RunBlock, step: Step, hidden: Tensor, mean: bool = False) -> Tensor:
    """Return what leaves a step: one block's output, or the stream with what several contribute to it.

    Args:
        run: runs one block.
        step: the blocks.
        hidden: what enters them, [row, pos, d_model].
        mean: add the mean of several contributions in place of their sum.
    """
    if len(step) == 1:
        return run(step[0], hidden)
    added = torch.stack([run(block, hidden) - hidden for block in step])
    return hidden + (added.mean(0) if mean else added.sum(0))


def following(model: Model, program: Program) -> AbstractContextManager[None]:
    """Run the model's blocks as a program says inside, without a cache.

    Raises:
        PointError: a backend without access to its blocks.
    """

    def route(hidden: Tensor, call: Caller) -> Tensor:
        for step in program.steps:
            hidden = run_step(call, step, hidden, program.mean)
        return hidden

    return rerouted(model, route, cached=False)


Key = tuple[Step, bool]
"""A step, and whether its contributions are averaged."""


@dataclass(eq=False)
class _Beginning:
    """Steps that programs share, from where they leave the plain order."""

    following: dict[Key, _Beginning] = field(default_factory=dict)
    ends: list[int] = field(default_factory=list)
    """Programs that end here."""


def _beginnings(programs: Sequence[Program], n_layers: int) -> Mapping[int, _Beginning]:
    """Return the steps that programs share, by the number of plain steps before them."""
    roots: dict[int, _Beginning] = {}
    for index, program in enumerate(programs):
        plain = departure(program, n_layers)
        node = roots.setdefault(plain, _Beginning())
        for step in program.steps[plain:]:
            node = node.following.setdefault((step, program.mean and len(step) > 1), _Beginning())
        node.ends.append(index)
    return roots


def block_runs(programs: Sequence[Program], n_layers: int) -> int:
    """Return how many blocks run on one prompt for all the programs together; what runs as the model does is free."""
    runs, stack = 0, list(_beginnings(programs, n_layers).values())
    while stack:
        for (step, _), node in stack.pop().following.items():
            runs += len(step)
            stack.append(node)
    return runs


def parts(programs: Sequence[Program], positions: int) -> list[list[int]]:
    """Return which programs run together, so that those with the longest shared beginnings do and memory is bounded.

    Args:
        programs: all programs of one prompt.
        positions: positions of each stream.
    """
    together = max(1, HELD_TOKENS // positions)
    ordered = sorted(range(len(programs)), key=lambda index: programs[index].steps)
    return [ordered[first : first + together] for first in range(0, len(ordered), together)]


def run_programs(
    programs: Sequence[Program],
    entering: Sequence[Float[Tensor, "pos d_model"]],
    run: RunBlock,
    width: int | None = None,
) -> Iterator[tuple[list[int], Float[Tensor, "row pos d_model"], int]]:
    """Run programs of one prompt; yield, part by part, (indices of programs, what leaves their last step, block-runs).

    Args:
        programs: what is run.
        entering: the plain stream before every block, and behind the last; beginnings in the plain order are taken from it.
        run: runs one block.
        width: positions of a row that run through a block in one call; all of them unless given.
    """
    rows = max(1, ROW_TOKENS // (width or len(entering[0])))
    for part in parts(programs, len(entering[0])):
        last, runs = _run_part([programs[index] for index in part], entering, run, rows)
        yield part, last, runs


def _run_part(programs: Sequence[Program], entering: Sequence[Tensor], run: RunBlock, rows: int) -> tuple[Tensor, int]:
    """Run the lowest block that any row waits for, at most `rows` at once, so that rows which left the plain order elsewhere join in."""
    results: dict[int, Tensor] = {}
    waiting: dict[Key, list[tuple[Tensor, _Beginning]]] = {}
    runs = 0

    def reach(node: _Beginning, stream: Tensor) -> None:
        results.update(dict.fromkeys(node.ends, stream))
        for key, following in node.following.items():
            waiting.setdefault(key, []).append((stream, following))

    for plain, root in _beginnings(programs, len(entering) - 1).items():
        reach(root, entering[plain])
    while waiting:
        key = min(waiting)
        step, mean = key
        batch = waiting.pop(key)
        runs += len(step) * len(batch)
        for first in range(0, len(batch), rows):
            some = batch[first : first + rows]
            leaving = run_step(run, step, torch.stack([stream for stream, _ in some]), mean)
            for row, (_, node) in zip(leaving, some, strict=True):
                reach(node, row)
    return torch.stack([results[index] for index in range(len(programs))]), runs
