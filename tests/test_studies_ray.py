"""A study on a local Ray cluster of two nodes says what the local engine says, also when a process is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from study_makers import BASE, model_folder, prompt_file, study_file

from analyses.cli import main
from analyses.studies import StudyFolder
from probes.capture.canary import CANARY
from probes.store import ActivationStore

# Imported by the one process that runs these tests, not by all that list them.
pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="no Ray")

DRAW = random.Random(0)
PROMPTS = [[DRAW.randrange(3, 97) for _ in range(50 + i % 10)] for i in range(240)]
"""Seven batches, so that an actor can be killed between the first and the last."""
CELLS = (
    '[[analyses]]\nanalysis = "voids"\noptions.mode = "measure"\n[[analyses]]\nanalysis = "logit_lens"\n'
    'options.positions = "last"\n'
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a cluster of two nodes with one processor each; a process that has imported all waits for more."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "include_log_monitor": False}
    patient = {"idle_worker_killing_time_threshold_ms": 600_000}
    head = {**node, "include_dashboard": False, "no_monitor": True, "_system_config": patient}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    nodes.add_node(**node)
    ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
    yield nodes.address
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two models and its run by the local engine, in `local`."""
    folder = tmp_path_factory.mktemp("ray")
    model_folder(folder / "model", layers=6)
    prompt_file(folder / "ids.jsonl", PROMPTS)
    study_file(folder, BASE + CELLS)
    assert batch(folder, "local", "--workers", "0") == 0
    return folder


def batch(folder: Path, out: str, *flags: str) -> int:
    places = ["--out", str(folder / out), "--store", str(folder / f"{out}-store")]
    return main(["batch", str(folder / "study.toml"), *places, *flags])


def rows(root: Path) -> list[tuple[bytes, str]]:
    """(sequence, feature) of every row of a store, as often as it is held."""
    with ActivationStore(root)._backing.catalogue.reading() as connection:
        query = "SELECT s.digest, f.feature FROM sequences s JOIN features f ON f.shard = s.shard"
        return list(connection.execute(query).fetchall())


def same_rows(one: Path, other: Path) -> None:
    """Both stores hold the same rows, once each, with the same numbers."""
    left, right = rows(one), rows(other)
    assert len(left) == len(set(left)) == len(right)
    assert set(left) == set(right)
    stores = [ActivationStore(root) for root in (one, other)]
    assert [store.verify().damaged for store in stores] == [(), ()]
    (context,) = stores[0]._backing.catalogue.contexts()
    for feature in sorted({feature for _, feature in left} - {CANARY}):  # a canary has sequences of its own
        ours, theirs = (torch.cat(store.read(json.loads(context), PROMPTS, feature)) for store in stores)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def same_tables(one: Path, other: Path) -> None:
    files = sorted(path.relative_to(one) for path in one.glob("cells/[!.]*/tables/*.parquet"))
    assert files == sorted(path.relative_to(other) for path in other.glob("cells/[!.]*/tables/*.parquet"))
    for file in files:
        pd.testing.assert_frame_equal(pd.read_parquet(one / file), pd.read_parquet(other / file), rtol=1e-4, atol=1e-5)


def capturing() -> list[psutil.Process]:
    """Actors of this process's own cluster that hold a model."""
    children = psutil.Process().children(recursive=True)
    return [process for process in children if "MapWorker" in " ".join(process.cmdline())]


def test_two_nodes_leave_the_rows_and_tables_of_the_local_engine_though_an_actor_is_killed(
    cluster: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The actors of both nodes capture; one is killed after the first shard is there and before the last."""
    shards, killed = folder / "ray-store" / "shards", list[tuple[int, int]]()

    def kill() -> None:
        while not (before := len(list(shards.glob("*/*")))) or not capturing():
            time.sleep(0.01)
        victim = capturing()[0]
        os.kill(victim.pid, signal.SIGKILL)
        killed.append((victim.pid, before))

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    assert batch(folder, "ray", "--engine", "ray", "--address", cluster) == 0
    thread.join(1)
    said = capsys.readouterr()
    assert f"2 cells run, {len(PROMPTS)} forward passes" in said.out
    assert killed
    assert killed[0][1] < len(list(shards.glob("*/*"))), "the actor was killed in the middle"
    assert not psutil.pid_exists(killed[0][0])
    same_rows(folder / "local-store", folder / "ray-store")
    same_tables(folder / "local", folder / "ray")
    index = pd.read_parquet(folder / "ray" / "index.parquet")
    assert list(index["forwards"]) == [0, 0], "the cells found every row that the actors captured"


def test_a_failing_cell_on_the_cluster_stops_no_other(
    cluster: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = BASE.replace('file = "ids.jsonl"', "tokens = [[5, 6], [7, 8, 9]]")
    beyond = '[[prompts]]\nname = "beyond"\ntokens = [[5, 96, 97]]\n'
    study_file(folder, text + beyond + '[[analyses]]\nanalysis = "logit_lens"\n', "fails.toml")
    places = ["--out", str(folder / "fails"), "--store", str(folder / "fails-store")]
    assert main(["batch", str(folder / "fails.toml"), *places, "--engine", "ray", "--address", cluster]) == 3
    assert "1 cell run" in capsys.readouterr().out
    index = pd.read_parquet(folder / "fails" / "index.parquet")
    assert list(index["state"]) == ["done", "failed"]
    assert "token id 97 is outside the vocabulary" in index["error"].iloc[1]
    assert StudyFolder(folder / "fails").why(index["cell"].iloc[1])["kind"] == "PromptError"  # type: ignore[index]


def test_no_cluster_at_an_address_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray.is_initialized", lambda: False)
        patch.setattr("ray.init", _no_cluster)
        assert batch(folder, "nowhere", "--engine", "ray", "--address", "10.0.0.1:6379") == 2
    assert "no Ray cluster at --address '10.0.0.1:6379'" in capsys.readouterr().err


def _no_cluster(**_: object) -> None:
    raise ConnectionError("nobody answers")
