"""TransformerLens: attribution patching to nodes, and activation patching to where the stream is necessary and sufficient."""

import json
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path

try:
    import torch
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM, AutoTokenizer
except ImportError as error:
    sys.exit(f"skipped: {error}")
PROMPTS = 32
FIELDS = ("tokens", "partner", "answer", "partner_answer")


def read(model, tokens, points):
    """The logits and the tensors at some points, in one graph: only what a hook returns is in it."""
    store = {}
    hooks = [(point, lambda tensor, hook, point=point: store.setdefault(point, tensor)) for point in points]
    return model.run_with_hooks(tokens, fwd_hooks=hooks), store


def attributed(model, own, partner, answer, other):
    """The gradient of the answers' logits at the prompts times (prompt - partner), of every head and MLP."""
    points = [f"blocks.{n}.{at}" for n in range(model.cfg.n_layers) for at in ("attn.hook_z", "hook_mlp_out")]
    _, swapped = read(model, partner, points)
    with torch.enable_grad():
        logits, kept = read(model, own, points)
        rows = torch.arange(len(own))
        gap = (logits[rows, -1, answer] - logits[rows, -1, other]).sum()
        grads = torch.autograd.grad(gap, [kept[point] for point in points])
    scores = {}
    for point, grad in zip(points, grads, strict=True):
        layer, change = point.split(".")[1], (grad * (kept[point] - swapped[point]).detach()).sum(-1).sum(1).mean(0)
        scores |= {f"mlp.{layer}": change} if change.ndim == 0 else {f"{layer}.{h}": v for h, v in enumerate(change)}
    return {"decision": "answered", "scores": {name: abs(float(value)) for name, value in scores.items()}}


def patched(model, into, source, at, answer, expected):
    """The layers, from the embedding on, at which a patch makes most prompts give the answer, or no longer give it."""
    points = ["blocks.0.hook_resid_pre", *(f"blocks.{n}.hook_resid_post" for n in range(model.cfg.n_layers))]
    rows, (_, streams), layers = torch.arange(len(into)), read(model, source, points), []
    for layer, point in enumerate(points, -1):
        swap = partial(lambda brought, tensor, hook: tensor.index_put((rows, at), brought), streams[point][rows, at])
        top = model.run_with_hooks(into, fwd_hooks=[(point, swap)])[:, -1].argmax(-1)
        layers += [layer] if float(((top == answer) == expected).float().mean()) >= 0.5 else []
    return {"decision": "answered", "estimate": [layers[0], layers[-1]]} if layers else {"decision": "none"}


def said(model, question, everything):
    """The answer to one question, of prompts of one length."""
    prompts = [p for p in everything if p["partner"] and question["subset"] in (None, p["subset"])]
    prompts = [p for p in prompts if len(p["tokens"]) == len(prompts[0]["tokens"])]
    prompts = prompts[:: max(1, len(prompts) // PROMPTS)]
    if not prompts or (question["concept"] and question["kind"] != "nodes"):
        return {"decision": "declined", "reason": "no partners, or one concept of what is exchanged"}
    own, partner, answer, other = (torch.tensor([prompt[field] for prompt in prompts]) for field in FIELDS)
    if question["kind"] == "nodes":
        return attributed(model, own, partner, answer, other)
    at = torch.tensor([p["positions"][question["position"]] for p in prompts])
    necessary = question["kind"] == "necessary"
    return patched(model, *((own, partner) if necessary else (partner, own)), at, answer, not necessary)


root, answers, kinds = Path(sys.argv[1]), [], ("nodes", "necessary", "sufficient")
for folder in (root / name for name in json.loads((root / "depthbench.json").read_text())["tasks"]):
    questions, everything = (json.loads((folder / f"{name}.json").read_text()) for name in ("questions", "prompts"))
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    how = {"hf_model": module, "tokenizer": AutoTokenizer.from_pretrained(folder), "device": "cpu"}
    model = TransformerBridge.boot_transformers(str(folder), **how)
    key = {"method": "TransformerLens", "task": folder.name}
    with torch.no_grad():
        for question in [one for one in questions if one["kind"] in kinds]:
            answers.append({**key, "question": question["key"], **said(model, question, everything)})
(root / "answers-transformer-lens.json").write_text(json.dumps(answers))
print(f"transformer-lens {version('transformer-lens')}: {len(answers)} answers")
