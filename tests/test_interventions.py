"""What a dry run says of each analysis is what its run does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from small import SMALL
from tiny import native

from analyses.base import Analysis
from analyses.cli.run import cost
from probes.capture import plan_capture
from probes.prompts import PromptLine
from probes.store import ActivationStore

MORE: list[Analysis] = [
    replace(SMALL["voids"][0], semantics="mask"),
    replace(SMALL["concept_depth"][0], causal_layers=1),
    replace(SMALL["contextual_decomposition"][0], ablation=False, search_steps=0),
    replace(SMALL["contextual_decomposition"][0], random_circuits=2, search_steps=0),
    replace(SMALL["contextual_decomposition"][0], random_circuits=2, shares=(0.2, 1.0), other_preset=True, stride=2),
    replace(SMALL["contextual_decomposition"][0], random_circuits=2, prune=True, granularity="position"),
    replace(SMALL["contextual_decomposition"][0], prune=True, ablation=False),
]  # type: ignore[type-var]
RUNS = [*SMALL.values(), *((analysis, SMALL[analysis.name][1]) for analysis in MORE)]


@pytest.mark.parametrize(("analysis", "prompts"), RUNS, ids=lambda value: getattr(value, "name", ""))
def test_an_analysis_says_how_many_forwards_it_changes(
    analysis: Analysis, prompts: list[Any], store: ActivationStore
) -> None:
    model = native()
    asked = analysis.collect(model, prompts)
    planned = plan_capture(model, [prompt.tokens for prompt in asked], analysis.needs(model), store).forwards
    passed: list[int] = []
    last = model.module.get_submodule("model.layers.2")
    hook = last.register_forward_hook(lambda _, args, __: passed.append(len(args[0])))
    foretold = analysis.interventions(model, asked)
    try:
        result = analysis.run(model, prompts, store=store)
    finally:
        hook.remove()  # other tests share the module
    done = result.provenance["counts"]["intervention_forwards"]
    assert done == foretold.total if foretold.exact else 0 < done <= foretold.total
    assert (sum(passed) > planned) == (done > 0)


@pytest.mark.parametrize("name", ["logit_lens", "contextual_decomposition"])
def test_a_dry_run_counts_the_forwards_of_interventions(name: str, store: ActivationStore) -> None:
    analysis, prompts = SMALL[name]
    lines = [PromptLine(f"line {i}", None, prompt.tokens, prompt.fields) for i, prompt in enumerate(prompts)]
    said = "\n".join(cost(analysis, native(), lines, store))
    assert ("forwards with interventions (" in said) == (name != "logit_lens")
