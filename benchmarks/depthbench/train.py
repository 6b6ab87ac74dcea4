"""Trains the models of the trained tier and ships them with their certificates: `python -m benchmarks.depthbench.train`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from safetensors.torch import save_file

from benchmarks.depthbench.aligned_models import interchanged, unused_concept
from benchmarks.depthbench.hop_models import isolated_hops, ordered_hops
from benchmarks.depthbench.models import Trained, facts, induction, redrawn_labels
from benchmarks.depthbench.settle import questions_of, settled
from probes.planted import trained_prompts as data
from probes.planted.certify.certificate import certify
from probes.planted.making import accuracy
from probes.planted.record import Record
from probes.planted.trained import DATA, SEEDS, TRAINED, description, load_weights, task_of

TRAININGS: Mapping[str, Callable[[int], Trained]] = {
    "T1": induction,
    "T2": facts,
    "T3": isolated_hops,
    "T4": ordered_hops,
    "T5": lambda seed: interchanged(False, seed),
    "T6": lambda seed: interchanged(True, seed),
    "T7": unused_concept,
    "T8": redrawn_labels,
}
FACT_CONCEPTS = {"attribute": data.ANSWERS}


def ship(name: str) -> Record:
    """Train one model, write its weights in half precision, and certify what was written."""
    began = time.process_time()
    trained = TRAININGS[name](SEEDS[name])
    seconds = time.process_time() - began
    state = {key: value.half() for key, value in trained.module.state_dict().items() if value.abs().max() > 0}
    save_file(state, DATA / f"{name}.safetensors")
    training = {
        "seed": SEEDS[name], "steps": trained.steps, "seconds": round(seconds),
        "losses": {key: round(value, 4) for key, value in trained.losses.items()},
    }  # fmt: skip
    record = certified_record(name, training)
    (DATA / f"{name}.json").write_text(record.to_json() + "\n", encoding="utf-8")
    return record


def certified_record(name: str, training: Mapping[str, object]) -> Record:
    """The record of shipped weights: every question whose truth is unambiguous."""
    module = load_weights(name)
    record = Record(
        name, "trained", 0, {**description(name, module), "training": training},
        _positions(name), _concepts(name), {}, (),
    )  # fmt: skip
    task = task_of(record, module)
    candidates = questions_of(name, record.model["layers"], record.model["heads"])
    answered = [settled(task, question) for question in candidates]
    dropped = [question.key for question, answer in zip(candidates, answered, strict=True) if answer is None]
    record = replace(
        record, questions=tuple(question for question in answered if question), accuracy=accuracy(module, task.examples)
    )
    certificate = certify(replace(task, record=record))
    return replace(record, certificate={**certificate, "dropped": dropped})


def _positions(name: str) -> dict[str, int]:
    if name == "T1":
        successor = data.CUT - data.PERIOD
        return {"before": successor - 1, "successor": successor, "ask": -1}
    return {"ask": -1} if name in ("T3", "T4") else dict(data.FACT_POSITIONS)


def _concepts(name: str) -> dict[str, int]:
    if name == "T1":
        return {}
    if name in ("T3", "T4"):
        return {"bridge": 8, "answer": data.ANSWERS}
    return FACT_CONCEPTS | ({"unused": data.ANSWERS} if name == "T7" else {})


def main(arguments: list[str] | None = None) -> int:
    """Train and ship the models named, all unless told."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="T1…T8")
    parser.add_argument("--recertify", action="store_true", help="keep the shipped weights, measure their truths again")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name in options.names or TRAINED:
        if options.recertify:
            training = json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))["model"]["training"]
            record = certified_record(name, training)
            (DATA / f"{name}.json").write_text(record.to_json() + "\n", encoding="utf-8")
        else:
            record = ship(name)
        truths = {question.key: question.truth for question in record.questions}
        print(name, record.model["training"], record.accuracy, truths, "dropped:", record.certificate["dropped"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
