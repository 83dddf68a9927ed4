"""Speed and memory of two checkouts of this project side by side: what a change costs, or brings.

    python benchmarks/before_after.py OTHER_CHECKOUT --out docs/results/before_after

Each checkout works in processes of its own, with the same random weights and noise. For every case the two take turns,
one call each, so that what else happens on the machine meets both. Where memory lies differs from one start of a
process to the next and moves a time by up to a tenth, so each case is started several times. Memory is the peak of a
fresh process's resident memory above what it had with the model built, which differs from start to start, too. With
`--tensors` the bytes of torch's tensors at their peak are counted instead, by its profiler, and nothing is timed; what
else runs does not matter. This checkout's models run with `mrl_redimnet.speed_up`, where it exists.
"""

import argparse
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from timing import machine

HERE = Path(__file__).resolve().parents[1]
SPEAKERS = 5_994
EMBEDDING = {"b2, 1 x 3 s": ("b2", [3.0]), "b2, 16 x 3 s": ("b2", [3.0] * 16),
             "b2, mixed, 1 to 8 s": ("b2", [1.0 + 0.5 * i for i in range(15)]),
             "b0, 16 x 3 s": ("b0", [3.0] * 16), "redimnet2-nano, 16 x 3 s": ("redimnet2-nano", [3.0] * 16),
             "nano, 16 x 3 s": ("nano", [3.0] * 16)}  # fmt: skip
TRAINING = {"step nano, 32 x 2 s": ("nano", 32), "step b0, 16 x 2 s": ("b0", 16), "step b2, 16 x 2 s": ("b2", 16),
            "step redimnet2-nano, 32 x 2 s": ("redimnet2-nano", 32)}  # fmt: skip
LOSSES = {"loss aam, 256 x 5,994 speakers": {"loss": "aam"},
          "loss sphereface2, 256 x 5,994 speakers": {"loss": "sphereface2"}}  # fmt: skip
CASES = (*EMBEDDING, *TRAINING, *LOSSES)


def main():
    """Parses the command line, lets both take turns, writes and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="a checkout of another commit")
    parser.add_argument("--out", type=Path, help="OUT.json and OUT.md [only printed]")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, metavar="CASE", help="some of the cases")
    parser.add_argument("--starts", type=int, default=5, help="how often both are started, for every case [5]")
    parser.add_argument("--rounds", type=int, default=8, help="calls of each after a start [8]")
    parser.add_argument("--tensors", action="store_true", help="only the peak of torch's tensors in one call of each")
    parser.add_argument("--plain", action="store_true", help="without speed_up here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.plain)
        return
    command = shlex.join(["python", *sys.argv]).replace(str(arguments.other), "OTHER_CHECKOUT")
    if arguments.tensors:
        compare_tensors(command, arguments)
        return
    record = {"command": command, "machine": machine(), "torch": version("torch"), "cases": {}}
    for case in arguments.cases:
        record["cases"][case] = compare(case, arguments)
        print(table({case: record["cases"][case]}).splitlines()[-1], flush=True)
    if arguments.out:
        arguments.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        head = (
            f"# Speed and memory before and after\n\n```bash\n{record['command']}\n```\n\n{record['machine']}, torch "
            f"{record['torch']}. {arguments.starts} starts; in each both take turns, {arguments.rounds} calls each. "
            "Times: medians [quartiles] of all calls. Ratio: of each start the median over its turns; of these the "
            "median [lowest, highest]. Random weights and noise. Memory: the peak above that with the model built, "
            "median over starts.\n\n"
        )
        arguments.out.with_suffix(".md").write_text(head + table(record["cases"]) + "\n")


def compare(case: str, arguments) -> dict:
    """Milliseconds of every call and peak memory in MiB of both, in a list for each start."""
    found: dict[str, list] = {"before_ms": [], "after_ms": [], "before_mib": [], "after_mib": []}
    for _ in range(arguments.starts):
        workers = [start(folder, case, arguments.plain) for folder in (arguments.other.resolve(), HERE)]
        times: list[list[float]] = [[], []]
        for _ in range(arguments.rounds):
            for worker, calls in zip(workers, times, strict=True):
                worker.stdin.write("call\n")
                worker.stdin.flush()
                calls.append(float(worker.stdout.readline()))
        for name, worker, calls in zip(("before", "after"), workers, times, strict=True):
            peak, _ = worker.communicate("stop\n")
            found[f"{name}_ms"].append(calls)
            found[f"{name}_mib"].append(float(peak))
    return found


def compare_tensors(command: str, arguments) -> None:
    """Prints and writes the peak of torch's tensors of both."""
    lines = ["| case | before, MiB | after, MiB | after / before |", "|---" * 4 + "|"]
    for case in arguments.cases:
        peaks = []
        for folder in (arguments.other.resolve(), HERE):
            worker = start(folder, case, arguments.plain)
            peaks.append(float(worker.communicate("tensors\n")[0].split()[0]))
        lines.append(f"| {case} | {peaks[0]:,.1f} | {peaks[1]:,.1f} | {peaks[1] / peaks[0]:.3f} |")
        print(lines[-1], flush=True)
    if arguments.out:
        head = (
            f"# Memory of tensors before and after\n\n```bash\n{command}\n```\n\n{machine()}, torch "
            f"{version('torch')}. Bytes of all tensors that one call allocates, at their peak, "
            "as torch's profiler counts them.\n\n"
        )
        arguments.out.with_suffix(".md").write_text(head + "\n".join(lines) + "\n")


