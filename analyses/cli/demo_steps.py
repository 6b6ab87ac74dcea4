"""What the demo runs, analysis by analysis."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from analyses.back_patching import BackPatching
from analyses.base import Analysis
from analyses.causal_patching import CausalPatching
from analyses.communication_channels import CommunicationChannels
from analyses.concept_depth import ConceptDepth
from analyses.contextual_decomposition import ContextualDecomposition
from analyses.depth_use import DepthUse
from analyses.latent_language import LatentLanguage
from analyses.layer_programs import LayerPrograms
from analyses.lenses import Lenses
from analyses.logit_lens import LogitLens
from analyses.norm_removal import NormRemoval
from analyses.passage_use import PassageUse
from analyses.voids import Voids

DEMO_PROMPTS = Path(str(files("analyses").joinpath("data", "demo.jsonl")))
FEW_PROMPTS = DEMO_PROMPTS.with_name("demo_few.jsonl")
"""The short ones among them, and enough for an interval over prompts."""

FIFTH = tuple(range(4, 30, 5))
"""Every fifth block of the demo's model, the last among them."""


@dataclass(frozen=True)
class Step:
    """One analysis of the demo."""

    quick: Analysis
    full: Analysis
    weight: float
    """Processor seconds that it takes in the quick demo, roughly: for the estimate of what is left."""
    few: bool = False
    """Whether the quick demo reads `FEW_PROMPTS` alone."""

    def analysis(self, full: bool) -> Analysis:
        """The analysis with the options of the quick or the full demo."""
        return self.full if full else self.quick

    def prompts(self, full: bool) -> Path:
        """The prompts that the quick or the full demo reads."""
        return FEW_PROMPTS if self.few and not full else DEMO_PROMPTS


DEMO = (
    Step(LogitLens(), LogitLens(), 6),
    Step(
        Voids(alpha=(0.8, 0.2), max_new_tokens=3),
        Voids(alpha=(0.8, 0.2, 0.4, 0.6, 1.0), max_new_tokens=16, readout_positions="all"),
        3,
        few=True,
    ),
    Step(CommunicationChannels(task="none", kinds=("q",)), CommunicationChannels(n_prompts=24, laundry_items=(2, 3, 4)), 4),
    Step(
        Lenses(task="two_hop", n_prompts=4, fit_texts=5, eval_texts=10, layers=FIFTH),
        Lenses(task="two_hop", n_prompts=12, fit_texts=60, eval_texts=12),
        9,
    ),
    Step(
        LatentLanguage(
            source=("en",), target=("fr",), form="plain", set_rule="first_token", n_prompts=10, n_shot=3,
        ),
        LatentLanguage(
            source=("en", "fr"), target=("fr", "zh"), form="plain", set_rule="first_token", n_prompts=10, n_shot=3,
            extras=("similarity",),
        ),
        3,
    ),
    Step(
        ConceptDepth(sets=("city_country", "sentiment"), limit=60, splits=2, causal_layers=0, stride=3),
        ConceptDepth(
            sets=("city_country", "capital_negation", "sentiment"), limit=100, splits=2, causal_layers=1, causal_prompts=8
        ),
        8,
    ),
    Step(
        BackPatching(task="two_hop", pool=16, n_prompts=6, stride=6, stages=False),
        BackPatching(task="two_hop", pool=60, n_prompts=8, stride=3),
        8,
    ),
    Step(NormRemoval(split_paths=False, neurons=0, stride=6), NormRemoval(split_paths=False, neurons=4), 4, few=True),
    Step(
        CausalPatching(task="facts", n_pairs=6, heads="none", nulls="none", components=("resid_post",), stride=6),
        CausalPatching(task="facts", n_pairs=6, heads="none", nulls="none"),
        5,
    ),
    Step(PassageUse(task="facts", n_prompts=6, stride=4), PassageUse(task="facts", fuse=True), 8),
    Step(
        LayerPrograms(n_prompts=4, maps=("pairs",), metric=("answer",), stride=6),
        LayerPrograms(n_prompts=8, stride=3),
        2,
        few=True,
    ),
    Step(
        DepthUse(
            parts=("block",), bits=(8,), windows=(2,), skip_prompts=1, erasure_prompts=0, gradient_prompts=0, greedy_steps=0,
            drop_blocks=0, stride=6,
        ),
        DepthUse(
            parts=("block",), bits=(4,), windows=(2,), skip_prompts=4, erasure_prompts=1, gradient_prompts=0, greedy_steps=1,
            drop_blocks=3,
        ),
        8,
        few=True,
    ),
    Step(
        ContextualDecomposition(
            task="ioi", n_prompts=2, n_references=2, search_steps=1, shares=(0.02, 0.1), random_circuits=0, mlps=False,
            stride=6,
        ),
        ContextualDecomposition(
            task="ioi", n_prompts=2, n_references=6, search_steps=2, shares=(0.02, 0.1, 0.3), random_circuits=4, mlps=False
        ),
        10,
    ),
)  # fmt: skip
"""What the demo runs, in the order of what each gives a second."""
