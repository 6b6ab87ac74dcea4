"""Loading a model without its blocks' weights, which stay on disk: everything else is in memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from probes.anatomy import anatomy_of
from probes.errors import ModelError
from probes.models.backends.streamed import StreamedModel
from probes.models.fingerprint.plain_model import compute_buffers
from probes.models.protocol import Model
from probes.models.sources.block_weights import BlockWeights
from probes.models.sources.checkpoint import Loading, empty_module, load_module, load_tokenizer
from probes.models.sources.checkpoint_tensors import CheckpointTensors, SafetensorsFolder
from probes.models.sources.gguf_tensors import GgufTensors
from probes.models.sources.locate import Located


def load_streamed(located: Located, config: Any, how: Loading, memory_bytes: int | None = None) -> Model:
    """Load a model whose blocks stay in its folder.

    Args:
        located: its folder, and the GGUF file that its weights lie in if they are not there.
        config: its configuration.
        how: how it is loaded.
        memory_bytes: most activations that wait in memory for a later block; None leaves it to the backend.

    Raises:
        ModelError: weights missing or not finite, or blocks that cannot be read one at a time.
    """
    module, blocks = load_without_blocks(located, config, how)

    tokenizer = load_tokenizer(located.folder, trust_remote_code=how.trust_remote_code)
    limit = {} if memory_bytes is None else {"memory_bytes": memory_bytes}
    return StreamedModel(module, tokenizer, blocks=blocks, ref=located.ref, revision=located.revision, **limit)


def load_without_blocks(located: Located, config: Any, how: Loading) -> tuple[nn.Module, BlockWeights]:
    """Load a model without its blocks' weight matrices; returns it with the reader of these matrices.

    Raises:
        ModelError: as an ordinary load, or blocks that share weights with other parts.
    """
    tensors: CheckpointTensors
    if located.weights is None:
        module = load_module(located.folder, config, replace(how, device_map={"": "meta"}))
        tensors = SafetensorsFolder(located.folder)
    else:
        module = empty_module(located.folder, config, how)
        tensors = GgufTensors(located.weights, module)
    paths, device = block_paths(module), torch.device(how.device)
    _refuse_shared(module, paths)
    compute_buffers(module, device)
    blocks = BlockWeights(tensors, module, paths, device)
    blocks.place_rest()
    module.tie_weights()  # type: ignore[operator]
    for name, tensor in module.named_parameters():
        if tensor.is_meta and not any(name.startswith(f"{path}.") for path in paths):
            raise ModelError(f"{located.weights or located.folder} lacks the weight {name!r}; nothing is guessed")
    return module, blocks


def block_paths(module: nn.Module) -> list[str]:
    """Return the dotted path of each block of a model.

    Raises:
        ModelError: the architecture map does not know this class of model.
    """
    known = anatomy_of(module).map
    paths = [known.path("block", layer) for layer in range(known.n_layers)]
    return [path for path in paths if path]


def _refuse_shared(module: nn.Module, blocks: list[str]) -> None:
    ties: dict[str, str] = getattr(module, "all_tied_weights_keys", None) or {}
    for name in (*ties, *ties.values()):
        if any(name.startswith(f"{block}.") for block in blocks):
            raise ModelError(
                f"{type(module).__name__} shares the weight {name!r} between parts, so its blocks cannot be read one at "
                "a time; load it without streaming"
            )
