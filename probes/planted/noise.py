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
from probes.module_calls import temporary
from probes.planted.making import accuracy, drawn, model_digest
from probes.planted.record import Disguise, Question
from probes.planted.stream import BALANCE, CONSTANT
from probes.planted.task import PlantedTask

SIZES = (0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005)
"""Weight noise as a share of a matrix's root mean square; the largest that leaves the answers is taken."""
KEPT = 0.95
"""Share of named words that a disguise has to leave as they were."""
SHARES = (0.5, 0.625, 0.75)
"""Dimensions that superposed features share, of the width; the smallest that leaves the answers is taken."""
_DRAWS, _ROUNDS = 3, 50
_JUNK = 0.05
"""Length of a distractor's feature when superposed; others are of length 1."""
_RIDGE = 1e-6
_RARE = 1e-2
"""Least mean square of a feature for its reader; some come up in no prompt."""


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
        questions=tuple(map(_ranked, task.record.questions)) if kind == "noised" else task.record.questions,
    )
    return replace(task, record=record, module=module)


def _ranked(question: Question) -> Question:
    """A block of zero weights is small under noise and nothing tells how small: only the order of blocks can be scored."""
    return replace(question, ranking_only=True) if question.kind == "void" and not question.nothing else question


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
            matrix.weight.add_(draw, alpha=size * scale)
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
    for share in SHARES:
        for _ in range(_DRAWS):
            features = _features(task, share, generator)
            module = _read_through(task, features)
            if float((_named(task, module) == named).float().mean()) >= KEPT:
                overlap = nn.functional.normalize(features, dim=0)
                overlap = (overlap.T @ overlap).abs().fill_diagonal_(0.0)
                return module, {
                    "slots": {},
                    "dimensions": share,
                    "interference": float(overlap.mean()),
                    "largest_interference": float(overlap.max()),
                }
    raise ModelError(f"planted model {task.ref}: no draw of superposed features leaves its answers; take another seed")


def _features(task: PlantedTask, share: float, generator: torch.Generator) -> Float[Tensor, "d_model feature"]:
    """Draw a vector for each coordinate: those that are read make a tight frame of a random subspace, of mean zero."""
    slots: dict[str, list[int]] = task.record.model["slots"]
    width = int(task.record.model["d_model"])
    size = round(share * width)
    junk, balance = slots.get("junk", []), slots.get(BALANCE, [])
    used = [coordinate for coordinate in range(width) if coordinate not in {*junk, *balance}]
    frame = torch.randn(size, len(used), generator=generator, dtype=torch.float64)
    for _ in range(_ROUNDS):
        left, _, right = torch.linalg.svd(frame, full_matrices=False)
        frame = nn.functional.normalize(left @ right, dim=0)
    vectors = torch.zeros(size, width, dtype=torch.float64)
    vectors[:, used] = frame
    draw = torch.randn(size, len(junk), generator=generator, dtype=torch.float64)
    vectors[:, junk] = _JUNK * nn.functional.normalize(draw, dim=0)
    basis = torch.randn(width, size, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(basis - basis.mean(0)).Q @ vectors


def _read_through(task: PlantedTask, features: Float[Tensor, "d_model feature"]) -> nn.Module:
    """Return a model that writes these features, and reads each back by least squares as if all came independently.

    A reader fitted to the prompts would use that features occur together and read what is not written yet.
    """
    from probes.planted.certify.bench import Bench

    bench = Bench(task)
    tokens = torch.cat([bench.tokens, bench.partners[0]])
    valid = torch.arange(bench.longest) <= torch.cat([bench.last, bench.partners[1]])[:, None]
    module = copy.deepcopy(task.module)
    for matrix in matrices(module):
        if not matrix.reads:
            _map(matrix, features)
    before: list[Tensor] = []
    with temporary(norm.register_forward_hook(_keep(before)) for norm, _ in _norms(task.module)):
        task.module(tokens)
    # A feature that is written late, or after a jump alone, is read as well as it will be needed.
    moments = torch.stack([normed[valid].double().square().mean(0) for normed in before]).amax(0).clamp_min(_RARE)
    back = _reader(features, moments)
    constant = int(task.record.model["slots"][CONSTANT][0])
    handles = [
        norm.register_forward_hook(_read(readers, back, normed[valid][:, constant], valid, constant))
        for (norm, readers), normed in zip(_norms(module), before, strict=True)
    ]
    with temporary(handles):
        module(tokens)
    return module


def _reader(
    features: Float[Tensor, "d_model feature"], moments: Float[Tensor, "feature"]
) -> Float[Tensor, "feature d_model"]:
    """Return what reads each feature from what is written: least squares, Λ Fᵀ (F Λ Fᵀ)⁻¹, each row reading its own as 1.

    Distractors, which are written short, are read as least squares has them.
    """
    weighted = features * moments
    written = weighted @ features.T
    written += _RIDGE * written.diagonal().mean() * torch.eye(len(written), dtype=written.dtype)
    back = torch.linalg.solve(written, weighted).T
    own = (back * features.T).sum(-1)
    whole = features.norm(dim=0) > 0.5
    back[whole] /= own[whole, None]
    return back


def _read(
    readers: Sequence[Matrix],
    back: Float[Tensor, "feature d_model"],
    normed: Float[Tensor, "row"],
    valid: Tensor,
    constant: int,
) -> Callable[..., None]:
    """Let readers see the features; `normed` is the constant one in the undisguised model, whose scale the norm changed."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        seen = output[valid].double() @ back[constant]
        for matrix in readers:
            _map(matrix, back.T * (normed.double().mean() / seen.mean()))

    return hook


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
