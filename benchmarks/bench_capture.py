"""Capture of every layer's residual stream on CPU: what it adds to a plain forward, beside other tools.

Every way runs the same prompts through the same float32 weights and ends with the same rows [layer, batch, pos, d_model] in
host memory (and, where its name says so, on disk); they are compared before anything is timed. Peers that are not installed
are named and left out: `pip install 'bathyscope[bench]'`.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import capture_ways as ways
import torch
from side_by_side import race, table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from probes.models import Model, fetch_model, load_model
from probes.points import Address

Run = Callable[[], Tensor | None]
"""Does the work once; gives the rows [layer, batch, pos, d_model] where a way has them at hand."""


def ours_to_memory(model: Model, tokens: Tensor) -> Tensor:
    kept: list[Tensor] = []
    reads = {Address("resid_post", i): (lambda t: kept.append(t.clone())) for i in range(model.shape.n_layers)}
    model.run(tokens, reads)
    return torch.stack(kept)


def with_rows(way: ways.Way) -> Run:
    """The way, and its rows in one tensor, where it has any: both are timed."""

    def run() -> Tensor | None:
        rows = way.run()
        return rows() if rows else None

    return run


def contestants(model: Model, folder: Path, tokens: Tensor, store: Path) -> dict[str, Run]:
    """Every way that could be set up; the others are named with the reason."""
    written = ways.ours_to_store(model, tokens, store / "written")

    def write() -> None:
        written.prepare()
        written.run()

    runs: dict[str, Run] = {
        "plain forward": with_rows(ways.plain(model.module, tokens)),
        "plain forward without logits": with_rows(ways.plain_without_logits(model.module, tokens)),
        "bathyscope, rows in memory": lambda: ours_to_memory(model, tokens),
        "bathyscope, rows in the store": write,
        "bathyscope, read from the store": with_rows(ways.ours_to_store(model, tokens, store / "held")),
        "plain hooks": with_rows(ways.plain_hooks(model, tokens)),
    }
    for name, make in ways.PEERS.items():
        try:
            module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            way = make(module, tokens, folder, AutoTokenizer.from_pretrained(folder))
            runs[way.name] = with_rows(way)
        except Exception as error:
            print(f"left out: {name} ({type(error).__name__}: {' '.join(str(error).split())[:120]})")
    return runs


def agree(runs: dict[str, Run]) -> None:
    """Refuses to time ways whose rows differ."""
    reference = runs["plain hooks"]()
    for name, run in runs.items():
        rows = run()
        if rows is not None:
            error = ((rows - reference).abs().max() / reference.abs().max()).item()
            if rows.shape != reference.shape or error > 1e-4:
                raise SystemExit(
                    f"{name}: rows differ from plain hooks (shape {tuple(rows.shape)}, relative error {error:.1e})"
                )
            print(f"same rows: {name} (relative error {error:.0e})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    folder = fetch_model(options.model)
    model = load_model(options.model, device="cpu", dtype="float32")
    tokens = torch.randint(
        0, model.shape.d_vocab, (options.batch, options.length), generator=torch.Generator().manual_seed(0)
    )
    with tempfile.TemporaryDirectory() as scratch:
        runs = contestants(model, folder, tokens, Path(scratch))
        agree(runs)
        timings = race(runs, options.rounds)
    megabytes = model.shape.n_layers * tokens.numel() * model.shape.d_model * 4 / 2**20
    print(
        f"\n{options.model}, float32, {options.batch} prompts of {options.length} tokens, {megabytes:.0f} MiB of rows,"
    )
    print(
        f"{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}, {options.rounds} rounds\n"
    )
    print(table(timings, "plain forward"))


if __name__ == "__main__":
    main()
