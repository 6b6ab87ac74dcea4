"""Programs as changes of the plain order: jumps, exchanges and blocks side by side, met one after the other on the way up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from probes.edits.programs import Program, Step


@dataclass(frozen=True, order=True)
class Jump:
    """Leave before one block and go on before another: a skip upwards, a repeat downwards."""

    leave: int
    enter: int


@dataclass(frozen=True, order=True)
class Exchange:
    """Two spans of `width` blocks that change places."""

    first: int
    second: int
    width: int = 1


@dataclass(frozen=True, order=True)
class Together:
    """Blocks that run side by side, from the lowest on."""

    blocks: Step


Change = Jump | Exchange | Together


def program_of(n_layers: int, changes: Sequence[Change], mean: bool = False) -> Program | None:
    """Return the program that meets the changes in their order; None where one lies before the place that is reached.

    Args:
        n_layers: blocks of the model.
        changes: each is met when the way up, past those before it, comes to its place.
        mean: add the mean of the contributions of blocks side by side.
    """
    steps: list[Step] = []
    place = 0
    for change in changes:
        start, met, place_after = _met(change)
        if start < place or place_after > n_layers:
            return None
        steps += [(block,) for block in range(place, start)]
        steps += met
        place = place_after
    return Program((*steps, *((block,) for block in range(place, n_layers))), mean)


def _met(change: Change) -> tuple[int, list[Step], int]:
    """Return (the place where a change is met, the steps it runs, the place after it)."""
    if isinstance(change, Jump):
        return change.leave, [], change.enter
    if isinstance(change, Together):
        return min(change.blocks), [change.blocks], max(change.blocks) + 1
    first, second, width = change.first, change.second, change.width
    spans = (range(second, second + width), range(first + width, second), range(first, first + width))
    return first, [(block,) for span in spans for block in span], second + width


Path = tuple[int, int, tuple[Change, ...]]
"""Number of changes, blocks skipped, and the changes: what the best explanation is smallest in."""


def changes_of(program: Program, n_layers: int) -> tuple[Change, ...]:
    """Return the fewest changes that make the program of the plain order; of several, those that skip fewest blocks, then the leftmost."""
    paths: list[dict[int, Path]] = [{} for _ in range(len(program.steps) + 1)]
    paths[0][0] = (0, 0, ())
    for at, step in enumerate(program.steps):
        for place, path in paths[at].items():
            for length, change, following in _explained(program.steps, at, step, place, n_layers):
                _keep(paths[at + length], following, path, change)
    ends: dict[int, Path] = {}
    for place, path in paths[-1].items():
        _keep(ends, 0, path, () if place == n_layers else (Jump(place, n_layers),))
    return ends[0][2]


def _explained(
    steps: Sequence[Step], at: int, step: Step, place: int, n_layers: int
) -> Iterator[tuple[int, tuple[Change, ...], int]]:
    """Yield (steps explained, the changes that explain them, the place after them)."""
    if step == (place,):
        yield 1, (), place + 1
    elif len(step) == 1:
        yield 1, (Jump(place, step[0]),), step[0] + 1
    elif step[0] == place:
        yield 1, (Together(step),), step[-1] + 1
    else:
        yield 1, (Jump(place, step[0]), Together(step)), step[-1] + 1
    if len(step) == 1 and step[0] > place:
        for width in range(1, step[0] - place + 1):
            change = Exchange(place, step[0], width)
            _, met, following = _met(change)
            if following <= n_layers and tuple(met) == tuple(steps[at : at + len(met)]):
                yield len(met), (change,), following


def _keep(paths: dict[int, Path], place: int, path: Path, more: tuple[Change, ...]) -> None:
    skipped = sum(max(0, change.enter - change.leave) for change in more if isinstance(change, Jump))
    longer: Path = (path[0] + len(more), path[1] + skipped, (*path[2], *more))
    known = paths.get(place)
    if known is None or (longer[:2], _where(longer)) < (known[:2], _where(known)):
        paths[place] = longer


def _where(path: Path) -> tuple[int, ...]:
    return tuple(_met(change)[0] for change in path[2])
