"""Scales of norms measured on one prompt, and norms that divide by them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from probes.blocks.rerouting import block_access, in_order, rerouted
from probes.models.protocol import Model
from probes.norms import Norm, Rows, Scale, Switches, choose
from probes.norms.switches import Watch


def measured(model: Model, site: str, prompt: Sequence[int]) -> Switches:
    """Return the norms of a site frozen at their mean scales on a prompt's tokens.

    Raises:
        OptionError: no such site.
        PointError: norms that cannot be frozen.
    """
    tokens = torch.tensor([prompt], device=model.device)
    scales: dict[str, Scale] = {}
    access = block_access(model)
    with torch.no_grad(), rerouted(model, in_order(model.shape.n_layers)):
        switches = Switches(access.anatomy)
        sites = choose(switches.sites, [site])
        for each in sites:
            switches.watches[switches.norm(each).path] = _keep(scales)
        with access.during(switches.attached):
            access.module(input_ids=tokens, use_cache=False)
        switches.watches.clear()
        for each in sites:
            switches.freeze([each], scales[switches.norm(each).path])
    return switches


@contextmanager
def frozen(model: Model, switches: Switches, prompt: Sequence[int]) -> Iterator[None]:
    """Run the model with its norms as `switches` say inside, on a prompt's tokens; outside they are as before."""
    access = block_access(model)
    with access.exclusive():
        # Blocks may be called one by one, where no forward of the whole module says which tokens run.
        switches.enter(torch.tensor([prompt], device=model.device))
        with access.during(switches.attached):
            yield


def _keep(measured: dict[str, Scale]) -> Watch:
    """Return a watch that keeps a norm's mean scales: of ordinary positions, and of position 0."""

    def watch(norm: Norm, _: Tensor, scales: Tensor) -> None:
        own = scales.flatten(2).mean(-1) if scales.ndim > 2 else scales
        rows = Rows.of(torch.zeros(own.shape[:2], dtype=torch.long, device=own.device))
        measured[norm.path] = Scale(float(own[rows.ordinary].mean()), float(own[rows.first].mean()))

    return watch
