"""How a trained model is kept to a layer: parts frozen at zero, parts swapped between prompts, weights kept off a subspace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probes.module_calls import temporary


@dataclass(frozen=True)
class Node:
    """A head, or the MLP where `head` is None, of one block."""

    layer: int
    head: int | None = None


@dataclass(frozen=True)
class Swap:
    """In rows `rows` the output of `node` at `positions` becomes that of the rows `source`."""

    node: Node
    positions: tuple[int, ...]
    rows: slice
    source: slice


def freeze_mlps(module: Any, keep: Iterable[int]) -> None:
    """Set every MLP to zero, and leave it so, but those of the blocks in `keep`."""
    for layer, block in enumerate(module.model.layers):
        if layer not in set(keep):
            _rest(block.mlp)


def freeze_attention(module: Any, keep: Iterable[int]) -> None:
    """Let the heads of every block rest, and leave them so, but those of the blocks in `keep`."""
    for layer, block in enumerate(module.model.layers):
        if layer not in set(keep):
            _rest(block.self_attn)


def keep_one_head(module: Any, layer: int) -> None:
    """Let all heads of a block but the first write nothing; to be called after each step."""
    with torch.no_grad():
        module.model.layers[layer].self_attn.o_proj.weight[:, module.config.head_dim :] = 0.0


def _rest(part: nn.Module) -> None:
    for parameter in part.parameters():
        nn.init.zeros_(parameter.requires_grad_(False))


@contextmanager
def swapped(module: Any, swaps: Iterable[Swap]) -> Iterator[None]:
    """Within, outputs are swapped as `swaps` say."""
    handles = []
    for swap in swaps:
        block = module.model.layers[swap.node.layer]
        if swap.node.head is None:
            handles.append(block.mlp.register_forward_hook(lambda _, __, out, s=swap: _exchange(out, s, slice(None))))
        else:
            d_head = module.config.head_dim
            columns = slice(swap.node.head * d_head, (swap.node.head + 1) * d_head)
            handles.append(
                block.self_attn.o_proj.register_forward_pre_hook(
                    lambda _, args, s=swap, c=columns: (_exchange(args[0], s, c),)
                )
            )
    with temporary(handles):
        yield


def _exchange(out: Float[Tensor, "batch pos width"], swap: Swap, columns: slice) -> Float[Tensor, "batch pos width"]:
    result = out.clone()
    for position in swap.positions:
        result[swap.rows, position, columns] = out[swap.source, position, columns]
    return result


def keep_off(module: Any, space: Float[Tensor, "d_model k"], after: int) -> None:
    """Project everything that reads the stream after block `after`, the unembedding included, off an orthonormal space.

    What is written into the space by then has no way to the answer but through the norms' scale.
    """
    with torch.no_grad():
        for block in module.model.layers[after + 1 :]:
            attention, mlp = block.self_attn, block.mlp
            for norm, readers in (
                (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                for reader in readers:
                    _project(reader.weight, norm.weight, space)
        _project(module.lm_head.weight, module.model.norm.weight, space)


def _project(weight: Tensor, gain: Tensor, space: Float[Tensor, "d_model k"]) -> None:
    # The norm's gain stands between the stream and the weight, so its product with the weight is what must be off.
    reading = weight * gain
    weight.copy_((reading - reading @ space @ space.T) / gain)
