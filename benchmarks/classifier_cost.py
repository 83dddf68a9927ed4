"""What a training step of the margin classifier costs in time and memory, whole and with sampled rows.

    OMP_NUM_THREADS=1 python benchmarks/classifier_cost.py --out docs/results/classifier_cost [--steps 10]

The classifier alone: forward over all Matryoshka prefixes, backward to rows and embeddings, SGD with momentum; random
embeddings and labels. Memory is that of a process of its own for each case. OUT.md and OUT.json are rewritten after
each.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from memory import in_fresh_process, peak_resident, resident
from timing import machine

from configuration_mrl_redimnet import MRLReDimNetConfig
from modeling_mrl_redimnet import MatryoshkaMarginClassifier
from mrl_redimnet.training.sampled_classifier import SampledRows

BATCH, DIMS = 64, [64, 128, 192, 256]
WARM_UP_STEPS = 2  # the second has the optimiser's state from the start


@dataclass(frozen=True)
class Case:
    """speakers of the classifier; sample: those used in a step, None for all."""

    speakers: int
    sample: int | None = None


CASES = [Case(6_000), Case(100_000), Case(100_000, 10_000), Case(1_000_000, 10_000)]


@dataclass
class Cost:
    """step_s, rows_s: median seconds of a step, and of it those spent on drawing rows and moving them; memory_mib: what
    the process's peak has above what it had with the libraries loaded; matrix_mib: of all rows."""

    speakers: int
    sample: int | None
    step_s: float
    rows_s: float
    memory_mib: float
    matrix_mib: float


def main():
    """Measures case by case; prints and writes what is known after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    parser.add_argument("--steps", type=int, default=10, help="timed steps per case [10]")
    parser.add_argument("--quick", action="store_true", help="one step of the smallest case: to see that it runs")
    arguments = parser.parse_args()
    steps = 1 if arguments.quick else arguments.steps
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "batch": BATCH,
        "dims": DIMS,
        "steps": steps,
        "cases": [],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for case in CASES[:1] if arguments.quick else CASES:
        record["cases"].append(asdict(measure(case, steps)))
        arguments.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text(report(record))
    print(report(record))


def measure(case: Case, steps: int) -> Cost:
    """The cost of one case: times here, memory in a process that does nothing else."""
    seconds = train(case, steps)
    return Cost(
        case.speakers,
        case.sample,
        step_s=statistics.median(whole for whole, _ in seconds),
        rows_s=statistics.median(moving for _, moving in seconds),
        memory_mib=in_fresh_process(memory_of, case, preload=["mrl_redimnet.training.sampled_classifier"]),
        matrix_mib=case.speakers * DIMS[-1] * 4 / 2**20,
    )


def memory_of(case: Case) -> float:
    """MiB that a classifier in training adds to its process, at its peak."""
    before = resident()
    return (peak_resident(lambda: train(case, steps=1)) - before) / 2**20


def train(case: Case, steps: int) -> list[tuple[float, float]]:
    """What `timed_step` says of `steps` steps after the warm-up."""
    torch.manual_seed(0)
    config = MRLReDimNetConfig(embedding_size=DIMS[-1], matryoshka_dims=DIMS, num_speakers=case.speakers)
    classifier = MatryoshkaMarginClassifier(config)
    rows = None if case.sample is None else SampledRows(classifier, case.sample, seed=0)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.1, momentum=0.9)
    seconds = [timed_step(classifier, rows, optimizer, step) for step in range(WARM_UP_STEPS + steps)]
    return seconds[WARM_UP_STEPS:]


def timed_step(classifier, rows: SampledRows | None, optimizer, step: int) -> tuple[float, float]:
    """Seconds of one step, and of what SampledRows does in it."""
    embeddings = torch.randn(BATCH, DIMS[-1], requires_grad=True)
    speakers = classifier.num_speakers if rows is None else rows.num_speakers
    labels = torch.randint(speakers, (BATCH,))
    start = time.perf_counter()
    local = labels if rows is None else rows.begin(labels, step, optimizer)
    begun = time.perf_counter()
    optimizer.zero_grad()
    classifier(embeddings, local)[0].backward()
    optimizer.step()
    stepped = time.perf_counter()
    if rows is not None:
        rows.end(optimizer)
    end = time.perf_counter()
    return end - start, (end - start) - (stepped - begun)


def report(record: dict) -> str:
    """Markdown: the command, how to read it, the table."""
    text = [
        "# What the margin classifier costs",
        "",
        f"```bash\n{record['command']}\n```",
        "",
        f"{record['machine']}, threads: {record['threads']}, torch {record['torch']}, float32. The classifier alone, ",
        f"{record['batch']} embeddings of {record['dims'][-1]} numbers, prefixes {record['dims']}, SGD with momentum; ",
        f"median of {record['steps']} steps. Sampled: the rows of a step; moving rows: the part of a step spent on ",
        "drawing them, taking them out and putting them back. Peak memory: above that of a process with the libraries ",
        "loaded, all rows and their momentum included.",
        "",
        "| speakers | rows in a step | step, s | moving rows, s | peak memory, MiB | one matrix of all rows, MiB |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for case in record["cases"]:
        used = "all" if case["sample"] is None else f"{case['sample']:,}"
        text.append(
            f"| {case['speakers']:,} | {used} | {case['step_s']:.3f} | {case['rows_s']:.3f} | "
            f"{case['memory_mib']:,.0f} | {case['matrix_mib']:,.0f} |"
        )
    return "\n".join(line.rstrip() for line in text) + "\n"


if __name__ == "__main__":
    main()
