"""Activations that another tool computed, written to the store with a context that says so; imported by the command line
alone.
"""

from probes.foreign.hf_datasets import import_datasets
from probes.foreign.rows import Imported, foreign_context
from probes.foreign.vllm import import_vllm

__all__ = ["Imported", "foreign_context", "import_datasets", "import_vllm"]
