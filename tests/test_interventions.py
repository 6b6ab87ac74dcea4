"""What a dry run says of each analysis is what its run does."""

from __future__ import annotations

from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from fake_tokenizer import FakeTokenizer
from families import make
from small import SMALL
from tiny import PROMPTS, native
from torch import Tensor

from analyses.base import Analysis
from analyses.communication_channels import CommunicationChannels
from analyses.depth_use import DepthUse
from analyses.norm_removal import NormRemoval
from analyses.results.result import Result
from analyses.running.model_spec import ModelSpec
from analyses.running.runner import dry_run
from analyses.tasks import ioi, laundry_list
from probes.capture.run import plan_capture
from probes.errors import OptionError
from probes.models import Model, weights_digest
from probes.models.backends.native import NativeModel
from probes.progress import Progress
from probes.prompts import PromptLine
from probes.store import ActivationStore

LONG = [tuple(range(3 + i, 23 + i)) for i in range(3)]
DEPTH = {"parts": ("block", "mlp"), "gradient_steps": 3, "skip_prompts": 2, "bits": (8, 4), "windows": (2, 3)}
MORE: list[Analysis] = [
    replace(SMALL["voids"][0], mode="skip"),
    replace(SMALL["voids"][0], mode="skip", alpha=(0.5, 0.9), max_new_tokens=2, response_from="gated_model"),
    replace(SMALL["concept_depth"][0], causal_layers=1),
    NormRemoval(neurons=2),
    NormRemoval(neurons=0, sinks=False, stride=2, scale_source="per_position", first_token=True),
    replace(SMALL["contextual_decomposition"][0], ablation=False, search_steps=0),
    replace(SMALL["contextual_decomposition"][0], random_circuits=2, search_steps=0),
    replace(SMALL["contextual_decomposition"][0], random_circuits=2, shares=(0.2, 1.0), other_preset=True, stride=2),
    replace(SMALL["contextual_decomposition"][0], random_circuits=2, prune=True, granularity="position"),
    replace(SMALL["contextual_decomposition"][0], prune=True, ablation=False),
    replace(
        SMALL["layer_programs"][0],
        maps=("pairs",),
        search=("random", "exhaustive", "beam", "mcts"),
        budget=12,
        splits=2,
    ),
    replace(SMALL["layer_programs"][0], maps=("skips",), stride=2),
    replace(SMALL["layer_programs"][0], stride=2, swap_widths=(1, 2), swap_reach=2, group="mean"),
]  # type: ignore[type-var]
RUNS = [
    *SMALL.values(),
    *((analysis, SMALL[analysis.name][1]) for analysis in MORE),
    (DepthUse(**DEPTH, greedy_steps=2, drop_blocks=2, target_model="self"), [*LONG, (5,), (6, 7)]),
    (DepthUse(**DEPTH, greedy_steps=3, greedy_distance="angular", skip_rule="everywhere", first_token=True), LONG),
    (DepthUse(**DEPTH, stride=2, split_positions=2, erasure_prompts=1, gradient_prompts=2), [(5, 6, 7), *LONG]),
    (DepthUse(**DEPTH, layers=(1,), drop_blocks=0, greedy_steps=9), LONG),
    (DepthUse(**DEPTH, layers=(1,), generate_prompts=2, generate_tokens=3, generate_parts=("attn", "mlp")), LONG),
    (DepthUse(**DEPTH, stride=2, window_pairs=True, frontier_points=2, greedy_steps=0), LONG),
]


class Phases(Progress):
    """Remembers each phase's total and what was reported of it."""

    def __init__(self) -> None:
        self.seen: list[list[Any]] = []

    def start(self, total: int, what: str) -> None:
        self.seen.append([what, total, 0])

    def advance(self, done: int = 1) -> None:
        self.seen[-1][2] += done


@pytest.mark.parametrize(("analysis", "prompts"), RUNS, ids=lambda value: getattr(value, "name", ""))
def test_an_analysis_says_what_its_run_will_do(analysis: Analysis, prompts: list[Any], store: ActivationStore) -> None:
    check(analysis, native(), prompts, store)


def check(analysis: Analysis, model: Model, prompts: list[Any], store: ActivationStore) -> list[str]:
    """What is foretold is what is run: changed forwards, the total of each phase, use of the store. Returns the phases."""
    collected = analysis.collect(model, prompts)
    planned = plan_capture(model, [prompt.tokens for prompt in collected], analysis.needs(model), store).forwards
    passed: list[int] = []
    last = model.module.get_submodule("model.layers.2")
    plain = type(last).forward

    @wraps(plain)  # a hook of the test's own would be refused
    def forward(block: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        passed.extend([len(hidden)] if block is last else [])
        return plain(block, hidden, *args, **kwargs)

    foretold, progress = analysis.interventions(model, collected), Phases()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(last), "forward", forward)
        result = analysis.run(model, prompts, store=store, progress=progress)
    done = result.provenance["counts"]["intervention_forwards"]
    assert done == foretold.total if foretold.exact else 0 < done <= foretold.total
    assert (sum(passed) > planned) == (done > 0)
    assert [total for _, total, _ in progress.seen] == [ended for _, _, ended in progress.seen], progress.seen
    reads = analysis.reads == "store"
    assert bool(analysis.needs(model)) == reads
    assert any(store.root.rglob("*.safetensors")) == reads
    assert sum("Nothing was read from the activation store" in note for note in result.notes) == (not reads)
    return [what for what, _, _ in progress.seen]


