"""Activation patching: the resumed grid beside a whole forward for each cell, ours and TransformerLens's, on the same cells.

bathyscope bench patching [--model gpt2-shape|smollm2-135m] [--first N] [--sample N]

Work is counted in block-rows, one block on one position, and held against the formula; seconds are of the processor. With
`--sample`, ways that take a whole forward for each cell run so many of the cells, drawn at random, and their seconds are those
of all cells at that rate; resumed cells always all run.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import json_line
import pandas as pd
import random_gpt2
import torch
from side_by_side import best
from torch import Tensor

from analyses.causal_patching.cells import Cell, cells_of
from analyses.causal_patching.grid import Sources, addresses, capture_values, whole_forwards, writes_of
from analyses.causal_patching.resumed_grid import ResumedGrid
from probes.blocks.cached_prompt import CachedPrompt
from probes.hooks.forward_hooks import tensor_of
from probes.models import load_model
from probes.models.backends.native import NativeModel
from probes.points import Address

TRANSFORMER_LENS = {
    "resid_pre": ("get_act_patch_resid_pre", ("layer", "pos")),
    "attn_out": ("get_act_patch_attn_out", ("layer", "pos")),
    "mlp_out": ("get_act_patch_mlp_out", ("layer", "pos")),
    "z": ("get_act_patch_attn_head_out_by_pos", ("layer", "pos", "head_index")),
}
"""What TransformerLens calls the same cells, and the axes of its index."""


@contextmanager
def counted(model: NativeModel) -> Iterator[list[int]]:
    """Collect rows times positions of every block's call inside."""
    calls: list[int] = []
    with ExitStack() as stack:
        for layer in range(model.shape.n_layers):
            block = model.anatomy.component("block", layer)
            hook = block.register_forward_hook(lambda *call: calls.append(tensor_of(call[-1]).shape[:2].numel()))
            stack.callback(hook.remove)
        yield calls


def naive(model: NativeModel, corrupted: Sequence[int], start: int, cells: Sequence[Cell], sources: Sources) -> Tensor:
    """One whole forward a cell; logits of the last position, [cells, d_vocab]."""
    rows: list[Tensor] = []
    for cell in cells:
        reads = {Address("logits"): lambda t: rows.append(t[0, -1].clone())}
        model.run(torch.tensor([list(corrupted)]), reads, writes_of([(0, cell)], sources, start))
    return torch.stack(rows)


def resumed(
    model: NativeModel, corrupted: Sequence[int], start: int, cells: Sequence[Cell], sources: Sources
) -> Tensor:
    """The same cells, each resumed from the block after it; logits as `naive`."""
    last = ResumedGrid(CachedPrompt(model, corrupted, start)).last_rows(cells, sources)
    unembedding = model.unembedding()
    with torch.no_grad():
        return torch.nn.functional.linear(unembedding.norm(last), unembedding.weight, unembedding.bias)


def transformer_lens(
    bridge: Any,
    component: str,
    clean: Sequence[int],
    corrupted: Sequence[int],
    cells: Sequence[Cell],
    ids: tuple[int, int],
) -> Tensor:
    """TransformerLens's own patching of the same cells; the logit difference of each."""
    from transformer_lens import patching

    name, axes = TRANSFORMER_LENS[component]
    columns = {
        "layer": [c.layer for c in cells],
        "pos": [c.position for c in cells],
        "head_index": [c.head for c in cells],
    }
    index = pd.DataFrame({axis: columns[axis] for axis in axes})
    function = getattr(patching, name)
    setter = {**function.keywords, "index_axis_names": None}
    with torch.no_grad():
        _, cache = bridge.run_with_cache(torch.tensor([list(clean)]))
        out: Tensor = patching.generic_activation_patch(
            bridge, torch.tensor([list(corrupted)]), cache, lambda logits: logits[0, -1, ids[0]] - logits[0, -1, ids[1]],
            **setter, index_df=index,
        )  # fmt: skip
    return out


