"""A model's norms with a switch at every site: off, the model's own norm; on, the norm with a frozen scale.

FakeLN of Heimersheim 2024 (arXiv 2409.13710) and Baroni et al. 2025 (arXiv 2507.02559), for LayerNorm and RMSNorm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from probes.anatomy import Anatomy
from probes.errors import OptionError
from probes.module_calls import entered
from probes.norms.scales import Rows, RunningScale, Scale
from probes.norms.sites import Norm, NormSite, norms_of

Watch = Callable[[Norm, Tensor, Tensor], None]
"""Receives a norm, its input with pos as the second axis, and its scales [batch, pos, ...], differentiable."""


class Switches:
    """The switches of one module; inside `attached()` those that are on act, outside the module is as it was.

    The module's parameters stay where they are and keep their names, and frozen sites train them.

    Args:
        end_of_text: The token id that ends a text, where such tokens get a scale of their own.
        momentum: of the running scales, kept while the module trains; one update a forward.

    Raises:
        PointError: norms that cannot be frozen, or none at all.
    """

    def __init__(self, anatomy: Anatomy, end_of_text: int | None = None, momentum: float = 0.9) -> None:
        self.module: nn.Module = anatomy.map.module
        self.norms = norms_of(anatomy)
        self.end_of_text = end_of_text
        self.on: dict[NormSite, Scale] = {}
        self.running = {norm.path: RunningScale(momentum) for norm in self.norms}
        self.watches: dict[str, Watch] = {}
        """By path of a norm: receives its input at every forward."""
        self._norm_of = {site: norm for norm in self.norms for site in norm.sites}
        self._rows: Rows | None = None
        self._passed: dict[NormSite, Tensor] = {}

    @property
    def rows(self) -> Rows:
        """The positions that are running; `enter` or a forward of the module says which."""
        assert self._rows is not None
        return self._rows

    @property
    def sites(self) -> tuple[NormSite, ...]:
        """Every site of the model, in the order in which they run."""
        return tuple(self._norm_of)

    def norm(self, site: NormSite) -> Norm:
        """The norm that a site reads."""
        return self._norm_of[site]

    def freeze(self, sites: Sequence[NormSite], scale: Scale | None = None) -> None:
        """Switch sites on, with a scale or, without one, each with its norm's running scale.

        Sites of one norm share its scale, so a site whose norm is frozen elsewhere takes that scale.

        Raises:
            OptionError: no scale is given and none was measured.
        """
        for site in sites:
            norm = self._norm_of[site]
            shared = next((self.on[s] for s in norm.sites if s in self.on), None)
            self.on[site] = scale or shared or self.measured(site)

    def measured(self, site: NormSite, first: bool = False) -> Scale:
        """Return the running scale of a site's norm; with `first`, position 0 has its own.

        Raises:
            OptionError: nothing has run yet.
        """
        running = self.running[self._norm_of[site].path]
        if running.value is None:
            raise OptionError(f"{site} has no measured scale: run text through the model in training mode first")
        return Scale(running.value, running.first if first else None)

    def enter(self, tokens: Int[Tensor, "batch pos"]) -> None:
        """Say which token ids [batch, pos] are running, where the module itself is not called."""
        self._rows = Rows.of(tokens, self.end_of_text)

    def ordinary(self, tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        """Return a mask [batch, pos], True where token ids [batch, pos] are neither at position 0 nor the end of a text."""
        return Rows.of(tokens, self.end_of_text).ordinary

    @contextmanager
    def attached(self) -> Iterator[Switches]:
        """Let the switches act inside the context; outside it the module is bitwise as it was."""
        with ExitStack() as stack:
            stack.enter_context(self.module.register_forward_pre_hook(self._enter, with_kwargs=True))
            for norm in self.norms:
                module = norm.parts.norm
                stack.enter_context(module.register_forward_hook(self._on_norm(norm)))
                for site in norm.sites if len(norm.sites) > 1 else ():
                    self._hook_readers(norm, site, stack)
            try:
                yield self
            finally:
                self._passed.clear()

    def _hook_readers(self, norm: Norm, site: NormSite, stack: ExitStack) -> None:
        for path in norm.readers[site]:
            reader = self.module.get_submodule(path)
            if site in norm.columns:
                stack.enter_context(reader.register_forward_hook(self._on_joint(norm, site)))
            else:
                stack.enter_context(reader.register_forward_pre_hook(self._on_reader(norm, site), with_kwargs=True))

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(ids, Tensor):
            self.enter(ids)

    def _on_norm(self, norm: Norm) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            frozen = [site for site in norm.sites if site in self.on]
            seen = module.training or norm.path in self.watches
            if not frozen and not seen:
                return None
            rows, x, back = self.rows, *_shaped(args[0], self.rows.first)
            if seen:
                self._observe(norm, x, rows)
            if not frozen:
                return None
            outputs: dict[int, Tensor] = {}
            for site in frozen:
                scale = self.on[site]
                if id(scale) not in outputs:
                    new = norm.parts.own(x) if scale.own else norm.parts.divided(x, scale.at(rows, x.ndim - 3))
                    outputs[id(scale)] = back(new).to(output.dtype)
                self._passed[site] = outputs[id(scale)]
            return self._passed[frozen[0]] if self._whole(norm) else None

        return hook

    def _observe(self, norm: Norm, x: Tensor, rows: Rows) -> None:
        if norm.path in self.watches:
            self.watches[norm.path](norm, x, norm.parts.scale(x))
        if norm.parts.norm.training:
            with torch.no_grad():
                scale = norm.parts.scale(x)
                self.running[norm.path].enter(scale.flatten(2).mean(-1) if scale.ndim > 2 else scale, rows)

    def _whole(self, norm: Norm) -> bool:
        """Whether all its sites have one frozen scale, so that its output itself is replaced."""
        return len({id(self.on.get(site)) for site in norm.sites}) == 1 and norm.sites[0] in self.on

    def _on_reader(self, norm: Norm, site: NormSite) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return None if self._whole(norm) or site not in self.on else entered(args, kwargs, self._passed[site])

        return hook

    def _on_joint(self, norm: Norm, site: NormSite) -> Any:
        def hook(reader: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if self._whole(norm) or site not in self.on:
                return None
            columns = norm.columns[site].to(output.device)
            out = output.clone()
            out[..., columns] = reader.forward(self._passed[site].view_as(args[0]))[..., columns]
            return out

        return hook


def _shaped(raw: Tensor, first: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """(the input with axes batch, pos, ..., the way back); heads may stand before positions, or rows be flattened."""
    batch, pos = first.shape
    if raw.dim() == 2:
        return raw.view(batch, pos, -1), lambda x: x.flatten(0, 1)
    before = raw.dim() == 4 and (raw.shape[1] != pos or (raw.shape[2] == pos and raw.stride(1) < raw.stride(2)))
    return (raw.transpose(1, 2), lambda x: x.transpose(1, 2)) if before else (raw, lambda x: x)
