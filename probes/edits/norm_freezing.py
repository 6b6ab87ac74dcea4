"""A norm whose scale no longer follows its input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from probes.blocks.rerouting import block_access, in_order, rerouted
from probes.edits.edit import Edit
from probes.edits.line import Line
from probes.edits.positions import Texts, need_texts
from probes.models.protocol import Model, Shape, Write
from probes.norms import KINDS, Norm, Rows, Scale, Switches, choose
from probes.norms.switches import Watch
from probes.points import Address


@dataclass(frozen=True)
class FreezeNorm(Edit):
    """A norm divides by one number instead of each row's own scale; position 0 has a number of its own.

    The number is the mean of the norm's scales over the other positions of the unedited prompt (Heimersheim 2024,
    arXiv 2409.13710). Sites of one norm are one site each: `qk` and `v` read the same norm, and either can be frozen.
    """

    site: str
    """A site such as `mlp.5`, `qk.3`, `v.3` or `final`; several as `mlp.3-5` or `mlp.*`."""
    switches: Switches | None = field(default=None, compare=False, repr=False)
    """The norms with their frozen scales; None until it is resolved."""
    tokens: tuple[int, ...] = ()
    """The prompt that the scales were measured on."""

    uncached: ClassVar[bool] = True
    verbs: ClassVar[Mapping[str, str]] = {
        "freeze-norm": f"freeze-norm SITE, such as freeze-norm mlp.5, freeze-norm qk.* or freeze-norm final; sites: {', '.join(KINDS)}"
    }

    @classmethod
    def from_line(cls, verb: str, line: Line) -> Edit:
        """Return the edit that a line says."""
        start = line.at
        site = line.word("a norm site such as mlp.5")
        if site.partition(".")[0] not in (*KINDS, "all"):
            line.at = start
            raise line.fault(f"a norm site ({', '.join(KINDS)}), with its layer, such as mlp.5")
        return cls(site)

    def line(self) -> str:
        """Return the edit as one line."""
        return f"freeze-norm {self.site}"

    def text(self) -> str:
        """Return the edit as it enters store keys."""
        return self.line()

    def first_block(self, shape: Shape) -> int:
        """Return the first frozen norm's block."""
        assert self.switches is not None
        return min(shape.n_layers if site.layer is None else site.layer for site in self.switches.on)

    def writes(self, shape: Shape, lengths: Sequence[int] | None = None) -> Mapping[Address, Write]:
        """Return none: the norm itself is changed."""
        return {}

    def resolved(self, model: Model, texts: Texts | None = None) -> Edit:
        """Return the edit with its scales measured on the prompt.

        Raises:
            OptionError: no such site, or many prompts.
            PointError: norms that cannot be frozen.
        """
        if self.switches is not None:
            return self
        here = need_texts(texts, "a frozen norm, whose scale is measured on the prompt,")
        tokens = torch.tensor([here.tokens], device=model.device)
        measured: dict[str, Scale] = {}
        access = block_access(model)
        with torch.no_grad(), rerouted(model, in_order(model.shape.n_layers)):
            switches = Switches(access.anatomy)
            sites = choose(switches.sites, [self.site])
            for site in sites:
                switches.watches[switches.norm(site).path] = _keep(measured)
            with access.during(switches.attached):
                access.module(input_ids=tokens, use_cache=False)
            switches.watches.clear()
            for site in sites:
                switches.freeze([site], measured[switches.norm(site).path])
        return replace(self, switches=switches, tokens=here.tokens)

    @contextmanager
    def within(self, model: Model) -> Iterator[None]:
        """Freeze the norms inside; outside they are as before."""
        assert self.switches is not None
        access = block_access(model)
        with access.exclusive():
            # Blocks may be called one by one, where no forward of the whole module says which tokens run.
            self.switches.enter(torch.tensor([self.tokens], device=model.device))
            with access.during(self.switches.attached):
                yield


def _keep(measured: dict[str, Scale]) -> Watch:
    """Return a watch that keeps a norm's mean scales: of ordinary positions, and of position 0."""

    def watch(norm: Norm, _: Tensor, scales: Tensor) -> None:
        own = scales.flatten(2).mean(-1) if scales.ndim > 2 else scales
        rows = Rows.of(torch.zeros(own.shape[:2], dtype=torch.long, device=own.device))
        measured[norm.path] = Scale(float(own[rows.ordinary].mean()), float(own[rows.first].mean()))

    return watch