def bridge_of(model: NativeModel, folder: Path) -> Any:
    """The same weights behind TransformerLens's bridge."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM

    model.module.save_pretrained(folder)  # type: ignore[operator]
    copy = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    return TransformerBridge.boot_transformers(str(folder), hf_model=copy, tokenizer=model.tokenizer, device="cpu")


def main() -> None:
    """Writes one JSON line: cells, block-rows against the formula, processor seconds of each way, and largest differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("gpt2-shape", "smollm2-135m"), default="gpt2-shape")
    parser.add_argument("--component", choices=tuple(TRANSFORMER_LENS), default="resid_pre")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--first", type=int, default=0, help="the first position at which the prompts differ")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--sample", type=int, help="cells that whole forwards run; all by default")
    parser.add_argument("--no-peer", action="store_true", help="leave TransformerLens out")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model = random_gpt2.make() if options.model == "gpt2-shape" else load_model(options.model)
    assert isinstance(model, NativeModel)
    json_line.write(options.out, measured(model, options))


def measured(model: NativeModel, options: argparse.Namespace) -> dict[str, object]:
    """The record of one model and component."""
    n, first, shape = options.tokens, options.first, model.shape
    draw = torch.Generator().manual_seed(1)
    clean = torch.randint(100, 20000, (n,), generator=draw).tolist()
    corrupted = list(clean)
    corrupted[first] += 1
    cells = cells_of(shape, (options.component,), "by_position", range(first, n))
    sources = Sources(capture_values(model, clean, addresses(cells)), {p: p for p in range(n)})
    unpatched = whole_forwards(model, corrupted, first).unpatched
    ids = int(unpatched.argmax()), int(unpatched.argmin())
    with counted(model) as calls:
        resumed(model, corrupted, first, cells, sources)
    own_rows = sum(calls)
    naive_rows = len(cells) * shape.n_layers * n
    # The cells, and the prompt's own pass that keeps its keys and values.
    expected = sum(cell.block_rows(shape.n_layers, n, first) for cell in cells) + shape.n_layers * n
    own_s, own = best(lambda: resumed(model, corrupted, first, cells, sources), options.repeats)
    some = torch.randperm(len(cells), generator=draw)[: options.sample].sort().values
    sampled = [cells[int(i)] for i in some]
    own, scale = own[some], len(cells) / len(sampled)
    naive_s, whole = best(lambda: naive(model, corrupted, first, sampled, sources), options.repeats)
    naive_s *= scale
    record: dict[str, object] = {
        "model": model.ref, "component": options.component, "tokens": n, "first_difference": first, "cells": len(cells),
        "cells_by_whole_forwards": len(sampled),
        "threads": torch.get_num_threads(), "block_rows": own_rows, "block_rows_formula": expected,
        "block_row_ratio": round(naive_rows / own_rows, 2), "formula_ratio": round(naive_rows / expected, 2),
        "resumed_s": round(own_s, 3), "naive_s": round(naive_s, 3), "naive_over_resumed": round(naive_s / own_s, 1),
        "largest_relative_difference": float((own - whole).abs().max() / whole.abs().max()),
    }  # fmt: skip
    if not options.no_peer:
        with tempfile.TemporaryDirectory() as folder:
            bridge = bridge_of(model, Path(folder))
            peer_s, peer = best(
                lambda: transformer_lens(bridge, options.component, clean, corrupted, sampled, ids), options.repeats
            )
            peer_s *= scale
        difference = own[:, ids[0]] - own[:, ids[1]]
        record |= {
            "transformer_lens_s": round(peer_s, 3), "transformer_lens_over_resumed": round(peer_s / own_s, 1),
            "transformer_lens_largest_difference": float((peer - difference).abs().max()),
        }  # fmt: skip
    return record


if __name__ == "__main__":
    main()
