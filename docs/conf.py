"""The documentation site: `make docs` builds it, and any warning is an error."""

from __future__ import annotations

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

project = "Bathyscope"
copyright = "2026, The Bathyscope authors"
version = release = version_of("bathyscope")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "generated", "mathml"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "Bathyscope"
html_show_sourcelink = False
html_copy_source = False

# Docstrings write code as `code`, as the rest of the project does.
default_role = "code"
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
# The sidebar names pages and modules; with every function in it each page would be many times as long.
toc_object_entries = False

# The notebooks are shipped with the outputs of a real run.
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
html_math_renderer = "mathml"
# Notebooks carry figures as Plotly's JSON too, beside the pictures that are shown.
suppress_warnings = ["mystnb.unknown_mime_type"]
