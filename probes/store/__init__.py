"""The activation store: safetensors shards named by content, and a catalogue rebuilt from them; knows no model and no point."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
