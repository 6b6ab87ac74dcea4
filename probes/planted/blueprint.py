"""A model as a list of parts in the stream, and its assembly: sizes are calibrated on the prompts in one forward."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probes.module_calls import temporary
from probes.planted.hosts import Host, Weights, weights
from probes.planted.padding import padded
from probes.planted.stream import BALANCE, CONSTANT, Stream

BALLAST = 6.0
"""Size of a constant that true norms divide by besides the features, so that their scale differs little between prompts."""
ACTIVE = 0.5
"""A part is active at rows where it gives more than this share of its largest."""


@dataclass(frozen=True, eq=False)
class Head:
    """What a head reads and writes, in units of the stream before its norm."""

    query: Float[Tensor, "rank d_model"]
    key: Float[Tensor, "rank d_model"]
    scores: Float[Tensor, "rank"]
    """Attention score where both the query and the key of a rank read a whole feature."""
    value: Float[Tensor, "d_value d_model"]
    output: Float[Tensor, "d_model d_value"]
    size: float | None = 1.0
    """Mean norm of what it writes where it is active; None leaves the output as it is."""
    graded: bool = False
    """Whether queries and keys take every value, as angles do, rather than being present or absent."""


@dataclass(frozen=True, eq=False)
class Units:
    """Hidden units of an MLP, in units of the stream before its norm."""

    gate: Float[Tensor, "unit d_model"]
    down: Float[Tensor, "d_model unit"]
    hardness: float = 40.0
    """Factor of the gate: at a whole feature over threshold its argument."""
    size: float | None = 1.0
    """Mean norm of what they write where they are active; None leaves the output as it is."""
    up: Float[Tensor, "unit d_model"] | None = None
    """The second factor of SwiGLU; None is the constant feature."""


class Blueprint:
    """The parts of a model before it is assembled.

    `embedding` [vocab, d_model] and `positions` [pos, d_model] are added at the bottom, `unembedding` [vocab, d_model] reads
    the top; families write to all three directly.
    """

    def __init__(self, host: Host, generator: torch.Generator) -> None:
        self.host, self.generator = host, generator
        self.stream = Stream(host.width, generator, balanced=host.is_gpt2)
        self.embedding = self.stream.basis(CONSTANT).repeat(len(host.vocabulary), 1)
        if host.norm != "none":
            self.stream.slot("ballast")
            self.embedding += self.stream.vector("ballast", scale=BALLAST)
        self.positions = torch.zeros(64, host.width)
        self.unembedding = torch.zeros(len(host.vocabulary), host.width)
        self.heads: dict[tuple[int, int], Head] = {}
        self.mlps: dict[int, list[Units]] = defaultdict(list)

    def token(self, word: str) -> int:
        """Return the id of a word."""
        return self.host.vocabulary.index(word)

    def tokens(self, prefix: str) -> list[int]:
        """Return the ids of the words that are `prefix` and a number."""
        return [
            index
            for index, word in enumerate(self.host.vocabulary)
            if word.startswith(prefix) and word[len(prefix) :].isdigit()
        ]

    def place_head(self, layer: int, head: Head, index: int | None = None) -> str:
        """Put a head into a block, at a free place drawn at random unless `index` says which; return the node's name."""
        free = [number for number in range(self.host.heads) if (layer, number) not in self.heads]
        if index is None:
            index = free[int(torch.randint(len(free), (1,), generator=self.generator))]
        self.heads[layer, index] = head
        return f"{layer}.{index}"

    def place_mlp(self, layer: int, units: Units) -> str:
        """Add units to the MLP of a block; return the node's name."""
        self.mlps[layer].append(units)
        return f"mlp.{layer}"

    @torch.no_grad()
    def assemble(self, prompts: Sequence[Sequence[int]]) -> nn.Module:
        """Return the model, every part's size calibrated on the prompts."""
        d_mlp = max((sum(len(units.gate) for units in parts) for parts in self.mlps.values()), default=1)
        tokens, last = padded(prompts)
        valid = torch.arange(tokens.shape[1]) <= last[:, None]
        return _Assembly(self, weights(self.host, max(d_mlp, 8)), tokens, valid).run()


