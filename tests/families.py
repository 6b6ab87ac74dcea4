"""Tiny random models of many families, built from configurations; nothing is downloaded."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers as hf
from torch import nn
from transformers.utils import logging

logging.set_verbosity_error()

VOCAB = 97
_IDS: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA: dict[str, Any] = dict(
    _IDS,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
_NEOX: dict[str, Any] = dict(
    _IDS, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64
)
_FALCON: dict[str, Any] = dict(_IDS, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_hidden_size=48)
_OPT: dict[str, Any] = dict(
    _IDS, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64
)

_CONFIGS: dict[str, Any] = {
    "gpt2": lambda: hf.GPT2Config(**_IDS, n_positions=64, n_embd=32, n_layer=3, n_head=4, n_inner=48),
    "llama": lambda: hf.LlamaConfig(**_LLAMA),
    "mistral": lambda: hf.MistralConfig(**_LLAMA, sliding_window=4),
    "qwen2": lambda: hf.Qwen2Config(**_LLAMA),
    "qwen3": lambda: hf.Qwen3Config(**_LLAMA, head_dim=12),
    "gemma2": lambda: hf.Gemma2Config(
        **_LLAMA, head_dim=12, sliding_window=4, query_pre_attn_scalar=12, final_logit_softcapping=5.0
    ),
    "gemma3": lambda: hf.Gemma3TextConfig(**_LLAMA, head_dim=12, sliding_window=4, query_pre_attn_scalar=12),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**_NEOX),
    "gpt_neox_sequential": lambda: hf.GPTNeoXConfig(**_NEOX, use_parallel_residual=False),
    "phi": lambda: hf.PhiConfig(**_NEOX),
    "opt": lambda: hf.OPTConfig(**_OPT, word_embed_proj_dim=32),
    "opt_post_norm": lambda: hf.OPTConfig(**_OPT, word_embed_proj_dim=16, do_layer_norm_before=False),
    "falcon_multi_query": lambda: hf.FalconConfig(**_FALCON),
    "falcon_grouped": lambda: hf.FalconConfig(**_FALCON, num_kv_heads=2, new_decoder_architecture=True),
    "falcon_sequential": lambda: hf.FalconConfig(**_FALCON, multi_query=False, parallel_attn=False, bias=True),
    "olmo2": lambda: hf.Olmo2Config(**_LLAMA),
    "mixtral": lambda: hf.MixtralConfig(**_LLAMA, num_local_experts=4),
    "bert": lambda: hf.BertConfig(
        **{**_NEOX, "eos_token_id": None}, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    ),
}
FAMILIES = tuple(_CONFIGS)
"""Every family by name."""


def make(family: str, seed: int = 0, **config: Any) -> nn.Module:
    """A new float32 model; every parameter is random, norms' too, so that no part acts as an identity."""
    torch.manual_seed(seed)
    settings = _CONFIGS[family]()
    for name, value in config.items():
        setattr(settings, name, value)
    bidirectional = family == "bert"
    module = hf.BertForMaskedLM(settings) if bidirectional else hf.AutoModelForCausalLM.from_config(settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return module.eval()


@cache
def shared(family: str) -> nn.Module:
    """One model of the family for the whole session; a test must leave it as it found it."""
    return make(family)


def prompt(length: int = 9, seed: int = 0, rows: int = 1) -> torch.Tensor:
    """Token ids [rows, length] without special ids."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
