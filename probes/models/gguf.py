"""GGUF files: checked by name before use, converted once to a safetensors folder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from probes.errors import ModelError, one_line
from probes.models.cache import Source, install
from probes.models.quiet import quiet

_MAGIC = b"GGUF"


def gguf_folder(path: Path) -> Path:
    """The safetensors folder of a GGUF file, converted on first use and found again by the file's sha256.

    Raises:
        ModelError: not a GGUF file, a damaged one, an architecture that cannot be converted, or no room on the disk.
    """
    _check_magic(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    source = Source(f"gguf-{digest[:16]}", digest, path.name)
    # Four-bit weights grow eightfold in float32; the rest is the tokenizer.
    n_bytes = 9 * path.stat().st_size

    def build(work: Path, folder: Path) -> None:
        check_gguf(path)  # Faults are named by the path that was given, not by the link below.
        # Alone in a folder, so that no tokenizer or configuration lying beside the file is taken for its own.
        alone = work / "model.gguf"
        alone.symlink_to(path.resolve())
        convert_gguf(alone, folder)

    return install(source, build, n_bytes=n_bytes)


def convert_gguf(path: Path, folder: Path) -> None:
    """Writes weights (float32), configuration, generation settings and tokenizer of a GGUF file into `folder`.

    Raises:
        ModelError: as `gguf_folder`.
    """
    has_tokenizer = "tokenizer.ggml.model" in check_gguf(path)
    try:
        with quiet():
            _convert(path, folder)
            if has_tokenizer:
                _convert_tokenizer(path, folder)
    except OSError as error:
        if error.errno is not None:
            raise
        raise ModelError(f"cannot convert {path.name}: {one_line(error)}") from error
    except (ValueError, KeyError, RuntimeError, NotImplementedError, ImportError, AttributeError, TypeError) as error:
        raise ModelError(f"cannot convert {path.name}: {one_line(error)}") from error


def check_gguf(path: Path) -> frozenset[str]:
    """The names of a GGUF file's metadata fields, after reading the header and the extent of every tensor.

    Raises:
        ModelError: not a GGUF file, cut short, without an architecture or without tensors.
    """
    _check_magic(path)
    from gguf import GGUFReader

    try:
        # A damaged header can give sizes that overflow; numpy would warn of it before it fails.
        with np.errstate(all="ignore"):
            reader: Any = GGUFReader(path)
    except Exception as error:  # The reader has no error of its own: a damaged file ends in any of numpy's.
        raise ModelError(
            f"{path} is a damaged or truncated GGUF file ({type(error).__name__} while reading its header); fetch it again"
        ) from error
    size = path.stat().st_size
    cut = [tensor.name for tensor in reader.tensors if tensor.data_offset + tensor.n_bytes > size]
    if cut:
        raise ModelError(f"{path} is a truncated GGUF file: tensor {cut[0]!r} ends after byte {size}; fetch it again")
    if not reader.tensors or "general.architecture" not in reader.fields:
        raise ModelError(f"{path} is a GGUF file without tensors or architecture; it is not a language model")
    return frozenset(reader.fields)


def _check_magic(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(len(_MAGIC))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    if magic != _MAGIC:
        raise ModelError(f"{path} is not a GGUF file: it starts with {magic!r}, not {_MAGIC!r}")


def _convert(path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    loaded, info = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    if info["missing_keys"]:
        raise ModelError(
            f"{path.name} lacks weights of {type(loaded).__name__}: {sorted(info['missing_keys'])[0]} and so on"
        )
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # A model read from GGUF refuses to be saved, so its tensors move, uncopied, into a fresh one.
    with torch.device("meta"):
        fresh = type(loaded)(config)
    fresh.load_state_dict(loaded.state_dict(), assign=True)
    fresh.generation_config = loaded.generation_config
    fresh.save_pretrained(folder)


def _convert_tokenizer(path: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True).save_pretrained(folder)
