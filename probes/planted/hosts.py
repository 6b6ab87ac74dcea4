"""Plain transformers models whose weights are set by hand, and tokenizers of one word a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probes.planted.record import node_names

Norm = Literal["none", "rms", "layer"]
LARGE_EPS, LARGE_GAIN = 1e12, 1e6
"""A norm of this epsilon and gain is the identity to 1e-7 while the mean square of its input stays below 1e4."""
BOS = "<bos>"
_CONTEXT = 64


@dataclass(frozen=True)
class Host:
    """The shape of a model to be set by hand.

    `rms` and `none` hosts are `LlamaForCausalLM`; `layer` is `GPT2LMHeadModel`, as is `none` with `gpt2=True`.
    """

    layers: int
    width: int
    vocabulary: tuple[str, ...]
    norm: Norm = "none"
    gpt2: bool = False
    heads: int = 4
    d_head: int = 16
    """Of Llama; GPT-2 has width / heads."""

    @property
    def is_gpt2(self) -> bool:
        """Whether it is built as GPT-2."""
        return self.gpt2 or self.norm == "layer"

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.width // self.heads if self.is_gpt2 else self.d_head

    @property
    def nodes(self) -> tuple[str, ...]:
        """Every head and MLP by name."""
        return node_names(self.layers, self.heads)


class LlamaWeights:
    """The weights of a Llama by their part in the stream; all zero but the norms' gains."""

    def __init__(self, host: Host, d_mlp: int) -> None:
        import transformers

        config = transformers.LlamaConfig(
            vocab_size=len(host.vocabulary), hidden_size=host.width, intermediate_size=d_mlp,
            num_hidden_layers=host.layers, num_attention_heads=host.heads, num_key_value_heads=host.heads,
            head_dim=host.d_head, max_position_embeddings=_CONTEXT, tie_word_embeddings=False,
            rms_norm_eps=LARGE_EPS if host.norm == "none" else 1e-6,
            # The slow half of the rotary pairs turns by 1e-8 a token and less.
            rope_parameters={"rope_type": "default", "rope_theta": 1e16}, **_ids(host),
        )  # fmt: skip
        self.host = host
        self.module: Any = transformers.LlamaForCausalLM(config).eval()
        _clear(self.module, host)
        half = host.d_head // 2
        slow = range(half // 2 - 1, half)
        self.dims = [dim for pair in reversed(slow) for dim in (pair, pair + half)]
        """Dimensions of a head that hardly turn with position."""
        self.blocks = self.module.model.layers
        self.final_norm = self.module.model.norm
        self.embedding = self.module.model.embed_tokens.weight
        self.unembedding = self.module.lm_head.weight

    def norms(self, layer: int) -> tuple[nn.Module, nn.Module]:
        """Return the norm before attention and the one before the MLP."""
        return self.blocks[layer].input_layernorm, self.blocks[layer].post_attention_layernorm

    def attention_output(self, layer: int) -> nn.Module:
        """Return the module that takes the heads' values to the stream."""
        return self.blocks[layer].self_attn.o_proj

    def set_reads(self, layer: int, head: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Set what a head reads; rows [rank, d_model] of `query` and `key`, [d_value, d_model] of `value`."""
        attention, first = self.blocks[layer].self_attn, head * self.host.d_head
        rows = [first + dim for dim in self.dims[: len(query)]]
        attention.q_proj.weight[rows] = query * self.host.d_head**0.5
        attention.k_proj.weight[rows] = key
        attention.v_proj.weight[first : first + len(value)] = value

    def set_writes(self, layer: int, head: int, output: Float[Tensor, "d_model d_value"]) -> None:
        """Set what a head writes."""
        first = head * self.host.d_head
        self.blocks[layer].self_attn.o_proj.weight[:, first : first + output.shape[1]] = output

    def set_mlp(self, layer: int, gate: Tensor, up: Tensor, down: Tensor) -> None:
        """Set an MLP; rows [unit, d_model] of `gate` and `up`, `down` [d_model, unit]."""
        mlp = self.blocks[layer].mlp
        mlp.gate_proj.weight[: len(gate)], mlp.up_proj.weight[: len(up)] = gate, up
        mlp.down_proj.weight[:, : down.shape[1]] = down

    def activations(self, x: Float[Tensor, "*rows d_model"], gate: Tensor, up: Tensor) -> Float[Tensor, "*rows unit"]:
        """Return what units of these rows give on a normed stream."""
        return nn.functional.silu(x @ gate.T) * (x @ up.T)

    def set_positions(self, positions: Float[Tensor, "pos d_model"]) -> None:
        """Refuse position vectors, which Llama does not have.

        Raises:
            ValueError: one that is not zero.
        """
        if positions.abs().max() > 0:
            raise ValueError("a Llama host has no position vectors; use a GPT-2 host")


class Gpt2Weights:
    """The weights of a GPT-2 by their part in the stream; all zero but the norms' gains."""

    def __init__(self, host: Host, d_mlp: int) -> None:
        import transformers

        config = transformers.GPT2Config(
            vocab_size=len(host.vocabulary), n_embd=host.width, n_inner=d_mlp, n_layer=host.layers,
            n_head=host.heads, n_positions=_CONTEXT, tie_word_embeddings=False,
            layer_norm_epsilon=LARGE_EPS if host.norm == "none" else 1e-5,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **_ids(host),
        )  # fmt: skip
        self.host = host
        self.module: Any = transformers.GPT2LMHeadModel(config).eval()
        _clear(self.module, host)
        self.dims = list(range(host.head_width))
        self.blocks = self.module.transformer.h
        self.final_norm = self.module.transformer.ln_f
        self.embedding = self.module.transformer.wte.weight
        self.unembedding = self.module.lm_head.weight

    def norms(self, layer: int) -> tuple[nn.Module, nn.Module]:
        """Return the norm before attention and the one before the MLP."""
        return self.blocks[layer].ln_1, self.blocks[layer].ln_2

    def attention_output(self, layer: int) -> nn.Module:
        """Return the module that takes the heads' values to the stream."""
        return self.blocks[layer].attn.c_proj

    def set_reads(self, layer: int, head: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Set what a head reads; rows [rank, d_model] of `query` and `key`, [d_value, d_model] of `value`."""
        weight, width = self.blocks[layer].attn.c_attn.weight, self.host.width
        first = head * self.host.head_width
        for third, rows in enumerate((query * self.host.head_width**0.5, key, value)):
            start = third * width + first
            weight[:, start : start + len(rows)] = rows.T

    def set_writes(self, layer: int, head: int, output: Float[Tensor, "d_model d_value"]) -> None:
        """Set what a head writes."""
        first = head * self.host.head_width
        self.blocks[layer].attn.c_proj.weight[first : first + output.shape[1]] = output.T

    def set_mlp(self, layer: int, gate: Tensor, up: Tensor, down: Tensor) -> None:
        """Set an MLP; rows [unit, d_model] of `gate`, `down` [d_model, unit]; GPT-2 has no second factor."""
        mlp = self.blocks[layer].mlp
        mlp.c_fc.weight[:, : len(gate)] = gate.T
        mlp.c_proj.weight[: down.shape[1]] = down.T

    def activations(self, x: Float[Tensor, "*rows d_model"], gate: Tensor, up: Tensor) -> Float[Tensor, "*rows unit"]:
        """Return what units of these rows give on a normed stream."""
        return nn.functional.gelu(x @ gate.T, approximate="tanh")

    def set_positions(self, positions: Float[Tensor, "pos d_model"]) -> None:
        """Set the vectors added at each position."""
        self.module.transformer.wpe.weight[: len(positions)] = positions


Weights = LlamaWeights | Gpt2Weights


def weights(host: Host, d_mlp: int) -> Weights:
    """Return the empty model of a host with `d_mlp` units in each MLP."""
    with torch.random.fork_rng():
        return Gpt2Weights(host, d_mlp) if host.is_gpt2 else LlamaWeights(host, d_mlp)


def tokenizer(vocabulary: tuple[str, ...]) -> Any:
    """Return a fast tokenizer of one word a token; it begins a text with BOS where the vocabulary has it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token=vocabulary[0]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if BOS not in vocabulary:
        return PreTrainedTokenizerFast(tokenizer_object=words)
    words.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary.index(BOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token=BOS)


def _ids(host: Host) -> dict[str, int | None]:
    bos = host.vocabulary.index(BOS) if BOS in host.vocabulary else None
    return {"bos_token_id": bos, "eos_token_id": None, "pad_token_id": None}


def _clear(module: Any, host: Host) -> None:
    gain = LARGE_GAIN if host.norm == "none" else 1.0
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            is_gain = name.endswith("weight") and ("norm" in name or ".ln_" in name)
            parameter.fill_(gain if is_gain else 0.0).requires_grad_(False)
