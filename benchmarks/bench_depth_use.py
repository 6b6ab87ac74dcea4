"""Removal of every block and part: restarted from the stored stream beside whole forwards, on one random model."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import json_line
import random_gpt2
import torch
from side_by_side import best
from torch import Tensor

from analyses.depth_use.contributions import PARTS
from probes.blocks.batch import Chunk, Part, left_out, on_blocks
from probes.capture.needs import Need
from probes.capture.padded import chunks
from probes.capture.run import capture
from probes.models.backends.native import NativeModel
from probes.points import Address
from probes.store import ActivationStore

Finals = dict[tuple[Part, int], Tensor]


def whole(model: NativeModel, chunk: Chunk) -> Finals:
    """The stream leaving the last block when each part is left out, by one whole forward each."""
    finals: Finals = {}
    lengths = chunk.real.sum(1).tolist()
    end = Address("resid_post", chunk.n_layers - 1)
    for part in PARTS:
        for layer in range(chunk.n_layers):
            gone: list[tuple[Part, int]] = [("attn", layer), ("mlp", layer)] if part == "block" else [(part, layer)]
            reads = {end: lambda t, key=(part, layer): finals.__setitem__(key, t.clone())}
            model.run(chunk.tokens, reads, left_out(gone), lengths)  # type: ignore[arg-type]
    return finals


def restarted(model: NativeModel, chunk: Chunk) -> Finals:
    """The same, each restarted from the clean stream that enters its block."""
    places = [(part, layer) for part in PARTS for layer in range(chunk.n_layers)]
    return on_blocks(model, chunk.tokens, lambda blocks: {p: blocks.without(chunk, *p)[-1] for p in places})


def main() -> None:
    """Writes processor seconds of each (best of the repeats), their ratio and the largest difference as one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = random_gpt2.make(options.layers)
    tokens = torch.randint(1, 50000, (options.prompts, options.tokens)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        needs = [Need(("resid_pre.0", "resid_post.*", "attn_out.*"))]
        activations = capture(model, [tuple(row) for row in tokens], needs, ActivationStore(Path(folder)))
        (chunk,) = chunks(activations, range(options.prompts), together=True)
        naive, expected = best(lambda: whole(model, chunk), options.repeats)
        fast, finals = best(lambda: restarted(model, chunk), options.repeats)
    difference = max(float((finals[p] - expected[p]).abs().max() / expected[p].abs().max()) for p in finals)
    ratio = naive / fast
    record = {"removals": len(finals), "whole_s": naive, "restarted_s": fast, "ratio": ratio, "difference": difference}
    json_line.write(None, record)


if __name__ == "__main__":
    main()
