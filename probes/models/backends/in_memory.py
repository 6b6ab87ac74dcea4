"""The base of the backends whose transformers module is in memory: checking, refusing, running, decoding."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from probes.anatomy import Anatomy, anatomy_of
from probes.anatomy.views import Divisor
from probes.blocks.decoding import end_tokens
from probes.errors import ModelError, OptionError, PointError, PromptError
from probes.hooks.attention_probabilities import Attended, Watch, watched
from probes.hooks.forward_hooks import ForwardHooks, Stop, tensor_of
from probes.models.backends.model_card import Displayed
from probes.models.fingerprint.fingerprint import Fingerprint, fingerprint, keyed
from probes.models.fingerprint.foreign_code import unkeyable
from probes.models.placement import fetch_offloaded, main_device
from probes.models.protocol import Canary, Context, Model, Read, Shape, Unembedding, Write
from probes.models.sources.digest import weights_digest
from probes.models.unembedding import unembedding_of
from probes.models.verify.canary_answer import canary_of
from probes.models.verify.checked import Checked
from probes.models.verify.identities import verify
from probes.models.verify.recording import Evidence, attention_layers, attention_of, evidence_of
from probes.points import POINTS, Address

_ORDER = {name: index for index, name in enumerate(POINTS)}


class LocalModel(Displayed, Model):
    """A transformers module behind the `Model` protocol; a backend says only how hooks reach its tensors (`_call`).

    Args:
        module: A transformers model with its language-model head; never moved or cast.
        weights: Digest of the weights, for the store's keys; None computes it.
        anatomy: Where the points lie in `module`; by default what its architecture map says.
        source: The module that the user gave, where `module` is a copy of it.

    Raises:
        ModelError: an architecture without a map, weights that are not finite, or a map that does not fit the model.
    """

    backend: ClassVar[str]

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Any = None,
        *,
        ref: str,
        weights: str | None,
        revision: str | None = None,
        anatomy: Anatomy | None = None,
        source: nn.Module | None = None,
    ) -> None:
        self.module, self.tokenizer, self.ref, self.revision = module, tokenizer, ref, revision
        self.source = module if source is None else source
        self._config: Any = module.config.get_text_config()  # type: ignore[union-attr,operator]
        self._lock = self._new_lock()
        digest = self._examine(anatomy or anatomy_of(module), weights)
        self._wrapped = (self._state, digest)

    def _new_lock(self) -> AbstractContextManager[Any]:
        """What keeps other threads from running the module."""
        return threading.RLock()

    def _examine(self, guess: Anatomy, weights: str | None) -> str:
        """Check the module as it is, and set what follows from it: anatomy, shape, key and canary; return its digest."""
        self.device, dtype = self._place(next(guess.component("embed").parameters()))
        with evaluating(self.module):
            checked = self._run_checks(guess, dtype, weights)
        verified, self.canary = checked.verified, checked.canary
        self.anatomy: Anatomy = verified.anatomy
        self.faithfulness = verified.faithfulness
        self.shape = _shape(self.anatomy, verified.causal, verified.d_mlp)
        self._layers = attention_layers(self.module, self.anatomy)
        self._state = self._fingerprint()
        attention = str(self._config._attn_implementation)
        self.context = Context(self._key(checked.weights), self.backend, str(dtype).removeprefix("torch."), attention)
        return checked.weights

    def _run_checks(self, guess: Anatomy, dtype: torch.dtype, weights: str | None) -> Checked:
        """Check the module, and digest it where no digest is given."""
        seen: list[Canary] = []

        def gather(tokens: Tensor) -> Evidence:
            evidence = self._evidence(guess, tokens)
            seen.append(canary_of(tokens, evidence.logits))
            return evidence

        verified = verify(guess, gather, self.ref, dtype, getattr(self._config, "pad_token_id", None))
        return Checked(verified, seen[-1], weights or self._digest())

    def current(self) -> Context:
        """Return the context of the module as it is now; where it was changed in place, its identities are checked anew.

        Raises:
            ModelError: no key can say what it computes (a hook or a patched `forward` of somebody else, autocast), or
                its identities no longer hold.
        """
        with self._lock:
            if reason := unkeyable(self.module):
                raise ModelError(f"{self.ref}: its rows cannot be told from other rows: {reason}")
            now = self._fingerprint()
            if now != self._state:
                self._follow(now)
            return self.context

    def _follow(self, now: Fingerprint | None) -> None:
        """Examine the module anew after it was changed."""
        state, weights = self._wrapped
        self._examine(anatomy_of(self.module), weights if now == state else None)

    def _digest(self) -> str:
        return weights_digest(self.module, partial(fetch_offloaded, self.module, ref=self.ref))

    def _fingerprint(self) -> Fingerprint | None:
        return fingerprint(self.source)

    def _key(self, weights: str) -> str:
        return keyed(weights, self.source)

    def _place(self, entry: Tensor) -> tuple[torch.device, torch.dtype]:
        """The device that tokens go to and the dtype of the computation, by the embedding's weights."""
        return main_device(self.module) if entry.is_meta else entry.device, entry.dtype

    def _attended(self, anatomy: Anatomy, tokens: Tensor) -> Mapping[int, Attended] | str:
        """What each layer's attention function receives, or the reason it cannot be had."""
        return attention_of(self.module, anatomy, self._logits, tokens)

    def _call(self, hooks: ForwardHooks, tokens: Tensor, **kwargs: Any) -> Any:
        """The module's own output for `tokens` [batch, pos] and further arguments, with the hooks visited on the way."""
        raise NotImplementedError

    def component(self, name: str, layer: int | None = None) -> nn.Module:
        """Return a part of the module by its TransformerLens name, such as `attn.o` or `ln1` of a layer, or `unembed`."""
        return self.anatomy.component(name, layer)

    def refusal(self, address: Address) -> str | None:
        """Return why the address cannot be read, or None where it can."""
        return self.anatomy.refusal(address)

    def run(
        self,
        tokens: Int[Tensor, "batch pos"],
        reads: Mapping[Address, Read],
        writes: Mapping[Address, Write] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> None:
        """Run one forward over right-padded `tokens` [batch, pos], stopped after the last address read or written.

        Raises:
            PointError: an address this model refuses, or a write to a derived one; before any computation.
            PromptError: token ids outside the vocabulary, or more positions than the context window.
        """
        writes = writes or {}
        self._admit(reads, writes)
        self._admit_tokens(tokens, tokens.shape[1])
        if not reads and not writes:
            return
        with self._lock, evaluating(self.module), torch.inference_mode():
            hooks = self._hooks(reads, writes, stop=True)
            try:
                self._forward(hooks, tokens, lengths)
            except Stop:
                return
            hooks.finish()

    @torch.inference_mode()
    def generate(
        self,
        tokens: Sequence[int],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        writes: Callable[[], Mapping[Address, Write]] | None = None,
    ) -> list[int]:
        """Return the tokens the model writes after `tokens`; the last is an end-of-sequence token where it wrote one.

        The draw depends on `seed` alone and leaves the global random state as it was.

        Raises:
            PointError: the model is not causal, or refuses a write.
            PromptError: an empty prompt, or one that would outgrow the context window.
            OptionError: a negative temperature, or `top_p` outside (0, 1].
        """
        if not self.shape.causal:
            raise PointError(f"{self.ref} reads both ways, so it cannot write a continuation")
        if temperature < 0 or not 0 < top_p <= 1:
            raise OptionError(f"temperature {temperature} and top_p {top_p}: need temperature >= 0 and 0 < top_p <= 1")
        step = torch.tensor([list(tokens)], dtype=torch.long)
        self._admit_tokens(step, step.shape[1] + max_new_tokens)
        generator = torch.Generator().manual_seed(seed)
        ends, written, cache = end_tokens(self.module), list[int](), None
        with self._lock, evaluating(self.module):
            while len(written) < max_new_tokens:
                edits = writes() if writes else {}
                self._admit({}, edits)
                hooks = self._hooks({}, edits, stop=False)
                out = self._forward(hooks, step, None, past_key_values=cache, use_cache=True)
                hooks.finish()
                token = _choose(tensor_of(out)[0, -1].float().cpu(), temperature, top_p, generator)
                written.append(token)
                if token in ends:
                    break
                cache, step = out.past_key_values, torch.tensor([[token]])
        return written

    def unembedding(self) -> Unembedding:
        """Return the final norm and unembedding.

        Raises:
            PointError: they do not reproduce this model's logits; the message is the reason.
        """
        if reason := self.faithfulness.refused.get("lens"):
            raise PointError(f"{self.ref}: {reason}")
        return unembedding_of(self.anatomy)

    def _admit(self, reads: Mapping[Address, Read], writes: Mapping[Address, Write]) -> None:
        for address in (*reads, *writes):
            if reason := self.refusal(address):
                raise PointError(f"{self.ref} has no point {str(address)!r}: {reason}")
        for address in writes:
            if address.point != "pattern" and isinstance(self.anatomy.site(address).view, Divisor):
                raise PointError(
                    f"{address} is computed from the norm's input and cannot be written; write the stream before it"
                )

    def _admit_tokens(self, tokens: Tensor, n: int) -> None:
        if tokens.numel() == 0:
            raise PromptError("an empty prompt has no positions to run; give at least one token")
        if n > self.shape.n_ctx:
            raise PromptError(
                f"{n} positions exceed the context window of {self.ref}, {self.shape.n_ctx} tokens; shorten"
            )
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.shape.d_vocab:
            bad = low if low < 0 else high
            raise PromptError(
                f"token id {bad} is outside the vocabulary of {self.ref}: legal are 0 to {self.shape.d_vocab - 1}"
            )

    def _hooks(self, reads: Mapping[Address, Read], writes: Mapping[Address, Write], stop: bool) -> ForwardHooks:
        addresses = sorted({*reads, *writes}, key=lambda a: (a.layer or 0, _ORDER[a.point]))
        elsewhere = frozenset(a for a in addresses if a.point == "pattern" and a.layer not in self.anatomy.patterns)
        sites = {a: self.anatomy.site(a) for a in addresses if a not in elsewhere}
        return ForwardHooks(sites, reads, writes, elsewhere, stop)

    @contextmanager
    def _watching(self, hooks: ForwardHooks) -> Iterator[None]:
        """A context in which the attention function reports the patterns that no module carries."""
        patterns = {a.layer: a for a in hooks.pending if a not in hooks.sites}
        watch = {layer: _report(hooks, a) for layer, a in patterns.items()}
        edits = {layer: hooks.writes[a] for layer, a in patterns.items() if a in hooks.writes}
        if not patterns:
            yield
            return
        with self.during(lambda: watched(self._config, self._layers, watch, edits)):
            yield

    def during(self, context: Callable[[], AbstractContextManager[Any]]) -> AbstractContextManager[Any]:
        """Enter a context that changes the module inside."""
        return context()

    def _forward(self, hooks: ForwardHooks, tokens: Tensor, lengths: Sequence[int] | None, **cache: Any) -> Any:
        kwargs: dict[str, Any] = {"use_cache": False, **cache} if self.shape.causal else {}
        if not self.shape.causal and lengths is not None:
            positions = torch.arange(tokens.shape[1], device=self.device)
            kwargs["attention_mask"] = (positions < torch.tensor(lengths, device=self.device)[:, None]).long()
        # A causal model gets no mask: right padding cannot reach a real row, and the fast attention path stays open.
        with self._watching(hooks):
            return self._call(hooks, tokens.to(self.device), **kwargs)

    def _logits(self, tokens: Tensor, hooks: ForwardHooks | None = None) -> Tensor:
        hooks = hooks or ForwardHooks({}, {}, {}, stop=False)
        with torch.inference_mode():
            return tensor_of(self._call(hooks, tokens.to(self.device)))

    def _evidence(self, guess: Anatomy, tokens: Tensor) -> Evidence:
        attended = {} if guess.patterns else self._attended(guess, tokens)
        return evidence_of(guess, self._logits, attended, tokens)


def _report(hooks: ForwardHooks, address: Address) -> Watch:
    def watch(attended: Attended) -> None:
        if address in hooks.reads:
            hooks.reads[address](attended.pattern)
        hooks.done(address)

    return watch


def _shape(anatomy: Anatomy, causal: bool, d_mlp: int | None) -> Shape:
    sizes = anatomy.map.sizes
    return Shape(
        architecture=anatomy.map.architecture,
        n_layers=anatomy.n_layers,
        d_model=int(sizes.d_model),
        n_heads=anatomy.n_heads,
        n_kv_heads=anatomy.n_kv_heads,
        d_head=anatomy.d_head,
        d_mlp=int(d_mlp or sizes.d_mlp),
        d_vocab=int(sizes.d_vocab),
        n_ctx=int(sizes.n_ctx),
        causal=causal,
    )


def _parts(module: nn.Module) -> list[nn.Module]:
    """Return a module and all inside it, some perhaps twice: `modules()` would take longer than a small block."""
    parts = [module]
    for part in parts:
        parts.extend(filter(None, part._modules.values()))
    return parts


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode inside the context; every submodule has its own training flag back afterwards."""
    training = [m for m in _parts(module) if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


def _choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token id from logits [d_vocab]: the largest at temperature 0, otherwise drawn from the top_p nucleus."""
    if temperature == 0:
        return int(logits.argmax())
    ordered, ids = (logits / temperature).softmax(-1).sort(descending=True)
    # The token that crosses top_p still belongs, so the nucleus is never empty.
    kept = torch.where(ordered.cumsum(-1) - ordered < top_p, ordered, 0.0)
    return int(ids[torch.multinomial(kept, 1, generator=generator)])
