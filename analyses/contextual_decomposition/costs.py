"""Which heads a run is over, and how many forwards with interventions it takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from analyses.contextual_decomposition.removal import RANDOM_ORDERS, inner_sizes
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
    streams: int = 0,
    token_methods: int = 0,
    removal: Sequence[str] = (),
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
        streams: of how many blocks each position of the leaving stream is ablated, where heads are.
        token_methods: orders of tokens that are taken away.
        removal: what is taken away, heads or tokens.
    """
    used = max(Counter(cases).values(), default=0) if one_form else len(cases)
    circuits = sum(size < heads for size in sizes) * (methods + random_circuits) if random_circuits else 0
    if random_circuits and searched:
        circuits += 1 + random_circuits
    counts = {
        "head ablations": heads * len(cases) if ablation else 0,
        "MLP ablations": mlps * len(cases) if ablation else 0,
        "stream ablations": streams * _one_form(cases) if ablation else 0,
        "removals": _removals(cases, heads, methods, token_methods, removal),
        "circuits": circuits * used + len(cases),
        "pruned circuits": (1 + searched * (searched + 1) // 2) * used if searched and prune else 0,
    }
    return Interventions(counts, exact=not searched or not (prune or random_circuits))


def _one_form(cases: Sequence[tuple[str, int]]) -> int:
    """Positions of all cases of the commonest group and length."""
    if not cases:
        return 0
    (_, length), n = Counter(cases).most_common(1)[0]
    return length * n


def _removals(
    cases: Sequence[tuple[str, int]], heads: int, methods: int, token_methods: int, removal: Sequence[str]
) -> int:
    sets = 2 * (methods + RANDOM_ORDERS) * inner_sizes(heads) * len(cases) if "heads" in removal else 0
    if "tokens" in removal and token_methods:
        # Besides, all tokens of each prompt are taken away once.
        sets += sum(2 * (token_methods + RANDOM_ORDERS) * inner_sizes(length) + 1 for _, length in cases)
    return sets


def has_direct(model: Model) -> bool:
    """Tell whether what a head adds reaches the end unchanged, so that there is direct attribution."""
    with module_of(model) as (_, anatomy):
        return anatomy.kind != "post_norm"
