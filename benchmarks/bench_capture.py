"""Capture of every layer's residual stream on CPU: what it adds to a plain forward, beside other tools.

Every way runs the same prompts through the same float32 weights and ends with the same rows [layer, batch, pos, d_model] in
host memory (and, where its name says so, on disk); they are compared before anything is timed. Peers that are not installed
are named and left out: `pip install 'bathyscope[bench]'`.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from side_by_side import race, table

from probes.capture.needs import Need
from probes.capture.run import capture
from probes.models import Model, fetch_model, load_model
from probes.points import Address
from probes.store import ActivationStore

Rows = Callable[[], Tensor | None]


def plain(model: Model, tokens: Tensor) -> Rows:
    def run() -> None:
        with torch.inference_mode():
            model.module(tokens, use_cache=False)

    return run


def plain_without_logits(model: Model, tokens: Tensor) -> Rows:
    def run() -> None:
        with torch.inference_mode():
            model.module.base_model(tokens, use_cache=False)

    return run


def plain_hooks(model: Model, tokens: Tensor) -> Rows:
    blocks = [model.component("block", layer) for layer in range(model.shape.n_layers)]

    def run() -> Tensor:
        kept: list[Tensor] = []
        hooks = [
            block.register_forward_hook(
                lambda _, __, out: kept.append((out[0] if isinstance(out, tuple) else out).cpu().clone())
            )
            for block in blocks
        ]
        with torch.inference_mode():
            model.module(tokens, use_cache=False)
        for hook in hooks:
            hook.remove()
        return torch.stack(kept)

    return run


def ours_to_memory(model: Model, tokens: Tensor) -> Rows:
    def run() -> Tensor:
        kept: list[Tensor] = []
        reads = {Address("resid_post", i): (lambda t: kept.append(t.clone())) for i in range(model.shape.n_layers)}
        model.run(tokens, reads)
        return torch.stack(kept)

    return run


def ours_to_store(model: Model, tokens: Tensor, folder: Path) -> Rows:
    sequences = [tuple(row) for row in tokens.tolist()]

    def run() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        capture(model, sequences, [Need("resid_post.*")], ActivationStore(folder))

    return run


def ours_read_back(model: Model, tokens: Tensor, folder: Path) -> Rows:
    sequences = [tuple(row) for row in tokens.tolist()]

    def run() -> Tensor:
        rows = capture(model, sequences, [Need("resid_post.*")], ActivationStore(folder))
        return torch.stack([torch.stack(rows.get(f"resid_post.{i}")) for i in range(model.shape.n_layers)])

    return run


def transformer_lens(folder: Path, tokens: Tensor) -> Rows:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bridge = TransformerBridge.boot_transformers(str(folder), hf_model=hf, tokenizer=tokenizer, device="cpu")
    names = [f"blocks.{i}.hook_out" for i in range(bridge.cfg.n_layers)]

    def run() -> Tensor:
        with torch.inference_mode():
            _, cache = bridge.run_with_cache(tokens, names_filter=names, device="cpu")
        return torch.stack([cache[name] for name in names])

    return run


def nnsight(folder: Path, tokens: Tensor) -> Rows:
    from nnsight import TransformersModel

    model = TransformersModel(str(folder), task="text-generation", dispatch=True, dtype=torch.float32)
    layers = list(model.model.layers)

    def run() -> Tensor:
        with model.trace(tokens) as tracer:
            cache = tracer.cache(modules=layers, device=torch.device("cpu"))
            cache.save()
        outputs = [cache[name].output for name in list(cache.keys())]
        return torch.stack([out[0] if isinstance(out, tuple) else out for out in outputs])

    return run


def interp_engine(folder: Path, tokens: Tensor) -> Rows:
    import interp_engine as ie

    model = ie.load_model(str(folder), backend="eager", device="cpu", dtype=torch.float32)
    points = [ie.Address("resid_post", i) for i in range(model.n_layers)]

    def run() -> Tensor:
        cache = ie.capture(model, tokens, points)
        return torch.stack([cache[point] for point in points]).cpu()

    return run


def contestants(model: Model, folder: Path, tokens: Tensor, store: Path) -> dict[str, Rows]:
    """Every way that could be set up; the others are named with the reason."""
    ways: dict[str, Rows] = {
        "plain forward": plain(model, tokens),
        "plain forward without logits": plain_without_logits(model, tokens),
        "bathyscope, rows in memory": ours_to_memory(model, tokens),
        "bathyscope, rows in the store": ours_to_store(model, tokens, store / "written"),
        "bathyscope, read from the store": ours_read_back(model, tokens, store / "held"),
        "plain hooks": plain_hooks(model, tokens),
    }
    peers = {
        "TransformerLens run_with_cache": transformer_lens,
        "nnsight tracer.cache": nnsight,
        "interp-engine capture": interp_engine,
    }
    for name, make in peers.items():
        try:
            ways[name] = make(folder, tokens)
        except Exception as error:
            print(
                f"left out: {name} ({type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''})"
            )
    return ways


def agree(ways: dict[str, Rows]) -> None:
    """Refuses to time ways whose rows differ."""
    reference = ways["plain hooks"]()
    for name, run in ways.items():
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
        ways = contestants(model, folder, tokens, Path(scratch))
        agree(ways)
        timings = race(ways, options.rounds)
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
