"""Maps of programs: block-runs beside their formula and programs run whole, the processor seconds of both, and prompts run as one tree."""

from __future__ import annotations

import argparse
from pathlib import Path

import json_line
import random_llama
import torch
from side_by_side import best
from torch import Tensor

from analyses.layer_programs.maps import jump_cells, jump_formula, skip_programs
from probes.blocks.cached_prompt import CachedPrompt
from probes.blocks.prompt_tree import PromptTree
from probes.blocks.rerouting import Caller, call_blocks
from probes.edits.program_runs import run_programs, run_step
from probes.edits.programs import Program, jump
from probes.models.backends.native import NativeModel

VOCABULARY = 512


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


def skips_formula(n: int) -> int:
    """Return the block-runs of `skip_programs` of all blocks: those of the single skips, and those of the pairs beyond them."""
    return n * (n - 1) // 2 + n * (n - 1) * (n - 2) // 6


def prompts_of(count: int, tokens: int) -> list[list[int]]:
    """Return prompts of which each sixth begins like the next five, as questions of one template do: half of each is its own."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(0, VOCABULARY, (count, tokens), generator=generator).tolist()
    return [drawn[6 * (i // 6)][: tokens // 2] + own[tokens // 2 :] for i, own in enumerate(drawn)]


def together(model: NativeModel, prompts: list[list[int]], programs: list[Program]) -> tuple[Tensor, int, int]:
    """The same programs of many prompts as one tree; (what the first prompt ends in, nodes of the tree, block-runs of a prompt)."""
    tree = PromptTree(model, prompts, [0] * len(prompts))
    finals = torch.empty(len(programs), len(prompts[0]), tree.entering[0].shape[-1])
    runs = model.shape.n_layers
    for part, final, taken in run_programs(programs, tree.entering, tree.through, tree.width):
        finals[part] = final[:, tree.paths[0]]
        runs += taken
    return finals, tree.nodes, runs


def measured(
    model: NativeModel, prompts: list[list[int]], programs: list[Program], formula: int, sample: int
) -> dict[str, object]:
    """Return the block-runs, processor seconds and results of a map of one prompt, whole and resumed, and of all prompts together.

    Args:
        sample: programs that are run whole, evenly spaced; the seconds of all are estimated from theirs.
    """
    tokens = torch.tensor([prompts[0]])
    which = sorted({i * len(programs) // sample for i in range(sample)}) if sample else list(range(len(programs)))
    seconds, (own, runs) = best(lambda: resumed(model, tokens, programs))
    seconds_sample, (whole, sampled) = best(lambda: naive(model, tokens, [programs[i] for i in which]))
    seconds_together, (beside, nodes, tree_runs) = best(lambda: together(model, prompts, programs))
    runs_naive = sum(program.runs for program in programs)
    seconds_naive = seconds_sample * runs_naive / sampled
    difference = max(float((each[which] - whole).abs().max() / whole.abs().max()) for each in (own, beside))
    positions = sum(map(len, prompts))
    return {
        "programs": len(programs), "block_runs": runs, "formula_and_plain_run": formula + model.shape.n_layers,
        "block_runs_naive": runs_naive, "fewer": round(runs_naive / runs, 2),
        "processor_s": round(seconds, 2), "naive_processor_s": round(seconds_naive, 2),
        "naive_from_a_sample_of": len(which), "faster": round(seconds_naive / seconds, 2),
        "prompts": len(prompts), "positions": positions, "positions_run": nodes, "block_runs_of_each_together": tree_runs,
        "together_processor_s_a_prompt": round(seconds_together / len(prompts), 2),
        "together_faster": round(seconds_naive * len(prompts) / seconds_together, 2), "largest_relative_difference": difference,
    }  # fmt: skip


def main() -> None:
    """Writes, for the jump map and for the skips of one and two blocks, one JSON line of what `measured` returns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=6, help="run together; each six begin alike")
    parser.add_argument(
        "--sample", type=int, default=90, help="programs run whole, from which all are estimated; 0 runs all"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    n = options.layers
    torch.manual_seed(0)
    shape = random_llama.LlamaShape(576, 1536, n, 9, 3, VOCABULARY)
    module = random_llama.make(shape, torch.device("cpu"), torch.float32)
    model = NativeModel(module, ref="llama-shape", weights="random")
    prompts = prompts_of(options.prompts, options.tokens)
    maps = {
        "jumps": ([jump(n, *cell) for cell in jump_cells(n)], jump_formula(n)),
        "skips of one and two": (skip_programs(n, range(n)), skips_formula(n)),
    }
    records = (
        {"map": name, "layers": n, "tokens": options.tokens} | measured(model, prompts, *each, options.sample)
        for name, each in maps.items()
    )
    json_line.write(options.out, *records)


if __name__ == "__main__":
    main()
