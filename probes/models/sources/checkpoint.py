"""From a Hugging Face folder to its module and tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from probes.errors import ModelError, one_line
from probes.models.silence_loggers import silence_loggers
from probes.norms.large_eps import undo_large_eps

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True)
class Loading:
    """How a folder is loaded."""

    device: str = "cpu"
    dtype: str = "auto"
    """A torch dtype by name, or `auto` for the checkpoint's own."""
    attention: str = "sdpa"
    trust_remote_code: bool = False
    device_map: str | Mapping[str, str | int] | None = None
    """Where each part goes: a strategy such as `auto`, or device by module path; None puts all on `device`."""
    max_memory: Mapping[int | str, str] | None = None
    """The most each device may hold, such as `{0: "20GiB", "cpu": "60GiB"}`."""
    offload_folder: Path | None = None
    """Where offloaded weights go that cannot be read from the checkpoint as they are."""


def model_class(config: Any) -> Any:
    """Return the class to load a configuration with: the one its checkpoint was saved from, where that has logits or is bare.

    Raises:
        ModelError: encoder-decoder models and heads that do not predict tokens.
    """
    import transformers

    named = (getattr(config, "architectures", None) or [""])[0]
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"architecture {named or config.model_type!r} is encoder-decoder; legal are decoders and encoders"
        )
    if named.endswith("ForPreTraining"):
        # Pre-training heads add a sentence-level task beside the token predictions.
        return transformers.AutoModelForMaskedLM
    if named.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration", "Model")):
        named_class = getattr(transformers, named, None)
        if named_class is not None:
            return named_class
    elif "For" in named:
        raise ModelError(
            f"architecture {named!r} has a head that does not predict tokens; legal are …ForCausalLM, …LMHeadModel, "
            "…ForMaskedLM and bare …Model; load the base checkpoint it was made from"
        )
    if "auto_map" in config.to_dict():
        return transformers.AutoModelForCausalLM
    if named:
        raise ModelError(
            f"architecture {named!r} is unknown to transformers {transformers.__version__}; is it a newer model?"
        )
    return transformers.AutoModelForCausalLM


def load_module(folder: Path, config: Any, how: Loading) -> nn.Module:
    """Load the model of a folder, in evaluation mode on its device; never reads pickle, never fills a missing weight.

    Raises:
        ModelError: weights missing, damaged or of another shape; an attention the model does not have; out of memory.
    """
    import torch

    dtype: Any = "auto" if how.dtype == "auto" else getattr(torch, how.dtype)
    known = model_class(config)
    try:
        with silence_loggers():
            module, info = known.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                attn_implementation=attention_for(known, how.attention),
                trust_remote_code=how.trust_remote_code,
                **_placement(how),
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (torch.cuda.OutOfMemoryError, MemoryError) as error:
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        raise ModelError(
            f"out of memory on {how.device}: the weights of {folder.name} take {size / 1e9:.1f} GB on disk; "
            "try --dtype bfloat16, another device or a smaller model"
        ) from error
    except Exception as error:  # As for the configuration.
        raise ModelError(f"cannot load {folder}: {one_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} weight(s) of {type(module).__name__}, first {missing[0]!r}; nothing is guessed"
        )
    loaded: nn.Module = module.eval()
    undo_large_eps(loaded)
    return loaded


def empty_module(folder: Path, config: Any, how: Loading) -> nn.Module:
    """Return the model of a folder without weights, on the meta device, in evaluation mode.

    Raises:
        ModelError: a configuration that no model can be made of.
    """
    import torch
    from transformers import GenerationConfig

    dtype = torch.float32 if how.dtype == "auto" else getattr(torch, how.dtype)
    known = model_class(config)
    try:
        with silence_loggers(), torch.device("meta"):
            module = known._from_config(config, dtype=dtype, attn_implementation=attention_for(known, how.attention))
        module.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # As for a configuration.
        raise ModelError(f"cannot make the model of {folder}: {one_line(error)}") from error
    empty: nn.Module = module.eval()
    undo_large_eps(empty)
    return empty


def attention_for(known: Any, attention: str) -> str:
    """Return `attention`, or `eager` where that is the default and the class has no fused attention (Gemma 2, GPT-J, BLOOM)."""
    return "eager" if attention == "sdpa" and not getattr(known, "_supports_sdpa", True) else attention


def _placement(how: Loading) -> dict[str, Any]:
    if how.device_map is None:
        return {"device_map": None if how.device == "cpu" else how.device}
    spread = how.device_map if isinstance(how.device_map, str) else dict(how.device_map)
    memory = None if how.max_memory is None else dict(how.max_memory)
    return {"device_map": spread, "max_memory": memory, "offload_folder": how.offload_folder}


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a folder, or return None where it has none (prompts are then token ids).

    Raises:
        ModelError: a tokenizer that cannot be read.
    """
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        return None
    from transformers import AutoTokenizer

    try:
        with silence_loggers():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # The tokenizers library raises bare Exception for a damaged file.
        raise ModelError(f"cannot read the tokenizer of {folder}: {one_line(error)}") from error
