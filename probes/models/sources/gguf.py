"""GGUF files: checked by name before use, converted once to a safetensors folder, or to one without weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from probes.errors import ModelError, one_line, shown
from probes.models.silence_loggers import silence_loggers
from probes.models.sources.config_sizes import check_sizes
from probes.models.sources.model_cache import Source, install

_MAGIC = b"GGUF"
_FIELDS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "rope.dimension_count": "rotary_dim",
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
}
"""Fields below the architecture's name, and what a configuration calls each."""
_REQUIRED = ("num_hidden_layers", "hidden_size", "num_attention_heads")


def gguf_folder(path: Path) -> Path:
    """Return the safetensors folder of a GGUF file, converted on first use and known again by the file's sha256.

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


def gguf_outline(path: Path) -> Path:
    """Return a folder with the configuration and tokenizer of a GGUF file and no weights, which stay in the file.

    Raises:
        ModelError: as `gguf_folder`.
    """
    reader = check_gguf(path)
    has_tokenizer = "tokenizer.ggml.model" in reader.fields
    n_bytes = min(int(tensor.data_offset) for tensor in reader.tensors)
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(n_bytes)).hexdigest()

    def build(work: Path, folder: Path) -> None:
        alone = work / "model.gguf"
        alone.symlink_to(path.resolve())
        with _conversion(alone):
            _outline(alone, folder)
            if has_tokenizer:
                _convert_tokenizer(alone, folder)

    return install(Source(f"gguf-outline-{digest[:16]}", digest, path.name), build, n_bytes=2 * n_bytes)


def convert_gguf(path: Path, folder: Path) -> None:
    """Write weights (float32), configuration, generation settings and tokenizer of a GGUF file into `folder`.

    Raises:
        ModelError: as `gguf_folder`.
    """
    has_tokenizer = "tokenizer.ggml.model" in check_gguf(path).fields
    with _conversion(path):
        _convert(path, folder)
        if has_tokenizer:
            _convert_tokenizer(path, folder)


@contextmanager
def _conversion(path: Path) -> Iterator[None]:
    try:
        with silence_loggers():
            yield
    except OSError as error:
        if error.errno is not None:
            raise
        raise ModelError(f"cannot convert {path.name}: {one_line(error)}") from error
    except ModelError:
        raise
    except Exception as error:  # The library has no error of its own for what it cannot convert.
        raise ModelError(f"cannot convert {path.name}: {one_line(error)}") from error


def check_gguf(path: Path) -> Any:
    """Return what `read_gguf` does, after comparing the sizes that the file states with its tensors.

    Raises:
        ModelError: as `read_gguf`, or sizes that its tensors cannot have.
    """
    reader = read_gguf(path)
    shapes = {tensor.name: tuple(int(n) for n in tensor.shape) for tensor in reader.tensors}
    check_sizes(_sizes(reader, path), shapes, str(path))
    return reader


def read_gguf(path: Path) -> Any:
    """Return the fields and tensors of a GGUF file, as the gguf package's reader holds them, mapped.

    Raises:
        ModelError: not a GGUF file, cut short, without an architecture or without tensors.
    """
    _check_magic(path)
    try:
        reader = _reader(path)
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
    return reader


def _reader(path: Path) -> Any:
    """A GGUF file's fields and tensors; a length that leads out of the file ends the reading."""
    import numpy as np
    from gguf import GGUFReader

    class Bounded(GGUFReader):  # type: ignore[misc]
        def _get(self, offset: Any, dtype: Any, count: Any = 1, *order: Any, **named: Any) -> Any:
            # The library takes what is past the end for empty, and goes on for as many items as the header claims.
            if not 0 <= int(offset) + np.dtype(dtype).itemsize * int(count) <= len(self.data):
                raise ValueError("a length leads out of the file")
            return super()._get(offset, dtype, count, *order, **named)

    # A damaged header can give sizes that overflow; numpy would warn of it before it fails.
    with np.errstate(all="ignore"):
        return Bounded(path)


def _sizes(reader: Any, path: Path) -> dict[str, Any]:
    """The sizes a GGUF file states, by the names that configurations give them."""
    architecture = _value(reader, "general.architecture")
    stated = {size: _value(reader, f"{architecture}.{field}") for field, size in _FIELDS.items()}
    for field, size in _FIELDS.items():
        # The library would take its own class's default in place of what the file has lost.
        if stated[size] is None and size in _REQUIRED:
            raise ModelError(
                f"{path} has no field {shown(f'{architecture}.{field}')}; the file is damaged: fetch it again"
            )
    return {size: value for size, value in stated.items() if value is not None}


def _value(reader: Any, field: str) -> Any:
    return reader.fields[field].contents() if field in reader.fields else None


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


def _outline(path: Path, folder: Path) -> None:
    """Write what `_convert` writes beside the weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    module.config.architectures = [type(module).__name__]
    module.config.save_pretrained(folder)
    module.generation_config.save_pretrained(folder)
