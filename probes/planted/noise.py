"""Compiled models made unlike a toy: their basis rotated, their weights noised, their features superposed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from probes.errors import ModelError
from probes.planted.making import accuracy, drawn, model_digest
from probes.planted.record import Disguise
from probes.planted.stream import BALANCE
from probes.planted.task import PlantedTask

SIZES = (0.3, 0.2, 0.1, 0.05, 0.02)
"""Weight noise as a share of a matrix's root mean square; the largest that leaves the answers is taken."""
KEPT = 0.95
"""Share of named words that a disguise has to leave as they were."""
_DRAWS = 8
_JUNK = 0.25
"""Length of a distractor's feature when superposed, others are of length 1."""
_RIDGE = 1e-4


def disguise(task: PlantedTask, kind: Disguise) -> PlantedTask:
    """Return the task with a disguised copy of its model, still without a certificate.

    Raises:
        ModelError: no draw leaves 95 % of the named words as they were.
    """
    generator = drawn(f"{task.record.task}/{kind}", task.record.seed)
    module, facts = _DISGUISES[kind](task, generator)
    record = replace(
        task.record,
        task=f"{task.record.task}-{kind}",
        tier="noised",
        model={**task.record.model, **facts, "digest": model_digest(module)},
        accuracy=accuracy(module, task.examples),
    )
    return replace(task, record=record, module=module)


@dataclass(frozen=True)
class Matrix:
    """A weight of which one axis is the stream."""

    weight: Tensor
    axis: int
    reads: bool
    layer: int
    """-1 outside the blocks."""


def matrices(module: Any) -> Iterator[Matrix]:
    """Give every weight that reads or writes the stream, from the bottom to the top."""
    if hasattr(module, "transformer"):
        yield from (Matrix(part.weight, 1, False, -1) for part in (module.transformer.wte, module.transformer.wpe))
        for layer, block in enumerate(module.transformer.h):
            yield Matrix(block.attn.c_attn.weight, 0, True, layer)
            yield Matrix(block.attn.c_proj.weight, 1, False, layer)
            yield Matrix(block.mlp.c_fc.weight, 0, True, layer)
            yield Matrix(block.mlp.c_proj.weight, 1, False, layer)
    else:
        yield Matrix(module.model.embed_tokens.weight, 1, False, -1)
        for layer, block in enumerate(module.model.layers):
            attention, mlp = block.self_attn, block.mlp
            for part in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
                yield Matrix(part.weight, 1, True, layer)
            for part in (attention.o_proj, mlp.down_proj):
                yield Matrix(part.weight, 0, False, layer)
    yield Matrix(module.lm_head.weight, 1, True, -1)


@torch.no_grad()
def _rotated(task: PlantedTask, generator: torch.Generator) -> tuple[nn.Module, dict[str, Any]]:
    module = copy.deepcopy(task.module)
    turn = rotation(int(task.record.model["d_model"]), generator)
    for matrix in matrices(module):
        _map(matrix, turn)
    return module, {"slots": {}}


def rotation(width: int, generator: torch.Generator) -> Float[Tensor, "d_model d_model"]:
    """Draw a rotation that leaves the vector of all ones as it is, so that centring commutes with it."""
    draw = torch.randn(width, width, generator=generator, dtype=torch.float64)
    draw[:, 0] = 1.0
    frame = torch.linalg.qr(draw).Q
    inner = torch.linalg.qr(torch.randn(width - 1, width - 1, generator=generator, dtype=torch.float64)).Q
    turned = torch.cat([frame[:, :1], frame[:, 1:] @ inner], dim=1)
    return turned @ frame.T


@torch.no_grad()
def _noised(task: PlantedTask, generator: torch.Generator) -> tuple[nn.Module, dict[str, Any]]:
    named = _named(task, task.module)
    noise = [torch.randn(matrix.weight.shape, generator=generator) for matrix in matrices(task.module)]
    for size in SIZES:
        module = copy.deepcopy(task.module)
        for matrix, draw, scale in zip(matrices(module), noise, _scales(module), strict=True):
            matrix.weight += size * scale * draw
        if float((_named(task, module) == named).float().mean()) >= KEPT:
            return module, {"noise": size}
    raise ModelError(f"planted model {task.ref}: noise of {SIZES[-1]} changes its answers; take another seed")


def _scales(module: nn.Module) -> list[float]:
    """Root mean square of each matrix; of the layer's others where it is zero."""
    every = list(matrices(module))
    own = [float(matrix.weight.square().mean().sqrt()) for matrix in every]
    scales = []
    for matrix, size in zip(every, own, strict=True):
        beside = [rms for other, rms in zip(every, own, strict=True) if other.layer == matrix.layer and rms > 0]
        anywhere = [rms for rms in own if rms > 0]
        scales.append(size or math.fsum(beside or anywhere) / len(beside or anywhere))
    return scales


