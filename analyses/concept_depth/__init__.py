"""Concept depth: from which layer on a linear probe can tell the two classes of a concept apart."""

from analyses.concept_depth.analysis import ConceptDepth

__all__ = ["ConceptDepth"]
