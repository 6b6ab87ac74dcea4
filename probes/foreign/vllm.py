"""Hidden states that vLLM's `extract_hidden_states` method wrote (docs.vllm.ai, "Hidden State Extraction")."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from probes.cache_folder import expanded
from probes.errors import StoreError, one_line, shown
from probes.foreign.rows import Imported, Rows, Tokens, checked, key_of, put_all, token_ids
from probes.input_files import kind_of
from probes.points import Address
from probes.store import ActivationStore

MOST_LAYERS = 10_000
"""Layers of the deepest model thought of; a larger id is a slip."""
STATES, IDS = "hidden_states", "token_ids"


def import_vllm(path: str | Path, store: ActivationStore, *, model: str, layers: Sequence[int]) -> Imported:
    """Import the rows of every request file.

    Each file holds `hidden_states` [pos, layer, d_model] and `token_ids` [pos]. A layer id of vLLM names the stream that
    enters that layer (the number of layers names what leaves the last), so id k becomes `resid_post.(k-1)`, and id 0 `resid_pre.0`.

    Args:
        path: one file, or the folder vLLM wrote to.
        model: the model that was run, by which the rows are known.
        layers: the layer ids given to vLLM, in their order; the files do not say them.

    Raises:
        StoreError: no such files, files of another form, or ids that do not match them.
    """
    path = expanded(path)
    files = (
        [path] if kind_of(path) == "file" else sorted(path.rglob("*.safetensors")) if kind_of(path) == "folder" else []
    )
    if not files:
        raise StoreError(
            f"{shown(str(path))} holds no *.safetensors file; give the shared_storage_path that vLLM wrote to"
        )
    if (
        len(set(layers)) != len(layers)
        or not layers
        or not all(type(i) is int and 0 <= i < MOST_LAYERS for i in layers)
    ):
        raise StoreError(
            f"layers {shown(list(layers))}: give each layer id once, from 0, as in eagle_aux_hidden_state_layer_ids"
        )
    keys = [key_of(Address("resid_pre", layer).canonical) for layer in layers]
    return put_all(store, model, "vllm", _sequences(files, keys))


def _sequences(files: Sequence[Path], keys: Sequence[str]) -> Iterator[tuple[Tokens, Rows]]:
    for file in files:
        states, ids = _read(file)
        if states.dim() != 3 or states.shape[1] != len(keys):
            raise StoreError(
                f"{file}: {STATES} is {tuple(states.shape)}, not [tokens, {len(keys)} layers, width]; "
                f"{len(keys)} layer ids were given"
            )
        tokens = token_ids(ids, f"{file}, {IDS}")
        yield tokens, {key: checked(states[:, i], key, tokens, str(file)).contiguous() for i, key in enumerate(keys)}


def _read(file: Path) -> tuple[Tensor, Tensor]:
    if kind_of(file) != "file":
        raise StoreError(f"{file} is a {kind_of(file)}, not a file of vLLM's; move it out of the folder")
    try:
        with safe_open(file, framework="pt") as opened:
            names = set(opened.keys())
            if not {STATES, IDS} <= names:
                raise StoreError(f"{file}: holds {shown(sorted(names))}; a request of vLLM's has {STATES} and {IDS}")
            return opened.get_tensor(STATES), opened.get_tensor(IDS)
    except StoreError:
        raise
    except Exception as error:  # SafetensorError, and what torch makes of a header that lies.
        raise StoreError(
            f"{file}: not a whole safetensors file ({one_line(error)}); has vLLM finished writing it?"
        ) from error
