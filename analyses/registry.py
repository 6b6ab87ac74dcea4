"""Every analysis on offer."""

from __future__ import annotations

from analyses.back_patching import BackPatching
from analyses.base import Analysis
from analyses.communication_channels import CommunicationChannels
from analyses.concept_depth import ConceptDepth
from analyses.contextual_decomposition import ContextualDecomposition
from analyses.depth_use import DepthUse
from analyses.latent_language import LatentLanguage
from analyses.logit_lens import LogitLens
from analyses.norm_removal import NormRemoval
from analyses.voids import Voids
from probes.errors import OptionError, unknown

ANALYSES: tuple[type[Analysis], ...] = (
    Voids,
    LogitLens,
    BackPatching,
    CommunicationChannels,
    ConceptDepth,
    LatentLanguage,
    DepthUse,
    NormRemoval,
    ContextualDecomposition,
)
"""To add an analysis, add its class here."""


def get_analysis(name: str) -> type[Analysis]:
    """The analysis of that name.

    Raises:
        OptionError: an unknown name, with the legal ones.
    """
    by_name = {analysis.name: analysis for analysis in ANALYSES}
    if name not in by_name:
        raise OptionError(unknown("analysis", name, by_name))
    return by_name[name]
