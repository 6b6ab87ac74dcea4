"""Ways of capturing a model's residual stream: ours over the asynchronous path, and other tools on the same tokens."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from probes.batches import batches
from probes.capture.device_capture import DeviceCapture
from probes.capture.forward import forward
from probes.capture.needs import Need
from probes.capture.run import capture
from probes.device_to_host import PendingTensor, Transport
from probes.hooks.forward_hooks import tensor_of
from probes.models.backends.native import NativeModel
from probes.module_calls import temporary
from probes.reducers import Reducer
from probes.store import ActivationStore

Rows = Callable[[], Tensor]
"""Puts what was captured together as [layer, batch, pos, d_model] on the CPU; never timed."""


@dataclass(frozen=True)
class Way:
    """One way of capturing.

    `run` does it once and returns how to see the rows (None where they are not rows); `prepare` is not timed.
    """

    name: str
    run: Callable[[], Rows | None]
    moved: int = 0
    """Bytes that arrive on the host in one run."""
    prepare: Callable[[], None] = lambda: None
    peer: bool = False
    """Whether it is not ours, with the same rows as ours."""
    logits: bool = True
    """Whether its forward goes on to the logits."""


class Kept:
    """Takes pending tensors and keeps them, in page-locked memory, until the next run."""

    def __init__(self) -> None:
        self.tensors: dict[str, PendingTensor] = {}

    def put_pending(
        self, _: tuple[tuple[int, ...], ...], features: Mapping[str, tuple[PendingTensor, tuple[int, ...]]]
    ) -> None:
        self.tensors |= {key: pending for key, (pending, _) in features.items()}

    def arrived(self) -> list[Tensor]:
        """Every tensor, behind its barrier."""
        return [pending.read() for pending in self.tensors.values()]

    def clear(self) -> None:
        for pending in self.tensors.values():
            pending.release()
        self.tensors = {}


def plain(module: nn.Module, tokens: Tensor) -> Way:
    def run() -> None:
        with torch.inference_mode():
            module(tokens, use_cache=False)

    return Way("plain forward", run)


def plain_without_logits(module: nn.Module, tokens: Tensor) -> Way:
    def run() -> None:
        with torch.inference_mode():
            module.base_model(tokens, use_cache=False)

    return Way("plain forward without logits", run, logits=False)


def ours(model: NativeModel, tokens: Tensor, name: str, reducer: Reducer, transport: Transport) -> Way:
    """Every `resid_post` reduced on the device and brought to page-locked host memory."""
    sequences = [tuple(row) for row in tokens.tolist()]
    (batch,) = batches(sequences, tokens.numel())
    features = Need("resid_post.*", reducer).features(model.shape.n_layers)
    kept, shape = Kept(), (model.shape.n_layers, *tokens.shape, model.shape.d_model)
    whole = reducer == Reducer()

    def run() -> Rows | None:
        forward(model, batch, features, None, DeviceCapture(model, batch, tuple(sequences), transport, kept))
        values = kept.arrived()
        return (lambda: torch.stack(values).view(shape).clone()) if whole else None

    width = {"d_model": model.shape.d_model}
    per_row = {feature.row_values(width, tokens.shape[1]) for feature in features}
    size = model.module.dtype.itemsize if reducer.kind == "rows" else 4
    moved = sum(per_row) * len(features) * len(sequences) * size
    return Way(f"bathyscope, {name}", run, moved, kept.clear, logits=False)


def ours_to_store(model: NativeModel, tokens: Tensor, folder: Path) -> Way:
    sequences = [tuple(row) for row in tokens.tolist()]

    def run() -> Rows:
        activations = capture(model, sequences, [Need("resid_post.*")], ActivationStore(folder))
        layers = range(model.shape.n_layers)
        return lambda: torch.stack([torch.stack(activations.get(f"resid_post.{i}")) for i in layers])

    moved = model.shape.n_layers * tokens.numel() * model.shape.d_model * model.module.dtype.itemsize
    clear = lambda: shutil.rmtree(folder, ignore_errors=True)  # noqa: E731
    return Way("bathyscope, all rows to the store", run, moved, clear, logits=False)


def _blocks(module: nn.Module) -> list[nn.Module]:
    return list(next(part for part in module.modules() if isinstance(part, nn.ModuleList)))


def plain_hooks(module: nn.Module, tokens: Tensor) -> Way:
    def run() -> Rows:
        rows: list[Tensor] = []
        hooks = [
            block.register_forward_hook(lambda _, __, out: rows.append(tensor_of(out).to("cpu", copy=True)))
            for block in _blocks(module)
        ]
        with torch.inference_mode(), temporary(hooks):
            module(tokens, use_cache=False)
        return lambda: torch.stack(rows)

    return Way("plain hooks with .cpu()", run, peer=True)


def transformer_lens(module: nn.Module, tokens: Tensor, folder: Path, tokenizer: Any) -> Way:
    from transformer_lens.model_bridge import TransformerBridge

    dtype = next(module.parameters()).dtype
    bridge = TransformerBridge.boot_transformers(
        str(folder), hf_model=module, tokenizer=tokenizer, device=str(tokens.device), dtype=dtype
    )
    names = [f"blocks.{i}.hook_out" for i in range(bridge.cfg.n_layers)]

    def run() -> Rows:
        with torch.inference_mode():
            _, cache = bridge.run_with_cache(tokens, names_filter=names, device="cpu")
        return lambda: torch.stack([cache[name] for name in names])

    return Way('TransformerLens run_with_cache(device="cpu")', run, peer=True)


def nnsight(module: nn.Module, tokens: Tensor, folder: Path, tokenizer: Any) -> Way:
    from nnsight import TransformersModel

    model = TransformersModel(module, task="text-generation", tokenizer=tokenizer)
    layers = list(model.model.layers)

    def run() -> Rows:
        with torch.inference_mode(), model.trace(tokens) as tracer:
            cache = tracer.cache(modules=layers, device=torch.device("cpu"))
            cache.save()
        return lambda: torch.stack([tensor_of(cache[name].output) for name in list(cache.keys())])

    return Way("nnsight tracer.cache", run, peer=True)


def interp_engine(module: nn.Module, tokens: Tensor, folder: Path, tokenizer: Any) -> Way:
    import interp_engine as ie
    from interp_engine.model import EagerModel

    dtype = str(next(module.parameters()).dtype).removeprefix("torch.")
    device = str(tokens.device)
    model = EagerModel(str(folder), hf_model=module, tokenizer=tokenizer, device=device, dtype=dtype)
    points = [ie.Address("resid_post", i) for i in range(len(_blocks(module)))]

    def run() -> Rows:
        cache = ie.capture(model, tokens, points)
        rows = [cache[point].cpu() for point in points]
        return lambda: torch.stack(rows)

    return Way("interp-engine eager capture", run, peer=True)


PEERS = {"TransformerLens": transformer_lens, "nnsight": nnsight, "interp-engine": interp_engine}
"""Other tools by name; each makes its way from a model of its own, a folder with its configuration, and a tokenizer."""
