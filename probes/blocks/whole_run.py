"""A prompt run once from end to end, of which everything is kept that a run from inside it needs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from probes.blocks.key_values import KeyValues, cache_of
from probes.blocks.rerouting import Caller, call_blocks, exchanged
from probes.models.protocol import BlockAccess, Read, SavedRun, Write
from probes.points import Address
from probes.shelf import Shelved

Block = Mapping[str, Tensor]
"""What leaves a block, [1, pos, d_model], its keys and values [1, kv_head, pos, d_head], and points inside it [pos, ...], by name."""


@dataclass(frozen=True, eq=False)
class WholeRun:
    """What was kept of a run."""

    entering: Shelved
    """The stream [suffix, d_model] that enters each block, and after these the one that leaves the last."""
    keys: Shelved
    """Of each block, [1, kv_head, pos, d_head]."""
    values: Shelved
    points: dict[Address, Tensor]
    """Points inside the blocks, [pos, ...]."""


@torch.no_grad()
def run_whole(
    model: BlockAccess,
    ids: Int[Tensor, "1 pos"],
    start: int,
    writes: Mapping[Address, Write],
    points: Collection[Address],
) -> WholeRun:
    """Run a prompt once under writes; a run that was killed goes on behind its last saved group of blocks.

    Args:
        model: the model.
        ids: the prompt.
        start: the first position of the suffix, of which the stream is kept.
        writes: writes of points [1, pos, ...].
        points: points inside the blocks that are kept.
    """
    shelf, n_layers = model.shelf, model.shape.n_layers
    kept = WholeRun(Shelved(shelf), Shelved(shelf), Shelved(shelf), {})
    named = {str(address): address for address in points}
    inside: dict[str, Tensor] = {}

    def read(name: str) -> Read:
        return lambda tensor: inside.__setitem__(name, tensor[0].clone())

    def append(block: Block) -> None:
        kept.entering.append(block["leaving"][0, start:].clone())
        kept.keys.append(block["keys"].clone())
        kept.values.append(block["values"].clone())
        kept.points.update((named[name], tensor) for name, tensor in block.items() if name in named)

    def run_blocks(hidden: Tensor, call: Caller) -> None:
        run, done = model.saved_run(ids, hidden), 0
        kept.entering.append(hidden[0, start:].clone())
        for blocks, block in _saved(run) if run else ():
            done, hidden = blocks, block["leaving"].to(hidden.device)
            append({name: tensor.to(hidden.device) for name, tensor in block.items()})
        group: list[Block] = []
        for layer in range(done, n_layers):
            cache = KeyValues(None)
            hidden = call(layer, hidden, exchanged(nothing, cache))
            block = dict(zip(("leaving", "keys", "values"), (hidden, *cache.suffix[layer]), strict=True)) | inside
            inside.clear()
            append(block)
            if run:
                group.append(block)
            if run and model.ends_group(layer):
                _save(run, layer + 1, group)
                group.clear()

    nothing = cache_of(0, n_layers)
    reads = {address: read(name) for name, address in named.items()}
    # The first time this runs the module, which no hook may see.
    model.block_output_lengths()
    with model.hooked(reads, writes, (1, ids.shape[1])) if reads or writes else nullcontext():
        call_blocks(model, ids, run_blocks, past_key_values=nothing, use_cache=True)
    return kept


def _save(run: SavedRun, done: int, group: list[Block]) -> None:
    run.save(
        done, {f"{name}.{i}": tensor for i, block in enumerate(group) for name, tensor in block.items()}, instead=False
    )


def _saved(run: SavedRun) -> Iterator[tuple[int, Block]]:
    """Yield the blocks that were saved, each with the number of blocks up to the end of its group."""
    for done, tensors in run.saved():
        group: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for label, tensor in tensors.items():
            name, _, index = label.rpartition(".")
            group[int(index)][name] = tensor
        for _, block in sorted(group.items()):
            yield done, block
