"""Hidden states that vLLM's `extract_hidden_states` method wrote (docs.vllm.ai, "Hidden State Extraction")."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from probes.errors import StoreError
from probes.foreign.rows import Imported, Rows, Tokens, checked, key_of, put_all
from probes.points import Address
from probes.store import ActivationStore

STATES, IDS = "hidden_states", "token_ids"


def import_vllm(path: str | Path, store: ActivationStore, *, model: str, layers: Sequence[int]) -> Imported:
    """Rows of every request file into the store.

    Each file holds `hidden_states` [pos, layer, d_model] and `token_ids` [pos]. A layer id of vLLM names the stream that
    enters that layer (the number of layers names what leaves the last), so id k becomes `resid_post.(k-1)`, and id 0 `resid_pre.0`.

    Args:
        path: one file, or the folder vLLM wrote to.
        model: the model that was run, as the rows shall be known.
        layers: the layer ids given to vLLM, in their order; the files do not say them.

    Raises:
        StoreError: no such files, files of another form, or ids that do not match them.
    """
    path = Path(path).expanduser()
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    if not files:
        raise StoreError(f"{str(path)!r} holds no *.safetensors file; give the shared_storage_path that vLLM wrote to")
    if len(set(layers)) != len(layers) or not layers or min(layers) < 0:
        raise StoreError(f"layers {list(layers)}: give each layer id once, as in eagle_aux_hidden_state_layer_ids")
    keys = [key_of(Address("resid_pre", layer).canonical) for layer in layers]
    return put_all(store, model, "vllm", _sequences(files, keys))


def _sequences(files: Sequence[Path], keys: Sequence[str]) -> Iterator[tuple[Tokens, Rows]]:
    for file in files:
        try:
            with safe_open(file, framework="pt") as held:
                names = set(held.keys())
                if not {STATES, IDS} <= names:
                    raise StoreError(f"{file}: holds {sorted(names)}; a request of vLLM's has {STATES} and {IDS}")
                states, ids = held.get_tensor(STATES), held.get_tensor(IDS)
        except (SafetensorError, OSError) as error:
            raise StoreError(
                f"{file}: not a whole safetensors file ({error}); has vLLM finished writing it?"
            ) from error
        if states.dim() != 3 or states.shape[1] != len(keys):
            raise StoreError(
                f"{file}: {STATES} is {tuple(states.shape)}, not [tokens, {len(keys)} layers, width]; "
                f"{len(keys)} layer ids were given"
            )
        tokens = tuple(int(i) for i in ids.tolist())
        checked(states, tokens, str(file))
        yield tokens, {key: states[:, place].contiguous() for place, key in enumerate(keys)}
