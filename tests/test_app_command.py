"""`bathyscope app`: bound to this machine unless told otherwise, and open before torch is imported."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from app_server import serve

from analyses.cli import main
from analyses.cli.app import main_script
from app.live.protocol import SOCKET
from probes.errors import OptionError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines that Streamlit was given, in place of starting it."""
    commands: list[list[str]] = []
    monkeypatch.setattr("analyses.cli.app.serve", commands.append)
    monkeypatch.setenv("BATHYSCOPE_RUNS", "elsewhere")
    monkeypatch.setenv("BATHYSCOPE_STORE", "elsewhere")
    monkeypatch.setenv("BATHYSCOPE_HOSTS", "elsewhere")
    monkeypatch.setenv("BATHYSCOPE_PRELOAD", "elsewhere")
    return commands


def test_it_listens_on_this_machine_only_unless_told_otherwise(started: list[list[str]], tmp_path: Path) -> None:
    assert main(["app", "--no-browser", "--runs", str(tmp_path), "--store", str(tmp_path / "s")]) == 0
    assert main(["app", "--port", "9000", "--address", "0.0.0.0"]) == 0
    first, second = started
    assert first[:2] == ["run", str(ROOT / "app" / "server.py")]
    assert {"--server.address=localhost", "--server.port=8501", "--server.headless=True"} <= set(first)
    assert {"--server.address=0.0.0.0", "--server.port=9000", "--server.headless=False"} <= set(second)
    assert "--browser.gatherUsageStats=false" in first


def test_a_first_start_asks_nothing_and_ctrl_c_ends_it_and_its_worker_without_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # where Streamlit would keep what it asks of somebody new
    monkeypatch.setenv("BROWSER", "true")
    log = tmp_path / "log.txt"
    with serve(tmp_path / "runs", tmp_path / "store", log, "--browser") as running:
        (worker,) = psutil.Process(running.process.pid).children()
        ear = Path(worker.cmdline()[-1], SOCKET)
        for _ in range(600):
            if ear.exists():
                break
            time.sleep(0.1)
        running.process.send_signal(signal.SIGINT)
        assert not psutil.wait_procs([worker, psutil.Process(running.process.pid)], timeout=60)[1]
    said = log.read_text()
    assert f"dashboard: {running.url}" in said
    assert "Email" not in said
    assert "Traceback" not in said
    assert not ear.parent.exists()


def test_browsers_may_ask_for_the_address_and_the_hosts_given(started: list[list[str]], tmp_path: Path) -> None:
    flags = ["app", "--runs", str(tmp_path), "--host", "a.example", "--host", "b"]
    for address, names in (("0.0.0.0", "a.example,b"), ("10.1.2.3", "10.1.2.3,a.example,b")):
        assert main([*flags, "--address", address]) == 0
        assert os.environ["BATHYSCOPE_HOSTS"] == names


def test_a_model_is_loaded_ahead_unless_told_otherwise(started: list[list[str]], tmp_path: Path) -> None:
    for flags, switch in (([], "1"), (["--no-preload"], "0")):
        assert main(["app", "--runs", str(tmp_path), *flags]) == 0
        assert os.environ["BATHYSCOPE_PRELOAD"] == switch


def test_folders_reach_the_dashboard(started: list[list[str]], tmp_path: Path) -> None:
    assert main(["app", "--runs", str(tmp_path), "--store", str(tmp_path / "s")]) == 0
    assert (os.environ["BATHYSCOPE_RUNS"], os.environ["BATHYSCOPE_STORE"]) == (str(tmp_path), str(tmp_path / "s"))


@pytest.mark.parametrize(
    "flags", [["--port", "0"], ["--port", "99999"], ["--port", "x"], ["--runs", __file__], ["--nothing"]]
)
def test_bad_flags_are_refused(started: list[list[str]], flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["app", *flags]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert not started


def test_without_streamlit_it_says_what_to_install(
    started: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "streamlit" else real(name, *rest)
    )
    assert main(["app"]) == 2
    assert "pip install 'bathyscope[app]'" in capsys.readouterr().err


def test_the_dashboard_that_a_wheel_carries_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("analyses.cli.app.__file__", str(tmp_path / "site" / "analyses" / "cli" / "app.py"))
    monkeypatch.setattr("analyses.cli.app.files", lambda package: tmp_path / package)
    with pytest.raises(OptionError, match="not in this installation"):
        main_script()
    carried = tmp_path / "analyses" / "data" / "dashboard" / "app"
    carried.mkdir(parents=True)
    (carried / "server.py").touch()
    assert main_script() == carried / "server.py"


def test_the_first_page_imports_no_torch_and_no_pandas() -> None:
    code = "import sys, app.ui.selector, app.views.live; print([name for name in ('torch', 'pandas') if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_the_command_and_the_home_page_import_no_torch() -> None:
    code = (
        "import sys, analyses.cli, analyses.cli.app, app.views.home, app.offered, app.ui.selector, app.jobs.queue;"
        "app.offered.names(); print('torch' in sys.modules, 'analyses.voids' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
