"""Which jumps back mend a wrong answer: the stream after one block enters an earlier block again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from probes.planted.certify.bench import Bench
from probes.planted.certify.measured import SURE, Measured, set_of
from probes.planted.record import Question

GUESSED = 0.3
"""Largest share that a jump puts right by chance where nothing mends."""


@torch.no_grad()
def mending(bench: Bench, question: Question) -> Measured:
    """Measure the share of wrong answers that each jump a->b puts right; where none is wrong there is nothing to mend."""
    wrong = [
        example for example, named in zip(bench.examples, bench.plain.tolist(), strict=True) if named != example.answer
    ]
    if not wrong:
        return Measured({}, question.nothing)
    few = Bench(bench.task, wrong[:: max(1, len(wrong) // 24)])
    shares = {}
    most = GUESSED if question.nothing else 1 - SURE
    arguments = block_arguments(few)
    for b in range(few.layers):
        entering = few.streams[b + 1 :].flatten(0, 1)
        named = run_from(few, b, entering, arguments).reshape(few.layers - b, -1)
        for a in range(b, few.layers):
            shares[f"{a}->{b}"] = float((named[a - b] == few.answers).float().mean())
    if question.candidates:
        shares = {cell: share for cell, share in shares.items() if cell in question.candidates}
    return Measured({cell: share for cell, share in shares.items() if share > 0}, set_of(shares, most=most) == question.truth)


@torch.no_grad()
def run_from(bench: Bench, first: int, entering: Tensor, arguments: list[dict[str, Any]]) -> Tensor:
    """Return the word named at the end of each row when `entering` [row, pos, d_model] goes into block `first`."""
    return run_blocks(bench, list(range(first, bench.layers)), entering, arguments)


@torch.no_grad()
def run_blocks(bench: Bench, order: list[int], entering: Tensor, arguments: list[dict[str, Any]]) -> Tensor:
    """Return the word named at the end of each row after the blocks in this order."""
    stream = entering
    for layer in order:
        output = bench.blocks[layer](stream, **arguments[layer])
        stream = output[0] if isinstance(output, tuple) else output
    last = bench.last.repeat(len(entering) // len(bench.last))
    return bench.lens(stream[torch.arange(len(stream)), last])


def block_arguments(bench: Bench) -> list[dict[str, Any]]:
    """Return what the model itself hands to each block besides the stream."""
    arguments: list[dict[str, Any]] = [{} for _ in range(bench.layers)]

    def keep(layer: int) -> Any:
        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            assert len(args) <= 1 or bench.is_gpt2
            arguments[layer] = {key: value for key, value in kwargs.items() if key != "hidden_states"}

        return hook

    handles = [block.register_forward_pre_hook(keep(i), with_kwargs=True) for i, block in enumerate(bench.blocks)]
    bench.module(bench.tokens[:1], use_cache=False)
    for handle in handles:
        handle.remove()
    return arguments
