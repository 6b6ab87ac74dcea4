"""Ways to change what a module computes after it was built, each undone on leaving where it reaches beyond the module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

Change = Callable[[Any], AbstractContextManager[None]]
"""Receives a tiny Llama; within, it computes something else."""


def lasting(change: Callable[[Any], Any]) -> Change:
    """A change of the module alone, which nobody undoes."""

    @contextmanager
    def within(module: nn.Module) -> Iterator[None]:
        with torch.no_grad():
            change(module)
        yield

    return within


def attention(module: Any) -> Any:
    return module.model.layers[1].self_attn


def mlp(module: Any) -> Any:
    return module.model.layers[1].mlp


class Doubled(nn.Module):
    """A parametrisation."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Adapted(nn.Module):
    """A linear layer with a low-rank update beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        generator = torch.Generator().manual_seed(3)
        self.down = nn.Parameter(torch.randn(2, base.in_features, generator=generator))
        self.up = nn.Parameter(torch.randn(base.out_features, 2, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


def with_buffer(module: Any) -> Any:
    """A saved buffer that the model's forward reads; a Llama has none of its own."""
    norm = module.model.norm
    gain = norm.weight.detach().clone()
    del norm.weight
    norm.register_buffer("weight", gain)
    return module


def scaled_weight_norm(module: Any) -> None:
    nn.utils.parametrizations.weight_norm(mlp(module).up_proj)
    mlp(module).up_proj.parametrizations.weight.original0.mul_(1.5)


def patch_block(module: Any) -> None:
    block = module.model.layers[1]
    own = block.forward
    block.forward = lambda *args, **kwargs: own(*args, **kwargs) * 1.5


def patch_model(module: Any) -> None:
    own = module.forward
    module.forward = lambda input_ids, **kwargs: own(input_ids=(input_ids + 1) % 97, **kwargs)


def load_other(module: Any) -> None:
    module.load_state_dict({name: tensor * 1.25 for name, tensor in module.state_dict().items()})


def untie(module: Any) -> None:
    module.lm_head.weight = nn.Parameter(module.lm_head.weight.detach().clone() * 1.5)


@contextmanager
def patched_class(module: Any) -> Iterator[None]:
    kind = type(mlp(module))
    own = kind.forward
    kind.forward = lambda self, x: own(self, x) * 1.5
    try:
        yield
    finally:
        kind.forward = own


@contextmanager
def hooked_everywhere(_: Any) -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(
        lambda part, args, output: output * 1.01 if isinstance(part, nn.Linear) else None
    )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def autocast(_: Any) -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


@contextmanager
def default_dtype(_: Any) -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


CHANGES: dict[str, Change] = {
    "weight": lasting(lambda m: mlp(m).up_proj.weight.mul_(1.5)),
    "one bit of a weight": lasting(lambda m: mlp(m).up_proj.weight.view(torch.int32)[3, 5].bitwise_xor_(1 << 24)),
    "weight through .data": lasting(lambda m: mlp(m).up_proj.weight.data.mul_(1.5)),
    "weight through numpy": lasting(lambda m: mlp(m).up_proj.weight.detach().numpy().__imul__(1.5)),
    "norm gain": lasting(lambda m: m.model.layers[1].input_layernorm.weight.add_(0.5)),
    "saved buffer": lasting(lambda m: m.model.norm.weight.data.mul_(1.5)),
    "unsaved buffer": lasting(lambda m: m.model.rotary_emb.inv_freq.mul_(1.5)),
    "scaling": lasting(lambda m: setattr(attention(m), "scaling", 1.0)),
    "norm epsilon": lasting(lambda m: setattr(m.model.layers[1].input_layernorm, "variance_epsilon", 0.5)),
    "config field": lasting(lambda m: setattr(m.config, "rms_norm_eps", 0.5)),
    "activation module": lasting(lambda m: setattr(mlp(m), "act_fn", nn.Tanh())),
    "activation function": lasting(lambda m: (delattr(mlp(m), "act_fn"), setattr(mlp(m), "act_fn", torch.sin))),
    "forward of a block": lasting(patch_block),
    "forward of the model": lasting(patch_model),
    "forward of a class": patched_class,
    "hook": lasting(lambda m: m.model.layers[1].register_forward_hook(lambda _, __, out: out * 1.5)),
    "pre-hook": lasting(lambda m: mlp(m).register_forward_pre_hook(lambda _, args: (args[0] * 1.5,))),
    "global hook": hooked_everywhere,
    "autocast": autocast,
    "default dtype": default_dtype,
    "bfloat16": lasting(lambda m: m.to(torch.bfloat16)),
    "load_state_dict": lasting(load_other),
    "adapter": lasting(lambda m: setattr(attention(m), "o_proj", Adapted(attention(m).o_proj))),
    "pruning": lasting(lambda m: prune.l1_unstructured(mlp(m).up_proj, "weight", amount=0.5)),
    "parametrisation": lasting(lambda m: parametrize.register_parametrization(mlp(m).up_proj, "weight", Doubled())),
    "weight norm": lasting(scaled_weight_norm),
    "untied unembedding": lasting(untie),
    "attention implementation": lasting(lambda m: m.set_attn_implementation("eager")),
}  # fmt: skip
