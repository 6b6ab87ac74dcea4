"""The tensors of a checkpoint folder by name and shape, from the headers of its files alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from probes.errors import ModelError, one_line, shown
from probes.input_files import kind_of, read_text
from probes.strict_json import JsonFault, parse

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

Shapes = Mapping[str, tuple[int, ...]]


def tensor_shapes(folder: Path) -> Shapes:
    """Return the shape of every tensor in a folder's safetensors files.

    Raises:
        ModelError: a file that is damaged, cut short or no file; an index that names a shard which is not there or lies
            outside the folder.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        shapes |= _header(file)
    return shapes


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that make up a checkpoint: the single one, those of its index, or all there are.

    Raises:
        ModelError: as `tensor_shapes`.
    """
    if (folder / SINGLE).exists() or not (folder / INDEX).exists():
        return sorted(folder.glob("*.safetensors"))
    names = _shards(folder / INDEX)
    for name in names:
        if Path(name).name != name:
            raise ModelError(
                f"{folder / INDEX} names the shard {shown(name)}, which is outside its folder; fetch it again"
            )
        if kind_of(folder / name) != "file":
            raise ModelError(f"{folder / INDEX} names the shard {shown(name)}, which is not there; fetch it again")
    return [folder / name for name in names]


def read_object(path: Path, what: str) -> dict[str, Any]:
    """Return the object in a JSON file of a model folder.

    Raises:
        ModelError: a file that cannot be read, or another thing than one object of sound JSON.
    """
    try:
        value = parse(read_text(path, what, ModelError), infinite=True)
    except JsonFault as error:
        raise ModelError(f"{path}: {error}; the {what} is damaged: fetch the model again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds {shown(value)}, not an object; the {what} is damaged: fetch the model again")
    return value


def _shards(index: Path) -> list[str]:
    names = read_object(index, "index of the weights").get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(f"{index} has no weight_map from tensors to shards; fetch it again")
    return sorted(set(names.values()))


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    if kind_of(file) != "file":
        raise ModelError(f"{file} is a {kind_of(file)}, not a file of weights")
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except Exception as error:  # SafetensorError, and what Python makes of a name that is no text.
        raise ModelError(f"{file} is no whole safetensors file ({one_line(error)}); fetch it again") from error
