"""A final norm and an unembedding as tensors of a checkpoint, so that a lens can read rows without the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from probes.errors import PointError
from probes.models.protocol import Unembedding
from probes.models.sources.checkpoint_tensors import SafetensorsFolder
from probes.norms import NormParts, parts_of

_ROWS = 64
"""Rows on which a norm that was put together again has to give the model's own numbers, bit by bit."""


@dataclass(frozen=True)
class LensTensors:
    """Where the tensors lie, by the checkpoint's names for them, and what else decides the numbers."""

    weight: str
    bias: str | None
    gain: str
    norm_bias: str | None
    eps: float
    centred: bool
    gain_offset: float
    softcap: float | None
    dtype: str

    @classmethod
    def of(cls, model: Unembedding, folder: Path) -> LensTensors | None:
        """Return where an unembedding lies in the folder it was loaded from; None where that does not give its numbers."""
        if not isinstance(model.norm, nn.Module):
            return None
        try:
            parts = parts_of(model.norm, model.weight.shape[1], 0.0)
        except PointError:
            return None
        checkpoint, dtype = SafetensorsFolder(folder), model.weight.dtype

        def name_of(tensor: object) -> str | None:
            """The checkpoint's name of these numbers."""
            if not isinstance(tensor, Tensor):
                return None
            stored = ((name, checkpoint.read(name)[0]) for name in checkpoint.names)
            return next(
                (name for name, t in stored if t.shape == tensor.shape and torch.equal(t.to(tensor), tensor)), None
            )

        norm_bias = getattr(model.norm, "bias", None)
        names = [name_of(t) for t in (model.weight, model.bias, getattr(model.norm, "weight", None), norm_bias)]
        weight, bias, gain, shift = names
        if (
            weight is None
            or gain is None
            or (bias is None) != (model.bias is None)
            or (shift is None) != (norm_bias is None)
        ):
            return None
        lens = cls(
            weight, bias, gain, shift, parts.eps, parts.centred, parts.gain_offset, model.softcap, str(dtype).removeprefix("torch.")
        )  # fmt: skip
        rows = torch.randn(_ROWS, model.weight.shape[1], generator=torch.Generator().manual_seed(0)).to(model.weight)
        again = lens.read(folder, model.weight.device).norm
        return lens if all(torch.equal(again(x), model.norm(x)) for x in (rows, 30 * rows)) else None

    def read(self, folder: Path, device: torch.device) -> Unembedding:
        """Return the unembedding, read from the folder."""
        checkpoint = SafetensorsFolder(folder)

        def tensor(name: str) -> Tensor:
            return checkpoint.read(name)[0].to(device=device, dtype=getattr(torch, self.dtype), copy=True)

        gain = tensor(self.gain)
        norm = nn.LayerNorm(len(gain), self.eps, bias=self.norm_bias is not None, device="meta").requires_grad_(False)
        norm.weight = nn.Parameter(gain, requires_grad=False)
        if self.norm_bias is not None:
            norm.bias = nn.Parameter(tensor(self.norm_bias), requires_grad=False)
        own = norm if self.centred else NormParts(norm, self.eps, False, self.gain_offset).own
        return Unembedding(own, tensor(self.weight), None if self.bias is None else tensor(self.bias), self.softcap)
