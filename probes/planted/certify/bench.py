"""A planted model on the bench: plain forwards, and plain hooks on written-out module names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.module_calls import temporary
from probes.planted.certify.measured import SURE, SURE_IN_NOISE
from probes.planted.padding import padded
from probes.planted.record import node_names
from probes.planted.task import Example, PlantedTask

Site = tuple[Literal["stream", "q", "k", "v", "z", "mlp"], int]
"""`stream` leaves a block (-1: the embedding), `z` enters the output projection, `mlp` leaves the MLP."""
Change = Callable[[Tensor], Tensor]


class Bench:
    """Runs a model on examples and their partners, changing what passes chosen sites.

    Args:
        examples: those to run; all of the task unless given.
    """

    def __init__(self, task: PlantedTask, examples: Sequence[Example] | None = None) -> None:
        self.task = task
        module: Any = task.module
        self.module = module
        self.examples = tuple(task.examples if examples is None else examples)
        self.layers: int = task.record.model["layers"]
        self.heads: int = task.record.model["heads"]
        self.nodes = node_names(self.layers, self.heads)
        self.sure = SURE_IN_NOISE if task.record.tier == "noised" else SURE
        self.is_gpt2 = task.record.model["class"] == "GPT2LMHeadModel"
        self.blocks: Any = module.transformer.h if self.is_gpt2 else module.model.layers
        self.final_norm: Any = module.transformer.ln_f if self.is_gpt2 else module.model.norm
        self.longest = max(len(prompt) for e in task.examples for prompt in (e.tokens, e.partner))
        self.tokens, self.last = padded([example.tokens for example in self.examples], self.longest)
        self._few: dict[int, Bench] = {}
        self.whole = self
        """The bench of which this one has a few examples, over which means are taken."""
        self.answers = torch.tensor([example.answer for example in self.examples])

    def few(self, n: int) -> Bench:
        """Return a bench of about `n` of the examples, spread over them."""
        if n not in self._few:
            self._few[n] = Bench(self.task, self.examples[:: max(1, len(self.examples) // n)])
            self._few[n].whole = self
        return self._few[n]

    @cached_property
    def partners(self) -> tuple[Int[Tensor, "example pos"], Int[Tensor, "example"]]:
        """Tokens of the partners, and where each ends."""
        return padded([example.partner for example in self.examples], self.longest)

    @cached_property
    def valid(self) -> Bool[Tensor, "example pos"]:
        """Which positions are no padding."""
        return torch.arange(self.longest) <= self.last[:, None]

    def at(self, position: str | None) -> tuple[Int[Tensor, "example"], Int[Tensor, "example"]]:
        """Return the place of a named position in each example, as rows and columns."""
        assert position
        columns = [self.task.position(example, position) for example in self.examples]
        return torch.arange(len(columns)), torch.tensor(columns)

    @torch.no_grad()
    def logits(
        self, tokens: Int[Tensor, "row pos"], last: Int[Tensor, "row"], changes: Mapping[Site, Change] | None = None
    ) -> Float[Tensor, "row vocab"]:
        """Return the logits at each row's last token while `changes` are at work."""
        with temporary(self._hook(site, change) for site, change in (changes or {}).items()):
            every: Tensor = self.module(tokens, use_cache=False).logits
        return every[torch.arange(len(tokens)), last]

    def answer(
        self, tokens: Int[Tensor, "row pos"], last: Int[Tensor, "row"], changes: Mapping[Site, Change] | None = None
    ) -> Int[Tensor, "row"]:
        """Return the word named at each row's last token while `changes` are at work."""
        return self.logits(tokens, last, changes).argmax(-1)

    @cached_property
    def plain(self) -> Int[Tensor, "example"]:
        """The word named at the end of each example."""
        return self.answer(self.tokens, self.last)

    def read(
        self,
        sites: Sequence[Site],
        tokens: Int[Tensor, "row pos"],
        changes: Mapping[Site, Change] | None = None,
    ) -> dict[Site, Float[Tensor, "row pos width"]]:
        """Return what passes the sites; `changes` come first where both name one site."""
        passed: dict[Site, Tensor] = {}

        def keep(site: Site) -> Change:
            def kept(x: Tensor) -> Tensor:
                passed[site] = (changes or {}).get(site, _same)(x).clone()
                return passed[site]

            return kept

        everything = {**(changes or {}), **{site: keep(site) for site in sites}}
        self.logits(tokens, torch.zeros(len(tokens), dtype=torch.long), everything)
        return passed

    @cached_property
    def streams(self) -> Float[Tensor, "layer example pos d_model"]:
        """The stream of every example after each block; the first is the embedding's."""
        return self._streams(self.tokens)

    @cached_property
    def partner_streams(self) -> Float[Tensor, "layer example pos d_model"]:
        """The same of the partners."""
        return self._streams(self.partners[0])

    @torch.no_grad()
    def lens(self, stream: Float[Tensor, "*rows d_model"]) -> Int[Tensor, "*rows"]:
        """Return the word that the read-out names for each row of a stream."""
        return self.module.lm_head(self.final_norm(stream)).argmax(-1)

    def output_weight(self, layer: int) -> Float[Tensor, "d_model width"]:
        """Return the matrix that takes the heads' values to the stream."""
        block = self.blocks[layer]
        weight: Tensor = block.attn.c_proj.weight.T if self.is_gpt2 else block.self_attn.o_proj.weight
        return weight

    def projected(self, stream: Float[Tensor, "*rows d_model"], layer: int, kind: str) -> Float[Tensor, "*rows width"]:
        """Return the queries, keys or values (`q`, `k`, `v`) that a block's heads make of a stream entering it."""
        block = self.blocks[layer]
        if self.is_gpt2:
            joint: Tensor = block.attn.c_attn(block.ln_1(stream))
            return joint.chunk(3, dim=-1)["qkv".index(kind)]
        projected: Tensor = getattr(block.self_attn, f"{kind}_proj")(block.input_layernorm(stream))
        return projected

    @cached_property
    def _arguments(self) -> list[dict[str, Any]]:
        """What the model itself hands to each block besides the stream."""
        arguments: list[dict[str, Any]] = [{} for _ in range(self.layers)]

        def keep(layer: int) -> Callable[..., None]:
            def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
                arguments[layer] = {key: value for key, value in kwargs.items() if key != "hidden_states"}

            return hook

        with temporary(b.register_forward_pre_hook(keep(i), with_kwargs=True) for i, b in enumerate(self.blocks)):
            self.module(self.tokens[:1], use_cache=False)
        return arguments

    @torch.no_grad()
    def run_blocks(
        self, order: Sequence[int], entering: Float[Tensor, "row pos d_model"], last: Int[Tensor, "row"]
    ) -> Int[Tensor, "row"]:
        """Return the word named at the end of each row when the stream runs through these blocks."""
        stream = entering
        for layer in order:
            stream = self.through(layer, stream)
        return self.lens(stream[torch.arange(len(stream)), last])

    def through(self, layer: int, stream: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos d_model"]:
        """Return what leaves a block that the stream enters."""
        output = self.blocks[layer](stream, **self._arguments[layer])
        left: Tensor = output[0] if isinstance(output, tuple) else output
        return left

    def _streams(self, tokens: Tensor) -> Tensor:
        sites: list[Site] = [("stream", layer) for layer in range(-1, self.layers)]
        passed = self.read(sites, tokens)
        return torch.stack([passed[site] for site in sites])

    def _hook(self, site: Site, change: Change) -> Any:
        kind, layer = site
        if kind == "stream" and layer < 0:
            return self.blocks[0].register_forward_pre_hook(_on_arguments(change), with_kwargs=True)
        block = self.blocks[layer]
        if kind == "stream":
            return block.register_forward_hook(_on_output(change))
        if kind == "mlp":
            return block.mlp.register_forward_hook(_on_output(change))
        attention = block.attn if self.is_gpt2 else block.self_attn
        if kind == "z":
            output = attention.c_proj if self.is_gpt2 else attention.o_proj
            return output.register_forward_pre_hook(_on_arguments(change), with_kwargs=True)
        if self.is_gpt2:
            return attention.c_attn.register_forward_hook(_on_third("qkv".index(kind), change))
        return getattr(attention, f"{kind}_proj").register_forward_hook(_on_output(change))


def _same(x: Tensor) -> Tensor:
    return x


def _on_output(change: Change) -> Callable[..., Any]:
    def hook(module: Any, args: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    return hook


def _on_third(number: int, change: Change) -> Callable[..., Any]:
    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        thirds = list(output.chunk(3, dim=-1))
        thirds[number] = change(thirds[number])
        return torch.cat(thirds, dim=-1)

    return hook


def _on_arguments(change: Change) -> Callable[..., Any]:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    return hook