@pytest.mark.parametrize("name", ["logit_lens", "contextual_decomposition"])
def test_a_dry_run_counts_the_forwards_of_interventions(name: str, store: ActivationStore) -> None:
    analysis, prompts = SMALL[name]
    lines = [PromptLine(f"line {i}", None, prompt.tokens, prompt.fields) for i, prompt in enumerate(prompts)]
    said = "\n".join(dry_run(ModelSpec("tiny"), analysis, lines, store, model=native()))
    assert ("forwards with interventions (" in said) == (name != "logit_lens")


def worded() -> NativeModel:
    """A random model whose tokenizer has the names and things of the tasks as one token each."""
    words = [f"▁{word}" for word in (*ioi.NAMES, *laundry_list.ITEMS)]
    tokenizer = FakeTokenizer([*words, *ioi.NAMES])
    module = make("llama", vocab_size=len(tokenizer.pieces), max_position_embeddings=512)
    return NativeModel(module, tokenizer, ref="worded", weights=weights_digest(module))


TASK = {"n_prompts": 3, "random_directions": 4, "laundry_items": (2, 3), "laundry_prompts": 1, "steer_steps": 2}


@pytest.mark.parametrize(
    "options", [{}, {"stride": 3, "edit_pairs": 1}, {"heads": ("0.1", "1.0"), "laundry_prompts": 0}]
)
def test_a_task_says_how_many_forwards_its_edits_take(options: dict[str, Any], store: ActivationStore) -> None:
    phases = check(CommunicationChannels(**{**TASK, **options}), worded(), [], store)
    listed = ["steered list"] if options.get("laundry_prompts", 1) else []
    assert phases == ["prompt", "edited channel", *listed]


def test_edits_of_chosen_heads_and_components_alone(store: ActivationStore) -> None:
    analysis = CommunicationChannels(**{**TASK, "heads": ("0.1",), "stride": 3, "laundry_prompts": 0})
    tables = analysis.run(worded(), store=store).tables
    assert set(zip(tables["edits"]["source_layer"], tables["edits"]["source_head"], strict=True)) == {(0, 1)}
    zeroed = set(tables["edits"].query("edit == 'zero'")["component"])
    d_head = worded().shape.d_head
    assert zeroed == {*range(0, d_head, 3), *tables["rank"]["component"]}


@pytest.mark.parametrize("heads", [("4",), ("a.b",), ("2.0",), ("0.99",), ("-1.0",)])
def test_a_head_that_cannot_write_is_refused(heads: tuple[str, ...], store: ActivationStore) -> None:
    with pytest.raises(OptionError, match="option heads"):
        CommunicationChannels(**TASK, heads=heads).run(worded(), store=store)


@pytest.mark.parametrize(
    "analysis",
    [
        DepthUse(gradient_steps=2, greedy_steps=1, drop_blocks=1, layers=(2, 0)),
        NormRemoval(neurons=0, layers=(2, 0)),
    ],
    ids=lambda analysis: analysis.name,
)
def test_layers_that_are_not_swept_have_no_rows(analysis: Analysis, store: ActivationStore, tmp_path: Path) -> None:
    whole = replace(analysis, layers=())  # type: ignore[type-var]
    few, all_of_it = (each.run(native(), LONG, store=store) for each in (analysis, whole))
    swept = {"skip_effect": "skipped", "output_effect": "skipped", "windows": "start", "erasure": "layer", "greedy": "layer",
             "attribution": "layer", "freeze_effect": "layer", "sinks": "layer", "attribution_error": "layer"}  # fmt: skip
    for name in swept.keys() & few.tables.keys():
        column = few.tables[name][swept[name]]
        chosen = (
            {*analysis.layers, 3} if name == "freeze_effect" else set(analysis.layers)
        )  # the final norm has no layer
        assert set(column) <= chosen, name
        same = all_of_it.tables[name]
        if name not in ("greedy", "attribution_total"):
            same = same[same[swept[name]].isin(column)].reset_index(drop=True)
            pd.testing.assert_frame_equal(few.tables[name], same, check_exact=False, rtol=1e-4, atol=1e-6)
    if "proxy_intervals" in few.tables:
        table = few.tables["proxy_intervals"]
        assert set(table[table["proxy"] == "delta_ce_block"]["layer"]) == {0, 2}
        assert set(table[table["proxy"] == "similarity_block"]["layer"]) == {0, 1, 2}
    loaded = Result.load(few.save(tmp_path / "few"))
    for name in loaded.figures:
        assert loaded.figure(name).data
    for name in loaded.profiles:
        assert loaded.profile(name)["value"].notna().all()


@pytest.mark.parametrize("analysis", [DepthUse(layers=(3,)), NormRemoval(layers=(3,))], ids=lambda a: a.name)
def test_a_layer_that_does_not_exist_is_refused_before_anything_runs(
    analysis: Analysis, store: ActivationStore, count_forwards: Any
) -> None:
    model = native()
    seen = count_forwards(model)
    with pytest.raises(OptionError, match="layer 3 does not exist: legal are 0 to 2"):
        analysis.run(model, PROMPTS, store=store)
    assert seen == []
