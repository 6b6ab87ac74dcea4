"""nnsight: a model already in memory, read and edited from inside its traces."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from probes.errors import ModelError
from probes.hooks.forward_hooks import ForwardHooks, replaced, tensor_of
from probes.models.backends.in_memory import LocalModel, evaluating
from probes.models.fingerprint.fingerprint import Fingerprint
from probes.module_calls import entered, entering, temporary

Passage = tuple[nn.Module, str]
"""A module and a side of it, `input` or `output`."""

Visit = Callable[[Any, ForwardHooks, list[Any]], None]
"""Shows the tensor at one of nnsight's parts to the hooks of some keys."""


class NnsightModel(LocalModel):
    """A module behind the `Model` protocol through nnsight's traces; reads and edits happen in the order of the forward.

    nnsight leaves its controllers on the module's parts, inert outside traces; the module is otherwise as it was.

    Args:
        module: A transformers model with its language-model head, or an nnsight model around one.

    Raises:
        ModelError: as `LocalModel`, or nnsight is not installed.
    """

    backend: ClassVar[str] = "nnsight"

    def __init__(
        self, module: Any, tokenizer: Any = None, *, ref: str, weights: str, revision: str | None = None
    ) -> None:
        self.traced = module if not isinstance(module, nn.Module) else traced_over(module, tokenizer)
        inner: nn.Module = self.traced._module
        with evaluating(inner), torch.inference_mode():
            device = next(inner.parameters()).device
            self._order = execution_order(inner, torch.ones(1, 2, dtype=torch.long, device=device))
        self._parts = set(inner.modules())
        super().__init__(inner, tokenizer, ref=ref, weights=weights, revision=revision)

    def _follow(self, now: Fingerprint | None) -> None:
        if self._parts != set(self.module.modules()):
            raise ModelError(
                f"{self.ref}: parts of its module were exchanged since nnsight was put around it; wrap the module again "
                "(from_hf or from_nnsight)"
            )
        super()._follow(now)

    def _call(self, hooks: ForwardHooks, tokens: Tensor, **kwargs: Any) -> Any:
        hooks.rows = (tokens.shape[0], tokens.shape[1])
        visits = self._visits(hooks)
        outputs: list[Any] = []
        with self.traced.trace(input_ids=tokens, **kwargs):
            for visit, part, keys in visits:
                visit(part, hooks, keys)
            outputs.append(self.traced.output)
        return outputs[0]

    def _visits(self, hooks: ForwardHooks) -> list[tuple[Visit, Any, list[Any]]]:
        """The visits to nnsight's parts, in the order of the forward."""
        passages = []
        for (path, side), keys in hooks.places().items():
            part = self.module.get_submodule(path)
            when = self._order.get((part, side))
            if when == -1:
                raise ModelError(f"{keys[0]}: its module ran more than once in one forward, so the point is ambiguous")
            if when is not None:
                passages.append((when, part, side, keys))
        envoys = self.traced.interleaver.envoys
        visits = {"input": _visit_input, "output": _visit_output}
        return [(visits[side], envoys[id(part)], keys) for _, part, side, keys in sorted(passages, key=lambda f: f[0])]


def _visit_input(part: Any, hooks: ForwardHooks, keys: list[Any]) -> None:
    args, kwargs = part.inputs
    old = entering(args, kwargs)
    new = hooks.visit(keys, old)
    if new is not old:
        part.inputs = entered(args, kwargs, new)


def _visit_output(part: Any, hooks: ForwardHooks, keys: list[Any]) -> None:
    output = part.output
    old = tensor_of(output)
    new = hooks.visit(keys, old)
    if new is not old:
        part.output = replaced(output, new)


def library() -> Any:
    """Import the nnsight package.

    Raises:
        ModelError: it is not installed.
    """
    try:
        return import_module("nnsight")
    except ImportError as error:
        raise ModelError(
            f"backend 'nnsight' needs a package that is missing ({error}): pip install 'bathyscope[nnsight]'"
        ) from error


def traced_over(module: nn.Module, tokenizer: Any) -> Any:
    """Return an nnsight model around `module`: a TransformersModel, or the plain wrapper where there is no tokenizer."""
    nnsight = library()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if tokenizer is None:
            return nnsight.NNsight(module)
        # A copy, because nnsight sets the padding side and token of the one it is given.
        return nnsight.TransformersModel(module, tokenizer=copy.deepcopy(tokenizer))


def execution_order(module: nn.Module, tokens: Int[Tensor, "batch pos"]) -> Mapping[Passage, int]:
    """Number the passages of one forward over `tokens` [batch, pos] in their order; -1 for one that comes again."""
    order: dict[Passage, int] = {}

    def note(part: nn.Module, side: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            order[part, side] = -1 if (part, side) in order else len(order)

        return hook

    handles = []
    for part in module.modules():
        handles.append(part.register_forward_pre_hook(note(part, "input")))
        handles.append(part.register_forward_hook(note(part, "output")))
    with temporary(handles):
        module(input_ids=tokens)
    return order
