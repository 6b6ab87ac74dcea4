"""The sizes a model configuration states, compared with the tensors of its checkpoint before any module is built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from probes.errors import ModelError, shown
from probes.models.sources.tensor_files import Shapes

LAYERS = frozenset({"num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"})
"""Names under which the libraries' families state how many blocks they have."""
WIDTHS = frozenset({
    "hidden_size", "n_embd", "d_model", "dim", "model_dim", "word_embed_proj_dim",
    "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff", "hidden_dim",
    "vocab_size", "num_attention_heads", "num_heads", "n_head", "n_heads", "encoder_attention_heads",
    "decoder_attention_heads", "num_key_value_heads", "num_kv_heads", "n_head_kv", "head_dim", "rotary_dim",
})  # fmt: skip
"""Names of sizes of which at least one tensor of a checkpoint has an axis as long."""
POSITIONS = frozenset({"max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length"})
OPTIONAL = frozenset({"n_inner", "intermediate_size", "head_dim", "rotary_dim", "num_key_value_heads", "num_kv_heads"})
"""Sizes that a family derives from others where they are null."""

PACKING = 8
"""Most values that quantisation packs into one: an axis may be so many times shorter than the size it stands for."""
MOST = 2**31 - 1


def check_sizes(config: Mapping[str, Any], shapes: Shapes, where: str) -> None:
    """Refuse a configuration whose sizes are no whole numbers from 1, or larger than its tensors can be.

    A module built from such sizes may take all memory before the library sees that no tensor fits.

    Args:
        config: The configuration as it is written.
        shapes: The shape of each tensor by name.
        where: The file, for messages.

    Raises:
        ModelError: the first such size, with the legal values.
    """
    longest = max((max(shape, default=1) for shape in shapes.values()), default=1)
    highest = dict.fromkeys(LAYERS, len(shapes)) | dict.fromkeys(WIDTHS, PACKING * longest)
    highest |= dict.fromkeys(POSITIONS, MOST)
    for part in _parts(config):
        for name in highest.keys() & part.keys():
            _check_size(name, part[name], highest[name], where)
        _check_heads(part, where)


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A configuration and those nested in it (of text, of vision)."""
    yield config
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _parts(value)


def _check_size(name: str, value: Any, high: int, where: str) -> None:
    if value is None and name in OPTIONAL:
        return
    for size in value if isinstance(value, list) and value else [value]:
        if type(size) is not int or not 1 <= size <= high:
            because = "" if high == MOST else ", the most that the tensors of its checkpoint allow"
            raise ModelError(
                f"{where}: {name} is {shown(size)}; legal are whole numbers from 1 to {high:,}{because}; "
                "the configuration is damaged or of another checkpoint: fetch the model again"
            )


def _check_heads(part: Mapping[str, Any], where: str) -> None:
    heads = next((part[name] for name in ("num_attention_heads", "n_head", "num_heads") if name in part), None)
    width = next((part[name] for name in ("hidden_size", "n_embd", "d_model") if name in part), None)
    keys = part.get("num_key_value_heads")
    if type(heads) is int and type(width) is int and part.get("head_dim") is None and width % heads:
        raise ModelError(f"{where}: {heads} heads do not divide a width of {width}; the configuration is damaged")
    if type(heads) is int and type(keys) is int and heads % keys:
        raise ModelError(f"{where}: {keys} key heads do not divide {heads} query heads; the configuration is damaged")
