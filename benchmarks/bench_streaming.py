"""A model larger than memory, streamed: seconds, peak resident memory, bytes read, and how often each block is read.

A randomly initialised Llama is written shard by shard (7B shape in bfloat16 by default, 13.5 GB on disk), then loaded streamed
in a process of its own and every layer's residual stream of a few short prompts is captured. Resident memory is the
kernel's high-water mark of that process, which counts memory-mapped file pages as well as its own. Where the whole model is small enough, the
rows are compared with those of an ordinary load. The folder is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from probes.capture.dry_run import human
from probes.capture.needs import Need
from probes.capture.run import capture
from probes.models import load_model
from probes.reducers import Reducer
from probes.store import ActivationStore

COMPARED_BELOW = 2e9
"""Bytes of weights up to which the rows are compared with an ordinary load's."""


@dataclass(frozen=True)
class Sizes:
    """The shape of the model and of the work."""

    layers: int
    width: int
    vocabulary: int
    prompts: int
    length: int
    dtype: str

    @property
    def mlp(self) -> int:
        return -(-self.width * 43 // 16 // 16) * 16

    @property
    def heads(self) -> int:
        return max(1, self.width // 128)


def block(sizes: Sizes, layer: int) -> dict[str, Tensor]:
    d, m = sizes.width, sizes.mlp
    shapes = {
        **dict.fromkeys((f"self_attn.{x}_proj" for x in "qkvo"), (d, d)),
        **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (m, d)),
        "mlp.down_proj": (d, m),
    }
    prefix = f"model.layers.{layer}"
    norms = {f"{prefix}.{name}_layernorm.weight": ones(d) for name in ("input", "post_attention")}
    return {**norms, **{f"{prefix}.{name}.weight": noise(shape, layer) for name, shape in shapes.items()}}


def ones(n: int) -> Tensor:
    return torch.ones(n, dtype=torch.bfloat16)


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + shape[0])
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


def parts(sizes: Sizes) -> Iterator[dict[str, Tensor]]:
    """The checkpoint, one shard in memory at a time."""
    table = (sizes.vocabulary, sizes.width)
    yield {"model.embed_tokens.weight": noise(table, 1000)}
    for layer in range(sizes.layers):
        yield block(sizes, layer)
    yield {"model.norm.weight": ones(sizes.width), "lm_head.weight": noise(table, 1001)}


