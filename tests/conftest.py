"""Shared fixtures: a tiny random model, a fresh store, and the bundled default model."""

from __future__ import annotations

import one_thread  # noqa: F401

# isort: split
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make
from hypothesis import HealthCheck, settings
from tiny import native
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from probes.models import Model, load_model
from probes.models.backends.native import NativeModel
from probes.store import ActivationStore

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")  # a busy machine fails no property
if not torch.cuda.is_available():
    # Without a GPU the fused kernels are interpreted; Triton decides that when a test first imports it.
    os.environ.setdefault("TRITON_INTERPRET", "1")

LONGEST = (
    "test_app_browser",
    "test_notebooks",
    "test_studies_ray",
    "test_planted",
    "test_planted_families",
    "test_studies_run",
    "test_kernels_compiled",
    "test_app_pages",
    "test_live_process",
    "test_transformer_lens",
    "test_outside_analysis",
    "test_nnsight",
    "test_cdt_families",
    "test_jacobian_lens",
    "test_lenses",
    "test_interventions",
    "test_native",
    "test_causal_patching",
    "test_live_keys",
    "test_studies_quick",
    "test_norm_training",
    "test_app_jobs",
)
"""Files that take half a minute or more. A file is one process's, which makes its fixtures once; these must not come last."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, the others as they are."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONGEST)))


@pytest.fixture(autouse=True)
def quick_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dry runs measure the device for a moment only."""
    monkeypatch.setattr("probes.capture.dry_run.PROBE_SECONDS", 0.1)


@pytest.fixture
def tiny() -> NativeModel:
    """A tiny random Llama of 3 layers."""
    return native()


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    """An empty store."""
    return ActivationStore(tmp_path / "store")


@pytest.fixture
def count_forwards(monkeypatch: pytest.MonkeyPatch) -> Callable[[Model], list[int]]:
    """Wraps a model's `run`; the list receives the batch size of every forward."""

    def watch(model: Model) -> list[int]:
        seen: list[int] = []
        original = model.run

        def run(tokens: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            seen.append(len(tokens))
            original(tokens, *args, **kwargs)

        monkeypatch.setattr(model, "run", run)
        return seen

    return watch


@pytest.fixture(scope="session")
def real() -> Model:
    """The bundled default model, fetched once and cached."""
    return load_model("smollm2-135m")


@pytest.fixture
def word_folder(llama_folder: Path) -> Path:
    """The same folder with a tokenizer of one word a token."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2").save_pretrained(llama_folder)
    return llama_folder


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    """A folder with a tiny Llama checkpoint and no tokenizer."""
    folder = tmp_path / "model"
    make("llama").save_pretrained(folder)
    return folder
