"""Does English lead in the middle layers? Word translation on a multilingual model and on an English one.

    bathyscope bench latent_language --items 40 --out runs/latent

Fetches gemma3-270m (238 MB, Gemma Terms of Use: https://ai.google.dev/gemma/terms), which running it accepts.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from analyses.latent_language import LatentLanguage
from analyses.latent_language.figures import across_models
from analyses.results.report import write_report
from analyses.results.result import Result
from probes.models import fetch_model, load_model
from probes.store import ActivationStore

SOURCES, TARGETS = ("en", "fr", "de", "ja"), ("fr", "zh", "fr", "fr")
COLUMNS = [
    "pair", "latent", "n", "accuracy", "peak_layer", "peak", "peak_control", "target_at_peak", "crossover", "leads_at",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["gemma3-270m", "smollm2-135m"])
    parser.add_argument("--items", type=int, default=40, help="words per pair; 0 for all 103")
    parser.add_argument("--set-rule", default="first_token", choices=["prefix", "first_token", "multi_token"])
    parser.add_argument("--form", default="plain", choices=["quoted", "plain"])
    parser.add_argument("--lens", default="logit", choices=["logit", "tuned", "attn", "mlp"])
    parser.add_argument("--extras", nargs="*", default=[], choices=["culture", "similarity", "swap", "layer_writing"])
    parser.add_argument("--shots", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("runs/latent_language"))
    parser.add_argument("--store", type=Path, default=None)
    flags = parser.parse_args()
    results = [measure(ref, flags) for ref in flags.models]
    across_models([r.tables["curve"] for r in results]).write_html(flags.out / "models.html")
    print(f"report: {write_report(results, flags.out / 'report.html')}")
    print(f"all models in one map: {flags.out / 'models.html'}")


def measure(ref: str, flags: argparse.Namespace) -> Result:
    fetch_model(ref, accept_license=True)
    model = load_model(ref)
    analysis = LatentLanguage(
        source=SOURCES, target=TARGETS, set_rule=flags.set_rule, form=flags.form, lens=flags.lens, n_prompts=flags.items, n_shot=flags.shots,
        extras=tuple(flags.extras),
    )  # fmt: skip
    started = time.perf_counter()
    result = analysis.run(model, store=ActivationStore(flags.store))
    result.save(flags.out / model.ref)
    print(f"\n{model.ref}: {time.perf_counter() - started:.0f} s, {result.provenance['counts']}")
    print(result.tables["summary"][COLUMNS].to_string(index=False, float_format="%.3f"))
    for note in result.notes:
        print(f"- {note}")
    return result


if __name__ == "__main__":
    main()
