"""Time, memory and size of ReDimNet2 models beside ReDimNet's, and each beside its reference code, in one run.

    python benchmarks/forward_redimnet2.py REFERENCE2_CHECKOUT REFERENCE_CHECKOUT --out docs/results/redimnet2_speed
        [--threads 2] [--seconds 300] [--quick]

REFERENCE2_CHECKOUT: a checkout of PalabraAI/redimnet2 (ffe8f27 was used), REFERENCE_CHECKOUT one of IDRnD/redimnet
(dd9f519 was used); neither is part of this project. A reference and ours get the same random weights, and their
embeddings are compared before anything is timed. Of each load all of them take turns; a ratio is the median over rounds
of the two times in the same round. Peak memory is of a process each. --quick: nano, short, few rounds, to see that it
runs. Run it while nothing else runs.
"""

import argparse
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from memory import in_fresh_process, peak_resident, resident
from reference import build_pair, network_of, refuse_no_checkout
from timing import machine, quartiles, speedup, take_turns
from torch.utils.flop_counter import FlopCounterMode

from configuration_mrl_redimnet import SAMPLING_RATE, SIZES
from mrl_redimnet.files import replace_file

LOADS = ((1, 3.0), (16, 3.0))  # utterances, seconds of each
AGREES = 1e-4  # relative error of embeddings


@dataclass(frozen=True)
class Contestant:
    """A size in `SIZES`, by the reference's code or by ours."""

    size: str
    by: str

    def __str__(self) -> str:
        return f"{self.size} {self.by}"


def build(contestant: Contestant, checkouts: dict[str, Path]) -> torch.nn.Module:
    checkout = str(checkouts[network_of(contestant.size)])
    if checkout not in sys.path:
        sys.path.insert(0, checkout)
    return dict(zip(("reference", "ours"), build_pair(contestant.size), strict=True))[contestant.by]


@torch.inference_mode()
def embed(model: torch.nn.Module, waves: torch.Tensor) -> torch.Tensor:
    answer = model(waves)
    return answer if isinstance(answer, torch.Tensor) else answer.embeddings


def drawn(utterances: int, seconds: float) -> torch.Tensor:
    return 0.1 * torch.randn(utterances, int(seconds * SAMPLING_RATE), generator=torch.Generator().manual_seed(1))


def peak_memory(contestant: Contestant, checkouts: dict[str, Path], threads: int, load: tuple[int, float]) -> int:
    """Bytes that a forward pass adds to what the process with its model occupies; in a process of its own."""
    torch.set_num_threads(threads)
    model, waves = build(contestant, checkouts), drawn(*load)
    embed(model, waves[:1])  # what is set up once
    before = resident()
    return peak_resident(lambda: embed(model, waves)) - before


