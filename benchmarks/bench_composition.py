"""All composition scores of a model of 12 layers and 12 heads: through small factors, and TransformerLens's own."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import json_line
import numpy as np
import torch
from process_memory import apart
from torch import Tensor

KINDS = ("q", "k", "v")


def gpt2_shape() -> torch.nn.Module:
    """A random model of GPT-2 small's shape; its gains are random too."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    module = GPT2LMHeadModel(GPT2Config()).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ".ln_" in name and name.endswith("weight"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def ours(module: torch.nn.Module, kinds: list[str]) -> tuple[float, dict[str, Tensor]]:
    """(seconds from a loaded model to all scores, scores by kind)."""
    from probes.models.backends.native import NativeModel
    from probes.weights.composition import composition_scores
    from probes.weights.head_weights import head_weights

    model = NativeModel(module, ref="gpt2-shape", weights="random")
    started = time.perf_counter()
    heads = head_weights(model, fold_norm=False)
    scores = {kind: composition_scores(heads.ov, heads.reader(kind)).nan_to_num(0.0) for kind in kinds}  # type: ignore[arg-type]
    return time.perf_counter() - started, scores


def theirs(module: torch.nn.Module, kinds: list[str]) -> tuple[float, dict[str, Tensor]]:
    """The same from a TransformerBridge with the model's own weights."""
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers("gpt2", hf_model=module, tokenizer=_tokenizer())
    started = time.perf_counter()
    with torch.no_grad():
        scores = {kind: bridge.all_composition_scores(kind.upper()).scores for kind in kinds}
    return time.perf_counter() - started, scores


def _tokenizer() -> object:
    """The least that TransformerLens accepts; the scores do not need one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    backend = Tokenizer(models.WordLevel({end: 0}, unk_token=end))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, pad_token=end)


def one(who: str, kinds: list[str]) -> tuple[float, dict[str, np.ndarray]]:
    """(seconds, scores by kind) of one side."""
    seconds, scores = (ours if who == "ours" else theirs)(gpt2_shape(), kinds)
    return seconds, {kind: values.detach().numpy() for kind, values in scores.items()}


def main() -> None:
    """Writes seconds, peak memory, their ratio and the largest difference as one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", default="q,k,v")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("runs/bench_composition.json"))
    options = parser.parse_args()
    kinds = options.kinds.split(",")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    record: dict[str, object] = {"kinds": options.kinds, "threads": options.threads}
    seconds, scores = {}, {}
    for who in ("ours", "theirs"):
        # In a process of its own, so that its peak memory is its own.
        (seconds[who], scores[who]), memory = apart(one, options.threads, who, kinds)
        record |= {f"{who}_seconds": round(seconds[who], 2), f"{who}_peak_mib": round(memory["VmHWM"] / 2**20, 2)}
    difference = max(float(np.abs(scores["ours"][kind] - scores["theirs"][kind]).max()) for kind in kinds)
    record |= {"ratio": round(seconds["theirs"] / seconds["ours"], 1), "largest_difference": difference}
    json_line.write(options.out, record)


if __name__ == "__main__":
    main()
