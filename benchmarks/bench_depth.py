"""DepthBench: every method on models whose answer is known, scored by how many layers it is off and what it makes of nothing.

    bathyscope bench depth [--quick] [--tier compiled,noised,trained] [--tasks A2,C1] [--methods voids] [--seeds dev] [--peers DIR] [--out DIR]
    bathyscope bench depth export DIR        tasks as files for other tools, without their truth
    bathyscope bench depth score DIR         the answers*.json that other tools left there
    bathyscope bench depth certify           certifies every task anew and writes the certificates that are shipped

Prints a digest of all answers, equal in two runs on one machine. `--write` puts the results between the markers
of README.md and docs/depth_bench.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import marked

from analyses.ground_truth.answers import name_of
from analyses.ground_truth.bench import (
    DEV_SEEDS,
    PROCESSES,
    Job,
    Ran,
    chosen_tasks,
    further_jobs,
    run_bench,
    seed_of_release,
)
from analyses.ground_truth.contestants import names
from analyses.ground_truth.exchange import export, exported, handed_in
from probes import planted
from probes.errors import OptionError, unknown

ROOT = Path(__file__).resolve().parents[1]
write_between = partial(marked.write_between, "depth")
TIERS = ("compiled", "noised", "trained")


def split(text: str) -> tuple[str, ...]:
    """The parts of a list with commas."""
    return tuple(part for part in text.split(",") if part)


def tiers_of(text: str) -> tuple[str, ...]:
    """The tiers of a list."""
    if wrong := set(split(text)) - set(TIERS):
        raise OptionError(unknown("tier", min(wrong), TIERS))
    return split(text)


def seeds_of(text: str, task: str) -> tuple[int, ...]:
    """The seeds of a task: numbers, `dev`, or `test`, which exists from the release's tag on."""
    if text == "dev":
        return DEV_SEEDS
    if text == "test":
        from analyses.results.provenance import versions

        tag = f"v{versions()['bathyscope']}"
        done = subprocess.run(
            ["git", "-C", str(ROOT), "tag", "--list", tag], capture_output=True, text=True, check=False
        )
        if done.stdout.strip() != tag:
            raise OptionError(f"seeds test exist once this version is tagged {tag}: give dev, or numbers")
        return (seed_of_release(tag, task),)
    if not all(part.isdigit() for part in split(text)):
        raise OptionError(f"seeds {text!r} are none: give dev, test, or numbers such as 0,1,2")
    return tuple(int(part) for part in split(text))


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """One job a task and seed; where neither tasks nor seeds are chosen, also those that few families are asked at further seeds."""
    methods = split(options.methods)
    if wrong := set(methods) - set(names()):
        raise OptionError(unknown("method", min(wrong), names()))
    tiers = tiers_of(options.tier)
    tasks = chosen_tasks(tiers, split(options.tasks), options.quick)
    jobs = [Job(task, seed, methods) for task in tasks for seed in seeds_of(options.seeds or "0", task)]
    whole = not (options.seeds or options.tasks or options.quick)
    return jobs + (further_jobs(tiers, methods) if whole else [])


def run(options: argparse.Namespace) -> None:
    """Run the benchmark, print its table and digest, and save it where that is asked for."""
    jobs = jobs_of(options)
    # Starts before what draws its tables is imported.
    ran: Ran = run_bench(jobs, options.processes, note=lambda line: print(line, file=sys.stderr))
    own = ran.digest
    if options.peers:
        questions = {(name_of(record), question.key) for record in ran.records for question in record.questions}
        peers = (answer for answer in handed_in(options.peers) if (answer.task, answer.question) in questions)
        ran = replace(ran, answers=(*ran.answers, *peers))
    from analyses.ground_truth.words import method_list, readme_table, sentences

    summary = ran.scored.summary
    table = readme_table(summary)
    further = sum(bool(job.kinds) for job in jobs)
    seeds = f"seeds {options.seeds or '0'}" + (
        f" and {further} more, of one kind each, at seeds 1 to 5" if further else ""
    )
    about = (
        f"{len(jobs) - further} tasks, {seeds}, {len(ran.answers):,} answers, {ran.seconds:.0f} s on "
        f"{options.processes} processes of one thread; digest {own}."
    )
    print(table)
    print("\n".join(sentences(summary[~summary["method"].str.startswith("control")])))
    print(about)
    if options.out:
        print(ran.save(options.out) / "report.html")
    if options.write:
        write_between(ROOT / "README.md", f"{table}\n\n{about}")
        write_between(ROOT / "docs" / "depth_bench.md", f"{about}\n\n{method_list(summary)}")


def score_folder(folder: str) -> None:
    """Print what the answers in an exported folder are worth."""
    from analyses.ground_truth.score import score
    from analyses.ground_truth.words import readme_table, sentences

    tasks = [name.partition("@") for name in exported(folder)]
    answers = handed_in(folder)
    scored = score(answers, records=[planted.task(task, seed=int(seed)).record for task, _, seed in tasks])
    print(readme_table(scored.summary))
    print("\n".join(sentences(scored.summary)))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", nargs="?", choices=("run", "export", "score", "certify"), default="run")
    parser.add_argument("folder", nargs="?", help="of export and score")
    parser.add_argument("--quick", action="store_true", help="10 tasks, within a minute")
    parser.add_argument("--tier", default=",".join(TIERS))
    parser.add_argument("--tasks", default="", help="task ids, such as A2,C1; all of the tiers where none is named")
    parser.add_argument("--methods", default="", help=f"of {', '.join(names())}")
    parser.add_argument(
        "--seeds",
        default="",
        help="numbers, dev (0 to 4) or test; by default 0, and 1 to 5 for kinds that few tasks ask",
    )
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--peers", help="an exported folder, whose answers*.json are scored beside")
    parser.add_argument("--out", help="folder for answers, tables and a report")
    parser.add_argument("--write", action="store_true", help="put the results into README.md and docs/depth_bench.md")
    options = parser.parse_args()
    if options.action in ("export", "score") and not options.folder:
        raise OptionError(f"{options.action} needs a folder: bathyscope bench depth {options.action} DIR")
    if options.action == "export":
        tasks = [planted.task(job.task, seed=job.seed) for job in jobs_of(options) if not job.kinds]
        print(export(tasks, options.folder))
    elif options.action == "certify":
        from probes.planted.certify.certificate import ship
        from probes.planted.registry import build

        jobs = (*(Job(task, 0, ()) for task in planted.tasks()), *further_jobs(TIERS, ()))
        print(ship(build(job.task, job.seed) for job in jobs))
    elif options.action == "score":
        score_folder(options.folder)
    else:
        run(options)


if __name__ == "__main__":
    main()
