"""All that answering a task imports, for the process that the others of a run are forked from."""

from __future__ import annotations

import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama

import probes.planted.certify.certificate
import probes.planted.noise
import probes.planted.trained
from analyses.ground_truth import interchange, updates
from analyses.ground_truth.contestants import ADAPTED, adapter_of

LOADED = (
    transformers.models.gpt2.modeling_gpt2, transformers.models.llama.modeling_llama, probes.planted.certify.certificate,
    probes.planted.noise, probes.planted.trained, interchange, updates, *(adapter_of(name) for name in ADAPTED),
)  # fmt: skip
