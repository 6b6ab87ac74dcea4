"""Capturing rows into the store: needs, the plan of what is missing, the forwards, reading back. Imported by analyses."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
