"""TransformerLens's architecture map of a plain Hugging Face module: the only file that touches that library's map."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from probes.errors import ModelError

_GLOBAL = ("embed", "ln_final", "unembed")
_LAYERED = (
    *("ln1", "ln1_post", "attn", "attn.q", "attn.k", "attn.v", "attn.qkv", "attn.o", "attn.q_norm", "attn.k_norm"),
    *("ln2", "ln2_post", "mlp", "mlp.in", "mlp.gate", "mlp.out"),
)
_BARE = {"BertModel": "BertForMaskedLM"}
"""Classes without a head that are read by the map of the class that has one."""


@dataclass(frozen=True, eq=False)
class ArchitectureMap:
    """Names of a model's parts, and the sizes its configuration states."""

    module: nn.Module
    architecture: str
    adapter: Any
    _paths: dict[tuple[str, int | None], str | None] = field(default_factory=dict, repr=False)

    @property
    def sizes(self) -> Any:
        """The map's configuration: `d_model`, `n_heads`, `d_head`, `n_ctx` and others as attributes."""
        return self.adapter.cfg

    @property
    def bare(self) -> bool:
        """Whether the module has no language-model head, so that what it returns are no logits."""
        return self.architecture in _BARE

    @cached_property
    def n_layers(self) -> int:
        """The number of blocks."""
        return len(list(self.module.get_submodule(self._own(self.adapter.component_mapping["blocks"].name)).children()))

    def _own(self, path: str) -> str:
        """A path of the map as this module names it: a bare one is what the map's class calls its base."""
        return path.removeprefix(f"{self.module.base_model_prefix}.") if self.bare else path

    def path(self, component: str, layer: int | None = None) -> str | None:
        """Return the dotted path of a component such as `ln_final`, `block` or `attn.o`, or None where the model has none."""
        key = (component, layer)
        if key not in self._paths:
            self._paths[key] = self._find(component, layer)
        return self._paths[key]

    def _find(self, component: str, layer: int | None) -> str | None:
        name = component if layer is None else f"blocks.{layer}" + ("" if component == "block" else f".{component}")
        try:
            path = self._own(self.adapter.translate_transformer_lens_path(name))
            part = self.module.get_submodule(path)
        except (ValueError, AttributeError):
            return None
        return path if isinstance(part, nn.Module) else None

    def components(self, layer: int | None) -> tuple[str, ...]:
        """Return the components this model has at a layer, or outside the blocks."""
        names = _GLOBAL if layer is None else ("block", *_LAYERED)
        return tuple(name for name in names if self.path(name, layer))

    def split_joint(self, width: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return which outputs of a joint projection of `width` outputs the map's own code calls q, k and v.

        The code is run on a stand-in whose weights are their own row numbers. None where it cannot be run.
        """
        attention = self.adapter.component_mapping["blocks"].submodules["attn"]
        split = getattr(attention, "_split_qkv_matrix", None) or getattr(attention, "split_qkv_matrix", None)
        name = attention.submodules["qkv"].name if "qkv" in attention.submodules else None
        if split is None or name is None:
            return None
        rows = torch.arange(width, dtype=torch.float32)
        for weight in (rows[:, None].expand(width, self.sizes.d_model), rows.expand(self.sizes.d_model, width)):
            stand_in = SimpleNamespace(weight=weight, bias=rows)
            try:
                parts = split(SimpleNamespace(**{name: stand_in}))
                q, k, v = (part.bias.detach().flatten().round().long() for part in parts)
            except Exception:
                continue
            return q, k, v
        return None


def map_of(module: nn.Module) -> ArchitectureMap:
    """Return the architecture map of `module`, which is neither wrapped nor changed.

    Raises:
        ModelError: the map does not know the architecture, or it is no stack of blocks.
    """
    # Importing TransformerLens takes seconds, so nothing else in this package may do it at import time.
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf

    architecture = type(module).__name__
    config = getattr(module, "config", None)
    if config is None:
        raise ModelError(f"{architecture} has no Hugging Face config: give a transformers model")
    dtype = next((p.dtype for p in module.parameters()), torch.float32)
    mapped = _BARE.get(architecture, architecture)
    try:
        adapter = ArchitectureAdapterFactory.select_architecture_adapter(
            build_bridge_config_from_hf(config, mapped, mapped, dtype)
        )
        adapter.component_mapping["blocks"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"architecture {architecture!r} is not one TransformerLens maps ({error}). "
            "Load it with its language-model head, for instance through AutoModelForCausalLM."
        ) from error
    return ArchitectureMap(module, architecture, adapter)
