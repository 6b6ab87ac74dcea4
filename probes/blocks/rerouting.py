"""A model's blocks called one by one, with the arguments that the model itself would give them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor, nn

from probes.anatomy import Anatomy
from probes.blocks.block_outputs import imitated, watched_widths
from probes.errors import PointError
from probes.hooks.forward_hooks import Stop
from probes.models.protocol import BlockAccess, Model


@runtime_checkable
class Caller(Protocol):
    """Runs one block."""

    def __call__(self, layer: int, hidden: Tensor, change: Callable[[Any], Any] | None = None) -> Tensor:
        """Return what block `layer` makes of `hidden` [batch, pos, d_model]; every other argument becomes what `change` makes of it."""
        ...


T = TypeVar("T")

Program = Callable[[Tensor, Caller], Tensor]
"""Receives what enters block 0 and a caller; returns what leaves the last block."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""A block's positional and named arguments besides the stream."""


def exchanged(old: Any, new: Any) -> Callable[[Any], Any]:
    """Return the change of an argument that puts `new` where `old` was given."""
    return lambda argument: new if argument is old else argument


def block_access(model: Model) -> BlockAccess:
    """Return the model as one that hands out its blocks.

    Raises:
        PointError: the backend keeps its module to itself.
    """
    if not isinstance(model, BlockAccess):
        raise PointError(
            f"{model.ref}: backend {model.context.backend!r} does not hand out its blocks and weights; use native, without edits"
        )
    return model


@contextmanager
def module_of(model: Model) -> Iterator[tuple[nn.Module, Anatomy]]:
    """Hand out the model's own module and anatomy, for an alteration that the caller undoes; no other thread runs it.

    Raises:
        PointError: the backend keeps its module to itself, or the blocks are not in memory.
    """
    access = block_access(model)
    with access.whole():
        yield access.module, access.anatomy


@contextmanager
def rerouted(model: Model, program: Program, cached: bool = True) -> Iterator[None]:
    """Run the blocks as `program` says in every forward of the model inside; reads and writes see each block's call.

    Args:
        model: the model, of a backend that hands out its blocks.
        program: what runs in the blocks' place.
        cached: hand the blocks the forward's key-value cache; False where a block may run twice.

    Raises:
        PointError: the backend keeps its module to itself.
    """
    access = block_access(model)
    with access.exclusive():
        path = access.anatomy.map.path("block", 0)
        assert path is not None
        parent = access.module.get_submodule(path.rpartition(".")[0])
        blocks = dict(parent.named_children())
        route = _Route(program, access, cached)
        slots = {name: route.slot(index, block) for index, (name, block) in enumerate(blocks.items())}
        with access.during(lambda: _slotted(parent, blocks, slots)):
            yield


@contextmanager
def _slotted(parent: nn.Module, blocks: Mapping[str, nn.Module], slots: Mapping[str, nn.Module]) -> Iterator[None]:
    parent._modules.update(slots)
    try:
        yield
    finally:
        parent._modules.update(blocks)


def in_order(n_layers: int) -> Program:
    """Return the program that runs every block once, as the model itself does."""

    def program(hidden: Tensor, call: Caller) -> Tensor:
        for layer in range(n_layers):
            hidden = call(layer, hidden)
        return hidden

    return program


def call_blocks(
    model: Model, tokens: Int[Tensor, "batch pos"], work: Callable[[Tensor, Caller], T], **arguments: Any
) -> T:
    """Return what `work` makes of what enters block 0 and of a caller; no block runs but those that it calls.

    By then the model's own forward is over, so that `work` may wait for blocks.

    Args:
        model: the model, of a backend that hands out its blocks.
        tokens: what the module's forward is called on.
        work: receives what enters block 0 [batch, pos, d_model] and the caller, which stays usable afterwards.
        arguments: further arguments of the module's forward.

    Raises:
        PointError: the backend keeps its module to itself.
    """
    access, entered = block_access(model), list[tuple[Tensor, Caller]]()

    def program(hidden: Tensor, call: Caller) -> Tensor:
        entered.append((hidden, call))
        raise Stop

    with access.exclusive():
        with rerouted(model, program), suppress(Stop):
            access.module(input_ids=tokens.to(model.device), **arguments)
        return work(*entered[0])


@torch.inference_mode()
def block_outputs(module: nn.Module, anatomy: Anatomy, device: torch.device) -> tuple[int | None, ...]:
    """Return per block how long the tuple is that it returns; None where it returns a bare tensor."""
    blocks = [anatomy.component("block", layer) for layer in range(anatomy.n_layers)]
    with watched_widths(blocks) as widths:
        module(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device))
    return tuple(widths[index] for index in range(len(blocks)))


class _Route:
    """Collects every block's arguments while the model's loop passes, then runs the program at the loop's end."""

    def __init__(self, program: Program, access: BlockAccess, cached: bool) -> None:
        self.program, self.access, self.cached = program, access, cached
        self.widths = access.block_output_lengths()
        self.slots: list[_Slot] = []
        self.arguments: dict[int, Arguments] = {}

    def slot(self, index: int, block: nn.Module) -> _Slot:
        self.slots.append(_Slot(self, index, block))
        return self.slots[-1]

    def visit(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            hidden, rest = args[0], (args[1:], kwargs)
        else:
            hidden, rest = kwargs["hidden_states"], ((), {k: v for k, v in kwargs.items() if k != "hidden_states"})
        self.arguments[index] = rest if self.cached else _without_cache(*rest)
        if index == len(self.slots) - 1:
            arguments, self.arguments = self.arguments, {}
            hidden = self.program(hidden, partial(self.call, arguments))
        return imitated(hidden, self.widths[index])

    def call(
        self,
        arguments: Mapping[int, Arguments],
        layer: int,
        hidden: Tensor,
        change: Callable[[Any], Any] | None = None,
    ) -> Tensor:
        args, kwargs = arguments[layer]
        if change is not None:
            args = tuple(change(argument) for argument in args)
            kwargs = {name: change(argument) for name, argument in kwargs.items()}
        with self.access.at(layer):
            output = nn.Module.__call__(self.slots[layer], hidden, *args, **kwargs)
        return output if isinstance(output, Tensor) else output[0]


def _without_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    from transformers.cache_utils import Cache

    return (
        tuple(None if isinstance(a, Cache) else a for a in args),
        {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()},
    )


class _Slot(nn.Module):
    """Stands in a block's place: called by the model's loop it only notes; hooks see the block's real calls."""

    def __init__(self, route: _Route, index: int, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.__dict__["route"], self.__dict__["index"] = route, index

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.route.visit(self.index, args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.block(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)
