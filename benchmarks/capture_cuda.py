"""Capture of every layer's residual stream on a GPU: what it adds to a plain forward, and how much of the bus it uses.

One run, no downloads: Llama shapes with random bfloat16 weights. Every way that captures rows gets the same tokens and
ends with the same rows [layer, batch, pos, d_model] in host memory (or in the store); rows are compared before anything
is timed. Each way is timed in turn with the plain forward, so that a drift of the clock hits both. Peers that are not
installed, fail, or give other rows are named and left out: `pip install 'bathyscope[bench,triton]'`.

    python benchmarks/capture_cuda.py --shape 1b --shape 8b --out capture_cuda.md
    python benchmarks/capture_cuda.py --device cpu --shape tiny --rounds 2      # the script itself, without a GPU
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

import capture_ways as ways
import random_llama
from capture_ways import Way

from probes.capture.dry_run import copy_bandwidth
from probes.device_to_host import Transport
from probes.kernels import has_triton
from probes.models.backends.native import NativeModel
from probes.reducers import Reducer

TOLERANCE = 0.05
"""Largest deviation from plain hooks, relative to the largest value, at which bfloat16 rows count as the same."""
NOISE = 0.005
"""Share of the plain forward below which added time is not told from noise."""


@dataclass(frozen=True)
class Measured:
    """Medians over the rounds of one way; ratios and differences are taken within a round."""

    way: Way
    seconds: float
    ratio: float
    """To the plain forward."""
    bare_ratio: float
    """To the plain forward without logits."""
    added: float
    """Seconds more than the forward of the same length: ours ends before the logits, others' after them."""
    forward: float
    """Seconds of that forward."""
    peak: int
    """Bytes allocated on the device at the peak, the model included; 0 where that is not known."""

    @property
    def counted(self) -> float:
        """The added seconds, but not less than can be told from noise."""
        return max(self.added, NOISE * self.forward)


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run, the device's work included."""
    _settle(device)
    started = time.perf_counter()
    run()
    _settle(device)
    return time.perf_counter() - started


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(way: Way, base: Way, bare: Way, rounds: int, device: torch.device) -> Measured:
    """Times `way` in turn with the plain forwards, with and without logits, after one round that does not count."""
    times: list[tuple[float, float, float]] = []
    peak = 0
    for number in range(rounds + 1):
        way.prepare()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = timed(way.run, device)
        if device.type == "cuda":
            peak = max(peak, torch.cuda.max_memory_allocated(device))
        if number:
            times.append((seconds, timed(base.run, device), timed(bare.run, device)))
    way.prepare()
    forwards = [p if way.logits else b for _, p, b in times]
    return Measured(
        way,
        statistics.median(s for s, _, _ in times),
        statistics.median(s / p for s, p, _ in times),
        statistics.median(s / b for s, _, b in times),
        statistics.median(s - f for (s, _, _), f in zip(times, forwards, strict=True)),
        statistics.median(forwards),
        peak,
    )


def same_rows(way: Way, expected: Tensor) -> float:
    """The way's deviation from plain hooks, relative to their largest value; infinite for another shape."""
    way.prepare()
    rows = way.run()
    captured = rows() if rows else expected
    way.prepare()
    if captured.shape != expected.shape:
        return float("inf")
    scale = max(float(layer.float().abs().max()) for layer in expected)
    pairs = zip(captured, expected, strict=True)
    return max(float((a.float() - b.float()).abs().max()) for a, b in pairs) / scale


