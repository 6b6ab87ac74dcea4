"""Maps of programs of one prompt: block-runs beside their formula, programs run whole, and the processor seconds of both."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from analyses.layer_programs.maps import jump_cells, jump_formula
from probes.blocks.cached_prompt import CachedPrompt
from probes.blocks.rerouting import Caller, call_blocks
from probes.edits.program_runs import run_programs, run_step
from probes.edits.programs import Program, jump
from probes.models.backends.native import NativeModel

sys.path.insert(0, str(Path(__file__).parent))

import random_llama


def naive(model: NativeModel, tokens: Tensor, programs: list[Program]) -> tuple[Tensor, int]:
    """Each program run whole, from the embedding on; (what leaves the last step [program, pos, d_model], block-runs)."""
    runs = 0

    def work(hidden: Tensor, call: Caller) -> Tensor:
        nonlocal runs
        finals = []
        for program in programs:
            stream = hidden
            for step in program.steps:
                stream = run_step(call, step, stream)
                runs += len(step)
            finals.append(stream[0])
        return torch.stack(finals)

    with torch.no_grad():
        return call_blocks(model, tokens, work, use_cache=False), runs


def resumed(model: NativeModel, tokens: Tensor, programs: list[Program]) -> tuple[Tensor, int]:
    """The same programs, each from where it leaves the plain order; rows of a block run together. The plain run counts."""
    prompt = CachedPrompt(model, tokens[0].tolist(), 0)
    finals = torch.empty(len(programs), *prompt.entering[0].shape)
    runs = model.shape.n_layers
    for part, final, taken in run_programs(
        programs, prompt.entering, lambda layer, rows: prompt.through(layer, rows, {})
    ):
        finals[part] = final
        runs += taken
    return finals, runs


def two_skips(n_layers: int) -> list[Program]:
    """Return every program without one block, and without two."""
    both = itertools.combinations_with_replacement(range(n_layers), 2)
    return [Program.of(block for block in range(n_layers) if block not in pair) for pair in both]


def skips_formula(n: int) -> int:
    """Return the block-runs of `two_skips`: those of the single skips, and those of the pairs beyond them."""
    return n * (n - 1) // 2 + n * (n - 1) * (n - 2) // 6


def measured(model: NativeModel, tokens: Tensor, programs: list[Program], formula: int) -> dict[str, object]:
    """Return the block-runs, processor seconds and results of a map in both ways."""
    seconds, finals, runs = {}, {}, {}
    for how in (resumed, naive):
        started = time.process_time()
        finals[how.__name__], runs[how.__name__] = how(model, tokens, programs)
        seconds[how.__name__] = time.process_time() - started
    difference = (finals["naive"] - finals["resumed"]).abs().max() / finals["naive"].abs().max()
    return {
        "programs": len(programs), "block_runs": runs["resumed"], "formula_and_plain_run": formula + model.shape.n_layers,
        "block_runs_naive": runs["naive"], "fewer": round(runs["naive"] / runs["resumed"], 2),
        **{f"{name}_processor_s": round(value, 2) for name, value in seconds.items()},
        "faster": round(seconds["naive"] / seconds["resumed"], 2), "largest_relative_difference": float(difference),
    }  # fmt: skip


def main() -> None:
    """Writes, for the jump map and for the skips of one and two blocks, one JSON line of what `measured` returns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    n = options.layers
    torch.manual_seed(0)
    module = random_llama.make(random_llama.LlamaShape(576, 1536, n, 9, 3, 512), torch.device("cpu"), torch.float32)
    model = NativeModel(module, ref="llama-shape", weights="random")
    tokens = torch.randint(0, 512, (1, options.tokens), generator=torch.Generator().manual_seed(1))
    maps = {
        "jumps": ([jump(n, *cell) for cell in jump_cells(n)], jump_formula(n)),
        "skips of one and two": (two_skips(n), skips_formula(n)),
    }
    lines = [
        json.dumps({"map": name, "layers": n, "tokens": options.tokens, **measured(model, tokens, *programs)})
        for name, programs in maps.items()
    ]
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