@torch.no_grad()
def _superposed(task: PlantedTask, generator: torch.Generator) -> tuple[nn.Module, dict[str, Any]]:
    named = _named(task, task.module)
    for _ in range(_DRAWS):
        features = _features(task, generator)
        module = _refitted(task, features)
        if float((_named(task, module) == named).float().mean()) >= KEPT:
            overlap = nn.functional.normalize(features, dim=0)
            overlap = (overlap.T @ overlap).abs().fill_diagonal_(0.0)
            return module, {
                "slots": {},
                "interference": float(overlap.mean()),
                "largest_interference": float(overlap.max()),
            }
    raise ModelError(f"planted model {task.ref}: no draw of superposed features leaves its answers; take another seed")


def _features(task: PlantedTask, generator: torch.Generator) -> Float[Tensor, "d_model feature"]:
    """Draw a vector for each coordinate, all in one random subspace of half the width and of mean zero."""
    slots: dict[str, list[int]] = task.record.model["slots"]
    width = int(task.record.model["d_model"])
    basis = torch.randn(width, width // 2, generator=generator)
    basis = torch.linalg.qr(basis - basis.mean(0)).Q
    features = nn.functional.normalize(basis @ torch.randn(width // 2, width, generator=generator), dim=0)
    features[:, slots.get("junk", [])] *= _JUNK
    features[:, slots.get(BALANCE, [])] = 0.0
    return features


def _refitted(task: PlantedTask, features: Float[Tensor, "d_model feature"]) -> nn.Module:
    """Return a model that writes these features and whose readers are fitted, block by block, to what they read before."""
    from probes.planted.certify.bench import Bench

    bench = Bench(task)
    tokens = torch.cat([bench.tokens, bench.partners[0]])
    valid = torch.arange(bench.longest) <= torch.cat([bench.last, bench.partners[1]])[:, None]
    module = copy.deepcopy(task.module)
    for matrix in matrices(module):
        if not matrix.reads:
            _map(matrix, features.double())
    readers = list(zip(_norms(task.module), _norms(module), strict=True))
    before: list[Tensor] = []
    handles = [norm.register_forward_hook(_keep(before)) for (norm, _), _ in readers]
    task.module(tokens)
    for handle in handles:
        handle.remove()
    handles = []
    for ((_, old), (norm, new)), normed in zip(readers, before, strict=True):
        handles.append(norm.register_forward_hook(_fit(old, new, normed[valid], valid)))
    module(tokens)
    for handle in handles:
        handle.remove()
    return module


def _norms(module: Any) -> list[tuple[nn.Module, list[Matrix]]]:
    """Every norm in the order of the forward, with the matrices that read its output."""
    reads = [matrix for matrix in matrices(module) if matrix.reads]
    if hasattr(module, "transformer"):
        norms = [norm for block in module.transformer.h for norm in (block.ln_1, block.ln_2)]
        sizes, final = [1, 1] * len(module.transformer.h), module.transformer.ln_f
    else:
        norms = [
            norm for block in module.model.layers for norm in (block.input_layernorm, block.post_attention_layernorm)
        ]
        sizes, final = [3, 2] * len(module.model.layers), module.model.norm
    grouped = []
    for norm, size in zip([*norms, final], [*sizes, 1], strict=True):
        grouped.append((norm, reads[:size]))
        reads = reads[size:]
    return grouped


def _fit(old: Sequence[Matrix], new: Sequence[Matrix], normed: Tensor, valid: Tensor) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        x = output[valid].double()
        gram = x.T @ x
        gram += _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        for before, after in zip(old, new, strict=True):
            rows = before.weight if before.axis == 1 else before.weight.T
            fitted = torch.linalg.solve(gram, x.T @ (normed.double() @ rows.double().T)).T.float()
            after.weight.copy_(fitted if after.axis == 1 else fitted.T)

    return hook


def _keep(outputs: list[Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        outputs.append(output.clone())

    return hook


def _map(matrix: Matrix, onto: Float[Tensor, "d_model feature"]) -> None:
    """Map every stream vector of a matrix."""
    vectors = matrix.weight.double().movedim(matrix.axis, -1) @ onto.T
    matrix.weight.copy_(vectors.movedim(-1, matrix.axis).float())


def _named(task: PlantedTask, module: nn.Module) -> Int[Tensor, "prompt"]:
    from probes.planted.certify.bench import Bench

    bench = Bench(replace(task, module=module))
    return torch.cat([bench.plain, bench.answer(*bench.partners)])


_DISGUISES: dict[str, Callable[[PlantedTask, torch.Generator], tuple[nn.Module, dict[str, Any]]]] = {
    "rotated": _rotated, "noised": _noised, "superposed": _superposed,
}  # fmt: skip
