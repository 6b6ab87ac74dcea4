"""Everything that decides a module's numbers at one moment, cheap enough to compute at every capture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from probes.file_state import FileState, file_states
from probes.models.fingerprint.checksum import checksums, combined
from probes.models.fingerprint.description import Described, describe
from probes.models.fingerprint.plain_model import deviations
from probes.models.sources.digest import canonical_config


@dataclass(frozen=True)
class Fingerprint:
    """Equal for two moments exactly where a module computes the same at both."""

    described: Described
    config: str
    attention: str
    tensors: Mapping[str, tuple[str, tuple[int, ...], int]]
    """Every parameter and buffer, saved or not: dtype, shape and checksum."""
    files: tuple[FileState, ...]
    """Of weights that are on disk."""


def fingerprint(module: nn.Module, files: tuple[Path, ...] = ()) -> Fingerprint:
    """Return the fingerprint of a module now; `files` hold weights of it that are read when they are needed."""
    tensors, offloaded = _tensors(module)
    sums = checksums(tensors)
    facts = {name: (str(t.dtype), tuple(t.shape), sums[name]) for name, t in tensors.items()}
    config: Any = module.config
    attention = str(config.get_text_config()._attn_implementation)
    on_disk = file_states({*files, *offloaded})
    return Fingerprint(describe(module), canonical_config(module), attention, facts, on_disk)


def keyed(weights: str, module: nn.Module) -> str:
    """Return the key of a module: its weights digest, unless more than a plain load of these weights decides its numbers."""
    more = deviations(module)
    return combined([weights, *more]) if more else weights


def _tensors(module: nn.Module) -> tuple[dict[str, Tensor], set[Path]]:
    """Every parameter and buffer by name, and the files of those that accelerate keeps on disk."""
    tensors: dict[str, Tensor] = {}
    files: set[Path] = set()
    for path, part in module.named_modules(remove_duplicate=False):
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is None:
                continue
            kept = getattr(getattr(part, "_hf_hook", None), "weights_map", None) if tensor.is_meta else None
            inside, file = _offloaded(kept, name)
            tensors[f"{path}.{name}" if path else name] = tensor if inside is None else inside
            files |= {file} if file else set()
    return tensors, files


def _offloaded(kept: Any, name: str) -> tuple[Tensor | None, Path | None]:
    """Where accelerate keeps a tensor: in memory, or in a file."""
    if kept is None:
        return None, None
    loader, full = getattr(kept, "dataset", kept), f"{getattr(kept, 'prefix', '')}{name}"
    state = getattr(loader, "state_dict", loader)
    if full in state:
        return state[full], None
    entry = getattr(loader, "index", {}).get(full, {})
    file = entry.get("safetensors_file") or f"{loader.save_folder}/{full}.dat"
    return None, Path(file)
