"""Small models whose answer is known by construction and certified by exhaustive intervention; knows no paper.

Imported by `probes.models.sources`, `analyses.ground_truth` and the tests.
"""

from probes.planted.registry import task, tasks

__all__ = ["task", "tasks"]
