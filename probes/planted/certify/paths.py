"""Which head reads which: what the earlier writes is taken from one of the later's three inputs alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from probes.planted.certify.ablation import TAKES_PART, node_means
from probes.planted.certify.bench import Bench
from probes.planted.certify.measured import Measured, set_of
from probes.planted.record import Question

EXAMPLES = 48
"""Examples of each cut; there are hundreds of cuts."""


@torch.no_grad()
def channel(bench: Bench, question: Question) -> Measured:
    """Measure the share of answers changed when a head's output is its mean in the query, key or value of a later head."""
    chosen = torch.randperm(len(bench.examples), generator=torch.Generator().manual_seed(0))[:EXAMPLES].tolist()
    few = Bench(bench.task, [bench.examples[index] for index in chosen])
    written = _written(few)
    shares: dict[str, float] = {}
    for late in range(1, few.layers):
        for kind in range(3):
            shares |= _cut(few, written, late, kind)
    return Measured(
        {name: share for name, share in shares.items() if share > 0},
        set_of(shares, least=TAKES_PART, most=0.05) == question.truth,
    )


def _written(bench: Bench) -> dict[str, Tensor]:
    """What each head writes, [example, pos, d_model], less its mean."""
    means = node_means(bench)
    passed = bench.read([("z", layer) for layer in range(bench.layers)], bench.tokens)
    written = {}
    for layer in range(bench.layers):
        attention = bench.blocks[layer].attn if bench.is_gpt2 else bench.blocks[layer].self_attn
        output = attention.c_proj.weight if bench.is_gpt2 else attention.o_proj.weight.T
        z = passed["z", layer] - means["z", layer]
        width = z.shape[-1] // bench.heads
        for head in range(bench.heads):
            columns = slice(head * width, (head + 1) * width)
            written[f"{layer}.{head}"] = z[..., columns] @ output[columns]
    return written


def _cut(bench: Bench, written: dict[str, Tensor], late: int, kind: int) -> dict[str, float]:
    """Cut every earlier head from queries (0), keys (1) or values (2) of every head of one block, in one forward."""
    block, entering = bench.blocks[late], bench.streams[late]
    norm = block.ln_1 if bench.is_gpt2 else block.input_layernorm
    early = [name for name in written if int(name.split(".")[0]) < late]
    cuts = [(name, reader) for name in early for reader in range(bench.heads)]
    project, first, width = _projection(bench, late, kind)
    inputs = {name: project(norm(entering - written[name])) for name in early}
    n = len(bench.examples)

    def change(_: Any, __: Any, output: Tensor) -> Tensor:
        output = output.clone()
        for number, (name, reader) in enumerate(cuts):
            columns = slice(first + reader * width, first + (reader + 1) * width)
            output[number * n : (number + 1) * n, :, columns] = inputs[name][..., columns]
        return output

    handle = project.register_forward_hook(change)
    try:
        named = bench.answer(bench.tokens.repeat(len(cuts), 1), bench.last.repeat(len(cuts)))
    finally:
        handle.remove()
    changed = (named.reshape(len(cuts), n) != bench.plain).float().mean(1).tolist()
    return {
        f"{name}->{late}.{reader}:{'qkv'[kind]}": share for (name, reader), share in zip(cuts, changed, strict=True)
    }


def _projection(bench: Bench, layer: int, kind: int) -> tuple[Any, int, int]:
    """The module that makes queries, keys or values, where they begin in its output, and the width of a head."""
    if bench.is_gpt2:
        d_model = bench.module.config.n_embd
        return bench.blocks[layer].attn.c_attn, kind * d_model, d_model // bench.heads
    attention = bench.blocks[layer].self_attn
    return (attention.q_proj, attention.k_proj, attention.v_proj)[kind], 0, attention.head_dim


