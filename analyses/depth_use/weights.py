"""What a block's weights alone say about it, and the same block with coarser weights or frozen norms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probes.anatomy import Anatomy
from probes.anatomy.sites import divisor_of
from probes.anatomy.views import Divisor
from probes.blocks.batch import Chunk
from probes.models.rounded_weights import rounded

NORMS = ("ln1", "ln2")


def matrices(block: nn.Module) -> list[tuple[nn.Parameter, int]]:
    """Return (weight, axis of its outputs) of every matrix in a block."""
    weights = []
    for module in block.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.ndim >= 2:
                # GPT-2's Conv1D keeps its weight as [in, out].
                weights.append((parameter, 1 if type(module).__name__ == "Conv1D" else parameter.ndim - 2))
    return weights


def z_share(weights: Float[Tensor, "*rest"], threshold: float = 1.0) -> float:
    """Return ZD, the share of weights more than `threshold` standard deviations above their mean (Dumitru et al. 2024)."""
    w = weights.float()
    return int(torch.count_nonzero(w > w.mean() + threshold * w.std(correction=0))) / w.numel()


def z_share_of(block: nn.Module) -> float:
    """Return ZD over all matrices of a block together."""
    return z_share(torch.cat([weight.detach().flatten() for weight, _ in matrices(block)]))


@contextmanager
def coarser(block: nn.Module, bits: int) -> Iterator[None]:
    """Round a block's matrices to so many bits, one scale per output, and put the very same weights back on leaving."""
    kept = [(parameter, parameter.data) for parameter, _ in matrices(block)]
    try:
        for parameter, axis in matrices(block):
            parameter.data = rounded(parameter.data, bits, axis)
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


def normed_layers(anatomy: Anatomy, n_layers: int) -> list[int]:
    """Return the layers whose blocks begin a part with a norm."""
    return [layer for layer in range(n_layers) if any(anatomy.map.path(name, layer) for name in NORMS)]


@dataclass(frozen=True)
class NormScale:
    """The mean divisor of one norm: of prompts' first tokens, whose norms are massive, and of all others."""

    path: str
    divisor: Divisor
    first: float
    others: float


class NormScales:
    """Mean divisors of every block's norms, collected chunk by chunk."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self._sums: dict[tuple[int, str], Tensor] = {}

    def add(self, chunk: Chunk) -> None:
        """Enter a chunk's clean streams."""
        first = chunk.real.clone()
        first[:, 1:] = False
        for layer in range(chunk.n_layers):
            for name in NORMS:
                if path := self.anatomy.map.path(name, layer):
                    entering = chunk.stream[layer]
                    if name == "ln2" and not self.anatomy.parallel:
                        entering = entering + chunk.attn[layer]
                    scale = divisor_of(self.anatomy.map, path).read(entering).double().cpu()
                    parts = [
                        scale[first].sum(),
                        first.sum(),
                        scale[chunk.real & ~first].sum(),
                        (chunk.real & ~first).sum(),
                    ]
                    new = torch.stack([torch.as_tensor(p, dtype=torch.float64) for p in parts])
                    self._sums[layer, name] = self._sums.get((layer, name), torch.zeros(4, dtype=torch.float64)) + new

    def of(self, layer: int) -> list[NormScale]:
        """Return the norms of a block; none where its parts begin without one."""
        scales = []
        for name in NORMS:
            if (layer, name) in self._sums:
                path = self.anatomy.map.path(name, layer)
                assert path is not None
                total_first, n_first, total, n = self._sums[layer, name].tolist()
                others = total / n if n else total_first / n_first
                scales.append(NormScale(path, divisor_of(self.anatomy.map, path), total_first / n_first, others))
        return scales


@contextmanager
def frozen_norms(root: nn.Module, scales: Sequence[NormScale], rows: tuple[int, int]) -> Iterator[None]:
    """Let norms divide by their mean divisors instead of each token's own, in forwards over `rows` (batch, pos)."""
    with ExitStack() as stack:
        for scale in scales:
            norm = root.get_submodule(scale.path)
            stack.callback(norm.register_forward_hook(_freeze(scale, rows)).remove)
        yield


def _freeze(scale: NormScale, rows: tuple[int, int]) -> Any:
    def hook(norm: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        own = scale.divisor.read(args[0])
        mean = torch.full(rows, scale.others, device=own.device)
        mean[:, 0] = scale.first
        mean = mean.view_as(own)
        bias: Mapping[str, Tensor] = dict(norm.named_parameters(recurse=False))
        shift = bias["bias"] if "bias" in bias else torch.zeros((), device=output.device)
        return (((output - shift).float() * (own / mean)[..., None]) + shift).to(output.dtype)

    return hook
