"""The dashboard as a user starts it, on a free port, and the browser that opens it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CHROMIUM = Path(os.environ.get("CHROMIUM") or "/usr/bin/chromium")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip


@dataclass(frozen=True)
class Server:
    """A running dashboard."""

    url: str
    runs: Path
    process: subprocess.Popen[bytes]

    def memory(self) -> int:
        """Resident bytes of the dashboard's process, without its worker."""
        import psutil

        return int(psutil.Process(self.process.pid).memory_info().rss)


@contextmanager
def serve(runs: Path, store: Path, log: Path, *more: str) -> Iterator[Server]:
    """`bathyscope app` with `more` flags, on a free port, until the block ends; comes back once it answers.

    No model is loaded ahead, unless `more` says `--preload`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import sys; from analyses.cli import main; sys.exit(main())"
    flags = [
        "app",
        "--port",
        str(port),
        "--no-browser",
        "--no-preload",
        "--runs",
        str(runs),
        "--store",
        str(store),
        *more,
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *flags], stdout=out, stderr=out, env=env, cwd=log.parent
        )
        try:
            _wait(f"http://localhost:{port}/_stcore/health", process, log)
            yield Server(f"http://localhost:{port}", runs, process)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(url, timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise AssertionError(f"the dashboard did not start: {log.read_text()[-2000:]}")


@contextmanager
def chromium() -> Iterator[Any]:
    """Headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()
