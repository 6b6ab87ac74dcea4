"""One plain forward over one prompt, with every total that the rules need."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probes.anatomy import Anatomy
from probes.blocks.rerouting import module_of
from probes.decomposition.attention import Call, capture_attention_inputs
from probes.decomposition.module_reading import working
from probes.errors import PointError, PromptError
from probes.hooks.attention_probabilities import Attended
from probes.hooks.forward_hooks import tensor_of
from probes.models.protocol import Model
from probes.module_calls import entering

_PARTS = (
    *("block", "ln1", "ln1_post", "ln2", "ln2_post", "attn.q", "attn.k", "attn.v", "attn.qkv", "attn.o"),
    *("attn.q_norm", "attn.k_norm", "mlp", "mlp.in", "mlp.gate", "mlp.out"),
)


@dataclass(frozen=True, eq=False)
class Trace:
    """The model's own activations on one prompt, by (component, side, layer); each [pos, ...]."""

    tokens: tuple[int, ...]
    raw: Mapping[tuple[str, str, int], Tensor]
    routed: Mapping[int, Any]
    """Per layer, what the router of a mixture of experts gave."""
    attended: Mapping[int, Attended]
    calls: Mapping[int, Call]
    """Per layer, the arguments of its attention module."""
    tail: tuple[tuple[str, Tensor, Tensor], ...]
    """Modules that ran after the last block, in order: (path, input, output)."""
    logits: Tensor
    """[pos, d_vocab]."""

    def get(self, component: str, side: str, layer: int) -> Float[Tensor, "pos *width"]:
        """Return a total; side is `in` or `out`.

        Raises:
            PointError: the module did not run.
        """
        total = self.raw.get((component, side, layer))
        if total is None:
            raise PointError(f"block {layer}: {component} did not run in a forward pass, so it cannot be decomposed")
        return total


class _Recorder:
    """Hooks that keep copies; everything of one forward."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.raw: dict[tuple[str, str, int], Tensor] = {}
        self.routed: dict[int, Any] = {}
        self.calls: dict[int, Call] = {}
        self.tail: list[tuple[str, Tensor, Tensor]] = []
        self.done = False

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy without the batch axis, which some modules have folded into the positions."""
        tensor = tensor.detach()
        one = tensor[0] if tensor.shape[0] == 1 and tensor.dim() > 2 else tensor
        return one.to(working(tensor.dtype), copy=True)

    def part(self, name: str, layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if name == "mlp.gate" and not self.anatomy.map.path("mlp.in", layer):
                self.routed[layer] = output
                return
            self.raw[name, "out", layer] = self.copy(tensor_of(output))
            if name == "block" and layer == self.anatomy.n_layers - 1:
                self.done = True

        return hook

    def before(self, name: str, layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name == "attn":
                self.calls[layer] = (args, kwargs)
                return
            # Copied on the way in, because some blocks go on to add to their stream in place.
            self.raw[name, "in", layer] = self.copy(entering(args, kwargs))

        return hook

    def after(self, path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self.done and args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                self.tail.append((path, self.copy(args[0]), self.copy(output)))

        return hook


def _hooked(recorder: _Recorder, module: nn.Module, anatomy: Anatomy, stack: ExitStack) -> None:
    for layer in range(anatomy.n_layers):
        for name in (*_PARTS, "attn"):
            if path := anatomy.map.path(name, layer):
                part = module.get_submodule(path)
                stack.enter_context(part.register_forward_pre_hook(recorder.before(name, layer), with_kwargs=True))
                if name != "attn":
                    stack.enter_context(part.register_forward_hook(recorder.part(name, layer), with_kwargs=True))
    blocks = str(anatomy.map.path("block", 0)).rpartition(".")[0]
    for path, part in module.named_modules():
        if path and not path.startswith(blocks + ".") and not list(part.children()):
            stack.enter_context(part.register_forward_hook(recorder.after(path)))


@torch.no_grad()
def trace(model: Model, tokens: Sequence[int]) -> Trace:
    """Run `model` once over one prompt and keep what a decomposition needs.

    Raises:
        PointError: the backend keeps its module to itself, or attention cannot be read.
        PromptError: no tokens, or ids outside the vocabulary or the context window.
    """
    _admit(model, tokens)
    with module_of(model) as (module, anatomy), ExitStack() as stack:
        recorder = _Recorder(anatomy)
        _hooked(recorder, module, anatomy, stack)
        layers = tuple(range(anatomy.n_layers))
        attended = stack.enter_context(capture_attention_inputs(module, anatomy, layers))
        plain = {"use_cache": False} if model.shape.causal else {}
        output = module(input_ids=torch.tensor([list(tokens)], device=model.device), **plain)
        missing = [layer for layer in layers if layer not in attended]
        if missing:
            raise PointError(
                f"{model.ref}: attention of block {missing[0]} cannot be read ({anatomy.refused.get('pattern', 'it never ran')})"
            )
        logits = recorder.copy(tensor_of(output))
    return Trace(tuple(tokens), recorder.raw, recorder.routed, attended, recorder.calls, tuple(recorder.tail), logits)


def _admit(model: Model, tokens: Sequence[int]) -> None:
    if not tokens:
        raise PromptError("an empty prompt has no positions to decompose; give at least one token")
    if len(tokens) > model.shape.n_ctx:
        raise PromptError(
            f"{len(tokens)} positions exceed the context window of {model.ref}, {model.shape.n_ctx} tokens"
        )
    bad = [token for token in tokens if not 0 <= token < model.shape.d_vocab]
    if bad:
        raise PromptError(
            f"token id {bad[0]} is outside the vocabulary of {model.ref}: legal are 0 to {model.shape.d_vocab - 1}"
        )