def start(folder: Path, case: str, plain: bool) -> subprocess.Popen:
    """A process that works in a checkout, ready for calls."""
    paths = os.pathsep.join(map(str, (folder, folder / "src", HERE / "benchmarks")))
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, __file__, ".", "--worker", case, *(["--plain"] if plain else [])]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
                              cwd=folder)  # fmt: skip
    if worker.stdout.readline() != "ready\n":
        raise RuntimeError(f"{folder}: {case} did not start.")
    return worker


def work(case: str, plain: bool):
    """Answers each line on the standard input by the milliseconds of a call; at the end, the peak of memory."""
    call = make_call(case, plain)
    before = peak_mib()
    call()
    call()
    print("ready", flush=True)
    for line in sys.stdin:
        if line == "stop\n":
            break
        if line == "tensors\n":
            print(tensors_mib(call))
            continue
        began = time.perf_counter()
        call()
        print(1000 * (time.perf_counter() - began), flush=True)
    print(peak_mib() - before)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def tensors_mib(call) -> float:
    """The most that torch's tensors take up in a call beyond what they had before it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        call()
    with tempfile.TemporaryDirectory() as folder:
        watched.export_chrome_trace(f"{folder}/trace.json")
        trace = json.loads(Path(folder, "trace.json").read_text())
    events = sorted(
        (event["ts"], event["args"]["Bytes"]) for event in trace["traceEvents"] if event["name"] == "[memory]"
    )
    taken = peak = 0
    for _, size in events:
        taken += size
        peak = max(peak, taken)
    return peak / 2**20


def make_call(case: str, plain: bool):
    """The case as a function, with this process's checkout."""
    import torch

    from configuration_mrl_redimnet import MRLReDimNetConfig
    from modeling_mrl_redimnet import MRLReDimNetForXVector

    torch.manual_seed(0)
    size, options = "b0", LOSSES.get(case, {})
    if case in EMBEDDING:
        size = EMBEDDING[case][0]
    elif case in TRAINING:
        size = TRAINING[case][0]
    config = MRLReDimNetConfig.from_size(size, num_speakers=SPEAKERS, **options)
    model = MRLReDimNetForXVector(config)
    if not plain and Path("src/mrl_redimnet/speed").is_dir():
        from mrl_redimnet.speed import speed_up

        speed_up(model)
    if case in EMBEDDING:
        seconds = EMBEDDING[case][1]
        lengths = torch.tensor([round(16_000 * each) for each in seconds])
        waves = 0.1 * torch.randn(len(seconds), int(lengths.max()))
        mask = (torch.arange(waves.shape[1]) < lengths[:, None]).long()
        encoder = model.redimnet.eval()

        @torch.inference_mode()
        def call():
            encoder(waves, mask)

        return call
    if case in TRAINING:
        crops = TRAINING[case][1]
        waves, labels = 0.1 * torch.randn(crops, 32_000), torch.randint(SPEAKERS, (crops,))
        optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-6, momentum=0.9)

        def call():
            model(waves, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return call
    embeddings = torch.randn(256, config.embedding_size, requires_grad=True)
    labels = torch.randint(SPEAKERS, (256,))

    def call():
        model.classifier(embeddings, labels)[0].backward()
        embeddings.grad = None
        model.classifier.zero_grad()

    return call


def table(cases: dict[str, dict]) -> str:
    """Medians and spreads of both, and the ratio of each start."""
    lines = ["| case | before, ms | after, ms | after / before | before, MiB | after, MiB |", "|---" * 6 + "|"]
    for case, found in cases.items():
        before, after = (quartiles(sum(found[f"{name}_ms"], [])) for name in ("before", "after"))
        memory = [f"{statistics.median(found[f'{name}_mib']):,.0f}" for name in ("before", "after")]
        ratios = [
            statistics.median(b / a for a, b in zip(*calls, strict=True))
            for calls in zip(found["before_ms"], found["after_ms"], strict=True)
        ]
        ratio = f"{statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]"
        lines.append(f"| {case} | {before} | {after} | {ratio} | {' | '.join(memory)} |")
    return "\n".join(lines)


def quartiles(values: list[float]) -> str:
    """Median [quartiles]."""
    ordered = sorted(values)
    low, middle, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.25, 0.5, 0.75))
    return f"{middle:,.1f} [{low:,.1f}, {high:,.1f}]"


if __name__ == "__main__":
    main()
