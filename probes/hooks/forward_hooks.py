"""Forward hooks that hand out and replace the tensors at given sites during one forward, and are gone afterwards."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from probes.anatomy import Site
from probes.errors import ModelError, PointError
from probes.models.protocol import Read, Write
from probes.module_calls import entered, entering

Place = tuple[str, str]
"""A module's dotted path and the side of it, `input` or `output`."""

Find = Callable[[nn.Module, Place], tuple[nn.Module, str]]
"""Where under a root module a place is hooked: a module, and the side of it."""


class Stop(Exception):
    """Raised to end a forward whose remaining part nobody reads or writes."""


def tensor_of(output: Any) -> Tensor:
    """Return the tensor that carries the stream in a module's output: bare, a model output's logits, or the first there is."""
    if isinstance(output, Tensor):
        return output
    tensor: Tensor = output["logits"] if isinstance(output, Mapping) and "logits" in output else output[0]
    return tensor


def replaced(output: Any, new: Tensor) -> Any:
    """Return `output` with the tensor that carries the stream exchanged for `new`."""
    if isinstance(output, Tensor):
        return new
    if isinstance(output, Mapping):
        return type(output)(**{**output, "logits": new})
    return type(output)((new, *output[1:]))


def submodule(root: nn.Module, place: Place) -> tuple[nn.Module, str]:
    """Return the module at the place's path, hooked at the place's side."""
    return root.get_submodule(place[0]), place[1]


class ForwardHooks:
    """One forward's reads and writes by key, and which of them have happened."""

    def __init__(
        self,
        sites: Mapping[Any, Site],
        reads: Mapping[Any, Read],
        writes: Mapping[Any, Write],
        also: frozenset[Hashable] = frozenset(),
        stop: bool = True,
    ) -> None:
        """`also` are keys that report through `done` from elsewhere; `stop` ends the forward after the last key."""
        self.sites, self.reads, self.writes, self.stop = sites, reads, writes, stop
        self.pending: set[Any] = set(sites) | also
        self.stood_in: dict[Any, Tensor] = {}
        self.rows: tuple[int, int] = (0, 0)

    def places(self) -> dict[Place, list[Any]]:
        """Return the keys of every place, each in the order of the sites."""
        places: dict[Place, list[Any]] = {}
        for key, site in self.sites.items():
            for path in site.modules:
                places.setdefault((path, site.side), []).append(key)
        return places

    @contextmanager
    def on(self, root: nn.Module, rows: tuple[int, int], find: Find = submodule) -> Iterator[None]:
        """Hang the hooks on `root`'s modules inside the context, for forwards over `rows` (batch, pos)."""
        self.rows = rows
        with ExitStack() as stack:
            for place, keys in self.places().items():
                module, side = find(root, place)
                if side == "input":
                    stack.enter_context(module.register_forward_pre_hook(self._on_input(keys), with_kwargs=True))
                else:
                    stack.enter_context(module.register_forward_hook(self._on_output(keys)))
            yield

    def done(self, key: Any) -> None:
        """Note that a key has happened; end the forward when it was the last."""
        if key not in self.pending:
            raise ModelError(f"{key}: its module ran more than once in one forward, so the point is ambiguous")
        self.pending.discard(key)
        if self.stop and not self.pending:
            raise Stop

    def finish(self) -> None:
        """Raise ModelError where a key never happened."""
        if self.pending:
            missing = ", ".join(sorted(str(key) for key in self.pending))
            raise ModelError(f"{missing}: the module never ran in this forward")

    def _on_input(self, keys: list[Any]) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            old = entering(args, kwargs)
            new = self.visit(keys, old)
            return None if new is old else entered(args, kwargs, new)

        return hook

    def _on_output(self, keys: list[Any]) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            old = tensor_of(output)
            new = self.visit(keys, old)
            return None if new is old else replaced(output, new)

        return hook

    def visit(self, keys: list[Any], raw: Tensor) -> Tensor:
        """Apply the writes and reads of `keys` to the tensor that passes their place; return the one to go on with."""
        flat = raw.dim() == 2 and raw.shape[0] == self.rows[0] * self.rows[1]
        current = raw.view(*self.rows, raw.shape[-1]) if flat else raw
        shaped = current
        for key in keys:
            current = self._one(key, current)
        if current is shaped:
            return raw
        return current.flatten(0, 1) if flat else current

    def _one(self, key: Any, raw: Tensor) -> Tensor:
        """Write, then read, one key; its site may share the tensor with others."""
        site = self.sites[key]
        if key not in self.pending and len(site.modules) > 1:
            return self.stood_in.get(key, raw)
        if key in self.writes:
            raw = self._write(key, site, raw)
        if len(site.modules) > 1 and key in self.writes:
            self.stood_in[key] = raw
        if key in self.reads:
            self.reads[key](site.view.read(raw))
        self.done(key)
        return raw

    def _write(self, key: Any, site: Site, raw: Tensor) -> Tensor:
        old = site.view.read(raw)
        new = self.writes[key](old)
        if new.shape != old.shape or new.dtype != old.dtype:
            raise PointError(
                f"the write to {key} gave {new.dtype} {tuple(new.shape)}; it must give {old.dtype} {tuple(old.shape)}"
            )
        if new is old:
            return raw
        if site.in_place:
            return raw.copy_(new)
        return site.view.write(raw, new.to(old.device))
