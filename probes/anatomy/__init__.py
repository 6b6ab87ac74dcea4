"""Where each point lives inside a Hugging Face model. Imported by hooks, norms, models and everything above them."""

from probes.anatomy.layouts import Layout, joint_layouts
from probes.anatomy.mapping import ArchitectureMap, map_of
from probes.anatomy.sites import Anatomy, Kind, anatomy_of, linear_weight
from probes.anatomy.views import Site, View

__all__ = [
    "Anatomy", "ArchitectureMap", "Kind", "Layout", "Site", "View", "anatomy_of", "joint_layouts", "linear_weight", "map_of",
]  # fmt: skip
