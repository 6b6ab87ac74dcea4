"""A model that an earlier load has checked: it is known by that load's record, and loaded when something runs through it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch

from probes.errors import ModelError
from probes.models.backends.native import NativeModel
from probes.models.fingerprint.foreign_code import untouched
from probes.models.protocol import Context, Model, Unembedding
from probes.models.sources.locate import Located
from probes.models.verify.load_record import LoadRecord
from probes.points import Address

_OF_MODULE = frozenset({"module", "source", "anatomy", "_config", "_lock", "_layers", "_state", "_wrapped"})
"""What a native model has of its module."""


class DeferredModel(NativeModel):
    """The native backend without its weights: rows that a store holds are found and read through a lens without them.

    Everything else loads the model first, as if it had been loaded at once, with all its checks.

    Args:
        record: what an earlier load of the same files established.
        load: loads the model.
        located: where its weights lie.
    """

    def __init__(self, record: LoadRecord, tokenizer: Any, load: Callable[[], Model], located: Located) -> None:
        self.tokenizer, self.ref, self.revision = tokenizer, located.ref, located.revision
        self.shape, self.context, self.canary = record.shape, record.context, record.canary
        self.faithfulness, self.device = record.faithfulness, torch.device(record.device)
        self._record, self._load, self._folder, self._loading = record, load, located.folder, threading.RLock()

    def __getattr__(self, name: str) -> Any:
        if name not in _OF_MODULE:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        with self._loading:
            if not self._loaded:
                self._become(self._load())
        return getattr(self, name)

    @property
    def _loaded(self) -> bool:
        return "module" in vars(self)

    def _become(self, model: Model) -> None:
        if model.context != self.context:
            raise ModelError(
                f"{self.ref} is another model than at an earlier load, though its files look as they did then; that is noted "
                "now: run this again"
            )
        vars(self).update(vars(model))

    def current(self) -> Context:
        """Return the context of the module as it is now; of one that is not loaded, that of its record."""
        if not self._loaded and untouched(self.device.type):
            return self.context
        return super().current()

    def refusal(self, address: Address) -> str | None:
        """Return why the address cannot be read, or None where it can."""
        if self._loaded or (address.layer or 0) >= self.shape.n_layers:
            return super().refusal(address)
        return self._record.refusals.get(str(address))

    def unembedding(self) -> Unembedding:
        """Return the final norm and unembedding; see `LocalModel.unembedding`."""
        return super().unembedding() if self._loaded or not self._unembedding else self._unembedding

    @cached_property
    def _unembedding(self) -> Unembedding | None:
        """The unembedding as it lies in the folder."""
        lens = self._record.lens
        return None if lens is None else lens.read(self._folder, self.device)
