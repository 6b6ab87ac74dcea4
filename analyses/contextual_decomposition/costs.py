"""Which heads a run is over, and how many forwards with interventions it takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from analyses.contextual_decomposition.faithfulness import sizes_of
from analyses.interventions import Interventions, swept
from probes.blocks.rerouting import module_of
from probes.decomposition import Node, head
from probes.errors import OptionError
from probes.models.protocol import Model

if TYPE_CHECKING:
    from analyses.contextual_decomposition.analysis import ContextualDecomposition


def chosen_heads(n_layers: int, n_heads: int, layers: Sequence[int], stride: int, heads: Sequence[str]) -> list[Node]:
    """The heads named, or all heads of the layers of a sweep.

    Raises:
        OptionError: a layer or head that does not exist, a name that is none, or both ways of choosing at once.
    """
    if not heads:
        return [head(layer, h) for layer in swept(n_layers, layers, stride) for h in range(n_heads)]
    if layers or stride > 1:
        raise OptionError("heads names the heads by itself: give either heads, or layers and stride")
    return sorted({_head(name, n_layers, n_heads) for name in heads})


def _head(name: str, n_layers: int, n_heads: int) -> Node:
    layer, dot, number = name.partition(".")
    if not (dot and layer.isascii() and layer.isdigit() and number.isascii() and number.isdigit() and len(name) < 12):
        raise OptionError(f"head {name!r} is no layer.head, such as 3.1")
    if int(layer) >= n_layers or int(number) >= n_heads:
        raise OptionError(
            f"head {name!r} does not exist: layers are 0 to {n_layers - 1}, heads 0 to {n_heads - 1} in each"
        )
    return head(int(layer), int(number))


def interventions(analysis: ContextualDecomposition, model: Model, cases: Sequence[tuple[str, int]]) -> Interventions:
    """The forwards of a run over cases of given groups and lengths, before it is done.

    Circuits that keep every head change nothing and are none of them. A search decides by itself how large its circuit
    is, and pruning when it stops: then these are the most there can be.
    """
    heads = len(analysis.nodes(model))
    used = max(Counter(cases).values(), default=0) if analysis.granularity == "position" else len(cases)
    searched = analysis.search_steps > 0
    largest = analysis.top * (analysis.search_steps + 1) if searched else 0
    counts = {
        "head ablations": heads * len(cases) if analysis.ablation else 0,
        "circuits": _circuits(analysis, model, heads, largest) * used + len(cases),
        "pruned circuits": (1 + largest * (largest + 1) // 2) * used if searched and analysis.prune else 0,
    }
    return Interventions(counts, exact=not searched or not (analysis.prune or analysis.random_circuits))


def _circuits(analysis: ContextualDecomposition, model: Model, heads: int, largest: int) -> int:
    """Circuits run on each prompt: of every method and at random, at each size, and the searched one with its own."""
    if not analysis.random_circuits:
        return 0
    sizes = [size for size in sizes_of(analysis.shares, heads) if size < heads]
    return len(sizes) * (_methods(analysis, model) + analysis.random_circuits) + (
        1 + analysis.random_circuits if largest else 0
    )


def _methods(analysis: ContextualDecomposition, model: Model) -> int:
    """Ways of ordering heads: the decomposition, attribution patching, and those that the options and the model add."""
    with module_of(model) as (_, anatomy):
        direct = anatomy.kind != "post_norm"
    return 2 + direct + analysis.other_preset + analysis.ablation
