"""A model and how it is loaded: the one list of these options, for every front end."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

from analyses.options import as_flag, defaults_of, flag_of, option, types_of, validate
from probes.errors import OptionError, unknown
from probes.models.choices import ATTENTIONS, BACKENDS, DTYPES, check_streaming, parse_max_memory

if TYPE_CHECKING:
    from probes.models.protocol import Model

CHOICES = {"backend": tuple(BACKENDS), "dtype": DTYPES, "attention": ATTENTIONS}
"""The legal values of the options that name something."""


@dataclass(frozen=True)
class ModelSpec:
    """A model and how it is loaded; `load` gives the model.

    Raises:
        OptionError: a backend, dtype or attention that does not exist, with the legal ones.
    """

    ref: str = option("", "A named model, a folder, a .gguf file, or a hub id.", flag="model")
    backend: str = option("native", "What runs the model: native, transformer_lens or nnsight.")
    device: str = option("auto", "auto, cpu, cuda or cuda:N.")
    dtype: str = option("auto", "auto, float32, bfloat16 or float16.")
    attention: str = option("sdpa", "The attention implementation.")
    revision: str | None = option(None, "Branch, tag or commit of a hub id.")
    trust_remote_code: bool = option(False, "Run code that comes with the checkpoint.")
    streamed: bool = option(
        False, "For a model larger than memory: read its blocks one at a time, each for all prompts."
    )
    stream_memory: str | None = option(
        None, "With --streamed: the most activations kept in memory between blocks, such as 4GiB; more wait on disk."
    )
    device_map: str | None = option(None, "Spread the model: auto, balanced, balanced_low_0 or sequential.")
    max_memory: str | None = option(None, "What each device may hold, such as 0=20GiB,cpu=60GiB.")
    offload: str | None = option(None, "Folder for weights that fit on no device of the map.")
    remote: bool = option(False, "With --backend nnsight: run the model on an NDIF server (key in NDIF_API_KEY).")

    def __post_init__(self) -> None:
        if not self.ref:
            raise OptionError("no model is named: give a named model, a folder, a .gguf file, or a hub id")
        for name, legal in CHOICES.items():
            if (value := getattr(self, name)) not in legal:
                raise OptionError(unknown(name, value, legal))

    def on(self, device: str | None) -> ModelSpec:
        """Return the same on `device`, unless a device or a device map was chosen already."""
        chosen = self.device != "auto" or self.device_map is not None or self.remote
        return self if device is None or chosen else replace(self, device=device)

    def check(self) -> None:
        """Refuse a name that no model has, and options that do not go together, before anything heavy is imported.

        Raises:
            ModelError, OptionError: as `load`, as far as it can be told without loading.
        """
        check_streaming(self.streamed, self.backend, self.device_map, self.stream_memory)
        if self.max_memory is not None:
            parse_max_memory(self.max_memory)
        if not self.remote:
            from probes.models.sources.locate import check_reference

            check_reference(self.ref, revision=self.revision)

    def load(self, progress: Any = None, *, deferred: bool = False) -> Model:
        """Load the model.

        Args:
            deferred: read its weights only when something runs through it; see `load_model`.
            progress: receives a line per step of a first fetch.

        Raises:
            ModelError: a model that cannot be found, loaded or trusted.
            OptionError: options that do not go together.
        """
        from probes.models.load import load_model

        options = dataclasses.asdict(self)
        most = options.pop("max_memory")
        return load_model(
            options.pop("ref"),
            **options,
            max_memory=None if most is None else parse_max_memory(most),
            deferred=deferred,
            progress=progress,
        )

    def chosen(self) -> dict[str, Any]:
        """Return the options that are not at their default, without the model's name."""
        defaults = defaults_of(type(self))
        return {n: v for n, v in dataclasses.asdict(self).items() if n != "ref" and v != defaults[n]}

    def flags(self) -> list[str]:
        """Return the command-line flags that choose this model."""
        return [*as_flag(flag_of(ModelSpec, "ref"), self.ref), *self._loading_flags()]

    def _loading_flags(self) -> list[str]:
        return [word for name, value in self.chosen().items() for word in as_flag(flag_of(ModelSpec, name), value)]

    def python(self) -> str:
        """Return the Python that loads this model."""
        chosen = self.chosen()
        if "max_memory" in chosen:
            chosen["max_memory"] = parse_max_memory(chosen["max_memory"])
        return f"load_model({self.ref!r}{''.join(f', {name}={value!r}' for name, value in chosen.items())})"

    def __str__(self) -> str:
        return shlex.join([self.ref, *self._loading_flags()])

    @classmethod
    def parse(cls, text: str) -> ModelSpec:
        """Return the model that a text names as `str` gives it: a name, perhaps with flags such as `--dtype bfloat16`.

        Raises:
            OptionError: a text that is none, with the legal flags.
        """
        try:
            ref, *words = shlex.split(text) or [""]
        except ValueError as error:
            raise OptionError(f"model {text!r}: {error}") from None
        flags = _Flags(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
        for name, kind in types_of(cls).items():
            if name != "ref":
                how: Any = argparse.BooleanOptionalAction if kind is bool else "store"
                flags.add_argument(f"--{flag_of(cls, name)}", dest=name, action=how)
        return cls(ref, **vars(flags.parse_args(words)))

    @classmethod
    def of(cls, provenance: Mapping[str, Any]) -> ModelSpec:
        """Return how the model of a saved result was loaded; of one that does not say, as far as its provenance tells.

        The revision is pinned to the one that was loaded. Where the provenance does not say what was chosen, the device
        is left open: it tells where the model ran, not that anybody chose it.

        Raises:
            OptionError: the provenance of a damaged result.
        """
        revision = provenance["model"].get("revision")
        pinned = None if not revision or str(revision).startswith("sha256:") else str(revision)
        if loaded := provenance.get("loaded"):
            known = {name: value for name, value in loaded.items() if name in defaults_of(cls)}
            spec = cls(**{**known, "revision": known.get("revision") or pinned})
            validate(spec)
            return spec
        resolved: dict[str, Any] = {name: str(provenance[name]) for name in ("backend", "dtype", "attention")}
        streamed = bool(provenance.get("streamed"))
        return cls(str(provenance["model"]["ref"]), revision=pinned, streamed=streamed, **resolved)


class _Flags(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        flags = ", ".join(action.option_strings[0] for action in self._actions if action.option_strings)
        raise OptionError(
            f"{message}: write a model's name, in quotes where it has blanks, and after it any of {flags}"
        )
