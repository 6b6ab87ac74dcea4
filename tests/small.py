"""One small run of each analysis."""

from __future__ import annotations

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
from probes.prompts import Prompt


def line(tokens: tuple[int, ...], **fields: object) -> Prompt:
    return Prompt(tokens, None, fields)


LABELLED = [line((5 + i, 6 + i % 7, 9), label=i % 2, group=str(i // 2)) for i in range(24)]
SMALL: dict[str, tuple[Analysis, list[Prompt]]] = {
    "voids": (Voids(), [line((5, 6, 7)), line((8, 9))]),
    "logit_lens": (LogitLens(), [line((5, 6, 7)), line((8, 9))]),
    "lenses": (
        Lenses(lenses=("logit",), eval_texts=0, ks=(1,)),
        [line((5, 6, 7), watch={"x": [8]}), line((9, 5), watch={"x": [4]})],
    ),
    "back_patching": (BackPatching(stages=False), [line((5, 6, 7), answer_tokens=[8]), line((9, 5, 6), answer_tokens=[4])]),
    "communication_channels": (CommunicationChannels(task="none"), []),
    "concept_depth": (ConceptDepth(causal_layers=0, splits=1, jobs=1), LABELLED),
    "latent_language": (
        LatentLanguage(), [line((5, 6), targets={"zh": [8], "en": [9]}), line((7, 6), targets={"zh": [4], "en": [3]})],
    ),
    "depth_use": (
        DepthUse(
            parts=("block",), skip_prompts=0, erasure_prompts=0, gradient_prompts=0, greedy_steps=0, drop_blocks=0, bits=(8,),
            windows=(2,), generate_prompts=2, generate_tokens=3,
        ),
        [line((5, 6, 7, 8)), line((9, 5, 6, 7))],
    ),
    "norm_removal": (NormRemoval(split_paths=False, neurons=0), [line((5, 6, 7, 8)), line((9, 5, 6, 7))]),
    "contextual_decomposition": (
        ContextualDecomposition(mode="zero", random_circuits=0, mlps=False),
        [line((5, 6, 7), answer_tokens=[8], distractor_tokens=[9]), line((9, 5, 6), answer_tokens=[4], distractor_tokens=[3])],
    ),
    "causal_patching": (
        CausalPatching(min_gap=0, min_pairs=1),
        [
            line((92, 73, 76), corrupted_tokens=[92, 39, 76], answer_tokens=[5], distractor_tokens=[21]),
            line((91, 33, 38), corrupted_tokens=[91, 11, 38], answer_tokens=[30], distractor_tokens=[63]),
        ],
    ),
    "passage_use": (
        PassageUse(),
        [
            line((5, 6, 7, 8), passage=[1, 3], answer_tokens=[8], neutral=[4]),
            line((9, 5, 6, 7, 4), passage=[2, 4], answer_tokens=[4], noise=[[3, 3]]),
        ],
    ),
    "layer_programs": (
        LayerPrograms(), [line((5, 6, 7), answer_tokens=[8]), line((9, 5, 6), answer_tokens=[4]), line((7, 6, 3, 4), answer_tokens=[9])],
    ),
}  # fmt: skip
"""Per name: the analysis and its prompts."""
