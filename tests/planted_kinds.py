"""What planted tasks are asked, by the certificates that the package ships: quicker than building the models."""

from __future__ import annotations

from probes.planted.certify.certificate import CHECKS, shipped


def kinds_asked() -> dict[str, set[str]]:
    """Kinds of questions by task and seed, such as `A1@0`."""
    return {
        name.rpartition("-")[0]: {key.partition(":")[0] for key in certificate} & set(CHECKS)
        for name, certificate in shipped().items()
    }
