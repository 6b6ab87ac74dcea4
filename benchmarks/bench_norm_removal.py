"""Norms removed from small models trained here on English text: by the schedule, all at once, and not at all.

The text is Python's own language reference, which every CPython carries (`pydoc_data.topics`, 465 kB of English prose),
so nothing is downloaded; a byte-pair tokenizer of 512 tokens is trained on it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from pydoc_data import topics
from typing import Any

import json_line
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from analyses.norm_removal import NormRemoval
from analyses.norm_removal.schedule import Schedule
from analyses.norm_removal.text import make_blocks
from analyses.norm_removal.training import Setting, train
from probes.models import load_model
from probes.models.backends.native import NativeModel
from probes.store import ActivationStore

VOCAB, BLOCK, BATCH = 512, 64, 16
ENDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "vocab_size": VOCAB}


def reference_text() -> str:
    """The language reference of the running Python."""
    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def tokenizer_of(text: str) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer trained on `text`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def untrained(family: str, layers: int, width: int) -> torch.nn.Module:
    """A GPT-2-shape or Llama-shape model with random weights."""
    if family == "gpt2":
        quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel(GPT2Config(**ENDS, **quiet, n_positions=BLOCK, n_embd=width, n_layer=layers, n_head=4))
    sizes = {"hidden_size": width, "intermediate_size": width * 8 // 3, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": BLOCK}
    return LlamaForCausalLM(LlamaConfig(**ENDS, **sizes, **heads, tie_word_embeddings=True))


def main() -> None:
    """Writes one JSON line: losses on held-out text, gaps to the control, and the exported folder's difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=("gpt2", "llama"), default="gpt2")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--pretraining", type=int, default=1800, help="steps from random weights")
    parser.add_argument("--steps", type=int, default=200, help="steps of each removal and of the control")
    parser.add_argument("--out", type=Path, help="keeps the report and the exported model")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    started = time.process_time()
    text = reference_text()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        source = Path(scratch) / "reference.txt"
        source.write_text(text, encoding="utf-8")
        tokenizer = tokenizer_of(text)
        model = NativeModel(
            untrained(options.family, options.layers, options.width).eval(),
            tokenizer,
            ref=options.family,
            weights="untrained",
        )
        blocks = make_blocks(str(source), tokenizer, BLOCK, 10**9)
        schedule = Schedule(
            "from_scratch", (), options.pretraining, 3e-3, 3e-4, options.pretraining // 20, weight_decay=0.1
        )
        setting = Setting(BATCH, BATCH, False, False, 0, 100, str(folder / "checkpoints"))
        trained = train(model.anatomy, blocks, schedule, setting)
        base = folder / f"{options.family}-trained"
        trained.anatomy.map.module.save_pretrained(base)  # type: ignore[operator]
        tokenizer.save_pretrained(base)
        analysis = NormRemoval(
            schedule="proportional", steps=options.steps, text=str(source), block=BLOCK, batch=BATCH, micro_batch=BATCH,
            learning_rate=1e-3, at_once=True, export=str(folder / f"{options.family}-norm-free"),
            checkpoints=str(folder / "checkpoints"),
        )  # fmt: skip
        prompts = [tuple(row) for row in blocks.held_out[:16].tolist()]
        loaded = load_model(str(base))
        loaded.ref = f"{options.family}, 4 layers, trained on the Python reference"
        result = analysis.run(loaded, prompts, store=ActivationStore(Path(scratch) / "store"))
        if options.out:
            result.save(folder / f"{options.family}-report")
    losses = result.tables["losses"].set_index("variant")
    line = {
        "family": options.family,
        "loss": losses["mean"].round(4).to_dict(),
        "gap_to_control": losses["gap_to_control"].round(4).to_dict(),
        "gap_interval": {v: [round(r["gap_low"], 4), round(r["gap_high"], 4)] for v, r in losses.iterrows()},
        "export_difference": float(result.tables["export"]["difference"].max()),
        "cpu_s": round(time.process_time() - started, 1),
    }
    json_line.write(None, line)


if __name__ == "__main__":
    main()
