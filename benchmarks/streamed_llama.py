"""A Llama of any size with random weights, written to disk shard by shard."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """The shape of a model."""

    layers: int
    width: int
    vocabulary: int
    dtype: str = "bfloat16"
    """In which it is run; the checkpoint is in bfloat16."""

    @property
    def mlp(self) -> int:
        return -(-self.width * 43 // 16 // 16) * 16

    @property
    def heads(self) -> int:
        return max(1, self.width // 128)


def block(sizes: Sizes, layer: int) -> dict[str, Tensor]:
    d, m = sizes.width, sizes.mlp
    shapes = {
        **dict.fromkeys((f"self_attn.{x}_proj" for x in "qkvo"), (d, d)),
        **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (m, d)),
        "mlp.down_proj": (d, m),
    }
    prefix = f"model.layers.{layer}"
    norms = {f"{prefix}.{name}_layernorm.weight": ones(d) for name in ("input", "post_attention")}
    return {**norms, **{f"{prefix}.{name}.weight": noise(shape, layer) for name, shape in shapes.items()}}


def ones(n: int) -> Tensor:
    return torch.ones(n, dtype=torch.bfloat16)


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + shape[0])
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


def parts(sizes: Sizes) -> Iterator[dict[str, Tensor]]:
    """The checkpoint, one shard in memory at a time."""
    table = (sizes.vocabulary, sizes.width)
    yield {"model.embed_tokens.weight": noise(table, 1000)}
    for layer in range(sizes.layers):
        yield block(sizes, layer)
    yield {"model.norm.weight": ones(sizes.width), "lm_head.weight": noise(table, 1001)}


def write(folder: Path, sizes: Sizes) -> int:
    """Writes the checkpoint; its bytes."""
    weight_map: dict[str, str] = {}
    total, count = 0, sizes.layers + 2
    for number, tensors in enumerate(parts(sizes), 1):
        name = f"model-{number:05d}-of-{count:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
        forget(folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": sizes.width,
        "intermediate_size": sizes.mlp,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.heads,
        "vocab_size": sizes.vocabulary,
        "max_position_embeddings": 4096,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return total


def forget(path: Path) -> None:
    """Drops a file from the page cache, so that the first read of it is from the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
