"""Shared fixtures: a tiny random model, a fresh store, and the bundled default model."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    # The process that only hands out tests has no need of what takes seconds to import.
    import torch

    from probes.models import Model
    from probes.models.backends.native import NativeModel
    from probes.store import ActivationStore

# Read when torch and NumPy are imported, and inherited by what a test starts: several processes compute at once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A hundred interpreters import the same sources: they are compiled once, also in a container that keeps no bytecode.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

LONGEST = (
    "test_app_browser",
    "test_studies_ray",
    "test_notebooks",
    "test_planted",
    "test_studies_run",
    "test_planted_families",
    "test_ground_truth_run",
    "test_transformer_lens",
    "test_live_keys",
    "test_streaming",
    "test_depth_use",
    "test_concept_depth",
    "test_cdt_families",
    "test_streamed_grids",
    "test_causal_patching",
    "test_interventions",
    "test_native",
    "test_layer_programs",
    "test_result_malformed",
    "test_back_patching",
    "test_causal_patching_identities",
    "test_lenses",
    "test_live_process",
    "test_norm_diagnostics",
    "test_cli",
    "test_studies_quick",
    "test_norm_training",
    "test_jacobian_lens",
    "test_nnsight",
    "test_depth_use_generation",
    "test_causal_patching_planted",
    "test_app_jobs",
    "test_app_live",
    "test_kernels_compiled",
    "test_report_browser",
)
"""Files that take ten seconds or more. A file is one process's, which makes its fixtures once; these must not come last."""


def pytest_xdist_auto_num_workers() -> int:
    """One process more than processors, since some tests wait for a browser or for other processes; 4 GiB for each."""
    import psutil
    from joblib import cpu_count

    return max(1, min(int(cpu_count()) + 1, psutil.virtual_memory().total >> 32))


def pytest_collection(session: pytest.Session) -> None:
    """Before test files are imported: one thread, properties without a deadline, and kernels that need no GPU."""
    if session.config.pluginmanager.hasplugin("dsession"):
        return
    gc.disable()  # what is imported stays: no search for garbage in it
    import torch
    from hypothesis import HealthCheck, settings

    torch.set_num_threads(1)
    settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("untimed")  # a busy machine fails no property
    if not torch.cuda.is_available():
        # Without a GPU the fused kernels are interpreted; Triton decides that when a test first imports it.
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_finish() -> None:
    """After test files are imported: what is there is left out of every later search for garbage."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, the others as they are."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONGEST)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Before a test's fixtures: what is drawn without a generator of its own is the same in every run."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def quick_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dry runs measure the device for a moment only."""
    monkeypatch.setattr("probes.capture.dry_run.PROBE_SECONDS", 0.1)


@pytest.fixture(scope="session")
def scanned_once() -> Iterator[None]:
    """Streamlit looks for components through all that is installed once, not for every page: half a second each."""
    from streamlit.components.v2 import manifest_scanner

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest_scanner, "scan_component_manifests", cache(manifest_scanner.scan_component_manifests))
        yield


@pytest.fixture
def tiny() -> NativeModel:
    """A tiny random Llama of 3 layers."""
    from tiny import native

    return native()


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    """An empty store."""
    from probes.store import ActivationStore

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
    from probes.models import load_model

    return load_model("smollm2-135m")


@pytest.fixture
def word_folder(llama_folder: Path) -> Path:
    """The same folder with a tokenizer of one word a token."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2").save_pretrained(llama_folder)
    return llama_folder


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    """A folder with a tiny Llama checkpoint and no tokenizer."""
    from families import make

    folder = tmp_path / "model"
    make("llama").save_pretrained(folder)
    return folder