def facts(model: torch.nn.Module) -> dict:
    """Parameters, and multiply-adds of two seconds."""
    with FlopCounterMode(display=False) as counted:
        embed(model, drawn(1, 2.0))
    return {"parameters": sum(p.numel() for p in model.parameters()), "multiply_adds": counted.get_total_flops() // 2}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference2", type=Path)
    parser.add_argument("reference", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["redimnet2-b3", "redimnet2-b6", "b2", "b3", "b6"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=300.0, help="of timing per load, at least 5 rounds [300]")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    checkouts = {"redimnet": arguments.reference, "redimnet2": arguments.reference2}
    for network, checkout in checkouts.items():
        refuse_no_checkout(checkout, network)
    if arguments.quick:
        arguments.sizes, arguments.seconds = ["redimnet2-nano", "nano"], 1.0
    torch.set_num_threads(arguments.threads)

    contestants = [Contestant(size, by) for size in arguments.sizes for by in ("reference", "ours")]
    models = {contestant: build(contestant, checkouts) for contestant in contestants}
    record = {
        "command": f"python benchmarks/forward_redimnet2.py {shlex.join(options(arguments))}",
        "machine": machine(),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "sizes": {size: facts(models[Contestant(size, "ours")]) for size in arguments.sizes},
        "loads": {},
    }
    for utterances, seconds in LOADS:
        load = (2, 1.0) if arguments.quick and utterances > 1 else (utterances, seconds)
        record["loads"][f"{load[0]} x {load[1]:g} s"] = measure(models, checkouts, load, arguments)
    replace_file(arguments.out.with_suffix(".json"), lambda file: file.write_text(json.dumps(record, indent=1) + "\n"))
    replace_file(arguments.out.with_suffix(".md"), lambda file: file.write_text(report(record)))
    print(report(record))


def options(arguments) -> list[str]:
    """The command line without this machine's folders."""
    spelt = ["REFERENCE2_CHECKOUT", "REFERENCE_CHECKOUT", "--out", f"docs/results/{arguments.out.name}"]
    return [*spelt, "--threads", str(arguments.threads), "--seconds", f"{arguments.seconds:g}"]


def measure(models: dict[Contestant, torch.nn.Module], checkouts: dict, load: tuple[int, float], arguments) -> dict:
    """Of each size: the embeddings' agreement, times, peaks and ratios of one load."""
    waves = drawn(*load)
    answers = {contestant: embed(model, waves) for contestant, model in models.items()}  # warm, too
    calls = {str(contestant): lambda m=model: embed(m, waves) for contestant, model in models.items()}
    times = take_turns(calls, arguments.seconds, fewest=3 if arguments.quick else 5)
    rows = {}
    for size in arguments.sizes:
        reference, ours = (Contestant(size, by) for by in ("reference", "ours"))
        error = float((answers[ours] - answers[reference]).norm() / answers[reference].norm())
        if not error <= AGREES:
            raise RuntimeError(f"{size}: the two do not agree, relative error {error:.1e}.")
        rows[size] = {
            "relative_error": error,
            "rounds": len(times[str(ours)]),
            "ratio": speedup(times, str(reference), str(ours)),
        }
        for contestant in (reference, ours):
            peak = in_fresh_process(
                peak_memory, contestant, checkouts, arguments.threads, load, preload=("mrl_redimnet",)
            )
            seconds = quartiles(times[str(contestant)])
            rows[size][contestant.by] = {"seconds": seconds, "peak_bytes": peak}
    return rows


def report(record: dict) -> str:
    """The record as Markdown."""
    apart = max(row["relative_error"] for rows in record["loads"].values() for row in rows.values())
    lines = [
        "# ReDimNet2 beside ReDimNet, and beside the reference implementations",
        "",
        f"`{record['command']}`, {record['machine']}, {record['threads']} threads, torch {record['torch']}, eager,",
        f"float32. Random weights, the same in both, whose embeddings are within {apart:.1e} of their length of each",
        "other; hops as published (ReDimNet 15 ms, ReDimNet2 10 ms). All rows of a load took turns in one process.",
        "Times: median and quartiles. Ratio: reference over ours, median and quartiles over rounds. Peak: memory that",
        "a forward pass adds, each in a process of its own.",
        "",
        "| size | parameters | multiply-adds of 2 s |",
        "|---|---|---|",
    ]
    for size, row in record["sizes"].items():
        lines.append(f"| {size} | {row['parameters'] / 1e6:.2f} M | {row['multiply_adds'] / 1e9:.2f} G |")
    for load, rows in record["loads"].items():
        count = next(iter(rows.values()))["rounds"]
        lines += ["", f"## {load} ({count} rounds)", ""]
        lines += [
            "| size | reference, ms | ours, ms | ratio | reference, peak MB | ours, peak MB |",
            "|---|---|---|---|---|---|",
        ]
        for size, row in rows.items():
            times = [spread(row[by]["seconds"], 1000) for by in ("reference", "ours")]
            peaks = [f"{row[by]['peak_bytes'] / 1e6:.0f}" for by in ("reference", "ours")]
            lines.append(f"| {size} | {' | '.join(times)} | {spread(row['ratio'], 1, 2)} | {' | '.join(peaks)} |")
    return "\n".join(lines) + "\n"


def spread(values: dict[str, float], scale: float, digits: int = 0) -> str:
    median, low, high = (f"{scale * values[name]:.{digits}f}" for name in ("median", "low", "high"))
    return f"{median} ({low}-{high})"


if __name__ == "__main__":
    main()
