"""What the Matryoshka loss costs beside the loss of the full embedding alone: time and memory, forward and backward.

    OMP_NUM_THREADS=1 python benchmarks/matryoshka_loss.py --out docs/results/matryoshka_loss [--quick]

AAM of random embeddings and labels, the classifier alone, float32. Contestants take turns: the classifier with four
prefixes, with the full width alone, and both written down plainly (slice, normalise, multiply, cross entropy, by
autograd). Their losses and gradients are compared before anything is timed. Peak memory is that of a process for each.
On a CPU, or with --device cuda on a GPU, where memory is the GPU's.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from memory import in_fresh_process, peak_on_gpu, peak_resident, resident
from timing import machine, quartiles, take_turns

from configuration_mrl_redimnet import MRLReDimNetConfig
from losses_mrl_redimnet import angular_margin
from modeling_mrl_redimnet import MatryoshkaMarginClassifier

DIMS = [64, 128, 192, 256]
SPEAKERS, BATCHES = (5_994, 100_000), (32, 64)  # VoxCeleb2's, and many
GOAL = 1.15
PLAIN, MATRYOSHKA = "full width", "four prefixes"
COLUMNS = [
    "speakers",
    "batch",
    "full width, ms",
    "four prefixes, ms",
    "four prefixes by full width",
    "the same by autograd",
    "four prefixes by those of autograd",
    "full width by that of autograd",
    "four prefixes by full width by autograd",
    "memory, MiB: full width",
    "four prefixes",
    "full width by autograd",
    "four prefixes by autograd",
    "rows, MiB",
]
TOLERANCE = 1e-4  # relative, of losses and gradients


def main():
    """Measures case by case; prints and writes what is known after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    parser.add_argument("--seconds", type=float, default=30.0, help="of rounds per case [30]")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="few rounds of the smaller cases: to see that it runs")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    cases = [(speakers, batch) for speakers in SPEAKERS for batch in BATCHES]
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(arguments.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dims": DIMS,
        "cases": [],
    }
    for speakers, batch in cases[:2] if arguments.quick else cases:
        seconds = 0.0 if arguments.quick else arguments.seconds
        record["cases"].append(measure(speakers, batch, seconds, arguments.device))
        arguments.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text(report(record))
    print(report(record))


def measure(speakers: int, batch: int, seconds: float, device: str) -> dict:
    """Times in ms and memory in MiB of a case's contestants, by name."""
    calls = contestants(speakers, batch, device)
    for name in (PLAIN, MATRYOSHKA):
        check(calls[name](), calls[by_autograd(name)]())
    memory = {name: in_fresh_process(memory_of, name, speakers, batch, device) for name in calls}
    times = take_turns(calls, seconds, fewest=5, most=500, device=device)
    ratios = {
        "four prefixes by full width": (MATRYOSHKA, PLAIN),
        "the same by autograd": (by_autograd(MATRYOSHKA), by_autograd(PLAIN)),
        "four prefixes by those of autograd": (MATRYOSHKA, by_autograd(MATRYOSHKA)),
        "full width by that of autograd": (PLAIN, by_autograd(PLAIN)),
        "four prefixes by full width by autograd": (MATRYOSHKA, by_autograd(PLAIN)),
    }
    return {
        "speakers": speakers,
        "batch": batch,
        "rounds": len(times[PLAIN]),
        "ms": {name: quartiles([1000 * s for s in values]) for name, values in times.items()},
        "ratios": {
            words: quartiles([a / b for a, b in zip(times[one], times[other], strict=True)])
            for words, (one, other) in ratios.items()
        },
        "memory_mib": memory,
        "weight_mib": speakers * DIMS[-1] * 4 / 2**20,
    }


def by_autograd(name: str) -> str:
    """The name of the contestant that computes the same plainly."""
    return f"{name}, by autograd"


