"""TransformerLens's bridge: a model read and edited through its hook points, with raw Hugging Face numerics."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from probes.anatomy import Anatomy, ArchitectureMap, Site, anatomy_of
from probes.anatomy.constant_norm import ConstantNorm
from probes.errors import ModelError
from probes.hooks.forward_hooks import ForwardHooks, Place
from probes.models.backends.bare_copy import bare_copy
from probes.models.backends.in_memory import LocalModel, evaluating
from probes.models.backends.native import NativeModel
from probes.models.fingerprint.fingerprint import Fingerprint
from probes.models.protocol import Unembedding
from probes.models.sources.digest import weights_digest
from probes.models.verify.identities import TOLERANCE, absent, probe_tokens
from probes.models.verify.recording import deviation, recorded
from probes.points import POINTS

HALF = 1e-1
"""Relative tolerance between bridge and module in half precision, where each rounds elsewhere at every layer."""


class TransformerLensModel(LocalModel):
    """A TransformerBridge behind the `Model` protocol.

    The bridge wraps a copy of the module whose tensors are shared and never written, under eager attention, which the
    bridge computes itself. Every point is compared with the module's own when the model is loaded; one that differs is
    refused.

    Args:
        module: A transformers model with its language-model head; left as it is.

    Raises:
        ModelError: as `LocalModel`, or an architecture the bridge cannot wrap.
    """

    backend: ClassVar[str] = "transformer_lens"

    def __init__(
        self, module: nn.Module, tokenizer: Any = None, *, ref: str, weights: str, revision: str | None = None
    ) -> None:
        plain = NativeModel(module, tokenizer, ref=ref, weights=weights, revision=revision)
        self.bridge = bridge_over(bare_copy(module, ref, share_tensors=True), tokenizer, ref)
        self._wrap(tokenizer, ref, weights, revision, module)
        self._compare(plain)
        self._unembedding = None if "lens" in plain.faithfulness.refused else plain.unembedding()

    @classmethod
    def from_bridge(cls, bridge: Any, ref: str | None = None) -> TransformerLensModel:
        """Wrap a user's own bridge, whose hooks and processed weights stay in force.

        Raises:
            ModelError: its identities do not hold, as after some of its weight processing.
        """
        self = cls.__new__(cls)
        self.bridge, self._unembedding = bridge, None
        name = ref or str(bridge.cfg.model_name)
        self._wrap(bridge.tokenizer, name, weights_digest(bridge.original_model), None, bridge.original_model)
        return self

    def unembedding(self) -> Unembedding:
        """Return the final norm and unembedding; raises PointError where they do not reproduce the logits."""
        return self._unembedding or super().unembedding()

    def _wrap(self, tokenizer: Any, ref: str, weights: str, revision: str | None, source: nn.Module) -> None:
        wrapped: nn.Module = self.bridge.original_model
        self.module = wrapped
        anatomy = bridged_anatomy(wrapped)
        anatomy = replace(anatomy, patterns=self._patterns(anatomy))
        super().__init__(
            wrapped, tokenizer, ref=ref, weights=weights, revision=revision, anatomy=anatomy, source=source
        )

    def _follow(self, now: Fingerprint | None) -> None:
        raise ModelError(
            f"{self.ref}: its module was changed in place since a TransformerBridge was put around it, and what the bridge "
            "took over then no longer follows it; wrap the module again (from_hf or from_bridge)"
        )

    def _call(self, hooks: ForwardHooks, tokens: Tensor, **kwargs: Any) -> Any:
        with hooks.on(self.module, (tokens.shape[0], tokens.shape[1]), hook_point):
            return self.module(input_ids=tokens, **kwargs)

    def _patterns(self, anatomy: Anatomy) -> dict[int, Site]:
        """The sites of the attention probabilities, where each layer's pass its hook point before they are used."""
        sites: dict[Any, Site] = {}
        for layer in range(anatomy.n_layers):
            attention, output = (anatomy.map.path(name, layer) for name in ("attn", "attn.o"))
            if not attention or not output or not hasattr(anatomy.component("attn", layer), "hook_pattern"):
                return {}
            sites[layer] = Site((f"{attention}.hook_pattern",), "output")
            sites[f"after {layer}"] = Site((output,), "input")
        order: list[Any] = []
        reads = {key: lambda _, key=key: order.append(key) for key in sites}  # type: ignore[misc]
        tokens = torch.ones(1, 2, dtype=torch.long, device=next(self.module.parameters()).device)
        with evaluating(self.module), torch.inference_mode():
            self._call(ForwardHooks(sites, reads, {}, stop=False), tokens)
        expected = [key for layer in range(anatomy.n_layers) for key in (layer, f"after {layer}")]
        return {key: site for key, site in sites.items() if isinstance(key, int)} if order == expected else {}

    def _compare(self, plain: NativeModel) -> None:
        """Refuse every point whose tensor is not the plain module's own."""
        tolerance = TOLERANCE.get(getattr(torch, self.context.dtype), HALF)
        tokens = probe_tokens(self.shape.d_vocab, self.shape.n_ctx, getattr(self._config, "pad_token_id", None))
        refused = dict(self.anatomy.refused)
        with evaluating(plain.module), evaluating(self.module), torch.inference_mode():
            ours = recorded(self.anatomy, self._logits, tokens)
            theirs = recorded(plain.anatomy, plain._logits, tokens)
        for point in POINTS:
            addresses = [a for a in ours.sites if a.point == point and a in theirs.sites and not theirs.lacks(a)]
            error = max((deviation(ours.need(a), theirs.need(a)) for a in addresses if not ours.lacks(a)), default=0.0)
            if error > tolerance and point not in refused:
                refused[point] = (
                    f"TransformerLens's bridge gives another tensor than the model itself (off by {error:.1e} relative)"
                )
        self.anatomy = replace(self.anatomy, refused=refused)
        self.faithfulness = replace(self.faithfulness, refused={**self.faithfulness.refused, **absent(self.anatomy)})


