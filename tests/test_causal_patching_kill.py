"""A run of causal patching that is killed goes on where it was, also where it was killed while it wrote."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pandas as pd
from forked import forked
from test_causal_patching import native, pair_line

from analyses.causal_patching import CausalPatching
from probes.prompts import Prompt
from probes.store import ActivationStore

WRITTEN = 3


def analysis() -> CausalPatching:
    return CausalPatching(min_gap=0, min_pairs=1, nulls="none", components=("resid_post", "z"))


def pairs() -> list[Prompt]:
    return [pair_line(native("llama"), (5, 6, 7 + i, 8), (5, 6, 17 + i, 8)) for i in range(3)]


def killed_while_writing(store: Path) -> None:
    """Runs until the file after the first `WRITTEN` is about to take its place."""
    replace, written = os.replace, list[Path]()

    def replacing(draft: Path, path: Path) -> None:
        if "causal_patching" in str(path):
            if len(written) == WRITTEN:
                os.kill(os.getpid(), signal.SIGKILL)
            written.append(path)
        replace(draft, path)

    os.replace = replacing  # type: ignore[assignment]
    analysis().run(native("llama"), pairs(), store=ActivationStore(store))


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    assert forked(lambda: killed_while_writing(tmp_path / "store")) == -signal.SIGKILL
    kept = list((tmp_path / "store" / "causal_patching").rglob("*.npy"))
    assert len(kept) == WRITTEN
    model = native("llama")
    whole = analysis().run(model, pairs(), store=ActivationStore(tmp_path / "other"))
    resumed = analysis().run(model, pairs(), store=ActivationStore(tmp_path / "store"))
    pd.testing.assert_frame_equal(resumed.tables["cells"], whole.tables["cells"])
    forwards = [result.provenance["counts"]["intervention_forwards"] for result in (whole, resumed)]
    assert forwards[1] == forwards[0] // 2
    assert not list((tmp_path / "store" / "causal_patching").rglob("*.*"))