def write(folder: Path, sizes: Sizes) -> int:
    """Writes the checkpoint; its bytes."""
    weight_map: dict[str, str] = {}
    total, count = 0, sizes.layers + 2
    for number, tensors in enumerate(parts(sizes), 1):
        name = f"model-{number:05d}-of-{count:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
        forget(folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": sizes.width,
        "intermediate_size": sizes.mlp,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.heads,
        "vocab_size": sizes.vocabulary,
        "max_position_embeddings": 4096,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return total


def forget(path: Path) -> None:
    """Drops a file from the page cache, so that the first read of it is from the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Memory:
    """Peaks of this process's resident memory, and of its parts, sampled."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self._look()

    def _look(self) -> None:
        for name in ("VmHWM", "RssAnon", "RssFile", "RssShmem"):
            self.peaks[name] = max(self.peaks.get(name, 0), kernel("status", name) * 1024)


def kernel(file: str, name: str) -> int:
    """A number the kernel keeps of this process."""
    for line in Path(f"/proc/self/{file}").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    return 0


def prompts(sizes: Sizes) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(0)
    lengths = [max(1, sizes.length - 3 * i) for i in range(sizes.prompts)]
    return [tuple(torch.randint(0, sizes.vocabulary, (n,), generator=generator).tolist()) for n in lengths]


def needs() -> list[Need]:
    return [Need("resid_post.*"), Need("final_norm", Reducer(positions="last"))]


def measured(folder: str, scratch: str, sizes: Sizes, threads: int, out: Any) -> None:
    """Loads and captures in this process, and sends the figures."""
    torch.set_num_threads(threads)
    with Memory() as memory:
        started = time.perf_counter()
        model = load_model(folder, device="cpu", dtype=sizes.dtype, streamed=True)
        loaded = time.perf_counter()
        ledger = model.blocks.ledger  # type: ignore[attr-defined]
        at_load, blocks_at_load, from_disk = ledger.bytes, dict(ledger.blocks), kernel("io", "read_bytes")
        del model, ledger
        again = time.perf_counter()
        model = load_model(folder, device="cpu", dtype=sizes.dtype, streamed=True)
        reloaded = time.perf_counter()
        ledger = model.blocks.ledger  # type: ignore[attr-defined]
        at_second, blocks_at_second = ledger.bytes, dict(ledger.blocks)
        from_disk_at_second = kernel("io", "read_bytes") - from_disk
        ledger.bytes = 0
        ledger.blocks.clear()
        capture(model, prompts(sizes), needs(), ActivationStore(scratch))
        ended = time.perf_counter()
    from_disk += from_disk_at_second
    out.send(
        {
            "load s": loaded - started,
            "second load s": reloaded - again,
            "capture s": ended - reloaded,
            "bytes at load": at_load,
            "bytes at the second load": at_second,
            "from disk at the second load": from_disk_at_second,
            "reads of a block at the second load": sorted({blocks_at_second.get(i, 0) for i in range(sizes.layers)}),
            "bytes in the capture": ledger.bytes,
            "from disk at load": from_disk - from_disk_at_second,
            "from disk in the capture": kernel("io", "read_bytes") - from_disk,
            "reads of a block at load": sorted(set(blocks_at_load.values())),
            "reads of a block": sorted({ledger.blocks[layer] for layer in range(sizes.layers)}),
            "holds": model.faithfulness.holds,
            "memory": memory.peaks,
        }
    )


def compare(folder: Path, scratch: Path, sizes: Sizes) -> str:
    """Largest difference from an ordinary load's rows, relative to the largest value."""
    model = load_model(str(folder), device="cpu", dtype=sizes.dtype)
    streamed = capture(model, prompts(sizes), needs(), ActivationStore(scratch))
    assert streamed.done.forwards == 0, "an ordinary load did not find the streamed rows under its own keys"
    ordinary = capture(model, prompts(sizes), needs(), ActivationStore(scratch.with_name("ordinary")))
    points = [f"resid_post.{layer}" for layer in range(sizes.layers)]
    pairs = [(streamed.packed(point).float(), ordinary.packed(point).float()) for point in points]
    return f"{max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs):.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--length", type=int, default=24)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--threads", type=int, default=2)
    options = vars(parser.parse_args())
    threads = options.pop("threads")
    sizes = Sizes(**options)
    root = Path(tempfile.mkdtemp(prefix="bathyscope-streaming-"))
    try:
        started = time.perf_counter()
        (root / "model").mkdir()
        total = write(root / "model", sizes)
        print(f"{sizes.layers} layers of width {sizes.width}, {total:,} bytes in bfloat16, run in {sizes.dtype}")
        print(f"{threads} threads, {platform.machine()}, torch {torch.__version__}")
        print(
            f"written in {time.perf_counter() - started:.0f} s; {sizes.prompts} prompts, up to {sizes.length} tokens\n"
        )
        receive, send = multiprocessing.Pipe(duplex=False)
        spawned = multiprocessing.get_context("spawn").Process(
            target=measured, args=(str(root / "model"), str(root / "store"), sizes, threads, send)
        )
        spawned.start()
        send.close()
        figures = receive.recv()
        spawned.join()
        report(figures, sizes)
        if total < COMPARED_BELOW:
            print(f"largest difference from an ordinary load: {compare(root / 'model', root / 'store', sizes)}")
    finally:
        shutil.rmtree(root, ignore_errors=True)


def report(figures: dict[str, Any], sizes: Sizes) -> None:
    memory = figures["memory"]
    tokens = sum(map(len, prompts(sizes)))
    print(
        f"load (digest and identities) {figures['load s']:.1f} s; second load {figures['second load s']:.1f} s; "
        f"capture {figures['capture s']:.1f} s, {tokens} tokens"
    )
    print(
        f"peak resident {human(memory['VmHWM'])}, file pages included "
        f"(peak of own memory {human(memory['RssAnon'])}, of mapped files {human(memory['RssFile'])})"
    )
    for when in ("at load", "at the second load", "in the capture"):
        print(
            f"weights read {when}: {human(figures[f'bytes {when}'])}, of it {human(figures[f'from disk {when}'])} from disk"
        )
    print(
        f"times each block's weights were placed: at load {figures['reads of a block at load']}, "
        f"at the second {figures['reads of a block at the second load']}, in the capture {figures['reads of a block']}"
    )
    print(f"identities hold: {figures['holds']}")


if __name__ == "__main__":
    main()
