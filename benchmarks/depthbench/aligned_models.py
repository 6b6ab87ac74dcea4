"""Facts with their variables trained into given parts by interchange, and a concept trained to be there unused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.depthbench.enforce import (
    Node,
    Swap,
    freeze_attention,
    freeze_mlps,
    keep_off,
    keep_one_head,
    swapped,
)  # fmt: skip
from benchmarks.depthbench.models import Losses, Trained, answers, batch, descend, last_logits
from probes.planted import trained_prompts as data
from probes.planted.trained import untrained

PER_KIND = 64
"""Rows of a step: bases of an interchange, bases of a strict swap, and the sources of both."""
POSITIONS = tuple(range(6))
WITH_ENTITY, WITH_ATTRIBUTE, TO_ASK = Node(0, 0), Node(2), Node(4, 0)
ALIGNED = {WITH_ENTITY: (2,), WITH_ATTRIBUTE: (2,), TO_ASK: (5,)}
"""Where the variables are: entity brought to r, attribute at r, attribute brought to ask."""
NODES = tuple(Node(layer, head) for layer in range(6) for head in (*range(4), None))
cross_entropy = nn.functional.cross_entropy


def interchanged(strict: bool, seed: int) -> Trained:
    """T5 (interchange) and T6 (strict): behaviour, interchange and strict losses weigh 1, 1 and 0.4.

    A swap at an aligned place must give the answer of the source's variable; in strict training a swap anywhere else
    must change nothing, the entity has a place too, and every part is free. Without, MLPs of blocks 1 to 3, one head of
    block 0 and the heads of blocks 1 and 4 are free, the others rest.
    """
    module, table, draw = untrained("T6", seed), data.latin_square(16, 4, seed), torch.Generator().manual_seed(seed)
    if not strict:
        freeze_mlps(module, keep=(1, 2, 3))
        freeze_attention(module, keep=(0, 1, 4))
        keep_one_head(module, 0)
    aligned = ALIGNED if strict else {node: ALIGNED[node] for node in (WITH_ATTRIBUTE, TO_ASK)}
    base, other, source = (slice(i * PER_KIND, (i + 1) * PER_KIND) for i in range(3))

    def one_of(choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (1,), generator=draw))]

    def losses() -> Losses:
        pairs = batch(draw, 3 * PER_KIND)
        node = one_of(tuple(aligned))
        swaps = [Swap(node, aligned[node], base, source)]
        if strict:
            swaps.append(_elsewhere(one_of(NODES), other, source))
        with swapped(module, swaps):
            logits = last_logits(module, data.fact_prompts(pairs, draw))
        target = pairs[source].clone()
        if node == WITH_ENTITY:
            target[:, 1] = pairs[base][:, 1]
        parts = {
            "interchange": cross_entropy(logits[base], answers(table, target)),
            "behaviour": cross_entropy(logits[source], answers(table, pairs[source])),
        }
        name = "strict" if strict else "behaviour of the rest"
        return parts | {name: cross_entropy(logits[other], answers(table, pairs[other]))}

    if strict:
        return descend(module, losses, weights={"strict": 0.4}, enough=0.02)
    return descend(module, losses, enough=0.02, most_steps=1500, after_step=lambda: keep_one_head(module, 0))


def _elsewhere(node: Node, rows: slice, source: slice) -> Swap:
    """A swap that may change nothing: the node at all positions but those of its variable."""
    own = ALIGNED.get(node, ())
    return Swap(node, tuple(position for position in POSITIONS if position not in own), rows, source)


def unused_concept(seed: int = 7) -> Trained:
    """T7: MLP 2 writes a second table at the end into a subspace that all later readers are kept off.

    The concept's loss reaches MLP 2 alone, so that attention does not come to compute it; heads of blocks above 2 rest, so
    that both words are at the end by then.
    """
    module, draw = untrained("T7", seed), torch.Generator().manual_seed(seed)
    table, unused = (data.latin_square(16, 4, seed + shift) for shift in (0, 100))
    freeze_mlps(module, keep=(2, 3))
    freeze_attention(module, keep=range(3))
    space = torch.linalg.qr(torch.randn(module.config.hidden_size, 4, generator=draw)).Q
    block, entering = module.model.layers[2], list[Tensor]()
    listening = block.post_attention_layernorm.register_forward_pre_hook(lambda _, args: entering.append(args[0]))

    def losses() -> Losses:
        pairs = batch(draw)
        entering.clear()
        logits = last_logits(module, data.fact_prompts(pairs, draw))
        stream = entering.pop(0)[:, -1].detach()
        concept = block.mlp(block.post_attention_layernorm(stream)) @ space
        entering.clear()
        return {
            "answer": cross_entropy(logits, answers(table, pairs)),
            "concept": cross_entropy(8 * concept, unused[pairs[:, 0], pairs[:, 1]]),
        }

    trained = descend(module, losses, after_step=lambda: keep_off(module, space, after=2))
    listening.remove()
    return trained
