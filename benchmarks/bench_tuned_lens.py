"""A tuned lens in closed form beside one trained by the tuned-lens package, on the same rows.

    pip install --no-deps tuned-lens
    bathyscope bench tuned_lens --layers 5 15 25

Both get the rows of the same texts and are judged on other texts by KL(model || lens), in nats. The package's translators, read-out
and optimiser settings (SGD with Nesterov momentum .9, learning rate 1 times .1, decay 1e-3, rate falling linearly over 250 steps,
gradients clipped to 1, here a layer at a time) are its own; its steps of 2^18 tokens become steps of a few hundred rows drawn anew from those there are.
"""

from __future__ import annotations

import argparse
import tempfile
import time

import numpy as np
import torch
from torch import Tensor

from analyses.reading.texts import Texts, shipped_texts
from analyses.reading.tuned import fit_tuned_on
from analyses.results.statistics import cluster_bootstrap
from probes.capture.needs import Need
from probes.capture.run import capture
from probes.models import load_model
from probes.points import Address
from probes.store import ActivationStore


def kl(lens_logits: Tensor, final_logits: Tensor) -> Tensor:
    """KL(model || lens) of each row, in nats, [row]."""
    own = final_logits.log_softmax(-1)
    return (own.exp() * (own - lens_logits.log_softmax(-1))).sum(-1)


def trained(
    rows: Tensor, final: Tensor, unembed: torch.nn.Module, steps: int, batch: int, seed: int
) -> torch.nn.Linear:
    """One translator of the package, trained as its training script does."""
    translator = torch.nn.Linear(rows.shape[1], rows.shape[1])
    for parameter in translator.parameters():
        torch.nn.init.zeros_(parameter)
    optimiser = torch.optim.SGD(translator.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        drawn = torch.randint(len(rows), (batch,), generator=generator)
        with torch.no_grad():
            target = unembed(final[drawn])
        loss = kl(unembed(rows[drawn] + translator(rows[drawn])), target).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(translator.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return translator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--texts", type=int, default=150, help="to fit on, and a third as many to judge by")
    parser.add_argument("--layers", type=int, nargs="+", default=[5, 15, 25])
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=256, help="rows of a step")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        from tuned_lens import model_surgery
        from tuned_lens.nn.unembed import Unembed
    except ImportError:
        raise SystemExit("the peer is missing: pip install --no-deps tuned-lens") from None
    # The package asks transformer-lens for a class that version 4 no longer has.
    model_surgery._transformer_lens_available = False
    model = load_model(options.model)
    drawn = shipped_texts(model, options.texts * 4 // 3, options.seed)
    # A sentence and its translations stay on one side.
    judged = set(sorted(set(drawn.groups))[::4])
    fitting, judging = (
        Texts(
            tuple(s for s, g in zip(drawn.sequences, drawn.groups, strict=True) if (g in judged) == held_out),
            tuple(g for g in drawn.groups if (g in judged) == held_out), drawn.name, drawn.licence,
        )
        for held_out in (False, True)
    )  # fmt: skip
    last = model.shape.n_layers - 1
    with tempfile.TemporaryDirectory() as folder:
        store = ActivationStore(folder)
        fit_rows, judged_rows = (
            capture(model, list(part.sequences), [Need("resid_post.*")], store) for part in (fitting, judging)
        )

        def stacked(captured: object, layer: int) -> Tensor:
            return torch.cat([text[1:].float() for text in captured.get(Address("resid_post", layer))])  # type: ignore[attr-defined]

        started = time.process_time()
        lens = fit_tuned_on(model, fitting, store, layers=options.layers, seed=options.seed)[0].lens
        ours_seconds = (time.process_time() - started) / len(options.layers)
        unembed = Unembed(model.module).float()
        final, judged_final = (stacked(captured, last) for captured in (fit_rows, judged_rows))
        with torch.no_grad():
            target = unembed(judged_final)
        of_text = np.concatenate([[g] * (len(s) - 1) for s, g in zip(judging.sequences, judging.groups, strict=True)])
        print(
            f"{len(final):,} rows to fit on, {len(judged_final):,} of {len(set(of_text))} groups of texts to judge by"
        )
        print("| layer | logit lens | closed form (ours) | trained (tuned-lens) | trained − ours |")
        print("|---|---|---|---|---|")
        theirs_seconds = []
        for layer in options.layers:
            rows, held_out = stacked(fit_rows, layer), stacked(judged_rows, layer)
            started = time.process_time()
            translator = trained(rows, final, unembed, options.steps, options.batch, options.seed)
            theirs_seconds.append(time.process_time() - started)
            with torch.no_grad():
                readings = {
                    "logit": held_out, "ours": lens.readable(held_out, layer), "theirs": held_out + translator(held_out),
                }  # fmt: skip
                measured = {
                    name: torch.cat(
                        [kl(unembed(a), t) for a, t in zip(read.split(256), target.split(256), strict=True)]
                    )
                    for name, read in readings.items()
                }
            measured["difference"] = measured["theirs"] - measured["ours"]
            columns = np.stack([value.double().numpy() for value in measured.values()], 1)
            interval = cluster_bootstrap(columns, of_text, seed=options.seed)
            cells = [
                f"{m:.3f} [{lo:.3f}, {hi:.3f}]"
                for m, lo, hi in zip(interval.mean, interval.low, interval.high, strict=True)
            ]
            print(f"| {layer} | " + " | ".join(cells) + " |", flush=True)
        print(
            f"processor seconds a layer: closed form {ours_seconds:.0f} (all choices and controls included), "
            f"trained {np.mean(theirs_seconds):.0f} ({options.steps} steps of {options.batch} rows)"
        )


if __name__ == "__main__":
    main()
