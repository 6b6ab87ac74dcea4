"""The lens over every layer and position: vocabulary tiles beside unembedding whole layers.

    bathyscope bench lens --sequences 4 --length 128

Both read the same stored rows of every layer (log-sum-exp, entropy, top token, log-probability of the last layer's top
token); each runs in a process of its own, so that its peak memory is its own. The numbers are compared before the times:
with each other, and each with the same read-out in float64, since two float32 results differ by the errors of both.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from process_memory import Memory, apart
from torch import Tensor

from probes.capture.needs import Need
from probes.capture.run import capture
from probes.lenses import logit
from probes.lenses.row_sums import LOG2
from probes.models import Model, fetch_model, load_model
from probes.points import Address
from probes.store import ActivationStore


@dataclass(frozen=True)
class Measured:
    """What one way took, beside what it found."""

    way: str
    seconds: float
    rise_bytes: int
    """Growth of the resident memory above what the model and the rows take, at its peak."""
    readings: dict[str, np.ndarray]


def tiled(rows: Tensor, model: Model, ids: Tensor) -> dict[str, np.ndarray]:
    read = logit.read(rows, model.unembedding(), ids=ids[:, None], top_k=1)
    return {
        "log_z": read.log_z.numpy(), "entropy": read.entropy_bits.numpy(), "top": read.top_ids[:, 0].numpy(),
        "logprob": read.logprobs[:, 0].numpy(),
    }  # fmt: skip


@torch.inference_mode()
def naive(rows: Tensor, model: Model, ids: Tensor) -> dict[str, np.ndarray]:
    """All positions of a layer unembedded into one tensor of logits, then its softmax, layer by layer, as lens scripts do."""
    unembedding = model.unembedding()
    n_layers = model.shape.n_layers
    parts = []
    for layer, layer_ids in zip(rows.chunk(n_layers), ids.chunk(n_layers), strict=True):
        logits = unembedding.norm(layer) @ unembedding.weight.T
        if unembedding.softcap is not None:
            logits = torch.tanh(logits / unembedding.softcap) * unembedding.softcap
        logprobs = logits.log_softmax(-1)
        probs = logprobs.exp()
        entropy = -torch.special.xlogy(probs, probs).sum(-1) / LOG2
        parts.append((logits.logsumexp(-1), entropy, logits.argmax(-1), logprobs.gather(1, layer_ids[:, None])[:, 0]))
    names = ("log_z", "entropy", "top", "logprob")
    return {name: torch.cat(column).numpy() for name, column in zip(names, zip(*parts, strict=True), strict=True)}


WAYS = {"tiled": tiled, "naive": naive}
COLUMNS = ("log_z", "entropy", "logprob")


@torch.inference_mode()
def float64(rows: Tensor, model: Model, ids: Tensor) -> dict[str, np.ndarray]:
    """The same numbers with logits, their exponentials and all sums in float64, from the same float32 normalised rows."""
    unembedding = model.unembedding()
    weight, parts = unembedding.weight.double(), []
    for few, few_ids in zip(logit.normalized(rows, unembedding).split(128), ids.split(128), strict=True):
        logits = few.double() @ weight.T
        if unembedding.softcap is not None:
            logits = torch.tanh(logits / unembedding.softcap) * unembedding.softcap
        logprobs = logits.log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1) / LOG2
        parts.append((logits.logsumexp(-1), entropy, logprobs.gather(1, few_ids[:, None])[:, 0]))
    return {name: torch.cat(column).numpy() for name, column in zip(COLUMNS, zip(*parts, strict=True), strict=True)}


def compare(ours: Measured, theirs: Measured, exact: dict[str, np.ndarray], chosen: np.ndarray) -> str:
    """Markdown: largest differences, relative where a number exceeds 1, of both ways with float64 and with each other."""

    def apart(a: np.ndarray, b: np.ndarray) -> float:
        return float((np.abs(a - b) / np.maximum(1, np.abs(b))).max())

    lines = ["| | tiled and float64 | naive and float64 | tiled and naive |", "|---|---|---|---|"]
    for name in COLUMNS:
        a, b = ours.readings[name], theirs.readings[name]
        errors = (apart(a[chosen], exact[name]), apart(b[chosen], exact[name]), apart(a, b))
        lines.append(f"| {name} | " + " | ".join(f"{error:.1e}" for error in errors) + " |")
    a, b, e = (np.exp(readings["logprob"]) for readings in (ours.readings, theirs.readings, exact))
    errors = [np.abs(x - y).max() for x, y in ((a[chosen], e), (b[chosen], e), (a, b))]
    lines.append("| probability | " + " | ".join(f"{error:.1e}" for error in errors) + " |")
    return "\n".join(lines)


def measured(way: str, ref: str, folder: str) -> Measured:
    """Read all rows, after a few that do not count."""
    model = load_model(ref)
    inputs = torch.load(Path(folder) / "rows.pt", weights_only=True)
    rows, ids = inputs["rows"], inputs["ids"]
    few = slice(0, model.shape.n_layers)
    WAYS[way](rows[few], model, ids[few])
    with Memory() as memory:
        started = time.perf_counter()
        readings = WAYS[way](rows, model, ids)
        seconds = time.perf_counter() - started
    return Measured(way, seconds, memory.peaks["VmRSS"] - memory.start["VmRSS"], readings)


def write_rows(ref: str, sequences: int, length: int, folder: Path) -> tuple[int, int]:
    """Captures the rows of random prompts; (rows, layers)."""
    model = load_model(ref)
    generator = torch.Generator().manual_seed(0)
    prompts = [
        tuple(torch.randint(3, model.shape.d_vocab, (length,), generator=generator).tolist()) for _ in range(sequences)
    ]
    activations = capture(model, prompts, [Need("resid_post.*")], ActivationStore(folder / "store"))
    layers = [activations.packed(Address("resid_post", layer)).float() for layer in range(model.shape.n_layers)]
    best = logit.read(layers[-1], model.unembedding(), top_k=1).top_ids[:, 0]
    rows = torch.cat(layers)
    torch.save({"rows": rows, "ids": best.repeat(len(layers))}, folder / "rows.pt")
    return len(rows), len(layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, nargs="+", default=[128])
    parser.add_argument("--reference-rows", type=int, default=4096, help="rows, evenly spread, read in float64 too")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    flags = parser.parse_args()
    fetch_model(flags.model, accept_license=True)
    for length in flags.length:
        with tempfile.TemporaryDirectory() as name:
            n_rows, n_layers = write_rows(flags.model, flags.sequences, length, Path(name))
            ours, theirs = (apart(measured, flags.threads, way, flags.model, name)[0] for way in WAYS)
            inputs = torch.load(Path(name) / "rows.pt", weights_only=True)
        chosen = np.unique(np.linspace(0, n_rows - 1, min(n_rows, flags.reference_rows)).astype(np.int64))
        exact = float64(inputs["rows"][chosen], load_model(flags.model), inputs["ids"][chosen])
        print(f"\n{flags.model}, {n_layers} layers x {flags.sequences} x {length} tokens = {n_rows:,} rows")
        print(f"largest differences (with float64 on {len(chosen):,} rows), relative where a number exceeds 1:")
        print(compare(ours, theirs, exact, chosen))
        print(f"same top token: {(ours.readings['top'] == theirs.readings['top']).mean():.4%}")
        print("| way | seconds | peak above the rows, MiB |\n|---|---|---|")
        for way in (ours, theirs):
            print(f"| {way.way} | {way.seconds:.2f} | {way.rise_bytes / 2**20:.0f} |")
        ratio = theirs.seconds / ours.seconds
        print(
            f"ratio: tiled is {ratio:.2f}x as fast, with {theirs.rise_bytes / max(1, ours.rise_bytes):.1f}x less memory"
        )


if __name__ == "__main__":
    main()
