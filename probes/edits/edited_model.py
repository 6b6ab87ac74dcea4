"""A model under edits, as a model: what reads activations reads those of the edited model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from probes.edits.edit import Edit, altered, composed, generate, reordered, resolve, writes_of
from probes.errors import OptionError
from probes.models.protocol import Canary, Context, Model, Read, Unembedding, Write
from probes.points import Address

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor


class EditedModel(Model):
    """A model that runs under edits; its context says so, and no row of it goes under the key of the model itself.

    It does not hand out its blocks, so analyses that change the model themselves refuse it.

    Args:
        model: the model.
        edits: what is changed, in order.

    Raises:
        UserError: an edit that this model cannot have, or one about a single prompt.
    """

    def __init__(self, model: Model, edits: Sequence[Edit]) -> None:
        self.model, self.edits = model, tuple(edits)
        self._ready = resolve(model, self.edits)
        self._times = Counter(chain.from_iterable(reordered(self.edits, model.shape.n_layers).steps))
        self.ref, self.shape, self.tokenizer, self.device = model.ref, model.shape, model.tokenizer, model.device
        self.faithfulness, self.revision = model.faithfulness, model.revision
        self.context = self._keyed(model.context)

    @property
    def canary(self) -> Canary:  # type: ignore[override]
        """That of the model without edits, which is the same model."""
        return self.model.canary

    def _keyed(self, context: Context) -> Context:
        return replace(context, edits=";".join(edit.text() for edit in self.edits) or "none")

    def current(self) -> Context:
        """Return the context of the model as it is now, with the edits."""
        return self._keyed(self.model.current())

    def refusal(self, address: Address) -> str | None:
        """Return why the address cannot be read, or None where it can."""
        if address.layer is not None and (times := self._times[address.layer]) != 1:
            return f"block {address.layer} {f'runs {times} times' if times else 'does not run'} under these edits"
        return self.model.refusal(address)

    def run(
        self,
        tokens: Int[Tensor, "batch pos"],
        reads: Mapping[Address, Read],
        writes: Mapping[Address, Write] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> None:
        """Run one forward under the edits; further writes act after them. See `Model.run`."""
        own = writes_of(self.model, self._ready, lengths)
        with altered(self.model, self._ready):
            self.model.run(tokens, reads, composed([own, writes or {}]), lengths)

    def generate(self, tokens: Sequence[int], max_new_tokens: int, **how: Any) -> list[int]:
        """Return the tokens that the model writes under the edits; see `Model.generate`.

        Raises:
            OptionError: further writes, which the edits leave no place for.
        """
        if how.pop("writes", None) is not None:
            raise OptionError("a model under edits takes no further writes while it decodes: put them into its edits")
        return generate(self.model, tokens, max_new_tokens, self._ready, **how)

    def unembedding(self) -> Unembedding:
        """Return the model's final norm and unembedding, without edits."""
        return self.model.unembedding()
