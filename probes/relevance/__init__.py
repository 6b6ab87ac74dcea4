"""Relevance from one forward and one backward whose rules are changed: of tokens, heads, MLPs and streams, with its leaks.

Layer-wise relevance propagation written as gradient times input (Achtibat et al. 2024, AttnLRP, arXiv 2402.05602).
Imports anatomy, norms, hooks and blocks; analyses import it.
"""

from probes.relevance.read import Leaks, Relevance, relevance_of
from probes.relevance.rules import RULES, Rule, changed, exceptions

__all__ = ["RULES", "Leaks", "Relevance", "Rule", "changed", "exceptions", "relevance_of"]
