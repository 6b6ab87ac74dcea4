"""The weights of a checkpoint read block by block, under the names the model itself has for them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from probes.errors import ModelError
from probes.models.sources.checkpoint_tensors import CheckpointTensors
from probes.models.sources.digest import rows_digest


@dataclass(frozen=True)
class _Group:
    """Checkpoint tensors that become one or more parameters together."""

    target: str
    sources: tuple[tuple[str, str | None], ...]
    """Name in the checkpoint, and the pattern of the conversion it takes part in, or None."""

    @property
    def converted(self) -> bool:
        return self.sources[0][1] is not None


@dataclass
class Ledger:
    """What has been read of a checkpoint."""

    bytes: int = 0
    """Of checkpoint tensors, as they lie on disk."""
    blocks: Counter[int] = field(default_factory=Counter)
    """How often each block was put in place."""


class BlockWeights:
    """The block parameters of a model without them, in its checkpoint.

    Args:
        tensors: the checkpoint.
        module: a model whose block parameters are on the meta device.
        blocks: dotted path of each block.

    Raises:
        ModelError: a checkpoint in which a block's weight cannot be found.
    """

    def __init__(
        self, tensors: CheckpointTensors, module: nn.Module, blocks: Sequence[str], device: torch.device
    ) -> None:
        self.module, self.paths, self.device = module, tuple(blocks), device
        self.ledger = Ledger()
        self._checkpoint = tensors
        self._empty: dict[str, Tensor] = {
            name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if tensor.is_meta
        }
        self._conversions: list[Any] = _conversions(module)
        self._names = frozenset(module.state_dict())
        self._groups = self._group()
        self._spare: dict[str, Tensor] = {}

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that blocks are read from."""
        return self._checkpoint.files

    def read(self, layer: int) -> dict[str, Tensor]:
        """Read the parameters of block `layer` by their full name, on the device, in the model's dtype.

        Raises:
            ModelError: the folder lacks one, or holds it in another shape.
        """
        prefix = f"{self.paths[layer]}."
        tensors: dict[str, Tensor] = {}
        for target, group in self._groups.items():
            if target.startswith(prefix):
                tensors.update(self._read(group))
        for name in (name for name in self._empty if name.startswith(prefix)):
            if name not in tensors or tensors[name].shape != self._empty[name].shape:
                stored = tuple(tensors[name].shape) if name in tensors else "nothing"
                raise ModelError(f"weight {name!r} should be {tuple(self._empty[name].shape)}; the folder has {stored}")
        return {name: tensor for name, tensor in tensors.items() if name in self._empty}

    def tensor(self, name: str) -> Tensor:
        """Read one parameter of a block, for this call alone.

        Raises:
            ModelError: the folder does not hold it.
        """
        if name in self._spare:
            return self._spare.pop(name)
        block = next((f"{path}." for path in self.paths if name.startswith(f"{path}.")), name)
        own = [self._groups[name]] if name in self._groups else []
        for group in own or (g for g in self._groups.values() if g.target.startswith(block) and g.converted):
            parameters = self._read(group)
            if name in parameters:
                parameter = parameters.pop(name)
                # A conversion makes several parameters of the same tensors; the others are read next.
                self._spare = parameters
                return parameter
        raise ModelError(f"the folder lacks the weight {name!r}")

    def placed_tensors(self, layer: int) -> dict[str, Tensor]:
        """Return the parameters of block `layer` that are in place only for a while, by full name."""
        prefix = f"{self.paths[layer]}."
        state = self.module.get_submodule(self.paths[layer]).state_dict()
        return {name: state[name.removeprefix(prefix)] for name in self._empty if name.startswith(prefix)}

    def canary_rows(self) -> str:
        """Return a hash of one row of every weight that stays on disk."""
        sources = [source for group in self._groups.values() for source, _ in group.sources]
        return rows_digest(map(self._counted, self._checkpoint.rows(sources)))

    def _counted(self, row: Tensor) -> Tensor:
        self.ledger.bytes += row.nbytes
        return row

    @contextmanager
    def placed(self, layer: int, tensors: dict[str, Tensor]) -> Iterator[None]:
        """Put the block's parameters in place inside the context; they are empty again afterwards."""
        self.ledger.blocks[layer] += 1
        names = list(tensors)
        self._set(tensors)
        tensors.clear()
        try:
            yield
        finally:
            self._set({name: self._empty[name] for name in names})

    def place_rest(self) -> None:
        """Put in place, to stay, all that is outside the blocks, and norm weights and biases inside them.

        Those inside are small, and the checks of a load use them after a block's matrices are gone.
        """
        for target, group in list(self._groups.items()):
            template = self._empty.get(target)
            if not self._inside(target) or (template is not None and template.dim() <= 1 and not group.converted):
                parameters = self._read(group)
                self._set({name: parameters[name] for name in parameters if name in self._names})
                for name in parameters:
                    self._empty.pop(name, None)
                del self._groups[target]

    def _inside(self, name: str) -> bool:
        return any(name.startswith(f"{path}.") for path in self.paths)

    def _set(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            path, _, own = name.rpartition(".")
            part = self.module.get_submodule(path)
            if own in part._buffers:
                part._buffers[own] = tensor
            else:
                part._parameters[own] = (
                    tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
                )

    def _group(self) -> dict[str, _Group]:
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        renamings = [entry for entry in self._conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._conversions if isinstance(entry, WeightConverter)]
        names = self.module.state_dict()
        groups: dict[str, list[tuple[str, str | None]]] = {}
        for source in sorted(self._checkpoint.names, key=dot_natural_key):
            rename = partial(rename_source_key, base_model_prefix=self.module.base_model_prefix, meta_state_dict=names)
            target, pattern = rename(source, renamings, converters)
            if target not in names and source in names:
                target, pattern = rename(source, [], [])
            if target in names or pattern is not None:
                groups.setdefault(target, []).append((source, pattern))
        return {target: _Group(target, tuple(sources)) for target, sources in groups.items()}

    def _read(self, group: _Group) -> dict[str, Tensor]:
        from transformers.core_model_loading import WeightConverter

        template = self._empty.get(group.target)
        dtype = None if template is None else template.dtype
        first, pattern = group.sources[0]
        if not group.converted:
            return {group.target: self._tensor(first, dtype)}
        converter = next(
            c for c in self._conversions if isinstance(c, WeightConverter) and pattern in c.source_patterns
        )
        converter = copy.deepcopy(converter)
        for source, own in group.sources:
            converter.add_tensor(group.target, source, own, partial(self._tensor, source, dtype))
        converted = converter.convert(group.target, model=self.module, config=self.module.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}

    def _tensor(self, source: str, dtype: torch.dtype | None) -> Tensor:
        stored, n_bytes = self._checkpoint.read(source)
        self.ledger.bytes += n_bytes
        return stored.to(device=self.device, dtype=dtype or stored.dtype, copy=True)


def _conversions(module: nn.Module) -> list[Any]:
    """How transformers renames and merges a checkpoint's tensors for this class of model."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return list(get_model_conversion_mapping(module))
