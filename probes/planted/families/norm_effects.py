"""J: position 0 is massive between two blocks; or the last MLP acts through the scale of the final norm alone."""

from __future__ import annotations

from probes.planted.fact_words import ANSWERS, POSITIONS, fact_words
from probes.planted.making import answer_words, at, begin, choose, nothing, planted_task
from probes.planted.parts import STEP, distract, lookup
from probes.planted.record import Question, nodes, span
from probes.planted.task import PlantedTask

_LAYERS, _CIRCUIT = 8, (0, 2, 4, 5)
MASSIVE, SHRINKING = 300.0, 16.0


def build(task: str, seed: int) -> PlantedTask:
    """Return J1, in which position 0 is massive, or J2, in which half the answers lose by the final norm."""
    name, generator, score = begin(task, seed)
    last = _LAYERS - 1
    bring, look, move, decide = _CIRCUIT if seed == 0 else choose(range(last), 4, generator)
    facts = fact_words(_LAYERS, "rms", generator, {"attribute": 4, "moved": 4, "answer": 4, "large": 1})
    blueprint, stream = facts.blueprint, facts.blueprint.stream
    answer_words(blueprint, blueprint.tokens("a"), blueprint.stream.basis("answer"), default="f0")
    circuit = [facts.place_bringer(bring, score), facts.place_table(look)]
    circuit.append(facts.place_mover(move, score))
    moved, large = stream.basis("moved"), stream.vector("large")
    circuit.append(facts.place_decider(decide))
    subsets: tuple[str | None, ...] = (None,) * ANSWERS
    if name == "J1":
        first = 1 if seed == 0 else choose(range(1, last - 2), 1, generator)[0]
        bos = (stream.vector("bos"),)
        blueprint.place_mlp(first, lookup(blueprint, [(bos, large)], step=STEP, size=MASSIVE))
        blueprint.place_mlp(last, lookup(blueprint, [(bos, -large)], step=STEP, size=MASSIVE))
        norm = Question("norm", span(first, last - 1), position="bos", note="the stream of position 0 is massive")
    else:
        rules = [((moved[v],), large) for v in range(ANSWERS // 2)]
        blueprint.place_mlp(last, lookup(blueprint, rules, step=STEP, size=SHRINKING))
        subsets = tuple("large" if v < ANSWERS // 2 else "usual" for v in range(ANSWERS))
        norm = Question("norm", frozenset({"final"}), candidates=norm_sites(_LAYERS))
    stream.rest("junk")
    distract(blueprint)
    questions = (
        norm,
        Question("lens", at(decide), position="ask"),
        Question("nodes", nodes(circuit), candidates=blueprint.host.nodes),
        nothing("mending", _LAYERS),
        nothing("pivot"),
    )
    examples = facts.examples(n_fillers=4, subsets=subsets)
    return planted_task(
        task, seed, blueprint, examples, positions=POSITIONS | {"bos": 0}, concepts={"attribute": 4},
        questions=questions,
    )  # fmt: skip


def norm_sites(layers: int) -> tuple[str, ...]:
    """Return the norm before each attention and each MLP, and the final one, by name."""
    return (*(f"{part}.{layer}" for layer in range(layers) for part in ("attn", "mlp")), "final")
