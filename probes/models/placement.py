"""Models spread over devices by accelerate: the legal ways, and the data of parts that are elsewhere."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from probes.errors import OptionError, unknown
from probes.models.finite import check_finite

DeviceMap = str | Mapping[str, str | int]
"""A strategy of `STRATEGIES`, or a device for each module path."""
MaxMemory = Mapping[int | str, str]
"""The most each device may hold, by GPU number or `cpu`."""

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
_SIZE = re.compile(r"\d+(\.\d+)?\s*([KMGT]i?B)", re.IGNORECASE)


def spread(
    device: str, device_map: DeviceMap | None, max_memory: MaxMemory | None, offload: str | Path | None
) -> dict[str, Any]:
    """Return the fields of `Loading` that place a model's parts.

    Raises:
        OptionError: an unknown strategy, a size that is none, or a combination that says two things at once.
    """
    if device_map is None:
        if max_memory is not None or offload is not None:
            raise OptionError("max_memory and offload place the parts of a device map: give device_map 'auto' as well")
        return {}
    if device != "auto":
        raise OptionError(f"device {device!r} and a device map say two things: leave the device at auto")
    if isinstance(device_map, str) and device_map not in STRATEGIES:
        raise OptionError(unknown("device map", device_map, STRATEGIES))
    for place, size in (max_memory or {}).items():
        if not _SIZE.fullmatch(str(size)):
            raise OptionError(f"max_memory of {place!r} is {size!r}: write a number and a unit, such as 20GiB")
    folder = None if offload is None else Path(offload)
    return {"device_map": device_map, "max_memory": max_memory, "offload_folder": folder}


def bytes_of(size: int | str) -> int:
    """Return a number of bytes written as such, or as `4GiB`.

    Raises:
        OptionError: text of another form, or a negative number.
    """
    from accelerate.utils import convert_file_size_to_int

    if not (_SIZE.fullmatch(size) if isinstance(size, str) else size >= 0):
        raise OptionError(f"a size of {size!r}: write bytes, or a number with its unit, such as 4GiB or 500MB")
    return int(convert_file_size_to_int(size))


def data_of(part: nn.Module, name: str) -> Tensor | None:
    """Return a module's own parameter, read from where accelerate keeps it if that is elsewhere; None where it has none."""
    value = getattr(part, name, None)
    if not isinstance(value, Tensor) or not value.is_meta:
        return value
    kept = getattr(getattr(part, "_hf_hook", None), "weights_map", None)
    return value if kept is None else kept[name]


def fetch_offloaded(module: nn.Module, name: str, *, ref: str) -> Tensor:
    """Return a finite tensor of a model by its full name, from where accelerate keeps it.

    Raises:
        ModelError: a value that is not finite.
    """
    from transformers.integrations.accelerate import load_offloaded_parameter

    tensor: Tensor = load_offloaded_parameter(module, name)
    check_finite(tensor, name, ref)
    return tensor


def main_device(module: nn.Module) -> torch.device:
    """Return the device that a spread model takes its inputs on: its first that computes."""
    places = [place for place in getattr(module, "hf_device_map", {}).values() if place not in ("cpu", "disk")]
    place = places[0] if places else "cpu"
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
