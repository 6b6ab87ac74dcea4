"""`bathyscope app`: the dashboard in a browser. Imports nothing heavy, so that it opens at once."""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from analyses.cli.console import say
from probes.cache_folder import expanded
from probes.errors import OptionError

LOCAL = "localhost"
EVERYWHERE = ("0.0.0.0", "::")
"""Addresses that listen and are nobody's name."""
SETTINGS = {
    "browser.gatherUsageStats": "false",
    "client.toolbarMode": "minimal",
    "runner.magicEnabled": "false",
    "server.fileWatcherType": "none",
    "server.maxUploadSize": "20",
    "server.showEmailPrompt": "false",
    "theme.light.primaryColor": "#0072B2",
    "theme.dark.primaryColor": "#1F83C4",
}
"""Options of Streamlit: nothing is sent home or asked at a first start, uploads are small, colours are those of the figures."""


def main_script() -> Path:
    """The dashboard's entry: that of the source checkout, else the one that the wheel carries as data.

    Raises:
        OptionError: neither is there.
    """
    checkout = Path(__file__).resolve().parents[2]
    carried = Path(str(files("analyses").joinpath("data", "dashboard")))
    for root in (checkout, carried):
        if (root / "app" / "server.py").is_file():
            return root / "app" / "server.py"
    raise OptionError("the dashboard is not in this installation: install the wheel, or run from a source checkout")


def open_app(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8501,
    address: Annotated[
        str, typer.Option(help="Address to listen on. Anyone who reaches it can run models and delete runs here.")
    ] = LOCAL,
    host: Annotated[
        list[str] | None,
        typer.Option(
            "--host",
            help="A further name that browsers may ask for, as behind a proxy; may be repeated. Other names are refused.",
        ),
    ] = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open a browser window.")] = True,
    runs: Annotated[Path, typer.Option("--runs", help="Folder of saved runs.")] = Path("runs"),
    store: Annotated[
        Path | None, typer.Option("--store", help="The activation store's folder; default in the user cache.")
    ] = None,
    preload: Annotated[
        bool,
        typer.Option("--preload/--no-preload", help="Load the model of the first example at once, where it is here."),
    ] = True,
) -> None:
    """Open the dashboard on the saved runs of a folder; no analysis runs by itself."""
    if importlib.util.find_spec("streamlit") is None:
        raise OptionError("the dashboard needs Streamlit: pip install 'bathyscope[app]'")
    if runs.is_file():
        raise OptionError(f"--runs {str(runs)!r} is a file: give a folder")
    script, names = main_script(), _names(address, host or [])
    os.environ["BATHYSCOPE_RUNS"] = str(expanded(runs).absolute())
    os.environ["BATHYSCOPE_HOSTS"] = ",".join(names)
    os.environ["BATHYSCOPE_PRELOAD"] = str(int(preload))
    if store is not None:
        os.environ["BATHYSCOPE_STORE"] = str(expanded(store).absolute())
    settings = {**SETTINGS, "server.address": address, "server.port": str(port), "server.headless": str(not browser)}
    shown = f"[{address}]" if ":" in address else address
    say(f"dashboard: http://{shown}:{port}   runs: {os.environ['BATHYSCOPE_RUNS']}   Ctrl-C ends it")
    serve(["run", str(script), *(f"--{name}={value}" for name, value in settings.items())])


def _names(address: str, given: list[str]) -> list[str]:
    """What browsers may call this machine, besides localhost.

    Raises:
        OptionError: something that is no name, such as a whole URL.
    """
    for name in given:
        if not name or set(name) & set("/,*@ ") or name.count(":") == 1:
            raise OptionError(
                f"--host {name!r}: give a bare name or address, such as lab.example.org, without port or path"
            )
    return [*([] if address in EVERYWHERE else [address]), *given]


def serve(args: list[str]) -> None:
    """Run Streamlit in this process, until it is ended; the process that holds models is started first."""
    sys.path.insert(0, str(Path(args[1]).parents[1]))
    import_module("app.jobs.process").begin()
    sys.argv = ["streamlit", *args]
    runpy.run_module("streamlit", run_name="__main__", alter_sys=True)
