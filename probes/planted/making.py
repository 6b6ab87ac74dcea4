"""What every family shares: draws of a seed, tables, splits, and the task made of a blueprint and its examples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from probes.planted.blueprint import Blueprint
from probes.planted.hosts import tokenizer
from probes.planted.padding import padded
from probes.planted.parts import SHARP, SOFT
from probes.planted.record import Interval, Question, Record, span
from probes.planted.stream import CONSTANT
from probes.planted.task import Example, PlantedTask

PROMPTS = 128


def base_of(task: str) -> str:
    """Return the id without its variant: `A2` of `A2-sharp`."""
    return task.partition("-")[0]


def drawn(task: str, seed: int) -> torch.Generator:
    """Return the generator of everything that a seed draws; variants of a task share their draws."""
    digest = hashlib.sha256(f"{base_of(task)}@{seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def begin(task: str, seed: int) -> tuple[str, torch.Generator, float]:
    """Return the id without its variant, the generator of its draws, and the score of a copying head's match.

    The score is sharp where the id says so.
    """
    return base_of(task), drawn(task, seed), SHARP if task.endswith("-sharp") else SOFT


def randint(high: int, generator: torch.Generator) -> int:
    """Draw an integer from 0 to `high` - 1."""
    return int(torch.randint(high, (1,), generator=generator))


def choose(options: Sequence[int], n: int, generator: torch.Generator) -> list[int]:
    """Draw `n` different options, in order of size."""
    order = torch.randperm(len(options), generator=generator)[:n].tolist()
    return sorted(options[index] for index in order)


def another(option: int, options: Sequence[int], generator: torch.Generator) -> int:
    """Draw an option that is not this one."""
    return options[(options.index(option) + 1 + randint(len(options) - 1, generator)) % len(options)]


def classes(n: int, n_classes: int, generator: torch.Generator) -> list[int]:
    """Draw a class for each of `n` words, all classes equally often."""
    shuffled = torch.randperm(n, generator=generator)
    return (shuffled % n_classes).tolist()


def latin_square(n: int, generator: torch.Generator) -> Int[Tensor, "row column"]:
    """Draw a table in which every row and every column holds each value once."""
    rows, columns, values = (torch.randperm(n, generator=generator) for _ in range(3))
    return values[(rows[:, None] + columns) % n]


def answer_words(
    blueprint: Blueprint,
    answers: Sequence[int],
    rows: Float[Tensor, "answer d_model"] | str,
    *,
    default: str,
    gain: float = 12.0,
) -> None:
    """Let the unembedding name answer i where row i (or coordinate i of a slot) reads 1; while none does, the default word."""
    read = blueprint.stream.basis(rows) if isinstance(rows, str) else rows
    blueprint.unembedding[list(answers)] += gain * read
    blueprint.unembedding[blueprint.token(default)] += 0.45 * gain * blueprint.stream.vector(CONSTANT)


def windows(kind: str, intervals: Mapping[str, tuple[int, int] | None], note: str = "") -> tuple[Question, ...]:
    """Return one `necessary` or `sufficient` question for each position."""
    assert kind in ("necessary", "sufficient")
    return tuple(
        Question(kind, None if interval is None else span(*interval), position=position, note=note)  # type: ignore[arg-type]
        for position, interval in intervals.items()
    )


def jump_cells(layers: int) -> tuple[str, ...]:
    """Every jump back: the stream after block a enters block b again, b <= a."""
    return tuple(f"{a}->{b}" for a in range(layers) for b in range(a + 1))


def mending(layers: int, after: int, before: int) -> frozenset[str]:
    """Return the jumps from block `after` or later to block `before` or earlier."""
    return frozenset(f"{a}->{b}" for a in range(after, layers) for b in range(min(before, a) + 1))


def nothing(kind: Literal["mending", "void", "pivot"], layers: int = 0, note: str = "") -> Question:
    """Return a question of whose kind there is nothing in a model of this many blocks."""
    if kind == "pivot":
        return Question(kind, None, note=note)
    candidates = jump_cells(layers) if kind == "mending" else tuple(map(str, range(layers)))
    return Question(kind, frozenset(), candidates=candidates, note=note)


def at(layer: int) -> Interval:
    """Return the interval of one layer."""
    return Interval(layer, layer)


@torch.no_grad()
def planted_task(
    task: str,
    seed: int,
    blueprint: Blueprint,
    examples: Sequence[Example],
    *,
    positions: Mapping[str, int],
    concepts: Mapping[str, int],
    questions: Sequence[Question],
) -> PlantedTask:
    """Assemble the model and return the task, still without a certificate."""
    prompts = [prompt for example in examples for prompt in (example.tokens, example.partner) if prompt]
    module = blueprint.assemble(prompts)
    host = blueprint.host
    record = Record(
        task=task,
        tier="compiled",
        seed=seed,
        model={
            "class": type(module).__name__, "layers": host.layers, "d_model": host.width, "heads": host.heads,
            "norm": host.norm, "digest": model_digest(module), "slots": blueprint.stream.slots,
        },
        positions=dict(positions),
        concepts=dict(concepts),
        accuracy=accuracy(module, examples),
        questions=tuple(questions),
    )  # fmt: skip
    return PlantedTask(record, module, tokenizer(host.vocabulary), tuple(examples))


@torch.no_grad()
def accuracy(module: nn.Module, examples: Sequence[Example]) -> dict[str, float]:
    """Return the share of right answers on the prompts and on their partners, where there are any."""
    plain = [(example.tokens, example.answer) for example in examples]
    partners = [(example.partner, example.partner_answer) for example in examples if example.partner]
    shares = {"plain": _right(module, plain)}
    return shares | {"partner": _right(module, partners)} if partners else shares


def _right(module: nn.Module, cases: Sequence[tuple[Sequence[int], int]]) -> float:
    tokens, last = padded([tokens for tokens, _ in cases])
    logits = module(tokens).logits[torch.arange(len(cases)), last]
    return float((logits.argmax(-1) == torch.tensor([answer for _, answer in cases])).float().mean())


def model_digest(module: nn.Module) -> str:
    """Return the sha256 of a model's configuration and weights."""
    config = module.config.to_dict()  # type: ignore[union-attr,operator]
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
