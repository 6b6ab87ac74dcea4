"""Back-patching at the last position: the resumed grid beside the naive loop of whole forwards, on one model."""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import json_line
import random_gpt2
import torch
from torch import Tensor

from probes.blocks.cached_prompt import CachedPrompt
from probes.models.backends.native import NativeModel
from probes.points import Address


def naive(model: NativeModel, tokens: Tensor, cells: list[tuple[int, int]]) -> Tensor:
    """One whole forward a cell, the target's output replaced at the last position; [cells, d_model]."""
    sources: dict[int, Tensor] = {}
    reads = {Address("resid_post", s): lambda t, s=s: sources.__setitem__(s, t[0, -1].clone()) for s, _ in cells}
    model.run(tokens, reads)
    out: list[Tensor] = []
    for s, t in cells:

        def put(hidden: Tensor, row: Tensor = sources[s]) -> Tensor:
            hidden = hidden.clone()
            hidden[0, -1] = row
            return hidden

        end = Address("resid_post", model.shape.n_layers - 1)
        model.run(tokens, {end: lambda x: out.append(x[0, -1].clone())}, {Address("resid_post", t): put})
    return torch.stack(out)


def resumed(model: NativeModel, tokens: Tensor, cells: list[tuple[int, int]]) -> Tensor:
    """The same cells, each resumed from the block after its target."""
    cached = CachedPrompt(model, tokens[0].tolist(), -1)
    hidden = torch.stack([cached.entering[s + 1] for s, _ in cells])
    return cached.resume([t + 1 for _, t in cells], hidden).last


def main() -> None:
    """Writes seconds of each (best of the repeats), their ratio and the largest difference as one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cells", choices=("full", "upper"), default="full")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = random_gpt2.make(options.layers)
    tokens = torch.randint(0, 50257, (1, options.tokens), generator=torch.Generator().manual_seed(1))
    pairs = itertools.product(range(options.layers), repeat=2)
    cells = [(s, t) for s, t in pairs if options.cells == "full" or s > t]
    seconds, rows = {"naive": float("inf"), "resumed": float("inf")}, {}
    for _ in range(options.repeats):
        for how in (resumed, naive):
            started = time.perf_counter()
            rows[how.__name__] = how(model, tokens, cells)
            seconds[how.__name__] = min(seconds[how.__name__], time.perf_counter() - started)
    difference = float((rows["naive"] - rows["resumed"]).abs().max() / rows["naive"].abs().max())
    record = {
        "layers": options.layers, "tokens": options.tokens, "threads": options.threads,
        "cells": len(cells), **{f"{k}_s": round(v, 4) for k, v in seconds.items()},
        "ratio": round(seconds["naive"] / seconds["resumed"], 1), "largest_relative_difference": difference,
    }  # fmt: skip
    json_line.write(options.out, record)


if __name__ == "__main__":
    main()
