"""Models: where they come from, and one interface to look into them."""

from probes.models.base import Context, Faithfulness, Identity, Model, Read, Shape, Unembedding, Write
from probes.models.digest import weights_digest
from probes.models.embedded import EMBEDDED, EmbeddedModel
from probes.models.handover import BACKENDS
from probes.models.load import load_model
from probes.models.sources import ModelInfo, fetch_model, list_models, model_info

__all__ = [
    "BACKENDS",
    "EMBEDDED",
    "Context",
    "EmbeddedModel",
    "Faithfulness",
    "Identity",
    "Model",
    "ModelInfo",
    "Read",
    "Shape",
    "Unembedding",
    "Write",
    "fetch_model",
    "list_models",
    "load_model",
    "model_info",
    "weights_digest",
]