def bridge_over(module: nn.Module, tokenizer: Any, ref: str) -> Any:
    """Return a TransformerBridge that takes `module` over, with a tokenizer of its own.

    Raises:
        ModelError: the bridge cannot wrap it; the message is the library's own.
    """
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    try:
        module.set_attn_implementation("eager")  # type: ignore[operator]
        bridge = build_bridge_from_module(
            module,
            type(module).__name__,
            hf_config=module.config,
            tokenizer=copy.deepcopy(tokenizer),
            model_name=ref,
        )
    except Exception as error:
        raise ModelError(
            f"{ref}: TransformerLens cannot wrap this {type(module).__name__} ({type(error).__name__}: {error}); "
            "use backend native or nnsight"
        ) from error
    for part in module.modules():
        if isinstance(getattr(part, "original_component", None), ConstantNorm):
            # The bridge's own arithmetic would divide by the standard deviation again.
            part.use_native_layernorm_autograd = True  # type: ignore[assignment]
    return bridge


@dataclass(frozen=True, eq=False)
class BridgedMap(ArchitectureMap):
    """The map of a wrapped module: its own projections instead of a joint one, and the parts that carry hook points."""

    def _find(self, component: str, layer: int | None) -> str | None:
        path = super()._find(component, layer)
        part = component.removeprefix("attn.")
        if layer is None or part == component:
            return path
        attention = super()._find("attn", layer)
        if part == "qkv" and self.path("attn.q", layer):
            return None
        if path and attention and not hasattr(self.module.get_submodule(path), "hook_out"):
            own = f"{attention}.{part}"
            return own if hasattr(self.module.get_submodule(attention), part) else path
        return path


def bridged_anatomy(module: nn.Module) -> Anatomy:
    """Return the anatomy of a module that a bridge has taken over."""
    plain = anatomy_of(module)
    return replace(plain, map=BridgedMap(module, plain.map.architecture, plain.map.adapter))


def hook_point(root: nn.Module, place: Place) -> tuple[nn.Module, str]:
    """Return the hook point at a place; the module itself where TransformerLens has none there."""
    path, side = place
    module = root.get_submodule(path)
    point = getattr(module, "hook_in" if side == "input" else "hook_out", None) if path else None
    return (point, "output") if isinstance(point, nn.Module) else (module, side)
