"""Exhaustive intervention on a planted model by plain forwards and plain hooks; uses no code that is scored by it.

Imported by `probes.planted.registry`.
"""
