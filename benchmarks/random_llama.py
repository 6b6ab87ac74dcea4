"""Llama models with random weights in the shapes of released ones: nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a Llama, and the batches it is measured on as (prompts, tokens)."""

    d_model: int
    d_mlp: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_vocab: int
    prefill: tuple[int, int] = (8, 1024)
    decode: tuple[int, int] = (64, 1)


SHAPES = {
    "tiny": LlamaShape(64, 128, 3, 4, 2, 512, (2, 16), (4, 1)),
    "1b": LlamaShape(2048, 8192, 16, 32, 8, 128_256),
    "8b": LlamaShape(4096, 14_336, 32, 32, 8, 128_256),
}
"""`1b` and `8b` have the sizes of Llama 3.2 1B and Llama 3.1 8B."""


def config(shape: LlamaShape) -> Any:
    """The transformers configuration of a shape."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.d_vocab,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_mlp,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        max_position_embeddings=8192,
        rope_theta=500_000.0,
    )


def make(shape: LlamaShape, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A model on the device; the same seed gives every caller on one device the same weights."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config(shape), dtype=dtype, attn_implementation="sdpa").eval()


def save_stub(shape: LlamaShape, folder: Path) -> Any:
    """Writes configuration and a tokenizer of made-up words, for tools that ask for a folder; the tokenizer."""
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(shape.d_vocab)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")),
        unk_token="w0",
        bos_token="w1",
        eos_token="w2",
        pad_token="w0",
    )
    config(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)
