"""What the site takes from the code: the reference, the notebooks, options of analyses, and figures with their captions."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any, ClassVar

from docutils.nodes import Node, document
from docutils.parsers.rst.directives.images import Figure
from docutils.statemachine import StringList
from pygments.lexers.special import TextLexer
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

DOCS = Path(__file__).parent
ROOT = DOCS.parent
GENERATED = DOCS / "_generated"
"""Written at every build, and never committed."""

DRAWN = {
    "voids": "usage",
    "logit_lens": "convergence",
    "lenses": "divergence",
    "latent_language": "probability",
    "communication_channels": "components",
    "back_patching": "heatmap",
    "concept_depth": "curves",
    "depth_use": "measured_loss",
    "norm_removal": "freeze_effect",
    "contextual_decomposition": "heads",
    "causal_patching": "curves",
    "passage_use": "curves",
    "layer_programs": "jump_map",
}
"""The figure of each analysis that the gallery shows."""

OUTSIDE = re.compile(r"analyses\.cli|probes\.kernels\.fused_|analyses\..*\.(figures|profiles|tables)")
"""What the reference leaves out: commands document themselves, fused kernels compute what the eager ones say, and what figures,
profiles and tables show stands in their captions and beside the results."""


def modules(package: str) -> dict[str, list[str]]:
    """The public modules of each folder of a package, by the folder's dotted name."""
    folders: dict[str, list[str]] = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        dotted = ".".join(parts)
        if OUTSIDE.match(dotted):
            continue
        if parts[-1] == "__init__":
            folders.setdefault(".".join(parts[:-1]), [])
        elif not any(part.startswith("_") for part in parts):
            folders.setdefault(".".join(parts[:-1]), []).append(dotted)
    return {folder: folders[folder] for folder in sorted(folders)}


def write_changed(path: Path, text: str) -> None:
    """Write a file unless it says so already, so that an unchanged page is not built again."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def write_reference(target: Path) -> None:
    """Write one page for each folder of `probes` and `analyses`."""
    target.mkdir(parents=True, exist_ok=True)
    pages = set()
    for package in ("probes", "analyses"):
        for folder, files in modules(package).items():
            text = f"{folder}\n{'=' * len(folder)}\n\n.. automodule:: {folder}\n   :no-members:\n"
            for dotted in files:
                text += f"\n{dotted}\n{'-' * len(dotted)}\n\n.. automodule:: {dotted}\n"
            write_changed(target / f"{folder}.rst", text)
            pages.add(target / f"{folder}.rst")
    for stale in set(target.glob("*.rst")) - pages:
        stale.unlink()


def copy_notebooks(target: Path) -> None:
    """Copy the notebooks, with their outputs, to where Sphinx reads pages."""
    target.mkdir(parents=True, exist_ok=True)
    sources = sorted((ROOT / "notebooks").glob("*.ipynb"))
    for stale in {path.name for path in target.glob("*.ipynb")} - {path.name for path in sources}:
        (target / stale).unlink()
    for source in sources:
        if not (target / source.name).is_file() or (target / source.name).read_bytes() != source.read_bytes():
            shutil.copyfile(source, target / source.name)


class GalleryFigure(Figure):  # type: ignore[misc]
    """`{gallery} voids`: the picture of that analysis, with the caption that its pages and reports show."""

    required_arguments = 1
    has_content = False

    def run(self) -> list[Node]:
        """The figure's nodes."""
        from analyses.registry import get_analysis

        name = self.arguments[0]
        spec = get_analysis(name).figures[DRAWN[name]]
        self.arguments[0] = f"/gallery/{name}.png"
        self.options["alt"] = spec.title
        self.content = StringList([f"{spec.title}. {spec.caption}"], source=name)
        return super().run()


class Options(SphinxDirective):
    """`{options} voids`: every option of that analysis with its default and what it means."""

    required_arguments = 1
    has_content: ClassVar[bool] = False

    def run(self) -> list[Node]:
        """A list, one item an option."""
        from analyses.registry import get_analysis

        fields = dataclasses.fields(get_analysis(self.arguments[0]))
        lines = [f"- `{field.name}` (`{shown(field.default)}`): {field.metadata['help']}" for field in fields]
        return self.parse_text_to_nodes("\n".join(lines) + "\n")


def shown(default: Any) -> str:
    """A default as one writes it in a study file or in Python, whichever is shorter."""
    if isinstance(default, tuple):
        return ", ".join(str(value) for value in default) or "none"
    return "empty" if default == "" else str(default)


MARKUP = re.compile(r"``.+?``|`([^`]+)`|[*|\\]|_(?=\W|$)", re.DOTALL)


def escape(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text in which only `code` is marked: escape whatever else looks like markup."""

    def escaped(match: re.Match[str]) -> str:
        if match[1]:
            return f"``{' '.join(match[1].split())}``"
        return match[0] if match[0].startswith("``") else "\\" + match[0]

    lines[:] = MARKUP.sub(escaped, "\n".join(lines)).split("\n")
    if what in ("attribute", "data", "property"):
        lines.insert(0, "")  # else napoleon takes what stands before a colon for a type


def unlink_types(app: Sphinx, doctree: document) -> None:
    """Show types as text: to look each of them up takes longer than the rest of the build."""
    for reference in list(doctree.findall(pending_xref)):
        if reference.get("refdomain") == "py":
            reference.replace_self(reference.children)


def write_pages(app: Sphinx) -> None:
    """Write what is generated before Sphinx looks for pages."""
    write_reference(GENERATED / "reference")
    copy_notebooks(GENERATED / "tutorials")


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect the pages and directives to the build."""
    app.add_directive("gallery", GalleryFigure)
    app.add_directive("options", Options)
    for language in ("digests", "hex"):
        app.add_lexer(language, TextLexer)
    app.connect("builder-inited", write_pages)
    app.connect("autodoc-process-docstring", escape, priority=400)
    app.connect("doctree-read", unlink_types)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
