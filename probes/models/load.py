"""`load_model`: from a reference to a model behind one of the backends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

from probes.errors import OptionError, unknown
from probes.models.backends.deferred import DeferredModel
from probes.models.choices import ATTENTIONS, DTYPES, check_streaming
from probes.models.fingerprint.foreign_code import untouched
from probes.models.imported import import_all, uncollected
from probes.models.interop import backend_class
from probes.models.placement import DeviceMap, MaxMemory, bytes_of, fetch_offloaded, spread
from probes.models.protocol import Model
from probes.models.sources.checkpoint import Loading, load_module, load_tokenizer
from probes.models.sources.digest import weights_digest
from probes.models.sources.fast_tokenizer import FastTokenizer
from probes.models.sources.fetch import Progress
from probes.models.sources.locate import Located, locate
from probes.models.sources.model_folder import read_config
from probes.models.sources.planted import check_precision
from probes.models.verify.load_record import LoadRecord, RecordFile


def load_model(
    ref: str,
    *,
    backend: str = "native",
    device: str = "auto",
    dtype: str = "auto",
    attention: str = "sdpa",
    revision: str | None = None,
    trust_remote_code: bool = False,
    offline: bool = False,
    device_map: DeviceMap | None = None,
    max_memory: MaxMemory | None = None,
    offload: str | Path | None = None,
    streamed: bool = False,
    stream_memory: int | str | None = None,
    remote: bool = False,
    deferred: bool = False,
    progress: Progress | None = None,
) -> Model:
    """Load a model, ready to be read; its identities are checked on the way.

    Args:
        ref: a named model (`smollm2-135m`), a folder, a `.gguf` file, a hub id, or a planted model (`planted:A2@0`).
        backend: `native`, `transformer_lens` or `nnsight`.
        device: `auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:1`.
        dtype: `auto` is float32 on CPU, where half precision is slow, and the checkpoint's own on CUDA.
        attention: the implementation; `sdpa` unless the model lacks it.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run code that comes with the checkpoint.
        offline: ask no network; what is not on this machine is refused.
        device_map: spread the parts of a model over devices, by accelerate: `auto`, `balanced`, `balanced_low_0`,
            `sequential`, or a device (`cpu`, `disk`, a GPU's number) for each module path.
        max_memory: the most each device may hold, such as `{0: "20GiB", "cpu": "60GiB"}`; needs a `device_map`.
        offload: folder for weights put on `disk` that cannot be read from the checkpoint as they are.
        streamed: for a model larger than memory: blocks stay on disk and are read one at a time, each for all prompts
            of a capture and all cells of a grid. Rows and their store keys are those of an ordinary load.
        stream_memory: of a streamed model, the most activations that wait in memory for a later block, in bytes or such
            as `4GiB`; 2 GiB unless given. What does not fit waits on disk.
        remote: run the model on an NDIF server through nnsight; the key is read from the environment alone.
        deferred: read the weights only when something runs through the model, where an earlier deferred load of the same
            files checked them; until then the rows that a store holds of it can be read.
        progress: receives a line per step of a first fetch.

    Raises:
        ModelError: a model or backend that cannot be found, loaded or trusted.
        OptionError: an illegal device, dtype or attention.
    """
    backend_class(backend)
    how = _loading(device, dtype, attention, trust_remote_code)
    if remote:
        return _remote(ref, backend, offline, attention=attention, revision=revision, trust=trust_remote_code)
    how = replace(how, **spread(device, device_map, max_memory, offload))
    check_streaming(streamed, backend, device_map, stream_memory)
    check_precision(ref, dtype)
    located = locate(
        ref, revision=revision, offline=offline, trust_remote_code=trust_remote_code, progress=progress,
        keep_quantised=streamed,
    )  # fmt: skip
    if streamed:
        from probes.models.backends.meta_load import load_streamed

        memory = None if stream_memory is None else bytes_of(stream_memory)
        return load_streamed(located, read_config(located.folder, trust_remote_code=trust_remote_code), how, memory)
    whole = partial(_whole, backend, located, how)
    plain = backend == "native" and device_map is None and not trust_remote_code and untouched(how.device)
    return _deferred(located, how, whole) if deferred and plain else whole()


@uncollected()
def _whole(backend: str, located: Located, how: Loading) -> Model:
    """Load all of a model."""
    import_all()
    config = read_config(located.folder, trust_remote_code=how.trust_remote_code)
    module = load_module(located.folder, config, how)
    tokenizer = load_tokenizer(located.folder, trust_remote_code=how.trust_remote_code)
    weights = weights_digest(module, partial(fetch_offloaded, module, ref=located.ref))
    built = backend_class(backend)(module, tokenizer, ref=located.ref, weights=weights, revision=located.revision)
    return cast(Model, built)


def _deferred(located: Located, how: Loading, whole: Callable[[], Model]) -> Model:
    """Load a model once it runs, where an earlier load of the same files left a record of it."""
    file = RecordFile.of(located.folder, how)
    if file is None:
        return whole()

    def load() -> Model:
        model = whole()
        file.write(LoadRecord.of(model, located.folder))
        return model

    record = file.read()
    if record is None:
        return load()
    whole_tokenizer = partial(load_tokenizer, located.folder)
    tokenizer = FastTokenizer(*record.tokenizer, whole_tokenizer) if record.tokenizer else whole_tokenizer()
    return DeferredModel(record, tokenizer, load, located)


def _remote(ref: str, backend: str, offline: bool, *, attention: str, revision: str | None, trust: bool) -> Model:
    if backend != "nnsight" or offline:
        raise OptionError("remote execution goes through nnsight and the network: give backend nnsight, not offline")
    from probes.models.backends.remote import load_remote

    return load_remote(ref, attention=attention, revision=revision, trust_remote_code=trust)


def _loading(device: str, dtype: str, attention: str, trust_remote_code: bool) -> Loading:
    if dtype not in DTYPES:
        raise OptionError(unknown("dtype", dtype, DTYPES))
    if attention not in ATTENTIONS:
        raise OptionError(unknown("attention", attention, ATTENTIONS))
    place = _device(device)
    on_cpu = dtype == "auto" and place == "cpu"
    return Loading(place, "float32" if on_cpu else dtype, attention, trust_remote_code)


def _device(device: str) -> str:
    import torch

    kind, _, number = device.partition(":")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return "cpu"
    if kind != "cuda" or (":" in device and not number.isdecimal()):
        raise OptionError(unknown("device", device, ("auto", "cpu", "cuda", "cuda:0")))
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(number or 0) >= count:
        raise OptionError(
            f"device {device!r} is not on this machine, which has {count} CUDA device(s); use cpu or auto"
        )
    return device
