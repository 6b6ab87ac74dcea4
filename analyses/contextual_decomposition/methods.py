"""The methods compared, as every figure names and colours them."""

from __future__ import annotations

from analyses.results.theme import COLOURS

NAMES = {
    "cdt": "CD-T", "ablation": "mean ablation", "attribution": "attribution patching", "direct": "direct attribution",
    "cdt_paper": "CD-T, paper rules", "cdt_faithful": "CD-T, faithful rules",
}  # fmt: skip
COLOUR = dict(zip(NAMES, COLOURS, strict=False))
