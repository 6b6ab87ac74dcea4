"""The certificate of a task: every truth compared with what exhaustive intervention gives, shipped and kept by model digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn

from probes.cache_folder import cache_root
from probes.errors import ModelError
from probes.planted.certify import (
    ablation,
    channels,
    exchanges,
    interchange,
    jumps,
    norms,
    pivots,
    reading,
    subspaces,
    voids,
)  # fmt: skip
from probes.planted.certify.bench import Bench
from probes.planted.certify.measured import Measured
from probes.planted.record import Kind, Question
from probes.planted.task import PlantedTask

CHECKS: Mapping[Kind, Callable[[Bench, Question], Measured]] = {
    "readable": reading.readable,
    "lens": reading.lens,
    "written": reading.written,
    "moved": reading.moved,
    "necessary": interchange.necessary,
    "sufficient": interchange.sufficient,
    "nodes": ablation.nodes,
    "redundant": ablation.redundant,
    "channel": channels.channel,
    "mending": jumps.mending,
    "void": voids.void,
    "pivot": pivots.pivot,
    "order": exchanges.order,
    "norm": norms.norm,
    "subspace": subspaces.subspace,
}
"""How each kind of question is certified."""
SAME = 1e-4
"""How far apart a weight's parts along a direction may be, as a share of its length, and be float32's rounding."""
SHIPPED = Path(__file__).parents[1] / "data" / "certificates.json"


def certify(task: PlantedTask) -> dict[str, Any]:
    """Return what exhaustive intervention measured by question, under `agrees` whether every truth follows from it, and
    under `weights` of which weights.
    """
    certificate: dict[str, Any] = {"weights": [float(f"{part:.6g}") for part, _ in _projections(task.module)]}
    refuted = []
    benches: dict[str | None, Bench] = {}
    for question in task.record.questions:
        if question.kind not in CHECKS:
            continue
        if question.subset not in benches:
            examples = [example for example in task.examples if question.subset in (None, example.subset)]
            benches[question.subset] = Bench(task, examples)
        measured = CHECKS[question.kind](benches[question.subset], question)
        certificate[question.key] = _rounded(measured.values)
        refuted += [] if measured.agrees else [question.key]
    return {**certificate, "agrees": not refuted, "refuted": refuted}


def certified(task: PlantedTask) -> PlantedTask:
    """Return the task with its certificate: the one shipped for this model, prompts and truths, or else one that is
    computed once and kept in the cache folder.

    Where a disguise has changed a truth, its question is dropped, never adjusted.

    Raises:
        ModelError: a truth of a model that is not disguised does not follow from what was measured.
    """
    name = key_of(task)
    own = shipped().get(name)
    certificate = own if own and is_of(own, task) else _kept(task, cache_root() / "planted" / f"{name}.json")
    if task.record.tier == "noised":
        left = tuple(question for question in task.record.questions if question.key not in certificate["refuted"])
        return replace(task, record=replace(task.record, certificate=certificate, questions=left))
    if not certificate["agrees"]:
        refuted = ", ".join(certificate["refuted"])
        raise ModelError(
            f"planted model {task.ref}: exhaustive intervention does not give the truth built in of {refuted}; "
            "this seed cannot be scored, take another"
        )
    return replace(task, record=replace(task.record, certificate=certificate))


@cache
def shipped() -> Mapping[str, Any]:
    """Return the certificates that are part of the package, by `key_of`."""
    certificates: dict[str, Any] = json.loads(SHIPPED.read_text()) if SHIPPED.is_file() else {}
    return certificates


def ship(tasks: Iterable[PlantedTask]) -> Path:
    """Certify tasks anew and write what is shipped; return the file."""
    SHIPPED.write_text(json.dumps({key_of(task): certify(task) for task in tasks}, separators=(",", ":")) + "\n")
    return SHIPPED


def key_of(task: PlantedTask) -> str:
    """Return a name that changes with all that a task has of words and whole numbers: prompts, partners, answers, truths, plan.

    What is computed has other last digits on another processor; for the weights see `is_of`.
    """
    plan = {
        name: value for name, value in task.record.model.items() if name != "digest" and not isinstance(value, float)
    }
    everything = (replace(task.record, model=plan).to_json(), [(e.tokens, e.answer, e.partner) for e in task.examples])
    digest = hashlib.sha256(repr(everything).encode()).hexdigest()[:16]
    return f"{task.record.task}@{task.record.seed}-{digest}"


def is_of(certificate: Mapping[str, Any], task: PlantedTask) -> bool:
    """Return whether a certificate was measured on this task's weights, whose last digits may be another processor's."""
    here, there = _projections(task.module), certificate.get("weights", ())
    return len(here) == len(there) and all(
        abs(own - other) <= SAME * size for (own, size), other in zip(here, there, strict=True)
    )


@torch.no_grad()
def _projections(module: nn.Module) -> list[tuple[float, float]]:
    """Return each weight's part along a direction drawn at random, and its length."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for _, tensor in sorted(module.state_dict().items()):
        weight = tensor.flatten().double()
        direction = torch.randn(len(weight), generator=generator).double()
        pairs.append((float(direction @ weight), float(weight.norm())))
    return pairs


def _kept(task: PlantedTask, path: Path) -> dict[str, Any]:
    """Return the certificate of the cache folder, computed where there is none of these weights."""
    if path.is_file():
        kept: dict[str, Any] = json.loads(path.read_text())
        if is_of(kept, task):
            return kept
    certificate = certify(task)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        path.write_text(json.dumps(certificate))
    return certificate


def _rounded(values: Any) -> Any:
    if isinstance(values, float):
        return round(values, 4)
    if isinstance(values, Mapping):
        return {name: _rounded(value) for name, value in values.items()}
    return [_rounded(value) for value in values] if isinstance(values, list) else values
