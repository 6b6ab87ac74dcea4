"""A model larger than memory, streamed: loads, and a back-patching grid beside the same grid on accelerate's disk offload.

A randomly initialised Llama is written to disk, then loaded streamed, twice, in a process of its own, which patches one grid of
36 cells, with its controls unless told otherwise, block by block. The same analysis then runs on a load whose blocks accelerate keeps on
disk, and, where the model is small enough, on an ordinary one; the tables are compared before anything is reported. Bytes of
weights are counted where they are read, by the reader of blocks and by accelerate's loader. Resident memory is the kernel's
high-water mark of the process, which counts mapped file pages as well as its own. The folder is removed at the end.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from process_memory import apart, kernel
from streamed_llama import Sizes, write

from analyses.back_patching import BackPatching
from probes.html_card import size
from probes.models import load_model
from probes.models.protocol import Model
from probes.prompts import Prompt
from probes.store import ActivationStore

SHAPES = {"small": Sizes(12, 256, 2000), "1b": Sizes(22, 2048, 32_000), "7b": Sizes(32, 4096, 32_000)}
"""`1b` and `7b` have the sizes of TinyLlama 1.1B and Llama 2 7B."""
COMPARED_BELOW = 3e9
"""Bytes of weights up to which the grid is also run on an ordinary load."""
PASSES = 3
"""What the analysis needs: the questions are asked, their prompts opened, and the cells resumed."""


def questions(sizes: Sizes, count: int, length: int, positions: int) -> list[Prompt]:
    """Random prompts, each with a random answer and one or two positions to patch, the last one and one in the middle."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for index in range(count):
        tokens = torch.randint(5, sizes.vocabulary, (max(2, length - 3 * index) + 1,), generator=generator).tolist()
        fields = {"answer_tokens": tokens[-1:], "positions": [-1, (len(tokens) - 1) // 2][:positions]}
        out.append(Prompt(tuple(tokens[:-1]), None, fields))
    return out


def grid(model: Model, prompts: list[Prompt], controls: bool, scratch: Path) -> pd.DataFrame:
    """Every pair of eight layers and the embedding, source above target, with the analysis' three controls or without."""
    n = model.shape.n_layers
    layers = tuple(sorted({round(i * (n - 1) / 7) for i in range(8)}))
    analysis = BackPatching(layers=layers, include_embedding=True, stages=False, controls=controls)
    return analysis.run(model, prompts, store=ActivationStore(scratch)).tables["grid"]


def streamed(
    folder: Path, sizes: Sizes, prompts: list[Prompt], controls: bool, memory_bytes: int, total: int
) -> dict[str, Any]:
    """Load twice and run the grid."""
    facts: dict[str, Any] = {}
    for load in ("first load", "second load"):
        started, disk = time.perf_counter(), kernel("io")["read_bytes"]
        model: Any = load_model(str(folder), device="cpu", dtype=sizes.dtype, streamed=True, stream_memory=memory_bytes)
        took = (time.perf_counter() - started, model.blocks.ledger.bytes, kernel("io")["read_bytes"] - disk)
        print(line(load, *took) + f"  ({took[1] / total:.2f} of all weights)", flush=True)
    ledger = model.blocks.ledger
    ledger.bytes = 0
    ledger.blocks.clear()
    disk, started = kernel("io")["read_bytes"], time.perf_counter()
    table = grid(model, prompts, controls, folder.parent / "streamed")
    facts["grid"] = (time.perf_counter() - started, ledger.bytes, kernel("io")["read_bytes"] - disk)
    counts = [ledger.blocks[layer] for layer in range(sizes.layers)]
    return facts | {
        "table": table, "reads of a block": (min(counts), max(counts)), "waiting": model.schedule.waiting.share,
        "spilled": model.shelf.most_on_disk, "holds": model.faithfulness.holds,
    }  # fmt: skip


def offloaded(folder: Path, sizes: Sizes, prompts: list[Prompt], controls: bool) -> dict[str, Any]:
    """Run the grid on a load whose blocks accelerate keeps on disk."""
    from accelerate.utils.offload import OffloadedWeightsLoader

    fetched, plain = [0], OffloadedWeightsLoader.__getitem__

    def counted(self: Any, key: str) -> Any:
        tensor = plain(self, key)
        fetched[0] += tensor.nbytes
        return tensor

    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{layer}": "disk" for layer in range(sizes.layers)}
    offload = folder.parent / "offload"
    started = time.perf_counter()
    model = load_model(str(folder), dtype=sizes.dtype, device_map=places, offload=offload)
    facts: dict[str, Any] = {"load s": time.perf_counter() - started}
    OffloadedWeightsLoader.__getitem__ = counted
    disk, started = kernel("io")["read_bytes"], time.perf_counter()
    table = grid(model, prompts, controls, folder.parent / "offloaded")
    return facts | {
        "table": table,
        "grid": (time.perf_counter() - started, fetched[0], kernel("io")["read_bytes"] - disk),
    }


def ordinary(folder: Path, sizes: Sizes, prompts: list[Prompt], controls: bool) -> pd.DataFrame:
    """Run the grid on an ordinary load."""
    model = load_model(str(folder), device="cpu", dtype=sizes.dtype)
    return grid(model, prompts, controls, folder.parent / "ordinary")


def compare(table: pd.DataFrame, other: pd.DataFrame, name: str) -> None:
    """Print how far the cells of two grids differ; refuse grids of other cells."""
    keys = ["prompt", "position", "source_layer", "target_layer"]
    assert table[keys].equals(other[keys])
    apart_by = float((table["answer_logprob"] - other["answer_logprob"]).abs().max())
    same = float((table["token_id"] == other["token_id"]).mean())
    print(
        f"against {name}: {len(table)} cells, log-probabilities within {apart_by:.1e} nats, tokens equal in {same:.1%}"
    )


def line(what: str, seconds: float, counted: int, disk: int) -> str:
    return f"{what:<28}{seconds:8.1f} s  weights read {size(counted):>10}, from disk {size(disk):>10}"


def report(facts: dict[str, Any], memory: dict[str, int], blocks: int) -> None:
    print(line("grid, streamed", *facts["grid"]))
    low, high = facts["reads of a block"]
    print(
        f"blocks read {low} to {high} times in {PASSES} passes; {facts['grid'][1] / (PASSES * blocks):.2f} times a pass by bytes"
    )
    print(f"share of the time spent waiting for a block: {facts['waiting']:.0%} (loads and grid)")
    print(
        f"peak resident {size(memory['VmHWM'])} (own {size(memory['RssAnon'])}, mapped files {size(memory['RssFile'])}); "
        f"activations on disk {size(facts['spilled'])}; identities hold: {facts['holds']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="small", choices=list(SHAPES))
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--length", type=int, default=24)
    parser.add_argument(
        "--positions", type=int, default=2, choices=(1, 2), help="positions of each prompt that are patched"
    )
    parser.add_argument(
        "--controls", action=argparse.BooleanOptionalAction, default=True, help="also patch the controls"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", type=float, default=2.0, help="GiB of activations kept in memory between blocks")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="also run on accelerate")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    sizes = Sizes(shape.layers, shape.width, shape.vocabulary, options.dtype)
    root = Path(tempfile.mkdtemp(prefix="bathyscope-streaming-"))
    os.environ["BATHYSCOPE_CACHE"] = str(root / "cache")
    try:
        folder = root / "model"
        folder.mkdir()
        started = time.perf_counter()
        total = write(folder, sizes)
        blocks = total - 2 * 2 * sizes.vocabulary * sizes.width - 2 * sizes.width
        print(f"{sizes.layers} layers of width {sizes.width}, {total:,} bytes in bfloat16, run in {sizes.dtype}")
        print(f"written in {time.perf_counter() - started:.0f} s; {platform.machine()}, torch {torch.__version__}")
        prompts = questions(sizes, options.prompts, options.length, options.positions)
        print(f"{len(prompts)} prompts of up to {options.length} tokens, {options.threads} threads\n", flush=True)
        facts, memory = apart(
            streamed, options.threads, folder, sizes, prompts, options.controls, int(options.memory * 2**30), total
        )
        report(facts, memory, blocks)
        if options.peer:
            peer, peer_memory = apart(offloaded, options.threads, folder, sizes, prompts, options.controls)
            compare(facts["table"], peer["table"], "accelerate's disk offload")
            print(line("grid, accelerate on disk", *peer["grid"]))
            (seconds, counted, _), (peer_seconds, peer_counted, _) = facts["grid"], peer["grid"]
            print(
                f"accelerate reads {peer_counted / counted:.1f} times the bytes in {peer_seconds / seconds:.1f} times the seconds"
            )
            print(f"its peak resident memory: {size(peer_memory['VmHWM'])}")
        if total < COMPARED_BELOW:
            plain, _ = apart(ordinary, options.threads, folder, sizes, prompts, options.controls)
            compare(facts["table"], plain, "an ordinary load")
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
