"""How much each head and MLP writes, relative to the stream it writes to: the control that looks at nothing else."""

from __future__ import annotations

from itertools import groupby

import torch

from analyses.ground_truth.adapters.adapter import examples_of
from probes.edits import read
from probes.models.protocol import Model
from probes.planted.task import PlantedTask
from probes.points import Address
from probes.weights.head_weights import head_weights

PROMPTS = 16


@torch.no_grad()
def update_sizes(model: Model, task: PlantedTask) -> dict[str, float]:
    """Return, for each head (`7.2`) and MLP (`mlp.4`), the mean over tokens of the norm it adds over that of the stream."""
    shape = model.shape
    points = ("resid_pre", "z", "mlp_out")
    addresses = [Address(point, layer) for point in points for layer in range(shape.n_layers)]
    totals: dict[str, float] = {}
    tokens, writes = 0, head_weights(model, fold_norm=False).w_o
    by_length = groupby(sorted((e.tokens for e in examples_of(task, n=PROMPTS)), key=len), key=len)
    for length, prompts in by_length:
        rows = torch.tensor(list(prompts))
        out = {address: tensor[:, 1:].flatten(0, 1).float() for address, tensor in read(model, rows, addresses).items()}
        tokens += len(rows) * (length - 1)
        for layer in range(shape.n_layers):
            stream = out[Address("resid_pre", layer)].norm(dim=-1)
            added = torch.einsum("phk,hkd->phd", out[Address("z", layer)], writes[layer]).norm(dim=-1)
            sizes = {f"{layer}.{head}": added[:, head] for head in range(shape.n_heads)}
            sizes[f"mlp.{layer}"] = out[Address("mlp_out", layer)].norm(dim=-1)
            for name, size in sizes.items():
                totals[name] = totals.get(name, 0.0) + float((size / stream).sum())
    return {name: total / tokens for name, total in totals.items()}
