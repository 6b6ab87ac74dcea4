"""The rules of CONTRIBUTING.md that a program can check: cheap imports, no circles of files, names that say something."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "pandas", "plotly", "transformers")
"""Packages that take a second or more to import."""
EMPTY_NAMES = {"found", "mine", "wanted", "held", "made", "asked"}
"""Names that say nothing of the thing they stand for."""
REPLACED_NAMES = {
    *(
        "Taps",
        "Gates",
        "handover",
        "Parcel",
        "Outbox",
        "outbox",
        "Resumable",
        "batch_lambda0",
        "honest",
        "heard",
        "Opened",
    ),
    *("Whole", "collide", "special_ends", "include_bos", "task_prompts"),
}
"""Names for which there is one other word everywhere; option files of old runs may still spell them."""


def python(code: str) -> str:
    """Run code in an interpreter of its own; returns what it prints."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("package", ["probes", "analyses"])
def test_importing_a_package_imports_nothing_heavy(package: str) -> None:
    code = f"import sys, {package}; print([name for name in {HEAVY} if name in sys.modules])"
    assert python(code).strip() == "[]"


REFUSED_AT_ONCE = [
    "--bad-option 3",
    "--top-k x",
    "--top-k 0 --model x",
    "--positions none",
    "--model x --prompts nowhere",
    "--model x --prompts pyproject.toml",
    "--model smollm2-135m",
    "--model smollm2-135m --text a --stream-memory 4GiB",
    "--model smollm2-135m --text a --max-memory x",
    "--model smollm2-135m --text a --edit zero",
    "--model smollm2-135m --text a --lens docs",
    "--model smollm2-135m --text a --out docs",
    "--model smollm2-135m --text a --store pyproject.toml",
]


UNKNOWN_MODEL = [
    "run voids --model x --text a",
    "edit --model x --text a",
    "capture --model x --prompts pyproject.toml --points embed",
    "lens fit --model x --out x.lens",
    "lens check x.lens --model x",
    "check x",
]
ILLEGAL = [
    "edit --model smollm2-135m --text a --edit zap",
    "edit --model smollm2-135m --text a --watch 'x",
    "edit --model smollm2-135m --text a --save nowhere/file",
    "capture --model smollm2-135m --prompts pyproject.toml --points embed",
    "lens fit --model smollm2-135m --out docs",
    "lens fit --model smollm2-135m --out x.lens --layers z",
    "lens show docs",
    "lens check docs --model smollm2-135m",
    "lens import nowhere --model smollm2-135m --out x.lens",
    "store import vllm nowhere --of x --layers 1",
    "store import vllm docs --of x --layers z",
    "store export pyproject.toml",
    "batch pyproject.toml",
    "demo --out pyproject.toml",
]


def test_lists_of_commands_and_refusals_import_nothing_heavy() -> None:
    lines = ["--help", "run --help", "app --help", "run viods", "--version"]
    lines += [f"run logit_lens {words}" for words in REFUSED_AT_ONCE]
    lines += [*UNKNOWN_MODEL, *ILLEGAL, "batch nowhere.toml", "report nowhere", "lens --help", "capture --help"]
    code = (
        "import contextlib, io, os, sys\nfrom analyses.cli import main\nos.environ['HF_HUB_OFFLINE'] = '1'\n"
        f"for line in {lines}:\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()): main(line.split())\n"
        f"    print(*[(line, name) for name in {HEAVY} if name in sys.modules], sep='')"
    )
    assert python(code).split() == []


def test_a_store_is_listed_without_tensors_or_figures(tmp_path: Path) -> None:
    code = (
        "import contextlib, io, sys\nfrom analyses.cli import main\n"
        f"with contextlib.redirect_stdout(io.StringIO()): assert main(['store', 'ls', '--store', {str(tmp_path)!r}]) == 0\n"
        "print([name for name in ('torch', 'transformers', 'plotly', 'analyses.base') if name in sys.modules])"
    )
    assert python(code).strip() == "[]"


def test_no_files_import_one_another_in_a_circle() -> None:
    graph = grimp.build_graph("probes", "analyses", "app", cache_dir=None)
    modules = sorted(graph.modules)
    place = {module: i for i, module in enumerate(modules)}
    pairs = [(place[m], place[n]) for m in modules for n in graph.find_modules_directly_imported_by(m)]
    rows, columns = zip(*pairs, strict=True)
    imports = coo_array(([True] * len(pairs), (rows, columns)), shape=(len(modules), len(modules)))
    _, circle_of = connected_components(imports, connection="strong")
    circles: dict[int, list[str]] = {}
    for module, circle in zip(modules, circle_of.tolist(), strict=True):
        circles.setdefault(circle, []).append(module)
    assert [circle for circle in circles.values() if len(circle) > 1] == []


def code_of(path: Path) -> str:
    """Return a file's code; of a notebook, that of its cells without commands of the shell."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return text
    cells = ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    return re.sub(r"^[!%].*$", "", "\n".join(cells), flags=re.MULTILINE)


def names_bound(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and name of every variable, parameter and attribute that a file binds."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.alias) and node.asname:
            yield node.lineno, node.asname
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            yield node.lineno, node.name


@pytest.mark.parametrize("folder", ["probes", "analyses", "app", "benchmarks", "tests", "notebooks", "docs"])
def test_names_say_what_they_hold(folder: str) -> None:
    empty = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sorted([*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.ipynb")])
        for line, name in names_bound(ast.parse(code_of(path)))
        if name.strip("_") in EMPTY_NAMES | REPLACED_NAMES
    ]
    assert empty == []
