"""The documentation site: `make docs` builds it, and any warning is an error."""

from __future__ import annotations

from importlib.metadata import version as version_of

project = "Bathyscope"
copyright = "2026, The Bathyscope authors"
version = release = version_of("bathyscope")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
html_theme = "furo"
html_title = "Bathyscope"

# Docstrings write code as `code`, as the rest of the project does.
default_role = "code"
autosummary_generate = True
autosummary_imported_members = False
autodoc_default_options = {"members": True, "undoc-members": True, "show-inheritance": False}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_use_unqualified_type_names = True

# The notebooks are shipped with the outputs of a real run.
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3
# A field named like a builtin (`bytes`) makes every annotation with that builtin ambiguous; links of types are not followed.
suppress_warnings = ["ref.python"]
