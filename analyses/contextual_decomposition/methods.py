"""The methods compared, as every figure names and colours them."""

from __future__ import annotations

from analyses.results.theme import COLOURS, MORE

NAMES = {
    "cdt": "CD-T", "ablation": "mean ablation", "attribution": "attribution patching", "direct": "direct attribution",
    "cdt_paper": "CD-T, paper rules", "cdt_faithful": "CD-T, faithful rules", "relp": "RelP", "lrp": "LRP",
    "ig": "integrated gradients", "relp_cp": "RelP, rule cp", "lrp_cp": "LRP, rule cp", "relp_attnlrp": "RelP, rule attnlrp",
    "lrp_attnlrp": "LRP, rule attnlrp", "dynamic": "DynamicLRP", "distance": "distance from the baseline",
    "layer": "layer index", "random": "random order",
}  # fmt: skip
CONTROLS = ("distance", "layer", "random")
"""Scores that know nothing of the metric."""
GREY = "#8c8c8c"
_HUES = (*COLOURS[:6], *MORE, COLOURS[6], COLOURS[7], COLOURS[6], COLOURS[7], COLOURS[4])
COLOUR = dict(zip(NAMES, _HUES, strict=False)) | dict.fromkeys(CONTROLS, GREY)
