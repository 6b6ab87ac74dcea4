"""Instruments: everything that touches a model or an activation."""
