"""Which models run programs."""

from __future__ import annotations

from probes.blocks.rerouting import block_access
from probes.errors import PointError
from probes.models.protocol import Model

SHARED = {
    "num_kv_shared_layers": "later blocks read keys and values of earlier ones",
    "hidden_size_per_layer_input": "each block has embeddings of its own",
}
"""Fields of a configuration that tie a block to its place, and what they say."""


def check_model(model: Model) -> None:
    """Refuse a model whose blocks cannot be run in another order.

    Raises:
        PointError: it is not causal, keeps its blocks to itself, ties blocks to their places, or has blocks of several kinds.
    """
    if not model.shape.causal:
        raise PointError(f"{model.ref} reads both ways; programs are run on causal models, whose next token is read")
    access = block_access(model)
    config = getattr(access.module, "config", None)
    for name, says in SHARED.items():
        if getattr(config, name, None):
            raise PointError(f"{model.ref}: {says} ({name}), so its blocks have no meaning in another order")
    kinds = {type(access.anatomy.component("block", layer)).__name__ for layer in range(model.shape.n_layers)}
    if len(kinds) > 1:
        raise PointError(
            f"{model.ref} has blocks of several kinds ({', '.join(sorted(kinds))}), which are not exchanged"
        )
