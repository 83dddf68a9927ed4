"""What the metrics and a bootstrap over speakers cost from ten thousand to ten million scores.

    python benchmarks/metrics_at_size.py [--quick] [--out FOLDER]

Scores are drawn from two normals, 2 % of the trials are targets, of 1,000 speakers. Every line is a process of its own:
seconds of the call, and the memory it had at its peak beyond what the trials themselves take, per trial. `module eer`
is metrics/eer as an `evaluate` module, adding the trials included. `resample NAME` is one resample of a bootstrap,
without its one sort: multiply by the number of resamples. The value stands beside what two normals have in theory.
"""

import argparse
import functools
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import NormalDist

import numpy as np
from timing import machine

from mrl_redimnet.files import replace_file
from mrl_redimnet.scoring import metrics

SIZES = (10_000, 100_000, 1_000_000, 10_000_000)
SHIFT, TARGETS, SPEAKERS = 2.5, 0.02, 1000
RESAMPLES = 6
NORMAL = NormalDist()
METRICS = {
    "eer": metrics.eer,
    "eer_convex_hull": metrics.eer_convex_hull,
    "min_dcf": metrics.min_dcf,
    "act_dcf": metrics.act_dcf,
    "cllr": metrics.cllr,
    "min_cllr": metrics.min_cllr,
    "auc": metrics.auc,
}
THEORY = {
    "eer": NORMAL.cdf(-SHIFT / 2),
    "eer_convex_hull": NORMAL.cdf(-SHIFT / 2),
    "module eer": NORMAL.cdf(-SHIFT / 2),
    "auc": NORMAL.cdf(SHIFT / 2**0.5),
}


def main():
    """Prints a line per measurement, and writes all of them as JSON and as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest two sizes only")
    parser.add_argument("--out", type=Path, help="folder for metrics_at_size.json and .md")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(json.dumps(measure(arguments.measure[0], int(arguments.measure[1]))))
        return
    names = [*METRICS, "module eer", *(f"resample {name}" for name in METRICS)]
    rows = []
    for trials in SIZES[:2] if arguments.quick else SIZES:
        for name in names:
            rows.append(in_process(name, trials))
            print("{name:<26}{trials:>12,}{seconds:>10.3f} s{bytes_per_trial:>8.0f} bytes a trial".format(**rows[-1]))
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        facts = {"machine": machine(), "python": platform.python_version()}
        facts |= {"numpy": np.__version__, "targets": TARGETS, "speakers": SPEAKERS, "rows": rows}
        text = json.dumps(facts, indent=1) + "\n"
        replace_file(arguments.out / "metrics_at_size.json", lambda file: file.write_text(text))
        head = f"`python benchmarks/metrics_at_size.py --out docs/results`; {machine()}, numpy {np.__version__}.\n\n"
        replace_file(arguments.out / "metrics_at_size.md", lambda file: file.write_text(head + table(rows)))


def in_process(name: str, trials: int) -> dict:
    """One measurement, in a process of its own: a peak of memory is that of a process's whole life."""
    command = [sys.executable, __file__, "--measure", name, str(trials)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(name: str, trials: int) -> dict:
    """Seconds, peak bytes a trial beyond the trials, and value; of a resample: seconds of one, without the sort."""
    scores, labels, enrol, test = draw_trials(trials)
    kind, _, of_kind = name.partition(" ")
    if kind == "module":
        run = module_run(of_kind)  # loaded beforehand
    elif kind == "resample":
        run = functools.partial(bootstrap_seconds, METRICS[of_kind], enrol, test)
    else:
        run = METRICS[name]
    METRICS[of_kind or name](scores[:1000], labels[:1000])  # what is loaded on first use
    before, start = peak_bytes(), time.perf_counter()
    value = run(scores, labels)
    seconds = time.perf_counter() - start
    row = {"name": name, "trials": trials, "seconds": seconds, "bytes_per_trial": (peak_bytes() - before) / trials}
    return row | ({"seconds": value} if kind == "resample" else {"value": value, "theory": THEORY.get(name)})


def draw_trials(trials: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Scores (as llrs of two normals), labels, and both speakers as numbers, [trials] each."""
    rng = np.random.default_rng(0)
    labels = rng.random(trials, dtype=np.float32) < TARGETS
    scores = rng.standard_normal(trials)
    scores += SHIFT * labels
    scores *= SHIFT
    scores -= SHIFT**2 / 2
    enrol = rng.integers(SPEAKERS, size=trials)
    test = np.where(labels, enrol, (enrol + rng.integers(1, SPEAKERS, size=trials)) % SPEAKERS)
    return scores, labels, enrol, test


def bootstrap_seconds(metric, enrol, test, scores, labels) -> float:
    """Seconds of one resample of the speakers, the median of a few: weights and metric, without the sort."""
    ends = []

    def noted(scores, labels, weights):
        value = metric(scores, labels, weights=weights)
        ends.append(time.perf_counter())
        return value

    metrics.bootstrap_values(scores, labels, enrol, test, noted, RESAMPLES)
    return float(np.median(np.diff(ends)))


def module_run(name: str):
    import evaluate

    cache = tempfile.TemporaryDirectory()
    module = evaluate.load(str(Path(__file__).parent.parent / "metrics" / name), cache_dir=cache.name)

    def run(scores, labels, cache=cache):
        return module.compute(predictions=scores, references=labels)[name]

    return run


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table(rows: list[dict]) -> str:
    """A line per name, a column per size: seconds, and bytes a trial at the largest."""
    sizes = sorted({row["trials"] for row in rows})
    found = {(row["name"], row["trials"]): row for row in rows}
    lines = ["| seconds | " + " | ".join(f"{size:,}" for size in sizes) + " | bytes a trial | value | theory |"]
    lines.append("|---" * (len(sizes) + 4) + "|")
    for name in dict.fromkeys(row["name"] for row in rows):
        last = found[name, sizes[-1]]
        ends = [f"{last['bytes_per_trial']:.0f}"]
        ends += ["" if last.get(key) is None else f"{last[key]:.5f}" for key in ("value", "theory")]
        cells = [f"{found[name, size]['seconds']:.3g}" for size in sizes] + ends
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
