"""What a Hugging Face folder holds, told without its weights; imports no torch, so that a list of models opens at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from probes.errors import ModelError, one_line, shown
from probes.input_files import kind_of
from probes.models.silence_loggers import silence_loggers
from probes.models.sources.config_sizes import check_sizes
from probes.models.sources.tensor_files import read_object, tensor_shapes

_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")


def check_folder(folder: Path) -> None:
    """Refuse a folder that is no model.

    Raises:
        ModelError: no config.json, no weights, or weights in pickle form only.
    """
    if kind_of(folder / "config.json") != "file":
        try:
            inside = sorted(path.name for path in folder.iterdir())[:6]
        except OSError as error:
            raise ModelError(f"{folder} cannot be read ({error.strerror}); give a folder that can be") from None
        adapter = (
            " (adapter_config.json: an adapter; merge it into its base model first)"
            if "adapter_config.json" in inside
            else ""
        )
        contents = ", ".join(inside) or "nothing"
        raise ModelError(f"{folder} is not a model folder: config.json is missing; it holds {contents}{adapter}")
    if any(folder.glob("*.safetensors")):
        return
    pickles = [path.name for pattern in _PICKLES for path in folder.glob(pattern)]
    if pickles:
        raise ModelError(
            f"{folder} holds its weights as pickle ({pickles[0]}), which can run code and is never loaded; convert once where "
            "you trust it: python -c \"from transformers import AutoModel as M; M.from_pretrained('DIR').save_pretrained('NEW')\""
        )
    raise ModelError(f"{folder} is not a model folder: it has no *.safetensors weights")


def read_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Return the configuration of a folder, its sizes compared with the checkpoint's tensors.

    Raises:
        ModelError: damaged, sizes that its tensors cannot have, or a model type the installed transformers does not know.
    """
    from transformers import AutoConfig

    _check_config(folder)
    try:
        with silence_loggers():
            return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # The library has no error of its own for a folder that it cannot load.
        raise ModelError(f"cannot read the configuration of {folder}: {one_line(error)}") from error


def _check_config(folder: Path) -> None:
    path = folder / "config.json"
    raw = read_object(path, "configuration")
    classes = raw.get("architectures")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise ModelError(f"{path}: architectures is {shown(classes)}; legal is a list of class names, or null")
    # A folder without weights is that of a GGUF file, whose sizes were compared with its own tensors.
    if shapes := tensor_shapes(folder):
        check_sizes(raw, shapes, str(path))
