"""What changes when a head or an MLP gives its mean: alone, and two at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations
from typing import Any

from torch import Tensor

from probes.planted.certify.bench import Bench, Change, Site
from probes.planted.certify.measured import Measured, set_of
from probes.planted.record import Question

TAKES_PART = 0.4
"""Share of answers that the mean of a node which takes part changes at least; a guess among few answers keeps the rest."""
AT_ONCE = 2048
"""Rows of one forward."""


def nodes(bench: Bench, question: Question) -> Measured:
    """Measure the share of answers changed by mean-ablating each candidate alone; redundant ones take part together."""
    names = question.candidates or bench.nodes
    shares = dict(zip(names, ablated(bench.few(32), [(name,) for name in names]), strict=True))
    spare = {name for pair in _redundant_pairs(bench) for name in pair.split("+")} & set(names)
    alone = set_of(shares, least=TAKES_PART, most=1 - bench.sure)
    return Measured(shares, alone is not None and alone | spare == question.truth)


def redundant(bench: Bench, question: Question) -> Measured:
    """Measure the share of answers changed by mean-ablating two nodes, of which neither alone changes any."""
    alone = dict(zip(bench.nodes, ablated(bench, [(name,) for name in bench.nodes]), strict=True))
    idle = [name for name, share in alone.items() if share <= 1 - bench.sure]
    pairs = list(combinations(idle, 2))
    few = bench.few(8)
    joint = {"+".join(pair): share for pair, share in zip(pairs, ablated(few, pairs), strict=True)}
    return Measured(
        {name: share for name, share in joint.items() if share > 0},
        set_of(joint, least=TAKES_PART, most=1 - bench.sure) == question.truth,
    )


def _redundant_pairs(bench: Bench) -> frozenset[str]:
    """The pairs that the record says replace one another; their own question certifies them."""
    questions = (question for question in bench.task.record.questions if question.kind == "redundant")
    return next((question.truth for question in questions if isinstance(question.truth, frozenset)), frozenset())


def ablated(bench: Bench, sets: Sequence[tuple[str, ...]]) -> list[float]:
    """Return the share of answers that change when all nodes of a set give their mean, for each set."""
    means = node_means(bench.whole)
    n = len(bench.examples)
    step = max(1, AT_ONCE // n)
    shares: list[float] = []
    for start in range(0, len(sets), step):
        part = sets[start : start + step]
        changes = _changes(bench, part, means, n)
        named = bench.answer(bench.tokens.repeat(len(part), 1), bench.last.repeat(len(part)), changes)
        shares += (named.reshape(len(part), n) != bench.plain).float().mean(1).tolist()
    return shares


@lru_cache(maxsize=4)
def node_means(bench: Bench) -> dict[Site, Tensor]:
    """Return the mean of every block's z and MLP output: by position where all prompts are of one length, else over all."""
    sites: list[Site] = [(kind, layer) for layer in range(bench.layers) for kind in ("z", "mlp")]  # type: ignore[misc]
    passed = bench.read(sites, bench.tokens)
    if bench.valid.all():
        return {site: x.mean(0) for site, x in passed.items()}
    return {site: x[bench.valid].mean(0).expand(x.shape[1:]) for site, x in passed.items()}


def mean_changes(bench: Bench, names: Sequence[str]) -> dict[Site, Change]:
    """Return the changes that give all these nodes their mean."""
    return _changes(bench, [tuple(names)], node_means(bench.whole), len(bench.examples))


def _changes(bench: Bench, sets: Sequence[tuple[str, ...]], means: dict[Site, Tensor], n: int) -> dict[Site, Change]:
    width = means["z", 0].shape[-1] // bench.heads
    by_site: dict[Site, list[tuple[slice, slice]]] = {}
    for number, names in enumerate(sets):
        rows = slice(number * n, (number + 1) * n)
        for name in names:
            kind, _, rest = name.partition(".")
            if kind == "mlp":
                by_site.setdefault(("mlp", int(rest)), []).append((rows, slice(None)))
            else:
                columns = slice(int(rest) * width, (int(rest) + 1) * width)
                by_site.setdefault(("z", int(kind)), []).append((rows, columns))

    def change(site: Site, cuts: list[tuple[slice, slice]]) -> Change:
        def to_mean(x: Tensor) -> Tensor:
            x = x.clone()
            for rows, columns in cuts:
                x[rows, :, columns] = means[site][:, columns]
            return x

        return to_mean

    return {site: change(site, cuts) for site, cuts in by_site.items()}


def handled(bench: Bench, name: str) -> tuple[Site, slice]:
    """Return the site of a head's values and its columns there."""
    layer, head = map(int, name.split("."))
    width = (bench.module.config.n_embd // bench.heads) if bench.is_gpt2 else bench.module.config.head_dim
    return ("z", layer), slice(head * width, (head + 1) * width)


def replacing(at: Any, values: Tensor) -> Change:
    """Return the change that puts `values` at an index."""

    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x[at] = values
        return x

    return change
