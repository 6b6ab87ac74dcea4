"""CD-T: the full sweep of single nodes to the logits of one prompt, beside a plain mean-ablation sweep of the same nodes."""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from pathlib import Path

import json_line
import random_gpt2
import torch
from torch import Tensor

from analyses.contextual_decomposition.cases import Case, baseline_of
from analyses.contextual_decomposition.scores import PreparedCase, position_sources, to_metric
from probes.decomposition import PRESETS, Baseline, Decomposer, Source, head
from probes.models.backends.native import NativeModel
from probes.points import Address


def peak() -> float:
    """Largest resident memory of this process so far, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2


def decomposed(model: NativeModel, case: Case, baseline: Baseline, sources: list[Source], preset: str) -> Tensor:
    """The relevance of every node, from reading the model's operations on."""
    rules = PRESETS[preset]
    decomposer = Decomposer(model, case.tokens)
    prompt = decomposer.prepare(case.tokens, joint=rules.attention != "frozen")
    return to_metric(decomposer, PreparedCase(case, prompt, baseline), sources, rules)


def ablated(model: NativeModel, case: Case, baseline: Baseline, sources: list[Source]) -> Tensor:
    """The fall of the metric on mean-ablating each node: one whole forward a node."""
    tokens, ids = torch.tensor([case.tokens]), list(case.ids)

    def metric(writes: dict[Address, Callable[[Tensor], Tensor]]) -> float:
        logits: list[Tensor] = []
        model.run(tokens, {Address("logits"): lambda t: logits.append(t[0, -1, ids].clone())}, writes)
        return float(case.metric(logits[0]))

    full, out = metric({}), []
    for (node,) in sources:

        def write(z: Tensor, node=node) -> Tensor:  # type: ignore[no-untyped-def]
            z = z.clone()
            z[0, node.position, node.head] = baseline.z[node.layer, node.position, node.head]
            return z

        out.append(full - metric({Address("z", node.layer): write}))
    return torch.tensor(out)


def main() -> None:
    """Writes seconds, peak memory and the ratio to the ablation sweep as one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--presets", nargs="+", default=["faithful", "paper"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = random_gpt2.make()
    rows = torch.randint(0, 50257, (9, options.tokens), generator=torch.Generator().manual_seed(1)).tolist()
    case = Case(0, tuple(rows[0]), (11,), (12,), tuple(map(tuple, rows[1:])), tuple(range(options.tokens)), "random")
    baseline = baseline_of(model, case.references)
    sources = position_sources([head(layer, h) for layer in range(12) for h in range(12)], case.positions)
    record: dict[str, object] = {"sources": len(sources), "tokens": options.tokens, "threads": options.threads}
    record["peak_gb_before"], scores = round(peak(), 2), {}
    for preset in options.presets:
        started = time.perf_counter()
        scores[preset] = decomposed(model, case, baseline, sources, preset)
        record[f"{preset}_s"] = round(time.perf_counter() - started, 2)
        record[f"{preset}_peak_gb"] = round(peak(), 2)
    started = time.perf_counter()
    effects = ablated(model, case, baseline, sources)
    seconds = time.perf_counter() - started
    record["ablation_s"] = round(seconds, 2)
    for preset in options.presets:
        record[f"{preset}_ratio"] = round(float(record[f"{preset}_s"]) / seconds, 3)  # type: ignore[arg-type]
        record[f"{preset}_forwards"] = round(float(record[f"{preset}_s"]) / seconds * len(sources))  # type: ignore[arg-type]
        pair = torch.stack([scores[preset].float(), effects])
        record[f"{preset}_correlation"] = round(float(torch.corrcoef(pair)[0, 1]), 3)
    json_line.write(options.out, record)


if __name__ == "__main__":
    main()
