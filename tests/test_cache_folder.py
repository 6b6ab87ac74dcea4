"""Paths that begin with ~."""

from __future__ import annotations

from pathlib import Path

import pytest

from probes.cache_folder import expanded


def test_a_home_is_put_in_and_a_name_of_no_user_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~/store") == tmp_path / "store"
    assert expanded("~0/store") == Path("~0/store")
    assert expanded(tmp_path / "~0") == tmp_path / "~0"
