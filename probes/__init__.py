"""Instruments: everything that touches a model or an activation. They know no analysis and no screen."""

import lazy_loader

from probes.idle_threads import wait_briefly

wait_briefly()

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
