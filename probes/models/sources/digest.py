"""The name of a model's weights: one digest wherever weights and configuration are equal, in every process and on every device."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from probes.errors import ModelError

COSMETIC = frozenset(
    {
        "_name_or_path",
        "_model_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "architectures", "auto_map",
        "dtype", "torch_dtype", "_attn_implementation", "_attn_implementation_autoset", "attn_implementation",
        "_attn_implementation_internal", "_experts_implementation", "output_attentions", "output_hidden_states",
        "output_router_logits", "return_dict", "use_return_dict", "use_cache", "gradient_checkpointing",
        "initializer_range", "initializer_factor", "id2label", "label2id", "problem_type", "task_specific_params",
        "finetuning_task", "tokenizer_class", "bos_token_id", "eos_token_id", "sep_token_id", "pretraining_tp",
        "attention_dropout", "attention_probs_dropout_prob", "hidden_dropout", "hidden_dropout_prob", "attn_pdrop",
        "embd_pdrop", "resid_pdrop", "classifier_dropout", "summary_first_dropout", "chunk_size_feed_forward",
        "generation_config",
    }
)  # fmt: skip
"""Configuration fields that cannot change a forward in evaluation; every other field enters the digest."""


Fetch = Callable[[str], Tensor]
"""The data of a tensor that the model keeps elsewhere, by its name."""


def weights_digest(module: nn.Module, fetch: Fetch | None = None) -> str:
    """Return the xxh3_128, as 32 hex digits, of every parameter, persistent buffer and configuration field of a model.

    Tensors enter by name, dtype, shape and bytes, sorted by name; tied tensors enter once, under the first of their
    names. Two models with one digest compute the same numbers, up to the attention implementation and the device.

    Args:
        module: The model.
        fetch: Gives the data of tensors on the meta device, one at a time, so that the model need not fit in memory.

    Raises:
        ModelError: a tensor without data (weights left on the meta device) and no `fetch`.
    """
    digest = Digest(module)
    for name, tensor in distinct_tensors(module):
        if tensor.is_meta and fetch is None:
            raise ModelError(f"weight {name!r} holds no data; load the model with its weights")
        digest.add(name, fetch(name) if tensor.is_meta and fetch else tensor)
    return digest.finish()


class Digest:
    """A weights digest in the making; tensors are added in the order of `distinct_tensors`."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._state = module, xxhash.xxh3_128()

    def add(self, name: str, tensor: Tensor) -> None:
        """Add the next tensor."""
        self._state.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        for part in byte_parts(tensor):
            self._state.update(part)

    def finish(self) -> str:
        """Add the configuration, and return the digest as 32 hex digits."""
        self._state.update(canonical_config(self._module).encode())
        return str(self._state.hexdigest())


def canonical_config(module: Any) -> str:
    """Return the fields of `module.config` that decide the computation, as JSON with sorted keys; `{}` without a config."""
    config = getattr(module, "config", None)
    fields = config.to_dict() if config is not None else {}
    return json.dumps(_substance(fields), sort_keys=True, separators=(",", ":"), default=str)


def _substance(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {str(key): _substance(item) for key, item in value.items() if key not in COSMETIC}
        # A field that a newer library adds is None until something uses it.
        return {key: item for key, item in kept.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_substance(item) for item in value]
    return value


def distinct_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Give the tensors that a digest is made of, by name in sorted order, tied ones once; some may be on the meta device."""
    seen: set[tuple[Any, ...]] = set()
    ties: Mapping[str, str] = getattr(module, "all_tied_weights_keys", None) or {}
    state = sorted((name, tensor) for name, tensor in module.state_dict().items() if isinstance(tensor, Tensor))
    elsewhere = {ties.get(name, name) for name, tensor in state if tensor.device.type == "meta"}
    for name, tensor in state:
        place = storage_of(tensor)
        if ties.get(name, name) in elsewhere:
            # A tensor without data has no address to know it by.
            place = ("tied", ties.get(name, name))
        if not tensor.numel() or place not in seen:
            seen.add(place)
            yield name, tensor


def storage_of(tensor: Tensor) -> tuple[Any, ...]:
    """What two tensors have in common where they are the same memory read in the same way."""
    return (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)


def rows_digest(rows: Iterable[Tensor]) -> str:
    """Return a hash of rows of weights, which a file changed under the same inode, size and time would change."""
    state = xxhash.xxh3_128()
    for row in rows:
        for part in byte_parts(row):
            state.update(part)
    return str(state.hexdigest())


def byte_parts(tensor: Tensor, limit: int = 1 << 28) -> Iterator[Any]:
    """Give the bytes of a tensor as numpy arrays of at most `limit` bytes."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, flat.numel(), limit):
        yield flat[start : start + limit].cpu().numpy()
