"""Hub ids: the snapshot folder of a model, from the local hub cache or downloaded, with a quick answer when offline."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from probes.errors import ModelError, one_line
from probes.models.silence_loggers import silence_loggers

PROBE_SECONDS = 4.0
"""How long the hub may take to answer before the local cache is all there is."""

_PATTERNS = ("*.json", "*.jinja", "*.txt", "*.model", "model.safetensors", "model-*-of-*.safetensors")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")

MAX_ID = 96
"""Characters of the longest id that the hub gives."""


class HubUnreachable(ModelError):
    """The hub cannot be reached (or is switched off) and the model is not cached."""


class HubMissing(ModelError):
    """The hub answered that it has no such model."""


def is_hub_id(ref: str) -> bool:
    """Return whether a reference has the form of a hub id: `name` or `owner/name`."""
    return len(ref) <= MAX_ID and _HUB_ID.fullmatch(ref) is not None


def hub_folder(
    ref: str, *, revision: str | None = None, offline: bool = False, trust_remote_code: bool = False
) -> tuple[Path, str | None]:
    """Return the snapshot folder of a hub model and its commit.

    The hub is asked once, briefly, which commit is meant; what is cached of that commit is not downloaded again.

    Raises:
        ModelError: not on the hub, gated, without safetensors, or not cached while the hub cannot be reached.
    """
    info = None if offline or _switched_off() else _ask(ref, revision)
    if info is None:
        folder = _cached(ref, revision)
        if folder is None:
            raise HubUnreachable(ref)
        return folder, folder.name
    names = {sibling.rfilename for sibling in info.siblings or ()}
    if not any(name.endswith(".safetensors") and "/" not in name for name in names):
        raise ModelError(
            f"model {ref!r} has no safetensors weights on the hub, and pickle is never loaded; "
            "convert it once where you trust it, then load the folder"
        )
    folder = _download(ref, revision, (*_PATTERNS, "*.py") if trust_remote_code else _PATTERNS)
    return folder, folder.name


def check_hub(ref: str, *, revision: str | None = None, offline: bool = False) -> None:
    """Ask the hub, which is not asked for a cached model, whether it has one; nothing is downloaded.

    Raises:
        ModelError: not on the hub, gated, or not cached while the hub cannot be reached.
    """
    if _cached(ref, revision) is not None:
        return
    if offline or _switched_off():
        raise HubUnreachable(ref)
    # The interface to the hub takes longer to import than the refusal of a name may take.
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    with _hub_answers(ref, revision), suppress(EntryNotFoundError):
        get_hf_file_metadata(hf_hub_url(ref, "config.json", revision=revision), timeout=PROBE_SECONDS)


def cached_models() -> tuple[str, ...]:
    """Return the hub ids in the local hub cache that can be loaded: a configuration and safetensors weights."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories: Iterable[Any] = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return ()
    usable = [
        repository.repo_id
        for repository in repositories
        if repository.repo_type == "model"
        and any(_complete(Path(snapshot.snapshot_path)) for snapshot in repository.revisions)
    ]
    return tuple(sorted(usable))


def _complete(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _switched_off() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _ask(ref: str, revision: str | None) -> Any:
    """The hub's description of a model, or None where the hub does not answer."""
    from huggingface_hub import HfApi

    with suppress(HubUnreachable), _hub_answers(ref, revision):
        return HfApi().model_info(ref, revision=revision, timeout=PROBE_SECONDS)
    return None


@contextmanager
def _hub_answers(ref: str, revision: str | None) -> Iterator[None]:
    """Within it, what the hub refuses, or that it does not answer, is raised as an error of ours."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise ModelError(f"model {ref!r} is gated: accept its terms on the hub, then log in (hf auth login)") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"model {ref!r} has no revision {revision!r} on the hub") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise HubMissing(ref) from error
    except HfHubHTTPError as error:
        raise HubUnreachable(ref) from error
    except Exception as error:  # The hub's transport has changed its error classes from release to release.
        if not _is_transport(error):
            raise
        raise HubUnreachable(ref) from error


def _is_transport(error: BaseException) -> bool:
    names = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError) or bool(names & {"httpx", "httpx2", "httpcore", "httpcore2", "requests"})


def _cached(ref: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    config_path = try_to_load_from_cache(ref, "config.json", revision=revision)
    if not isinstance(config_path, str):
        return None
    folder = Path(config_path).parent
    return folder if _complete(folder) else None


def _download(ref: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        with silence_loggers():
            return Path(
                snapshot_download(ref, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*/*"])
            )
    except Exception as error:
        if not _is_transport(error):
            raise
        raise ModelError(
            f"downloading {ref!r} from the hub broke off: {one_line(error)}; run it again to resume"
        ) from error
