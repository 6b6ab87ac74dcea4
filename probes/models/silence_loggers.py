"""Loading without log noise: the libraries' messages and progress bars off for a while, then as they were."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

_LOGGERS = ("transformers", "huggingface_hub", "accelerate", "gguf", "httpx", "httpx2")
_ONE_AT_A_TIME = threading.RLock()
"""The settings are the process's; two threads saving and restoring at once would leave them off."""


@contextmanager
def silence_loggers() -> Iterator[None]:
    """Silence the messages, warnings and progress bars of transformers and the hub inside the context; restore them after."""
    with _ONE_AT_A_TIME, warnings.catch_warnings(), ExitStack() as restore:
        warnings.simplefilter("ignore")
        restore.callback(_bars_off())
        restore.callback(_gguf_bar_off())
        for name in _LOGGERS:
            logger = logging.getLogger(name)
            restore.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        yield


def _bars_off() -> Callable[[], None]:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as library

    bars, hub_bars = library.is_progress_bar_enabled(), not are_progress_bars_disabled()

    def restore() -> None:
        if bars:
            library.enable_progress_bar()
        # Switching the library's bars switches the hub's as well, so the hub's come last.
        (enable_progress_bars if hub_bars else disable_progress_bars)()

    library.disable_progress_bar()
    return restore


def _gguf_bar_off() -> Callable[[], None]:
    """The bar of GGUF dequantisation listens to no setting of the library, so its name is swapped."""
    import transformers.modeling_gguf_pytorch_utils as module

    original = getattr(module, "tqdm", None)

    def silent(items: Any, **_: Any) -> Any:
        return items

    def restore() -> None:
        module.tqdm = original

    module.tqdm = silent
    return restore
