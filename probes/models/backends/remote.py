"""A model that stays on an NDIF server, read and edited through nnsight's remote execution."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import xxhash
from torch import Tensor, nn

from probes.anatomy import Anatomy, anatomy_of
from probes.errors import ModelError, OptionError, PointError
from probes.hooks.forward_hooks import ForwardHooks
from probes.models.backends.in_memory import LocalModel
from probes.models.backends.nnsight import execution_order, library
from probes.models.protocol import Context, Unembedding
from probes.models.silence_loggers import silence_loggers
from probes.models.sources.digest import canonical_config
from probes.models.sources.hub import is_hub_id

KEY, HOST = "NDIF_API_KEY", "NDIF_HOST"
"""Environment variables: the key, and the server where it is not nnsight's own default."""

Client = Callable[[Any], Any]
"""Makes the object that carries one trace of an nnsight model to a server and its saved values back."""

_NORMS = ("ln1", "ln1_post", "ln2", "ln2_post", "attn.q_norm", "attn.k_norm")
_NO_LENS = "the weights stay on the server, so a residual cannot be read through them here"
_NO_PATTERN = "the attention function runs on the server, where only modules are read"


class RemoteModel(LocalModel):
    """A TransformersModel without weights behind the `Model` protocol; every forward is a request.

    A write is computed here, from the tensor that the server sends: a forward with n written places takes n + 1
    requests. Patterns, the lens and decoding are refused. nnsight unpickles the server's answers. Tested against
    nnsight's own rehearsal of its wire format; no request of this code has reached a server yet.

    Args:
        traced: nnsight's TransformersModel, not dispatched.
        client: What carries a trace to the server.

    Raises:
        ModelError: the server refuses or cannot be reached, the identities fail, or the order of the model's parts
            cannot be told without its weights.
    """

    backend = "nnsight"

    def __init__(self, traced: Any, client: Client, *, ref: str, revision: str | None = None) -> None:
        self.traced, self.client, self.ref = traced, client, ref
        module: nn.Module = traced._module.eval()
        self._order = _rehearsed(module, ref)
        self._paths = {part: _attribute_path(traced, path) for path, part in module.named_modules()}
        anatomy = anatomy_of(module)
        self._fetch_norms(anatomy)
        self.module, embed = module, anatomy.component("embed")
        self._dtype = self._fetch(torch.ones(1, 1, dtype=torch.long), {}, [(embed, "output", False)], {}, 0, True)[
            0
        ].dtype
        identity = f"{ref}\0{revision}\0{canonical_config(module)}"
        weights = f"remote-{xxhash.xxh3_128_hexdigest(identity.encode())}"
        super().__init__(module, traced.tokenizer, ref=ref, weights=weights, revision=revision, anatomy=anatomy)

    def unembedding(self) -> Unembedding:
        """Refuse: raises PointError, because the weights stay on the server."""
        raise PointError(f"{self.ref}: {_NO_LENS}")

    def generate(self, tokens: Sequence[int], max_new_tokens: int, **_: Any) -> NoReturn:
        """Refuse: raises PointError, because a server keeps no cache from one request to the next."""
        raise PointError(
            f"{self.ref}: decoding is not done remotely, because the server keeps no cache between requests; "
            "leave out --remote, or ask for no new tokens"
        )

    def current(self) -> Context:
        """Return the context, which is the server's: nothing done here can change the model there."""
        return self.context

    def _fingerprint(self) -> None:
        return None

    def _key(self, weights: str) -> str:
        return weights

    def _place(self, entry: Tensor) -> tuple[torch.device, torch.dtype]:
        return torch.device("cpu"), self._dtype

    def _attended(self, anatomy: Anatomy, tokens: Tensor) -> str:
        return _NO_PATTERN

    def _logits(self, tokens: Tensor, hooks: ForwardHooks | None = None) -> Tensor:
        if hooks is not None:
            self._call(hooks, tokens)
        root = [(self.module, "output", False)]
        return self._fetch(tokens, {}, root, {}, 0, True)[0] if hooks is None else torch.empty(0)

    def _call(self, hooks: ForwardHooks, tokens: Tensor, **kwargs: Any) -> None:
        hooks.rows = (tokens.shape[0], tokens.shape[1])
        visits, keys_of = [], []
        for (path, side), keys in sorted(hooks.places().items(), key=lambda item: self._when(item[0])):
            if self._when((path, side)) >= 0:
                in_place = any(hooks.sites[key].in_place for key in keys)
                visits.append((self.module.get_submodule(path), side, in_place))
                keys_of.append(keys)
        fixed: dict[int, Tensor] = {}
        after = 0
        written = [i for i, keys in enumerate(keys_of) if any(key in hooks.writes for key in keys)]
        for last in sorted({*written, len(visits) - 1}):
            tensors = self._fetch(tokens, kwargs, visits[: last + 1], fixed, after, stop=hooks.stop or last in written)
            for number, raw in enumerate(tensors, after):
                new = hooks.visit(keys_of[number], raw)
                if number in written:
                    fixed[number] = new
            after = last + 1

    def _when(self, place: tuple[str, str]) -> int:
        return self._order.get((self.module.get_submodule(place[0]), place[1]), -1)

    def _fetch_norms(self, anatomy: Anatomy) -> None:
        """The norms' few weights, so that the identities can be checked here."""
        layers = [(name, layer) for layer in range(anatomy.n_layers) for name in _NORMS]
        paths = [anatomy.map.path(name, layer) for name, layer in [*layers, ("ln_final", None)]]
        parameters = [
            (anatomy.map.module.get_submodule(path), name)
            for path in dict.fromkeys(paths)
            if path
            for name in anatomy.map.module.get_submodule(path).state_dict()
        ]
        names = [f"{self._paths[part]}.{name}" for part, name in parameters]
        traced, tokens = self.traced, torch.ones(1, 1, dtype=torch.long)
        with _clear(self.ref), traced.trace(input_ids=tokens, backend=self.client(traced)) as tracer:
            weights = list().save()  # type: ignore[attr-defined]  # noqa: C408
            for name in names:
                weights.append(traced.get(name))
            tracer.stop()
        for (part, name), weight in zip(parameters, weights, strict=True):
            setattr(part, name, nn.Parameter(weight.detach(), requires_grad=False))

    def _fetch(
        self,
        tokens: Tensor,
        kwargs: Mapping[str, Any],
        visits: Sequence[tuple[nn.Module, str, bool]],
        fixed: Mapping[int, Tensor],
        after: int,
        stop: bool,
    ) -> list[Tensor]:
        """The tensors at the visits from the `after`th on, in one request, with some visits' tensors replaced.

        A visit is a module, the side of it, and whether a replacement is written into the tensor itself.
        """
        traced = self.traced
        places = [(self._paths[part], side, in_place) for part, side, in_place in visits]
        changed = dict(fixed)
        # What stands inside the block is sent to the server as source, so it uses nothing of this package.
        with _clear(self.ref), traced.trace(input_ids=tokens, backend=self.client(traced), **kwargs) as tracer:
            tensors = list().save()  # type: ignore[attr-defined]  # noqa: C408
            for number, (path, side, in_place) in enumerate(places):
                part = traced.get(path) if path else traced
                value = part.input if side == "input" else part.output
                bare = torch.is_tensor(value)
                tensor = value if bare else value["logits"] if hasattr(value, "keys") else value[0]
                if number in changed:
                    new = changed[number].to(tensor.device)
                    if in_place:
                        tensor.copy_(new)
                    elif side == "input":
                        part.input = new
                    elif bare:
                        part.output = new
                    elif hasattr(value, "keys"):
                        value["logits"] = new
                    else:
                        part.output = (new, *value[1:])
                if number >= after:
                    tensors.append(tensor)
            if stop:
                tracer.stop()
        return [tensor.detach().cpu() for tensor in tensors]


