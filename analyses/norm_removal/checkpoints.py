"""Checkpoints of a training: whole or absent, without pickle, and enough to go on bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from probes.errors import TrainingError
from probes.norms import NormSite, Scale, Switches, choose

KEPT = 2
"""Checkpoints that stay; older ones go when a new one is whole."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one training in a folder of its own."""

    folder: Path

    def steps(self) -> list[int]:
        """Return the steps after which there is a checkpoint, in order."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-*"))

    def path(self, step: int) -> Path:
        """Return the path of the checkpoint after `step` steps."""
        return self.folder / f"step-{step:07d}"

    def save(self, step: int, module: nn.Module, optimizer: Optimizer, switches: Switches, history: list[Any]) -> Path:
        """Write a checkpoint, and then remove all but the newest `KEPT`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=self.folder))
        save_file(_tensors(module), draft / "model.safetensors")
        save_file(_optimizer_tensors(optimizer), draft / "optimizer.safetensors")
        record = {"step": step, "history": history, **_switch_record(switches)}
        (draft / "state.json").write_text(json.dumps(record), encoding="utf-8")
        for file in draft.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        shutil.rmtree(self.path(step), ignore_errors=True)
        os.replace(draft, self.path(step))
        for old in self.steps()[:-KEPT]:
            shutil.rmtree(self.path(old), ignore_errors=True)
        return self.path(step)

    def load(self, module: nn.Module, optimizer: Optimizer, switches: Switches) -> tuple[int, list[Any]]:
        """Put the newest checkpoint into all three; return (steps done, history), or (0, []) where there is none.

        Raises:
            TrainingError: the checkpoint is damaged, or of another model.
        """
        steps = self.steps()
        if not steps:
            return 0, []
        path = self.path(steps[-1])
        try:
            record = json.loads((path / "state.json").read_text(encoding="utf-8"))
            _restore(module, load_file(path / "model.safetensors"))
            _restore_optimizer(optimizer, load_file(path / "optimizer.safetensors"))
            _restore_switches(switches, record)
        except Exception as error:  # safetensors, json and torch each raise their own for a damaged file.
            raise TrainingError(
                f"checkpoint {path} cannot be read ({error}); remove it to go on from the one before"
            ) from None
        return int(record["step"]), list(record["history"])


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    # Named parameters come once each, so a tied unembedding is not written twice.
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}


@torch.no_grad()
def _restore(module: nn.Module, values: dict[str, Tensor]) -> None:
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if set(named) != set(values):
        raise ValueError("its weights are those of another model")
    for name, tensor in named.items():
        tensor.copy_(values[name])


def _optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    tensors = {
        f"{index}.{name}": torch.as_tensor(value).detach().cpu().contiguous()
        for index, values in state.items()
        for name, value in values.items()
    }
    tensors["random"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random_cuda"] = torch.cuda.get_rng_state()
    return tensors


def _restore_optimizer(optimizer: Optimizer, values: dict[str, Tensor]) -> None:
    torch.set_rng_state(values.pop("random"))
    cuda = values.pop("random_cuda", None)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in values.items():
        index, name = key.split(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _switch_record(switches: Switches) -> dict[str, Any]:
    return {
        "running": {path: [r.value, r.first] for path, r in switches.running.items()},
        "frozen": {str(site): [s.value, s.first, s.ends_as_first] for site, s in switches.on.items()},
    }


def _restore_switches(switches: Switches, record: dict[str, Any]) -> None:
    for path, (value, first) in record["running"].items():
        switches.running[path].value, switches.running[path].first = value, first
    switches.on.clear()
    shared: dict[tuple[str, Any], Scale] = {}
    for name, values in record["frozen"].items():
        site: NormSite = choose(switches.sites, [name])[0]
        # Sites of one norm share one scale, as they did when it was saved.
        key = (switches.norm(site).path, tuple(values))
        switches.on[site] = shared.setdefault(key, Scale(*values))