def own_ways(model: NativeModel, tokens: Tensor, scratch: Path, payload: int) -> Iterator[Way]:
    """Ours, each with rings that hold a whole run, because its rows stay in page-locked memory."""
    whole = Transport(payload // model.shape.n_layers, ring_bytes=payload + payload // 8)
    yield ways.ours(model, tokens, "all rows to the host", Reducer(), whole)
    yield ways.ours_to_store(model, tokens, scratch / "store")
    small = Transport(2**20)
    ids = tuple(range(3, 11))
    yield ways.ours(model, tokens, "norm only", Reducer("norm"), small)
    yield ways.ours(model, tokens, "last only", Reducer(positions="last"), small)
    yield ways.ours(model, tokens, "lens of 8 ids, last token", Reducer("lens_ids", "last", ids=ids), small)
    yield ways.ours(model, tokens, "lens of 8 ids, every token", Reducer("lens_ids", ids=ids), small)


def compare(shape: random_llama.LlamaShape, tokens: Tensor, rounds: int, scratch: Path) -> list[Measured]:
    """All ways on one batch; every peer on a model of its own, made and dropped in turn."""
    device, dtype = tokens.device, torch.bfloat16
    module = random_llama.make(shape, device, dtype)
    base, hooks = ways.plain(module, tokens), ways.plain_hooks(module, tokens)
    rows = hooks.run()
    assert rows is not None
    expected = rows()
    payload = expected.numel() * expected.itemsize
    model = NativeModel(module, ref="random llama", weights="random")
    bare = ways.plain_without_logits(module, tokens)
    own = [way for way in own_ways(model, tokens, scratch, payload) if admitted(way, expected)]
    measured = [measure(way, base, bare, rounds, device) for way in (base, bare, *own, replace(hooks, moved=payload))]
    tokenizer = random_llama.save_stub(shape, scratch)
    for name, make in ways.PEERS.items():
        try:
            way = make(random_llama.make(shape, device, dtype), tokens, scratch, tokenizer)
            if admitted(way, expected):
                measured.append(measure(replace(way, moved=payload), base, bare, rounds, device))
        except Exception as error:
            print(f"left out: {name} ({type(error).__name__}: {' '.join(str(error).split())[:160]})")
        way = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return measured


def admitted(way: Way, expected: Tensor) -> bool:
    """Whether the way gives the rows of plain hooks; says so where not."""
    error = same_rows(way, expected)
    if error > TOLERANCE:
        print(f"left out: {way.name} (rows differ from plain hooks by {error:.1e} of the largest value)")
        return False
    return True


def table(measured: list[Measured], bus: float) -> str:
    """Markdown; `bus` is the measured copy bandwidth in bytes per second."""
    head = "| way | median ms | × plain | × plain without logits | added ms | MB moved | GB/s | GB/s of the added time"
    lines = [f"{head} | % of bus | peak GiB |", "|---" * 10 + "|"]
    for m in measured:
        cells = [m.way.name, f"{m.seconds * 1e3:.2f}", f"{m.ratio:.3f}", f"{m.bare_ratio:.3f}", f"{m.added * 1e3:+.2f}"]
        if m.way.moved:
            bound = "> " if m.added < m.counted else ""
            cells += [f"{m.way.moved / 1e6:,.3g}", f"{m.way.moved / m.seconds / 1e9:.2f}"]
            cells += [f"{bound}{m.way.moved / m.counted / 1e9:.2f}", f"{100 * m.way.moved / m.seconds / bus:.1f}"]
        else:
            cells += ["–"] * 4
        cells.append(f"{m.peak / 2**30:.1f}" if m.peak else "–")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(measured: list[Measured]) -> list[str]:
    """What the table says of our aims, which are for a GPU, one line each."""
    by_name = {m.way.name: m for m in measured}
    limits = {"all rows to the host": 1.05, "norm only": 1.02, "last only": 1.02, "lens of 8 ids, last token": 1.02}
    lines = []
    for name, limit in limits.items():
        if way := by_name.get(f"bathyscope, {name}"):
            word = "held" if way.bare_ratio <= limit else "not held"
            lines.append(f"- {name}: {way.bare_ratio:.3f}× the plain forward without logits (aim {limit}×: {word})")
    peers = [m for m in measured if m.way.peer]
    if peers and (own := by_name.get("bathyscope, all rows to the host")):
        best = min(peers, key=lambda m: m.counted)
        factor = best.counted / own.counted
        word = "held" if factor >= 10 else "not held"
        lines.append(f"- transport rate of the added time: {factor:.1f}× that of {best.way.name} (aim 10×: {word})")
        lines.append(f"  (added time below {NOISE:.1%} of the forward counts as that much)")
    return lines


def machine(device: torch.device, bus: float) -> str:
    """The device and the versions, in one line."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    kernels = "Triton kernels" if has_triton() and device.type == "cuda" else "plain torch kernels"
    return (
        f"{date.today().isoformat()}, {name}, torch {torch.__version__}, {kernels}; copies from device to page-locked "
        f"host memory run at {bus / 1e9:.1f} GB/s here"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=list(random_llama.SHAPES), help="1b and 8b when left out")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--work", action="append", choices=["prefill", "decode"], help="both when left out")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; --device cpu --shape tiny runs the script itself")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
    bus = copy_bandwidth(device)
    parts = [machine(device, bus)]
    for name in options.shape or ["1b", "8b"]:
        shape = random_llama.SHAPES[name]
        for work in options.work or ["prefill", "decode"]:
            batch, length = getattr(shape, work)
            tokens = torch.randint(3, shape.d_vocab, (batch, length), generator=torch.Generator().manual_seed(0))
            with tempfile.TemporaryDirectory() as scratch:
                measured = compare(shape, tokens.to(device), options.rounds, Path(scratch))
            title = f"{name}, {work}: {batch} prompts of {length} tokens, bfloat16, medians of {options.rounds} rounds"
            aims = verdict(measured) if device.type == "cuda" else []
            parts.append("\n".join([f"**{title}**", "", table(measured, bus), "", *aims]).rstrip())
            print(f"\n{parts[-1]}\n", flush=True)
    text = "\n\n".join(parts) + "\n"
    if options.out:
        options.out.write_text(text)
    print(parts[0])


if __name__ == "__main__":
    main()