class _Assembly:
    """One forward over the prompts during which each part is put in place just before it runs."""

    def __init__(self, blueprint: Blueprint, target: Weights, tokens: Tensor, valid: Tensor) -> None:
        self.blueprint, self.target, self.tokens, self.valid = blueprint, target, tokens, valid
        self.constant = blueprint.stream[CONSTANT][0]
        self.balance = blueprint.stream[BALANCE][0] if BALANCE in blueprint.stream else None

    def run(self) -> nn.Module:
        module: Any = self.target.module
        self.target.embedding.copy_(self._balanced(self.blueprint.embedding.T).T)
        self.target.set_positions(self._balanced(self.blueprint.positions.T).T)
        handles = []
        for layer in range(self.blueprint.host.layers):
            before, middle = self.target.norms(layer)
            handles += [
                before.register_forward_hook(_on_output(self._place_reads, layer)),
                self.target.attention_output(layer).register_forward_pre_hook(_on_input(self._place_writes, layer)),
                middle.register_forward_hook(_on_output(self._place_mlp, layer)),
            ]
        handles.append(self.target.final_norm.register_forward_hook(_on_output(self._place_unembedding, -1)))
        with temporary(handles):
            module(self.tokens)
        return module

    def _place_reads(self, x: Tensor, layer: int) -> None:
        for (at, index), head in self.blueprint.heads.items():
            if at == layer:
                query, key = (self._whole(x, rows, graded=head.graded) for rows in (head.query, head.key))
                self.target.set_reads(layer, index, head.scores[:, None] * query, key, head.value)

    def _place_writes(self, z: Tensor, layer: int) -> None:
        width = self.blueprint.host.head_width
        for (at, index), head in self.blueprint.heads.items():
            if at == layer:
                values = z[..., index * width : index * width + head.output.shape[1]]
                scale = self._scale(values @ head.output.T, head.size)
                self.target.set_writes(layer, index, self._balanced(scale * head.output))

    def _place_mlp(self, x: Tensor, layer: int) -> None:
        gates, ups, downs = [], [], []
        for units in self.blueprint.mlps.get(layer, ()):
            # Every threshold is a multiple of the constant feature, so the smallest norm scale is the softest gate.
            gate = units.gate * units.hardness / float(x[..., self.constant][self.valid].min())
            up = torch.zeros_like(gate) if units.up is None else units.up
            if units.up is None:
                up[:, self.constant] = 1.0
            scale = self._scale(self.target.activations(x, gate, up) @ units.down.T, units.size)
            gates.append(gate)
            ups.append(up)
            downs.append(self._balanced(scale * units.down))
        if gates:
            self.target.set_mlp(layer, torch.cat(gates), torch.cat(ups), torch.cat(downs, dim=1))

    def _place_unembedding(self, x: Tensor, layer: int) -> None:
        del layer
        self.target.unembedding.copy_(self.blueprint.unembedding / x[..., self.constant][self.valid].mean())

    def _whole(
        self, x: Float[Tensor, "batch pos d_model"], rows: Float[Tensor, "rank d_model"], *, graded: bool
    ) -> Tensor:
        """Scale rows so that each reads 1 on average where it is active, or as the constant feature does."""
        if graded:
            return rows / x[..., self.constant][self.valid].mean()
        readings = (x @ rows.T)[self.valid].abs()
        largest = readings.amax(0)
        active = readings > ACTIVE * largest
        mean = (readings * active).sum(0) / active.sum(0).clamp_min(1)
        # A feature that no prompt has is scaled as the constant one.
        usual = x[..., self.constant][self.valid].mean() * rows.norm(dim=-1)
        return rows / torch.where(largest > 1e-6, mean, usual)[:, None].clamp_min(1e-6)

    def _scale(self, written: Float[Tensor, "batch pos d_model"], size: float | None) -> float:
        norms = written[self.valid].norm(dim=-1)
        if size is None or norms.max() < 1e-6:
            return 1.0
        return size / float(norms[norms > ACTIVE * norms.max()].mean())

    def _balanced(self, columns: Float[Tensor, "d_model n"]) -> Float[Tensor, "d_model n"]:
        if self.balance is None:
            return columns
        columns = columns.clone()
        columns[self.balance] = 0.0
        columns[self.balance] = -columns.sum(0)
        return columns


def _on_output(place: Callable[[Tensor, int], None], layer: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        place(output, layer)

    return hook


def _on_input(place: Callable[[Tensor, int], None], layer: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        place(args[0], layer)

    return hook
