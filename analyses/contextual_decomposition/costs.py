"""Which heads a run is over, and how many forwards with interventions it takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from analyses.interventions import Interventions, swept
from probes.blocks.rerouting import module_of
from probes.decomposition import Node, head
from probes.errors import OptionError
from probes.models.protocol import Model


def chosen_heads(n_layers: int, n_heads: int, layers: Sequence[int], stride: int, heads: Sequence[str]) -> list[Node]:
    """Return the heads named, or all heads of the layers of a sweep.

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


def interventions(
    cases: Sequence[tuple[str, int]],
    heads: int,
    *,
    one_form: bool,
    ablation: bool,
    methods: int,
    sizes: Sequence[int],
    random_circuits: int,
    searched: int,
    prune: bool,
    mlps: int = 0,
) -> Interventions:
    """Count the forwards of a run over cases of given groups and lengths, before it is done.

    Circuits that keep every head change nothing and are none of them. A search decides by itself how large its circuit
    is, and pruning when it stops: then these are the most there can be.

    Args:
        heads: how many heads are scored and ablated.
        one_form: whether circuits are run on the largest set of cases of one group and length alone.
        methods: orders of heads whose circuits are compared.
        sizes: numbers of heads that circuits keep.
        random_circuits: random circuits of each size; 0 runs no circuits at all.
        searched: the most nodes that the search can find; 0 without a search.
        mlps: how many MLPs are ablated, where heads are.
    """
    used = max(Counter(cases).values(), default=0) if one_form else len(cases)
    circuits = sum(size < heads for size in sizes) * (methods + random_circuits) if random_circuits else 0
    if random_circuits and searched:
        circuits += 1 + random_circuits
    counts = {
        "head ablations": heads * len(cases) if ablation else 0,
        "MLP ablations": mlps * len(cases) if ablation else 0,
        "circuits": circuits * used + len(cases),
        "pruned circuits": (1 + searched * (searched + 1) // 2) * used if searched and prune else 0,
    }
    return Interventions(counts, exact=not searched or not (prune or random_circuits))


def n_methods(model: Model) -> int:
    """How many cheap methods order this model's heads: the decomposition, attribution patching and direct attribution."""
    with module_of(model) as (_, anatomy):
        return 3 if anatomy.kind != "post_norm" else 2
