"""Direct logit attribution of heads and MLPs."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.contextual_decomposition.cases import Case
from probes.decomposition import Baseline, Decomposer, Rules, rules
from probes.decomposition.block_operations import Dense
from probes.decomposition.walk import Prepared


@torch.no_grad()
def direct_attribution(
    decomposer: Decomposer, prompt: Prepared, case: Case, baseline: Baseline | None
) -> Float[Tensor, "layer head"] | None:
    """Return what each head's output at the end adds to the metric through the final norm alone.

    None where blocks normalise each sum, so that nothing reaches the end unchanged.
    """
    shape = decomposer.operations
    if shape.kind == "post_norm":
        return None
    frozen, seen, end = Rules(), prompt.trace, len(case.tokens) - 1
    last = seen.get("block", "out", len(shape.blocks) - 1)[end:]
    ids = torch.tensor(case.ids, device=last.device)
    out = []
    for layer, block in enumerate(shape.blocks):
        z = seen.get("attn.o", "in", layer)[end].reshape(shape.n_heads, shape.d_head)
        change = z if baseline is None else z - baseline.z[layer, end].to(z)
        each = torch.zeros(shape.n_heads, 1, shape.n_heads, shape.d_head, dtype=z.dtype, device=z.device)
        each[torch.arange(shape.n_heads), 0, torch.arange(shape.n_heads)] = change
        rel = each.flatten(-2) @ block.o.weight
        if block.ln1_post is not None:
            rel = rules.norm(rel, block.ln1_post, seen.get("ln1_post", "in", layer)[end:], frozen)
        rel, _ = decomposer.logit_operations.relevant(rel, last, ids, frozen)
        out.append(case.metric(rel)[:, 0])
    return torch.stack(out).cpu()


@torch.no_grad()
def direct_of_mlps(
    decomposer: Decomposer, prompt: Prepared, case: Case, baseline: Baseline | None
) -> Float[Tensor, " layer"] | None:
    """Return what each MLP's output at the end adds to the metric through the final norm alone; None as for heads."""
    shape = decomposer.operations
    if shape.kind == "post_norm":
        return None
    seen, end = prompt.trace, len(case.tokens) - 1
    added = []
    for layer, block in enumerate(shape.blocks):
        last = "ln2_post" if block.ln2_post is not None else "mlp.out" if isinstance(block.mlp, Dense) else "mlp"
        out = seen.get(last, "out", layer)[end]
        added.append(out if baseline is None else out - baseline.mlp_out[layer, end].to(out))
    stream = seen.get("block", "out", len(shape.blocks) - 1)[end:]
    ids = torch.tensor(case.ids, device=stream.device)
    rel, _ = decomposer.logit_operations.relevant(torch.stack(added)[:, None], stream, ids, Rules())
    return case.metric(rel)[:, 0].cpu()
