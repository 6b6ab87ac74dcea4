"""Norm-free models as plain transformers loads them: norms whose epsilon is so large that they divide by a constant.

With eps = 10¹² a norm divides by 10⁶ whatever its input, and the gain holds 10⁶ over the frozen scale (the form of the
checkpoints published with Baroni et al. 2025, arXiv 2507.02559).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from probes.anatomy import Anatomy
from probes.anatomy.constant_norm import ConstantNorm
from probes.errors import OptionError
from probes.norms.arithmetic import parts_of
from probes.norms.folding import constant_scales, replace
from probes.norms.scales import Scale
from probes.norms.sites import NormSite, norms_of

LARGE_EPS = 1e12
SMALLEST_LARGE = 1e3
"""An epsilon from here on belongs to no norm that was trained."""
_IN_MODULE = ("eps", "variance_epsilon", "norm_eps")
_IN_CONFIG = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "layernorm_epsilon", "norm_epsilon", "norm_eps")


def is_large(norm: nn.Module) -> bool:
    """Return whether a module is a norm in the large-epsilon form."""
    eps = next((getattr(norm, name) for name in _IN_MODULE if hasattr(norm, name)), 0.0)
    return isinstance(eps, float | int) and eps >= SMALLEST_LARGE and isinstance(getattr(norm, "weight", None), Tensor)


def undo_large_eps(module: nn.Module) -> int:
    """Replace every norm of this form by the linear map that it is; return how many there were."""
    norms = [(path, norm) for path, norm in module.named_modules() if is_large(norm)]
    for path, norm in norms:
        assert isinstance(norm.weight, Tensor)
        parts = parts_of(norm, norm.weight.numel(), LARGE_EPS)
        gain = parts.gain / math.sqrt(parts.eps)
        constant = ConstantNorm(gain.to(norm.weight.dtype), getattr(norm, "bias", None), parts.centred)
        replace(module, path, constant.train(norm.training))
    return len(norms)


@torch.no_grad()
def make_large_eps(anatomy: Anatomy, on: Mapping[NormSite, Scale]) -> None:
    """Give the norms of the anatomy's own module this form; `on` holds every site's frozen scale.

    Raises:
        OptionError: a scale that is not constant, or a configuration that states no epsilon.
    """
    config: Any = anatomy.map.module.config.get_text_config()  # type: ignore[union-attr,operator]
    stated = [name for name in _IN_CONFIG if hasattr(config, name)]
    if not stated:
        raise OptionError(
            f"the configuration of {anatomy.map.architecture} states no epsilon of its norms, so plain transformers "
            "cannot be given a large one; this model is not exported"
        )
    norms = norms_of(anatomy)
    scales = constant_scales(norms, on)
    for norm in norms:
        module, weight = norm.parts.norm, norm.parts.norm.weight
        assert isinstance(weight, Tensor)
        gain = norm.parts.gain.double() * math.sqrt(LARGE_EPS) / scales[norm.path]
        weight.copy_(gain - norm.parts.gain_offset)
        for name in _IN_MODULE:
            if hasattr(module, name):
                setattr(module, name, LARGE_EPS)
    for name in stated:
        setattr(config, name, LARGE_EPS)
