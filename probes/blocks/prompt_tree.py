"""Several prompts run as one tree of their tokens: what they share from the start runs once.

A position's stream depends on the tokens up to it alone, so prompts that begin alike have the same streams there, under
any change of the blocks that is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from probes.blocks.key_values import KeyValues, Pair, cache_of
from probes.blocks.rerouting import Caller, block_access, call_blocks, exchanged
from probes.errors import PointError
from probes.models.protocol import Model


@dataclass(eq=False)
class _Segment:
    """Tokens that follow one another without a branch, and run as one piece."""

    tokens: list[int]
    parent: int | None
    """The segment that it continues; None at the start of a prompt."""
    depth: int
    """Positions before it."""
    moving: bool
    """Whether it lies at or behind the start of its prompts; what is before stays as it is in the plain run."""
    first: int = 0
    """Its first node in the order of `PromptTree`."""

    @property
    def stop(self) -> int:
        """The node after its last."""
        return self.first + len(self.tokens)


@dataclass(eq=False)
class _Wave:
    """Segments of one length at one depth, which run through a block in one call."""

    segments: list[int]
    call: Caller
    cache: Any
    """What the call takes for its cache, to be exchanged."""


@dataclass(eq=False, repr=False)
class PromptTree:
    """Prompts run plainly once, through whose blocks other streams can be sent, all prompts at a time.

    Args:
        model: the model, of a backend that hands out its blocks.
        prompts: token ids.
        starts: of each prompt, the first position whose stream may change; those before stay as they are.

    Raises:
        PointError: the model is not causal, or its backend does not hand out its blocks.
    """

    model: Model
    prompts: Sequence[Sequence[int]]
    starts: Sequence[int]
    paths: list[list[int]] = field(init=False)
    """Of each prompt, the nodes of its positions from the start on."""
    entering: list[Float[Tensor, "node d_model"]] = field(init=False)
    """The plain stream that enters each block, and after these the one that leaves the last."""

    def __post_init__(self) -> None:
        if not self.model.shape.causal:
            raise PointError(f"{self.model.ref} reads both ways: prompts that begin alike share nothing")
        self._access = block_access(self.model)
        self._segments, nodes = _segments(self.prompts, self.starts)
        self._fixed = sum(len(segment.tokens) for segment in self._segments if not segment.moving)
        self.paths = [
            [node - self._fixed for node in path[start:]] for path, start in zip(nodes, self.starts, strict=True)
        ]
        self._run_plainly()

    @property
    def nodes(self) -> int:
        """Positions that run, those that prompts share counted once."""
        return len(self.entering[0])

    @property
    def width(self) -> int:
        """Positions of a row that run through a block in one call, at most."""
        return max(sum(len(self._segments[i].tokens) for i in wave.segments) for wave in self._waves)

    @torch.no_grad()
    def _run_plainly(self) -> None:
        """Run every block on all nodes, and keep the keys and values that moving segments attend to but do not change."""
        order = sorted(range(len(self._segments)), key=lambda i: self._shape(i))
        waves, embedded = [], torch.empty(0)
        for _, same in groupby(order, key=self._shape):
            several = list(same)
            depth = self._segments[several[0]].depth
            cache = cache_of(depth, self.model.shape.n_layers)
            for i in several:
                segment = self._segments[i]
                ids = torch.tensor([segment.tokens], device=self._access.device)
                hidden, call = call_blocks(
                    self.model, ids, lambda h, c: (h[0].clone(), c), past_key_values=cache, use_cache=True
                )
                if not len(embedded):
                    embedded = hidden.new_empty(sum(len(s.tokens) for s in self._segments), hidden.shape[-1])
                embedded[segment.first : segment.stop] = hidden
            waves.append(_Wave(several, call, cache))
        self._waves = [wave for wave in waves if self._segments[wave.segments[0]].moving]
        parents = {segment.parent for segment in self._segments if segment.moving}
        self._kept: list[dict[int, Pair]] = []
        self.entering = [embedded[self._fixed :]]
        for layer in range(self.model.shape.n_layers):
            known: dict[int, Pair] = {}
            embedded = self._pass(layer, embedded[None], waves, 0, known)[0]
            self.entering.append(embedded[self._fixed :])
            self._kept.append({i: known[i] for i in known if i in parents and not self._segments[i].moving})

    def _shape(self, index: int) -> tuple[int, int, bool]:
        segment = self._segments[index]
        return segment.depth, len(segment.tokens), segment.moving

    @torch.no_grad()
    def through(self, layer: int, hidden: Float[Tensor, "row node d_model"]) -> Float[Tensor, "row node d_model"]:
        """Return what leaves a block where `hidden` enters it."""
        known = {
            i: (keys.expand(len(hidden), -1, -1, -1), values.expand(len(hidden), -1, -1, -1))
            for i, (keys, values) in self._kept[layer].items()
        }
        return self._pass(layer, hidden, self._waves, self._fixed, known)

    def _pass(self, layer: int, hidden: Tensor, waves: Sequence[_Wave], offset: int, known: dict[int, Pair]) -> Tensor:
        """Run one block wave by wave; `known` receives the keys and values of each segment and of all before it."""
        leaving = torch.empty_like(hidden)
        with self._access.exclusive(), self._access.at(layer):
            for wave in waves:
                segments = [self._segments[i] for i in wave.segments]
                rows = torch.cat([hidden[:, s.first - offset : s.stop - offset] for s in segments])
                parents = [known[s.parent] for s in segments if s.parent is not None]
                pairs = tuple(torch.cat(side) for side in zip(*parents, strict=True))
                before = partial(_same, (pairs[0], pairs[1])) if pairs else None
                cache = KeyValues(before, start=segments[0].depth, keeps=True)
                parts = wave.call(layer, rows, exchanged(wave.cache, cache)).chunk(len(segments))
                assert cache.whole is not None
                sides = [side.chunk(len(segments)) for side in cache.whole]
                for at, (i, segment) in enumerate(zip(wave.segments, segments, strict=True)):
                    leaving[:, segment.first - offset : segment.stop - offset] = parts[at]
                    known[i] = (sides[0][at], sides[1][at])
        return leaving


def _same(pair: Pair, _: int) -> Pair:
    return pair


def _segments(prompts: Sequence[Sequence[int]], starts: Sequence[int]) -> tuple[list[_Segment], list[list[int]]]:
    """Return (segments, those that stay as they are first; the nodes of every position of each prompt)."""
    children: list[dict[tuple[int, bool], int]] = [{}]
    paths = []
    for tokens, start in zip(prompts, starts, strict=True):
        path = [0]
        for position, token in enumerate(tokens):
            key = (token, position >= start)
            if key not in children[path[-1]]:
                children[path[-1]][key] = len(children)
                children.append({})
            path.append(children[path[-1]][key])
        paths.append(path[1:])
    segments: list[_Segment] = []
    of_node: dict[int, tuple[int, int]] = {}  # (segment, place in it)
    waiting: list[tuple[int, int | None, int, tuple[int, bool]]] = [(n, None, 0, key) for key, n in children[0].items()]
    while waiting:
        node, parent, depth, (token, moving) = waiting.pop()
        segment = _Segment([token], parent, depth, moving)
        of_node[node] = (len(segments), 0)
        while len(children[node]) == 1:
            ((token, next_moving), following) = next(iter(children[node].items()))
            if next_moving != moving:
                break
            node = following
            of_node[node] = (len(segments), len(segment.tokens))
            segment.tokens.append(token)
        segments.append(segment)
        waiting += [(n, len(segments) - 1, depth + len(segment.tokens), key) for key, n in children[node].items()]
    first = 0
    for segment in sorted(segments, key=lambda segment: segment.moving):
        segment.first, first = first, first + len(segment.tokens)
    return segments, [[segments[of_node[n][0]].first + of_node[n][1] for n in path] for path in paths]
