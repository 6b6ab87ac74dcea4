"""Layer programs: in which order a model's blocks run, as a value with one text form."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from probes.errors import OptionError, PointError, shown

Step = tuple[int, ...]
"""Blocks that run side by side on the same input; one in most steps."""

FORMS = "blocks and spans in the order in which they run, such as 0-11,12-15,12-29 or 0-13,{14|15},16-29; none runs no block"
_SPAN = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?")
_GROUP = re.compile(r"\{(\d{1,6}(?:\|\d{1,6})*)\}(?:/(\d{1,6}))?")
_EMPTY = "none"
LONGEST = 4096
"""Steps of the longest program that is read."""


@dataclass(frozen=True)
class Program:
    """Blocks in the order in which they run, each as often as it stands there.

    A step of several blocks hands each of them the same input and adds what they contribute.

    Raises:
        OptionError: a step without a block, or with one block twice.
    """

    steps: tuple[Step, ...]
    mean: bool = False
    """Whether a step of several blocks adds the mean of their contributions in place of the sum."""

    def __post_init__(self) -> None:
        if bad := [step for step in self.steps if not step or len(set(step)) < len(step) or min(step) < 0]:
            raise OptionError(f"step {shown(bad[0])} of a program: legal are one block or several different ones")
        object.__setattr__(self, "steps", tuple(tuple(sorted(step)) for step in self.steps))
        object.__setattr__(self, "mean", self.mean and any(len(step) > 1 for step in self.steps))

    @classmethod
    def of(cls, blocks: Iterable[int]) -> Program:
        """Return the program that runs these blocks one after the other."""
        return cls(tuple((block,) for block in blocks))

    @classmethod
    @lru_cache
    def plain(cls, n_layers: int) -> Program:
        """Return the program that is the model itself."""
        return cls.of(range(n_layers))

    @classmethod
    def parse(cls, text: str) -> Program:
        """Return the program of a text; spans may be cut anywhere, and spaces do not count.

        Raises:
            OptionError: a part that is no block, span or group, with its place.
        """
        if (bare := "".join(text.split())) == _EMPTY:
            return cls(())
        steps: list[Step] = []
        divided: set[bool] = set()
        for place, part in enumerate(bare.split(","), 1):
            if span := _SPAN.fullmatch(part):
                first, last = int(span[1]), int(span[2] or span[1])
                if last < first:
                    raise OptionError(f"part {place} of a program, {shown(part)}: a span runs upwards")
                if len(steps) + last - first >= LONGEST:
                    raise OptionError(f"part {place} of a program, {shown(part)}: legal are at most {LONGEST} steps")
                steps += [(block,) for block in range(first, last + 1)]
            elif group := _GROUP.fullmatch(part):
                blocks = tuple(int(block) for block in group[1].split("|"))
                if group[2] and int(group[2]) != len(blocks):
                    raise OptionError(
                        f"part {place} of a program, {shown(part)}: a mean is over its {len(blocks)} blocks, /{len(blocks)}"
                    )
                steps.append(blocks)
                divided |= {bool(group[2])} if len(blocks) > 1 else set()
            else:
                raise OptionError(f"part {place} of a program is {shown(part)}: legal are {FORMS}")
        if len(divided) > 1:
            raise OptionError(f"program {shown(text)} has groups with and without a mean: use one of them")
        return cls(tuple(steps), divided == {True})

    def text(self) -> str:
        """Return the one text of the program: spans as long as they are, cut where the next one enters them again."""
        return ",".join(self._parts()) or _EMPTY

    def _parts(self) -> Iterator[str]:
        spans = [[step] for step in self.steps[:1]]
        for before, step in pairwise(self.steps):
            if len(before) == len(step) == 1 and step[0] == before[0] + 1:
                spans[-1].append(step)
            else:
                spans.append([step])
        for span, following in zip(spans, [*spans[1:], None], strict=False):
            first, last = span[0][0], span[-1][0]
            if len(span[0]) > 1:
                yield self._group(span[0])
                continue
            entered = following[0][0] if following and len(following[0]) == 1 else first
            if first < entered <= last:
                yield _span(first, entered - 1)
                first = entered
            yield _span(first, last)

    def _group(self, step: Step) -> str:
        return f"{{{'|'.join(map(str, step))}}}" + (f"/{len(step)}" if self.mean else "")

    def listed(self) -> str:
        """Return every step, as store keys have it: `0,{1|2},3`."""
        return ",".join(str(step[0]) if len(step) == 1 else self._group(step) for step in self.steps)

    @property
    def runs(self) -> int:
        """How many blocks run, repeats counted: what the program costs."""
        return sum(map(len, self.steps))

    @property
    def depth(self) -> int:
        """How many steps follow one another."""
        return len(self.steps)

    def is_plain(self, n_layers: int) -> bool:
        """Return whether it is the model itself."""
        return self == Program.plain(n_layers)

    def check(self, n_layers: int, most: int | None = None) -> None:
        """Refuse a program that a model cannot run.

        Args:
            n_layers: blocks of the model.
            most: block-runs that are legal; any number where it is None.

        Raises:
            PointError: a block that the model does not have.
            OptionError: too many block-runs.
        """
        if bad := [block for step in self.steps for block in step if block >= n_layers]:
            raise PointError(f"block {bad[0]} in a program: legal blocks are 0 to {n_layers - 1}")
        if most is not None and self.runs > most:
            raise OptionError(f"program {self.text()} runs {self.runs} blocks: legal are at most {most}")


def jump(n_layers: int, leave: int, enter: int) -> Program:
    """Return the program that runs blocks 0..leave-1 and then enter..n_layers-1: a skip, a repeat or the plain order.

    Raises:
        OptionError: a place outside 0..n_layers.
    """
    if not (0 <= leave <= n_layers and 0 <= enter <= n_layers):
        raise OptionError(f"jump {leave}->{enter}: legal places are 0 to {n_layers}, before a block or behind the last")
    return Program.of((*range(leave), *range(enter, n_layers)))


def interchange(n_layers: int, first: int, second: int, width: int = 1) -> Program:
    """Return the program in which the `width` blocks from `first` on and those from `second` on change places.

    Raises:
        OptionError: spans that overlap or reach outside.
    """
    if width < 1 or first < 0 or first + width > second or second + width > n_layers:
        raise OptionError(
            f"interchange of {width} blocks from {first} and from {second}: legal are two spans inside 0..{n_layers - 1} "
            "that do not overlap, the lower first"
        )
    between = range(first + width, second)
    spans = (
        range(first),
        range(second, second + width),
        between,
        range(first, first + width),
        range(second + width, n_layers),
    )
    return Program.of(block for span in spans for block in span)


def replacement(n_layers: int, place: int, block: int) -> Program:
    """Return the program in which `block` runs in the place of block `place` too."""
    return Program.of(block if index == place else index for index in range(n_layers))


def side_by_side(n_layers: int, blocks: Sequence[int], mean: bool = False) -> Program:
    """Return the program in which neighbouring blocks run on the same input."""
    first, last = min(blocks), max(blocks)
    lower, upper = (((block,) for block in span) for span in (range(first), range(last + 1, n_layers)))
    return Program((*lower, tuple(blocks), *upper), mean)


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def departure(program: Program, n_layers: int) -> int:
    """Return how many steps a program runs as the model does before it leaves the plain order."""
    same = 0
    while same < min(len(program.steps), n_layers) and program.steps[same] == (same,):
        same += 1
    return same
