"""Every analysis on offer, by name; its code is imported when it is asked for."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from probes.errors import OptionError, unknown

SHIPPED: Mapping[str, tuple[str, str]] = {
    "voids": ("analyses.voids:Voids", "Voids: unactivated layers by the L2 norm"),
    "logit_lens": ("analyses.logit_lens:LogitLens", "Logit lens"),
    "lenses": ("analyses.lenses:Lenses", "Lenses"),
    "back_patching": ("analyses.back_patching:BackPatching", "Back-patching: hopping too late"),
    "communication_channels": ("analyses.communication_channels:CommunicationChannels", "Communication channels between heads"),
    "concept_depth": ("analyses.concept_depth:ConceptDepth", "Concept depth: linear probes along the layers"),
    "latent_language": ("analyses.latent_language:LatentLanguage", "Latent languages by the lens"),
    "depth_use": ("analyses.depth_use:DepthUse", "Depth use: contributions, skips and proxies of importance"),
    "norm_removal": ("analyses.norm_removal:NormRemoval", "Norm removal: what norms do, and a model without them"),
    "contextual_decomposition": ("analyses.contextual_decomposition:ContextualDecomposition", "Contextual decomposition: heads, words and circuits"),
    "causal_patching": ("analyses.causal_patching:CausalPatching", "Causal patching: where a change decides the answer"),
    "passage_use": ("analyses.passage_use:PassageUse", "Passage use: where a passage enters the answer"),
    "layer_programs": ("analyses.layer_programs:LayerPrograms", "Layer programs: skip, repeat, swap, loop"),
}  # fmt: skip
"""Name to the dotted path of the class and its title. To add an analysis here, add its line."""

ANALYSES: Mapping[str, str] = {name: path for name, (path, _) in SHIPPED.items()}
"""The dotted path of each."""

GROUP = "bathyscope.analyses"
"""Entry points of this group, in any installed package, add analyses of their own under the entry point's name."""


def paths() -> dict[str, str]:
    """Return the dotted path of every analysis by its name: those shipped, then those of other packages."""
    return {**ANALYSES, **{name: path for name, path in _elsewhere(tuple(sys.path)) if name not in ANALYSES}}


@cache
def _elsewhere(_: tuple[str, ...]) -> list[tuple[str, str]]:
    """Name and dotted path of the analyses of other packages on this search path, whose metadata is slow to read."""
    return sorted((point.name, point.value) for point in entry_points(group=GROUP))


def names() -> tuple[str, ...]:
    """Return the name of every analysis, without importing any."""
    return tuple(paths())


def titles() -> dict[str, str]:
    """Return the title of every analysis, without importing any; the dotted path stands for one that is not known."""
    return {name: SHIPPED[name][1] if name in SHIPPED else path for name, path in paths().items()}


def every_analysis() -> tuple[Any, ...]:
    """Import every analysis; return their classes."""
    return tuple(get_analysis(name) for name in names())


def get_analysis(name: str) -> Any:
    """Import the analysis of that name; return its class, an `analyses.base.Analysis`.

    Raises:
        OptionError: an unknown name, with the legal ones; or one whose package cannot be imported, with the reason.
    """
    known = paths()
    if name not in known:
        raise OptionError(unknown("analysis", name, known))
    module, _, attribute = known[name].partition(":")
    try:
        analysis = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise OptionError(f"analysis {name!r} cannot be imported from {known[name]!r}: {error}") from error
    if analysis.name != name:
        raise OptionError(f"analysis {name!r} at {known[name]!r} calls itself {analysis.name!r}: use one name")
    return analysis
