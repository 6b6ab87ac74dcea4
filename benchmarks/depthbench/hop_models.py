"""Two hops at one position: tables trained in isolation in the wrong order, and trained end to end in the right one."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from benchmarks.depthbench.enforce import freeze_attention, freeze_mlps
from benchmarks.depthbench.models import Losses, Trained, descend
from probes.planted import trained_prompts as data
from probes.planted.trained import untrained

WORDS, BRIDGES = torch.arange(32), torch.arange(8)
cross_entropy = nn.functional.cross_entropy


def _hop_model(seed: int, mlps: tuple[int, int]) -> Any:
    """Everything rests but two MLPs; embedding and read-out stay random, else they would store the tables themselves."""
    module = untrained("T3", seed)
    freeze_mlps(module, keep=mlps)
    freeze_attention(module, keep=())
    module.model.embed_tokens.requires_grad_(False)
    nn.init.orthogonal_(module.lm_head.weight, gain=4, generator=torch.Generator().manual_seed(seed))
    module.lm_head.requires_grad_(False)
    return module


def _added(module: Any, layer: int, stream: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch d_model"]:
    """What the MLP of a block adds to a stream at rest."""
    block = module.model.layers[layer]
    return block.mlp(block.post_attention_layernorm(stream))


def _logits(module: Any, stream: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch d_vocab"]:
    return module.lm_head(module.model.norm(stream))


def isolated_hops(seed: int = 3) -> Trained:
    """T3: the first hop in MLP 4, the second in MLP 1, each trained on its own, their composition never.

    MLP 1 also meets streams that have been through MLP 4, with the bridge of *another* word in them: the form in which a
    jump back brings the bridge to it.
    """
    module, hops, draw = _hop_model(seed, (1, 4)), data.hops(seed), torch.Generator().manual_seed(seed)
    embedding = module.model.embed_tokens

    def run(stream: Tensor) -> tuple[Tensor, Tensor]:
        """The stream after MLP 1 and what MLP 4 adds to it."""
        between = stream + _added(module, 1, stream)
        return between, _added(module, 4, between)

    def losses() -> Losses:
        between, bridge_code = run(embedding(WORDS))
        shift = int(torch.randint(1, len(WORDS), (1,), generator=draw))
        other = WORDS.roll(shift)
        apart = hops.bridge[WORDS] != hops.bridge[other]
        mixture, again = run((between + bridge_code[other])[apart])
        single, rest = run(embedding(BRIDGES + data.FIRST_BRIDGE))
        return {
            "first hop": cross_entropy(_logits(module, between + bridge_code), hops.bridge + data.FIRST_BRIDGE),
            "second hop": cross_entropy(_logits(module, single + rest), hops.end + data.FIRST_END),
            "bridge of another": cross_entropy(
                _logits(module, mixture + again), hops.answer[other][apart] + data.FIRST_END
            ),
        }

    return descend(module, losses, most_steps=1200, enough=0.0005)


def ordered_hops(seed: int = 4) -> Trained:
    """T4: both hops end to end, the bridge read out after block 1, whose MLP may not write along the answers' rows.

    MLP 4 also meets the bridge of *another* word beside the word itself, so that it has to follow the bridge.
    """
    module, hops, draw = _hop_model(seed, (1, 4)), data.hops(seed), torch.Generator().manual_seed(seed)
    embedding = module.model.embed_tokens
    rows = module.lm_head.weight[data.FIRST_END : data.FIRST_END + data.ANSWERS]
    space = torch.linalg.qr(rows.T.detach()).Q

    def losses() -> Losses:
        stream = embedding(WORDS)
        bridge_code = _added(module, 1, stream)
        after_first = stream + bridge_code
        answer = _logits(module, after_first + _added(module, 4, after_first))
        other = WORDS.roll(int(torch.randint(1, len(WORDS), (1,), generator=draw)))
        mixture = stream + bridge_code[other]
        followed = _logits(module, mixture + _added(module, 4, mixture))
        return {
            "bridge": cross_entropy(_logits(module, after_first), hops.bridge + data.FIRST_BRIDGE),
            "answer": cross_entropy(answer, hops.answer + data.FIRST_END),
            "bridge of another": cross_entropy(followed, hops.answer[other] + data.FIRST_END),
        }

    def keep_answer_out() -> None:
        with torch.no_grad():
            weight = module.model.layers[1].mlp.down_proj.weight
            weight.sub_(space @ (space.T @ weight))

    return descend(module, losses, most_steps=1200, enough=0.0005, after_step=keep_answer_out)