@contextmanager
def _clear(ref: str) -> Iterator[None]:
    """Turn a server's refusal or an outage inside the context into a ModelError; what is already in a store stays."""
    from nnsight.intervention.backends.remote import RemoteError

    try:
        yield
    except RemoteError as error:
        raise ModelError(f"{ref}: the server refuses: {_line(error)}") from error
    except Exception as error:
        outage = type(error).__module__.partition(".")[0] in ("httpx", "httpcore", "websocket")
        if not outage and not isinstance(error, OSError):
            raise
        raise ModelError(
            f"{ref}: the server cannot be reached or broke off ({type(error).__name__}: {_line(error)}); what was captured "
            f"stays, and the same command goes on from there. The environment variable {HOST} names the server."
        ) from error


def load_remote(
    ref: str, *, attention: str = "sdpa", revision: str | None = None, trust_remote_code: bool = False
) -> RemoteModel:
    """Load a model on an NDIF server, with the key from the environment.

    Raises:
        OptionError: no key in the environment.
        ModelError: not a hub id, a configuration that cannot be had, or as `RemoteModel`.
    """
    library()
    key = os.environ.get(KEY)
    if not key:
        raise OptionError(f"remote execution needs a key: set the environment variable {KEY} to your NDIF key")
    if not is_hub_id(ref) or "/" not in ref:
        raise ModelError(f"a remote model is named by its hub id, such as openai-community/gpt2, not {ref!r}")
    from nnsight import TransformersModel
    from transformers import AutoTokenizer

    try:
        with silence_loggers():
            tokenizer = AutoTokenizer.from_pretrained(ref, revision=revision, trust_remote_code=trust_remote_code)
            options = {"attn_implementation": attention, "trust_remote_code": trust_remote_code}
            traced = TransformersModel(ref, task="text-generation", tokenizer=tokenizer, revision=revision, **options)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{ref}: its configuration and tokenizer cannot be had from the hub: {_line(error)}"
        ) from error
    return RemoteModel(traced, server_client(key), ref=ref, revision=revision)


def server_client(key: str) -> Client:
    """Return the client of nnsight itself, with a key; the server is nnsight's default or the one the environment names."""

    def client(traced: Any) -> Any:
        from nnsight.intervention.backends.display import StatusDisplay
        from nnsight.intervention.backends.remote import RemoteBackend

        host = os.environ.get(HOST)
        backend = RemoteBackend(traced.to_model_key(), host=host, api_key=key, env=traced._remoteable_get_env())
        backend.display = StatusDisplay(enabled=False)
        return backend

    return client


def _rehearsed(module: nn.Module, ref: str) -> Mapping[tuple[nn.Module, str], int]:
    """The order in which a forward runs the parts, from one without weights."""
    try:
        with torch.inference_mode():
            return execution_order(module, torch.ones(1, 2, dtype=torch.long, device="meta"))
    except (RuntimeError, NotImplementedError) as error:
        raise ModelError(
            f"{ref}: the order in which {type(module).__name__} runs its parts cannot be told without its weights "
            f"({_line(error)}), so it cannot be read remotely; load it without --remote"
        ) from error


def _attribute_path(traced: Any, path: str) -> str:
    """How nnsight spells a module's path; it moves parts named after what it serves itself, such as `output`."""
    spelled: list[str] = []
    for name in path.split(".") if path else []:
        envoy = traced.get(".".join(spelled)) if spelled else traced
        moved = f"E_{name}"
        spelled.append(moved if moved in envoy.__dict__ else name)
    return ".".join(spelled)


def _line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else type(error).__name__
