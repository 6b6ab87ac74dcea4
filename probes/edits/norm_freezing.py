"""A norm whose scale no longer follows its input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from probes.edits.edit import Edit
from probes.edits.line import Line
from probes.edits.positions import Texts, need_texts
from probes.models.protocol import Model, Shape, Write
from probes.norm_kinds import KINDS
from probes.points import Address

if TYPE_CHECKING:
    from probes.norms import Switches


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
        from probes.edits.norm_scales import measured

        switches = measured(model, self.site, here.tokens)
        return replace(self, switches=switches, tokens=here.tokens)

    def within(self, model: Model) -> AbstractContextManager[None]:
        """Freeze the norms inside; outside they are as before."""
        from probes.edits.norm_scales import frozen

        assert self.switches is not None
        return frozen(model, self.switches, self.tokens)
