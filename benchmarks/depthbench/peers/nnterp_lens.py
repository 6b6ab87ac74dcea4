"""nnterp: its logit lens, to the layer from which the read-out stays the answer."""

import json
import statistics
import sys
from importlib.metadata import version
from pathlib import Path

try:
    import torch
    from nnterp import StandardizedTransformer
except ImportError as error:
    sys.exit(f"skipped: {error}")
METHOD = "nnterp logit lens"
PROMPTS = 32


def settled(tops, answer):
    """The first layer from which on the top token is the answer at every layer; None where it is not at the last."""
    wrong = [layer for layer, top in enumerate(tops) if top != answer]
    first = wrong[-1] + 1 if wrong else 0
    return first if first < len(tops) else None


def layers_of(model, prompts, position):
    """Read every block's output through the model's own head, prompts of one length at once."""
    cut = [prompt["tokens"][: prompt["positions"][position] + 1] for prompt in prompts]
    for length in sorted(set(map(len, cut))):
        rows, tops = [i for i, tokens in enumerate(cut) if len(tokens) == length], []
        with model.trace(torch.tensor([cut[i] for i in rows])):
            for layer in range(model.num_layers):
                tops.append(model.project_on_vocab(model.layers_output[layer])[:, -1].argmax(-1).save())
        for row, column in zip(rows, torch.stack(list(tops), 1).tolist(), strict=True):
            yield settled(column, prompts[row]["answer"])


def answer(folder):
    everything, questions = (json.loads((folder / f"{name}.json").read_text()) for name in ("prompts", "questions"))
    if not (questions := [question for question in questions if question["kind"] == "lens"]):
        return
    model = StandardizedTransformer(str(folder), device_map="cpu", dtype=torch.float32)
    for question in questions:
        prompts = [p for p in everything if question["subset"] in (None, p["subset"])]
        prompts = [prompts[i * len(prompts) // PROMPTS] for i in range(PROMPTS)] if len(prompts) > PROMPTS else prompts
        layers = list(layers_of(model, prompts, question["position"]))
        known = [layer for layer in layers if layer is not None]
        said = {"decision": "none"}
        if 2 * len(known) > len(layers):
            # A prompt that never settles counts as later than all others.
            middle = statistics.median([*known, *[model.num_layers] * (len(layers) - len(known))])
            said = {"decision": "answered", "estimate": [middle, middle]}
        yield {"method": METHOD, "task": folder.name, "question": question["key"], **said}


root = Path(sys.argv[1])
answers = [line for name in json.loads((root / "depthbench.json").read_text())["tasks"] for line in answer(root / name)]
(root / "answers-nnterp.json").write_text(json.dumps(answers))
print(f"nnterp {version('nnterp')}: {len(answers)} answers")
