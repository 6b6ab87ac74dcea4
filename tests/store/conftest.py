from __future__ import annotations

from pathlib import Path

import pytest

from probes.store import ActivationStore


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    return ActivationStore(tmp_path / "store")
