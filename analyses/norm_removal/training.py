"""Fine-tuning while norms are frozen one after the other, on whatever accelerate finds."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from analyses.norm_removal.checkpoints import Checkpoints
from analyses.norm_removal.schedule import END_OF_TEXT, FIRST, Event, Schedule
from analyses.norm_removal.text import Blocks
from analyses.options import option
from probes.anatomy import Anatomy
from probes.errors import TrainingError
from probes.norms import Norm, NormSite, Switches
from probes.progress import QUIET, Progress

DECAY_ROWS = 32
"""Sequences over which a running scale keeps nine tenths of its old value, as released."""


@dataclass(frozen=True)
class Setting:
    """The options of `NormRemoval` that say how a schedule is carried out; it has them among its own."""

    batch: int = option(16, "Sequences of a training step, over all processes.", low=1)
    micro_batch: int = option(4, "Sequences of a forward pass in training.", low=1)
    special_first: bool = option(True, "Keep a scale of its own for position 0 until the schedule withdraws it.")
    eot_scale: bool = option(
        True,
        "Keep position 0's scale for values at end-of-text tokens until it is withdrawn.",
        aliases=("special_ends",),
    )
    seed: int = option(0, "Seed of the training order, random neurons and intervals.")
    checkpoint_every: int = option(50, "Training steps between checkpoints.", low=1)
    checkpoints: str = option(
        "runs/norm_removal_checkpoints", "Folder of the checkpoints that a broken-off run goes on from."
    )


@dataclass(frozen=True, eq=False)
class Trained:
    """A model after its training."""

    anatomy: Anatomy
    """Of a copy of the model; the module it names holds the trained weights, its norms unswitched."""
    switches: Switches
    history: list[dict[str, Any]]
    """One entry a step: step, event, loss, aux, learning_rate, grad_norm, frozen."""
    checkpoint: Path | None
    """The newest checkpoint."""
    sequences: int
    """How many it was trained on now, steps of an earlier run left out."""


def copy_of(anatomy: Anatomy) -> Anatomy:
    """Return the anatomy of a copy of its module, with weights of its own."""
    module = copy.deepcopy(anatomy.map.module)
    return replace(anatomy, map=replace(anatomy.map, module=module, _paths={}))


def train(
    anatomy: Anatomy, blocks: Blocks, schedule: Schedule, setting: Setting, progress: Progress = QUIET
) -> Trained:
    """Train a copy of the model by the schedule, going on from the newest checkpoint of the same training.

    On one machine and one thread the same arguments give the same weights bit for bit, interrupted or not.

    Raises:
        OptionError: the schedule names a site that the model does not have.
        TrainingError: the loss is no longer a number; names the step and the checkpoint that is left.
    """
    run = _Run(copy_of(anatomy), blocks, schedule, setting)
    progress.start(schedule.steps, "training step")
    progress.advance(run.step)
    before = run.step
    if run.step:
        progress.note(f"{schedule.name}: goes on after step {run.step} from {run.checkpoint}")
    with run.switches.attached():
        while run.step < schedule.steps:
            run.take(progress)
    run.module.eval()
    return Trained(run.anatomy, run.switches, run.history, run.checkpoint, (run.step - before) * setting.batch)


class _Run:
    """A training in progress."""

    def __init__(self, anatomy: Anatomy, blocks: Blocks, schedule: Schedule, setting: Setting) -> None:
        from accelerate import Accelerator

        self.anatomy, self.blocks, self.schedule, self.setting = anatomy, blocks, schedule, setting
        self.module: nn.Module = anatomy.map.module.train()
        for parameter in self.module.parameters():
            parameter.requires_grad_(True)
        on_cpu = next(self.module.parameters()).device.type == "cpu"
        self.accelerator = Accelerator(cpu=on_cpu, mixed_precision="no" if on_cpu else "bf16")
        momentum = 0.9 ** (setting.micro_batch / DECAY_ROWS)
        self.switches = Switches(anatomy, blocks.end_of_text, momentum)
        self.events = schedule.events(self.switches.sites)
        self.spread = _Spread()
        if schedule.aux_weight:
            final = next(n for n in self.switches.norms if NormSite("final") in n.sites)
            self.switches.watches[final.path] = self.spread.see
        self.optimizer = torch.optim.AdamW(_groups(self.module, schedule.weight_decay), betas=(0.9, 0.95))
        torch.manual_seed(setting.seed)
        name = f"{schedule.name}-{_digest(self.module, blocks, schedule, setting)}"
        self.checkpoints = Checkpoints(Path(setting.checkpoints) / name) if setting.checkpoints else None
        done: tuple[int, list[Any]] = (0, [])
        if self.checkpoints:
            done = self.checkpoints.load(self.module, self.optimizer, self.switches)
        self.step, self.history = done
        self.wrapped, self.optimizer = self.accelerator.prepare(self.module, self.optimizer)

    @property
    def checkpoint(self) -> Path | None:
        steps = self.checkpoints.steps() if self.checkpoints else []
        return self.checkpoints.path(steps[-1]) if self.checkpoints and steps else None

    def take(self, progress: Progress) -> None:
        """Take one step: its events, its gradient, its update and, when due, a checkpoint."""
        names = []
        for event in (e for e in self.events if e.step == self.step):
            self._happen(event)
            names.append(event.name)
        rate = self.schedule.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, aux = self._gradient()
        norm = float(self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.schedule.clip or math.inf))
        self._check(loss, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._together()
        event_names = " ".join(names)
        frozen = len(self.switches.on)
        self.history.append(
            {"step": self.step, "event": event_names, "loss": loss, "aux": aux, "learning_rate": rate, "grad_norm": norm, "frozen": frozen}
        )  # fmt: skip
        self.step += 1
        self._report(event_names, loss, progress)
        if self.checkpoints and (self.step % self.setting.checkpoint_every == 0 or self.step == self.schedule.steps):
            if self.accelerator.is_main_process:
                self.checkpoints.save(self.step, self.module, self.optimizer, self.switches, self.history)
            self.accelerator.wait_for_everyone()

    def _happen(self, event: Event) -> None:
        on = self.switches.on
        if event.name == END_OF_TEXT:
            on.update({site: replace(scale, ends_as_first=False) for site, scale in on.items()})
        elif event.name == FIRST:
            on.update({site: replace(scale, first=None, ends_as_first=False) for site, scale in on.items()})
        else:
            first_left = any(e.name == FIRST and e.step > self.step for e in self.events)
            ends_left = any(e.name == END_OF_TEXT and e.step > self.step for e in self.events)
            for site in event.sites:
                norm = self.switches.norm(site)
                shared = next((on[s] for s in norm.sites if s in on), None)
                scale = shared or self.switches.measured(site, first=self.setting.special_first and first_left)
                ends = site.kind == "v" and self.setting.eot_scale and ends_left and scale.first is not None
                on[site] = replace(scale, ends_as_first=True) if ends else scale
        # Sites of one norm with the same numbers share one object, so that its output is made once.
        for norm in self.switches.norms:
            shared_by: dict[tuple[Any, ...], Any] = {}
            for site in (s for s in norm.sites if s in on):
                key = (on[site].value, on[site].first, on[site].ends_as_first)
                on[site] = shared_by.setdefault(key, on[site])

    def _gradient(self) -> tuple[float, float]:
        """Accumulate the gradient of one step's batch; return (loss, penalty) averaged over it and over all processes."""
        rows = self.blocks.batch(self.step, self.setting.batch, self.setting.seed)
        rows = rows[self.accelerator.process_index :: self.accelerator.num_processes].to(self.accelerator.device)
        parts = torch.split(rows, self.setting.micro_batch)
        losses, penalties = [], []
        for index, part in enumerate(parts):
            share = len(part) / len(rows)
            waiting = index < len(parts) - 1
            with self.accelerator.no_sync(self.wrapped) if waiting else nullcontext():
                ce = next_token_loss(self.wrapped(input_ids=part, use_cache=False).logits, part).mean()
                aux = self.spread.penalty(self.switches, part) if self.schedule.aux_weight else ce.new_zeros(())
                self.accelerator.backward((ce + self.schedule.aux_weight * aux) * share)
            losses.append(ce.detach() * share)
            penalties.append(aux.detach() * share)
        both = torch.stack([torch.stack(losses).sum(), torch.stack(penalties).sum()])
        loss, aux_sum = self.accelerator.reduce(both, reduction="mean").tolist()
        return loss, aux_sum

    def _check(self, loss: float, grad_norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return
        last = next((e.name for e in reversed(self.events) if e.step <= self.step), "no event")
        kept = f"the last good checkpoint is {self.checkpoint}" if self.checkpoint else "no checkpoint was kept"
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient is {grad_norm}"
        raise TrainingError(
            f"{self.schedule.name}: {what} at step {self.step} (last event: {last}), so training stopped; {kept}. "
            "Lower the learning rate or widen the gaps of the schedule"
        )

    def _together(self) -> None:
        """Average running scales over processes, so that all freeze at the same numbers."""
        if self.accelerator.num_processes == 1:
            return
        running = list(self.switches.running.values())
        own = torch.tensor([[r.value, r.first] for r in running], dtype=torch.float64, device=self.accelerator.device)
        for r, (value, first) in zip(running, self.accelerator.reduce(own, reduction="mean").tolist(), strict=True):
            r.value, r.first = value, first

    def _report(self, event: str, loss: float, progress: Progress) -> None:
        if self.accelerator.is_main_process:
            if event:
                progress.note(f"{self.schedule.name}, step {self.step - 1}: {event}; loss {loss:.4f}")
            progress.advance()


class _Spread:
    """The auxiliary loss: how far the scales of the final norm's input are from their mean over ordinary positions.

    Baroni et al. 2025: mean over all positions of (sigma - target)², target the detached mean over ordinary ones.
    """

    def __init__(self) -> None:
        self._scale: Tensor | None = None

    def see(self, _: Norm, __: Tensor, scale: Tensor) -> None:
        self._scale = scale

    def penalty(self, switches: Switches, tokens: Tensor) -> Tensor:
        assert self._scale is not None
        return spread(self._scale, switches.ordinary(tokens))


def spread(scale: Float[Tensor, "batch pos"], ordinary: Bool[Tensor, "batch pos"]) -> Float[Tensor, ""]:
    """Return mean((scale - target)²) with target the detached mean of the scale at `ordinary` positions."""
    return (scale - scale[ordinary].mean().detach()).square().mean()


def next_token_loss(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos-1"]:
    """Return the cross-entropy of each position's next token, nats."""
    flat = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    return flat.view(len(tokens), -1)


def _groups(module: nn.Module, weight_decay: float) -> Sequence[dict[str, Any]]:
    """Group parameters: matrices decay, gains and biases do not."""
    parameters = list(module.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def _digest(module: nn.Module, blocks: Blocks, schedule: Schedule, setting: Setting) -> str:
    """Digest what decides a training, so that only the same one goes on from its checkpoints."""
    digest = xxhash.xxh3_128()
    names = [field.name for field in fields(Setting) if not field.name.startswith("checkpoint")]
    options = {name: getattr(setting, name) for name in names}
    digest.update(repr((asdict(schedule), options)).encode())
    for tensor in (*module.state_dict().values(), blocks.training):
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return str(digest.hexdigest()[:12])
