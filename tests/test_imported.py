"""Importing in less time changes nothing but the time."""

from __future__ import annotations

import gc
from pathlib import Path

import transformers
from transformers.utils import import_utils

from probes.models import imported

MODELS = Path(transformers.__file__).parent / "models"


def test_the_list_of_models_is_taken_over_as_it_would_be_made_again() -> None:
    listing = import_utils.create_import_structure_from_path
    define = import_utils.define_import_structure.__wrapped__
    alone = define(MODELS)
    reads = listing.cache_info().misses
    with imported._models_listed_once():
        shared = define(str(MODELS / "__init__.py"))
        assert import_utils.create_import_structure_from_path(MODELS / "llama") == listing(MODELS / "llama")
    assert shared == alone
    assert listing.cache_info().misses <= reads + 1  # the folder just asked for, and none of the other five hundred
    assert import_utils.create_import_structure_from_path is listing
    assert any("LlamaForCausalLM" in names for files in shared.values() for names in files.values())


def test_what_cannot_be_imported_is_passed_over_and_garbage_is_collected_afterwards() -> None:
    assert gc.isenabled()
    imported.import_all(["no_such_module_anywhere", "probes.points"])
    assert gc.isenabled()
    gc.disable()
    try:
        imported.import_all(["probes.points"])
        assert not gc.isenabled()
    finally:
        gc.enable()
