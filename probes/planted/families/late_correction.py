"""L: a rare answer is written weaker than a frequent one, and named only once the last block takes frequency away."""

from __future__ import annotations

from probes.planted.fact_words import ANSWERS, fact_words
from probes.planted.hosts import Norm
from probes.planted.making import at, begin, choose, nothing
from probes.planted.parts import STEP, distract, look_alike, lookup
from probes.planted.record import Interval, Question, nodes
from probes.planted.task import PlantedTask

_HOSTS: dict[str, tuple[Norm, int]] = {"L1": ("none", 8), "L2": ("rms", 12)}
_LAYERS = {"L1": (0, 1, 3, 4), "L2": (1, 3, 5, 8)}
RARE = ANSWERS - 1
"""The rare answer; prompts have each of the others four times as often."""
_WEAK, _CORRECTION = 0.8, 0.5


def build(task: str, seed: int) -> PlantedTask:
    """Return a task of L1 and L2."""
    name, generator, score = begin(task, seed)
    norm, n_layers = _HOSTS[name]
    last = n_layers - 1
    bring, look, move, decide = list(_LAYERS[name]) if seed == 0 else choose(range(n_layers - 2), 4, generator)
    facts = fact_words(n_layers, norm, generator, {"attribute": 4, "moved": 4, "answer": 4})
    blueprint, stream = facts.blueprint, facts.blueprint.stream
    answer = stream.basis("answer")
    blueprint.unembedding[blueprint.tokens("a")] += 24 * answer
    blueprint.unembedding[blueprint.token("f0")] += 6 * stream.vector("constant")

    circuit = [facts.place_bringer(bring, score), facts.place_table(look)]
    circuit.append(facts.place_mover(move, score))
    moved, mixed = stream.basis("moved"), _WEAK * answer[RARE] + answer[0]
    frequent = lookup(blueprint, [((moved[v],), answer[v]) for v in range(RARE)], step=STEP)
    rare = lookup(blueprint, [((moved[RARE],), mixed)], size=float(mixed.norm()), step=STEP)
    blueprint.place_mlp(decide, frequent)
    circuit.append(blueprint.place_mlp(decide, rare))
    frequency = -_CORRECTION * answer[:RARE].sum(0)
    correction = lookup(blueprint, [((stream.vector("ask"),), frequency)], size=float(frequency.norm()), step=STEP)
    blueprint.place_mlp(last, correction)
    stream.rest("junk")
    blueprint.place_head(move - 1 if move else move + 1, look_alike(blueprint, query="ask", key="relation"))
    distract(blueprint)

    host = blueprint.host
    questions = (
        Question("lens", at(decide), position="ask", subset="frequent"),
        Question("lens", at(last), position="ask", subset="rare"),
        Question("readable", Interval(look, last), concept="attribute", position="r"),
        Question("readable", Interval(move, last), concept="attribute", position="ask"),
        Question(
            "nodes", nodes(circuit), candidates=host.nodes,
            note="the correction is the same for every prompt, so its mean is itself",
        ),
        nothing("mending", n_layers),
        nothing("pivot"),
    )  # fmt: skip
    subsets = tuple("rare" if v == RARE else "frequent" for v in range(ANSWERS))
    return facts.task(task, seed, questions, facts.examples(per_answer=(40, 40, 40, 10), subsets=subsets))
