"""Forward time of MRL-ReDimNet beside the reference implementation's, in one run, eager, float32.

    python benchmarks/forward_vs_reference.py REFERENCE_CHECKOUT [--output docs/results/forward_vs_reference.json]

REFERENCE_CHECKOUT: a checkout of IDRnD/redimnet (dd9f519 was used), which is not part of this project. Both get the
same random weights, and their embeddings are compared before anything is timed. The two take turns; a ratio is the
quotient of the medians. Run it while nothing else runs.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

from mrl_redimnet import convert_checkpoint

# The published b2 (keyword arguments of the reference's wrapper), at the published 15 ms hop and at its 10 ms default.
B2 = dict(
    F=72,
    C=16,
    block_1d_type="conv+att",
    block_2d_type="convnext_like",
    stages_setup=[
        (1, 2, 1, [(3, 3)], 12),
        (2, 2, 1, [(3, 3)], 12),
        (1, 3, 1, [(3, 3)], 12),
        (2, 4, 1, [(3, 3)], 8),
        (1, 4, 1, [(3, 3)], 8),
        (2, 4, 1, [(3, 3)], 4),
    ],
    group_divisor=4,
    out_channels=None,
    embed_dim=192,
    pooling_func="ASTP",
    global_context_att=True,
)
SHAPES = ((1, 3.0), (16, 3.0))  # batch, seconds


def main():
    """Prints a line per shape, and writes all of it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=30.0, help="of timing per shape [30]")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if not (arguments.reference / "redimnet" / "model.py").is_file():
        parser.error(f"{arguments.reference} is no checkout of the reference implementation (redimnet/model.py)")
    sys.path.insert(0, str(arguments.reference))
    torch.set_num_threads(arguments.threads)

    rows = []
    for hop in (240, 160):
        reference, ours = build_pair(dict(B2, hop_length=hop))
        for batch, seconds in SHAPES:
            row = {"model": "b2", "hop_ms": hop / 16, "batch": batch, "seconds": seconds}
            row |= compare(reference, ours, torch.randn(batch, int(seconds * 16000)), arguments.seconds)
            rows.append(row)
            print(
                f"b2, hop {row['hop_ms']:g} ms, {batch} x {seconds:g} s: "
                f"reference {row['reference_ms']['median']:.1f} ms, "
                f"ours {row['ours_ms']['median']:.1f} ms, ratio {row['ratio']:.2f}"
            )
    record = {"machine": machine(), "threads": arguments.threads, "torch": torch.__version__, "rows": rows}
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


def build_pair(model_config: dict):
    """The reference with random weights and lived-in batch norms, and its conversion."""
    from redimnet.model import ReDimNetWrap

    torch.manual_seed(0)
    reference = ReDimNetWrap(**model_config).eval()
    for module in reference.modules():
        if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    ours = convert_checkpoint({"model_config": model_config, "state_dict": reference.state_dict()})
    return reference, ours


@torch.inference_mode()
def compare(reference, ours, waveform: torch.Tensor, seconds: float) -> dict:
    """Checks that both agree, then times them in turns: quartiles in ms and the ratio of medians."""
    expected, answer = reference(waveform), ours(waveform).embeddings
    error = float((answer - expected).norm() / expected.norm())
    if error > 1e-4:
        raise RuntimeError(f"The two do not agree: relative error {error:.1e}.")
    calls = {"reference": lambda: reference(waveform), "ours": lambda: ours(waveform)}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():  # warm-up
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1000 * (time.perf_counter() - start))
    spread = {f"{name}_ms": quartiles(values) for name, values in times.items()}
    ratio = spread["reference_ms"]["median"] / spread["ours_ms"]["median"]
    return {"relative_error": error, **spread, "runs": len(times["ours"]), "ratio": ratio}


def quartiles(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "low": low, "high": high}


def machine() -> str:
    """Processor and system, in words."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{names[0] if names else platform.processor()}, {len(names)} cores, {platform.system()}"


if __name__ == "__main__":
    main()