def contestants(speakers: int, batch: int, device: str) -> dict[str, Callable]:
    """Calls by name: a forward and a backward pass over the same numbers -> loss and gradients."""
    torch.manual_seed(0)
    embeddings = torch.randn(batch, DIMS[-1]).to(device).requires_grad_()
    labels = torch.randint(speakers, (batch,)).to(device)
    start, calls = (0.1 * torch.randn(speakers, DIMS[-1])).to(device), {}
    for name, dims in ((PLAIN, DIMS[-1:]), (MATRYOSHKA, DIMS)):
        config = MRLReDimNetConfig(embedding_size=DIMS[-1], matryoshka_dims=dims, num_speakers=speakers)
        classifier = MatryoshkaMarginClassifier(config).to(device)
        classifier.weight.data = start  # one matrix for all
        for words, losses in ((name, classifier), (by_autograd(name), plainly)):
            calls[words] = step(losses, classifier, embeddings, labels)
    return calls


def step(losses: Callable, classifier, embeddings: torch.Tensor, labels: torch.Tensor) -> Callable:
    """What is timed."""

    def call():
        embeddings.grad = classifier.weight.grad = None
        loss = losses(embeddings, labels)[0] if losses is classifier else losses(classifier, embeddings, labels)
        loss.backward()
        return loss.detach(), embeddings.grad, classifier.weight.grad

    return call


def plainly(classifier: MatryoshkaMarginClassifier, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean over prefixes of AAM, each from its own slices."""
    losses = []
    for dim in classifier.dims:
        cosine = F.linear(F.normalize(embeddings[:, :dim]), F.normalize(classifier.weight[:, :dim]))
        target = angular_margin(cosine.gather(1, labels[:, None]), classifier.margin)
        losses.append(F.cross_entropy(classifier.scale * cosine.scatter(1, labels[:, None], target), labels))
    return torch.stack(losses).mean()


def check(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]):
    """Raises RuntimeError where losses or gradients differ."""
    for name, a, b in zip(("losses", "embeddings' gradients", "rows' gradients"), found, expected, strict=True):
        error = float((a - b).norm() / b.norm())
        if not error <= TOLERANCE:
            raise RuntimeError(f"The {name} do not agree: relative error {error:.1e}.")


def memory_of(name: str, speakers: int, batch: int, device: str) -> float:
    """MiB that a step adds at its peak, in a process of its own."""
    contestants(100, 2, device)[name]()  # pages of the libraries come in
    call = contestants(speakers, batch, device)[name]
    if device == "cuda":
        return peak_on_gpu(call) / 2**20
    before = resident()
    return (peak_resident(call) - before) / 2**20


def report(record: dict) -> str:
    """Markdown: the command, how to read it, the table, the goal."""
    text = [
        "# What the Matryoshka loss costs",
        "",
        f"```bash\n{record['command']}\n```",
        "",
        f"{record['machine']}, threads: {record['threads']}, torch {record['torch']}, float32. AAM over the prefixes ",
        f"{record['dims']} (four prefixes) or over {record['dims'][-1]} numbers (full width), forward and backward to ",
        "embeddings and rows; the classifier alone, random numbers. By autograd: each prefix from its own slices, by ",
        "torch's normalize, linear and cross_entropy. Ratios of time: median [quartiles] over rounds of taking turns. ",
        "Memory: what a step adds at its peak, above the process with the rows and libraries loaded; the rows' ",
        "gradient (as large as the rows) is among it.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|" + "---:|" * len(COLUMNS),
    ]
    for case in record["cases"]:
        cells = [f"{case['speakers']:,}", f"{case['batch']}"]
        cells += [f"{case['ms'][name]['median']:.2f}" for name in (PLAIN, MATRYOSHKA)]
        cells += [f"{r['median']:.2f} [{r['low']:.2f}, {r['high']:.2f}]" for r in case["ratios"].values()]
        names = (PLAIN, MATRYOSHKA, by_autograd(PLAIN), by_autograd(MATRYOSHKA))
        cells += [f"{case['memory_mib'][name]:,.0f}" for name in names] + [f"{case['weight_mib']:,.0f}"]
        text.append(f"| {' | '.join(cells)} |")
    text += ["", "## Goal", ""]
    for case in record["cases"]:
        ratio = case["ratios"]["four prefixes by full width"]["median"]
        text.append(
            f"- {'pass' if ratio <= GOAL else '**FAIL**'}: {case['speakers']:,} speakers, batch {case['batch']}: four "
            f"prefixes take {ratio:.2f} of the full width's time, at most {GOAL}"
        )
    return "\n".join(line.rstrip() for line in text) + "\n"


if __name__ == "__main__":
    main()
