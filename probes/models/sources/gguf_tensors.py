"""The tensors of a GGUF file under its model's own names; each stays quantised on disk until it is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from probes.errors import ModelError, one_line
from probes.models.silence_loggers import silence_loggers
from probes.models.sources.checkpoint_tensors import row_number
from probes.models.sources.gguf import read_gguf


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies in the file, and how."""

    name: str
    offset: int
    shape: tuple[int, ...]
    """Of its data as stored, last dimension fastest."""
    dtype: np.dtype[Any]
    kind: Any
    """How it is quantised, as the gguf package names it."""

    @property
    def n_bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


class GgufTensors:
    """A GGUF file read tensor by tensor, dequantised as transformers does when it loads the whole.

    Args:
        path: the file.
        module: the model that it is for, on the meta device.

    Raises:
        ModelError: not a GGUF file, or one in which a weight is made of several tensors, as merged experts are.
    """

    def __init__(self, path: Path, module: nn.Module) -> None:
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
            load_gguf_checkpoint,
        )

        self._path = path
        reader = read_gguf(path)
        architecture = reader.fields["general.architecture"].contents()
        try:
            with silence_loggers():
                config = load_gguf_checkpoint(str(path))["config"]
                self._processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config)
                self._own_names: dict[str, str] = get_gguf_hf_weights_map(module, self._processor)
        except Exception as error:  # The library has no error of its own for what it cannot convert.
            raise ModelError(f"cannot read the weights of {path.name}: {one_line(error)}") from error
        self._stored = {
            self._own_names[tensor.name]: _Stored(
                tensor.name, int(tensor.data_offset), tuple(tensor.data.shape), tensor.data.dtype, tensor.tensor_type
            )
            for tensor in reader.tensors
            if tensor.name in self._own_names
        }
        present = Counter(self._own_names[tensor.name] for tensor in reader.tensors if tensor.name in self._own_names)
        merged = sorted(name for name, count in present.items() if count > 1)
        if merged:
            raise ModelError(
                f"{path.name} holds {merged[0]!r} in several tensors, which are merged as a whole: load it without streaming"
            )

    @property
    def names(self) -> Collection[str]:
        """The name of every tensor."""
        return self._stored.keys()

    @property
    def files(self) -> tuple[Path, ...]:
        """The file."""
        return (self._path,)

    def read(self, name: str) -> tuple[Tensor, int]:
        """Return a dequantised tensor in float32, and the bytes that it takes on disk.

        Raises:
            ModelError: a tensor of a kind that the gguf package cannot dequantise, or that is merged with others.
        """
        from gguf import dequantize

        stored = self._stored[name]
        parsed: dict[str, dict[str, Tensor]] = {"tensors": {}}
        try:
            result = self._processor.process(
                weights=dequantize(self._raw(stored), stored.kind), name=stored.name,
                tensor_key_mapping=self._own_names, parsed_parameters=parsed,
            )  # fmt: skip
        except Exception as error:
            raise ModelError(f"cannot dequantise {stored.name!r} of {self._path.name}: {one_line(error)}") from error
        if result.name is not None:
            return torch.from_numpy(np.array(result.weights, dtype=np.float32)), stored.n_bytes
        if name not in parsed["tensors"]:
            raise ModelError(f"{stored.name!r} of {self._path.name} is split as a whole: load it without streaming")
        return parsed["tensors"][name], stored.n_bytes

    def rows(self, names: Collection[str]) -> Iterator[Tensor]:
        """Yield the quantised bytes of one row of every named tensor."""
        for name in names:
            stored = self._stored[name]
            row_bytes = stored.shape[-1] * stored.dtype.itemsize
            first = row_number(name) % (stored.n_bytes // row_bytes) * row_bytes
            yield torch.from_numpy(self._bytes(stored.offset + first, row_bytes).copy())

    def _raw(self, stored: _Stored) -> NDArray[Any]:
        return self._bytes(stored.offset, stored.n_bytes).view(stored.dtype).reshape(stored.shape)

    def _bytes(self, offset: int, n_bytes: int) -> NDArray[np.uint8]:
        """Read and not mapped: a map that stays open would count as resident memory, page by page."""
        return np.fromfile(self._path, dtype=np.uint8, count=n_bytes, offset=offset)
