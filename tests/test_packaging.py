"""What is shipped, what depends on what, and what an import costs."""

from __future__ import annotations

import ast
import configparser
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from click.testing import CliRunner
from importlinter.cli import lint_imports_command

ROOT = Path(__file__).parents[1]
OPTIONAL = ("transformer_lens", "nnsight", "streamlit", "ray", "triton", "sklearn", "plotly", "datasets")
"""Heavy or optional; imported by whoever asks for them, never by importing the packages."""


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built by the installed build backend, without network."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return zipfile.ZipFile(next(out.glob("bathyscope-*.whl")))


def about(shipped: zipfile.ZipFile, name: str) -> bytes:
    return shipped.read(next(path for path in shipped.namelist() if path.endswith(f".dist-info/{name}")))


def test_the_wheel_holds_the_two_packages_and_nothing_else(shipped: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in shipped.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"probes", "analyses"}


def test_every_source_file_and_datum_of_the_packages_is_in_the_wheel(shipped: zipfile.ZipFile) -> None:
    kinds = ("*.py", "*.md", "*.jsonl", "*.jinja", "*.html", "*.json", "*.safetensors")
    paths = [path for package in ("probes", "analyses") for kind in kinds for path in (ROOT / package).rglob(kind)]
    expected = {path.relative_to(ROOT).as_posix() for path in paths}
    assert "probes/store/PROTOCOL.md" in expected
    assert expected <= set(shipped.namelist())


def test_the_dashboard_travels_as_data(shipped: zipfile.ZipFile) -> None:
    own = {path.relative_to(ROOT).as_posix() for path in (ROOT / "app").rglob("*.*") if path.suffix != ".pyc"}
    carried = {name.removeprefix("analyses/data/dashboard/") for name in shipped.namelist() if "/dashboard/" in name}
    assert {"app/main.py", "app/server.py"} <= own
    assert carried == own


def test_no_test_no_cache_no_pickle_is_shipped(shipped: zipfile.ZipFile) -> None:
    names = shipped.namelist()
    assert not [
        name for name in names if Path(name).name.startswith("test") or "/tests/" in name or "__pycache__" in name
    ]
    weights = [name for name in names if name.endswith((".pkl", ".pt", ".bin", ".safetensors"))]
    assert [name for name in weights if not name.startswith("probes/planted/data/T")] == []


def test_the_wheel_is_small(shipped: zipfile.ZipFile) -> None:
    assert sum(info.compress_size for info in shipped.infolist()) < 5_000_000


def test_the_command_and_the_extras(shipped: zipfile.ZipFile) -> None:
    scripts = configparser.ConfigParser()
    scripts.read_string(about(shipped, "entry_points.txt").decode())
    assert dict(scripts["console_scripts"]) == {"bathyscope": "analyses.cli:main"}
    metadata = message_from_bytes(about(shipped, "METADATA"))
    extras = {"app", "bench", "datasets", "dev", "docs", "images", "nnsight", "notebooks", "ray", "triton"}
    assert set(metadata.get_all("Provides-Extra") or ()) == extras
    required = [line for line in metadata.get_all("Requires-Dist") or () if "extra ==" not in line]
    assert next(line for line in required if line.startswith("torch")) == "torch<2.14,>=2.8"
    assert not [line for line in required if line.startswith(("streamlit", "ray", "triton", "nnsight"))]
    assert about(shipped, "licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


def test_the_import_contracts_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(lint_imports_command, ["--no-cache"])
    assert done.exit_code == 0, done.output
    assert "0 broken" in done.output


@pytest.mark.parametrize("package", ["probes", "analyses"])
def test_no_package_imports_the_scripts_above_it(package: str) -> None:
    above = {"app", "notebooks", "benchmarks", "tests", "streamlit"} | ({"analyses"} if package == "probes" else set())
    upward = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in (ROOT / package).rglob("*.py")
        for name in imported(path)
        if name.split(".")[0] in above
    }
    assert not upward


def imported(path: Path) -> list[str]:
    """Every module a file imports, at any depth of its code."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return plain + [
        node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level
    ]


def test_the_public_face_of_probes_is_there_without_submodules_and_brings_nothing_optional() -> None:
    code = (
        "from probes import *; from probes import ActivationStore, load_model; "
        "import analyses, probes.anatomy, probes.models, probes.models.backends.native, probes.store, sys; "
        "print(ActivationStore.__module__, load_model.__module__, *{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    store, load, *brought = done.stdout.split()
    assert (store, load) == ("probes.store.store", "probes.models.load")
    assert {"analyses", "probes", "torch"} <= set(brought)
    assert not set(brought) & set(OPTIONAL)
