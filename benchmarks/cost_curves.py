"""Time and peak memory of an embedding over the length of an utterance and over the size of a batch.

    python benchmarks/cost_curves.py --out docs/results/cost_curves [--models nano b2] [--threads 2] [--quick]

Weights are random and audio is noise: neither matters for cost. Each point is measured in a process of its own, whose
memory nothing else has touched: after a first call on 0.1 s, how much the process's peak grows in one call,
then the time of calls in a row. Lengths reach an hour in windows as the model makes them by itself
(`window_seconds`), and four minutes in one piece, where attention shows. OUT.json is written after each point, and a
second call goes on from there; OUT.md and OUT.png at the end. --quick: nano and few points, to see that it runs. Run
it while nothing else runs.
"""

import argparse
import json
import math
import multiprocessing
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from memory import peak_resident, resident
from timing import machine, quartiles

from configuration_mrl_redimnet import SAMPLING_RATE, SIZES, MRLReDimNetConfig
from modeling_mrl_redimnet import MRLReDimNetModel
from mrl_redimnet.export import export_onnx
from mrl_redimnet.files import replace_file

LENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 120.0, 240.0, 480.0, 900.0, 1800.0, 3600.0)  # seconds
LONGEST_PIECE = 240.0  # without windows: attention's memory grows with the square
BATCHES, BATCH_SECONDS = (1, 2, 4, 8, 16, 32, 64), 3.0
TIMING_SECONDS, MOST_CALLS = 3.0, 50  # of each point
ONCE_SECONDS = 10.0
EAGER, ONNX = "eager", "ONNX Runtime"
CURVES = {  # of time and memory, by name: title and x axis
    "length": ("one utterance, in windows", "seconds of audio"),
    "piece": ("one utterance, in one piece", "seconds of audio"),
    "batch": (f"utterances of {BATCH_SECONDS:g} s", "utterances in a batch"),
}


@dataclass(frozen=True)
class Point:
    """What is embedded: `batch` utterances of `seconds`, whole or in the model's windows."""

    curve: str
    model: str
    backend: str
    seconds: float
    batch: int = 1

    @property
    def x(self) -> float:
        return self.batch if self.curve == "batch" else self.seconds

    @property
    def name(self) -> str:
        return f"{self.curve}, {self.model}, {self.backend}, {self.batch} x {self.seconds:g} s"


def points(model: str, quick: bool) -> list[Point]:
    """All points of a model's curves. An exported file knows no windows: its longest piece is a window."""
    window = MRLReDimNetConfig.from_size(model).window_seconds
    lengths, batches, longest = (LENGTHS[:5], BATCHES[:3], 8.0) if quick else (LENGTHS, BATCHES, LONGEST_PIECE)
    whole = [*(length for length in lengths if window <= length < longest), longest]
    found = [Point("length", model, EAGER, length) for length in lengths]
    found += [Point("piece", model, EAGER, length) for length in whole]
    found += [Point("piece", model, ONNX, length) for length in lengths if length <= window]
    return found + [Point("batch", model, each, BATCH_SECONDS, batch) for each in (EAGER, ONNX) for batch in batches]


def main():
    """Measures point by point and writes what is known after each; tables and picture at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    parser.add_argument("--models", nargs="+", choices=SIZES, help="[nano b2]")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    record = resumed(arguments)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for model in arguments.models or (["nano"] if arguments.quick else ["nano", "b2"]):
            for point in points(model, arguments.quick):
                if point.name not in record["points"]:
                    row = in_new_process(measure, point, onnx_file(point, Path(folder)), arguments.threads)
                    record["points"][point.name] = asdict(point) | row
                    tell(record["points"][point.name])
                    content = json.dumps(record, indent=1) + "\n"
                    replace_file(arguments.out.with_suffix(".json"), lambda file, text=content: file.write_text(text))
    figure, picture = plot(record), arguments.out.with_suffix(".png")
    replace_file(picture, lambda file: figure.savefig(file, dpi=110, format="png"))
    text = report(record, picture.name)
    replace_file(arguments.out.with_suffix(".md"), lambda file: file.write_text(text))


def resumed(arguments) -> dict:
    """The record in OUT.json, or a new one. Raises ValueError where that one was measured otherwise."""
    versions = {name: metadata.version(name) for name in ("torch", "onnxruntime")}
    settings = {"machine": machine(), "threads": arguments.threads, "quick": arguments.quick, "versions": versions}
    target = arguments.out.with_suffix(".json")
    if target.exists():
        record = json.loads(target.read_text())
        if record["settings"] != settings:
            was = record["settings"]
            raise ValueError(f"{target} was measured with {was}, not {settings}: remove it to begin anew.")
    else:
        record = {"commands": [], "settings": settings, "points": {}}
    command = shlex.join(["python", "benchmarks/cost_curves.py", *sys.argv[1:]])
    record["commands"] += [command] if command not in record["commands"] else []
    return record


def onnx_file(point: Point, folder: Path) -> Path | None:
    """The point's model as an ONNX file, written once; None where it needs none."""
    if point.backend != ONNX:
        return None
    path = folder / f"{point.model}.onnx"
    if not path.exists():
        in_new_process(export, point.model, path)
    return path


def export(model: str, path: Path):
    """A process's work: exporting takes memory, which is then not this one's."""
    export_onnx(MRLReDimNetModel(MRLReDimNetConfig.from_size(model)).eval(), path, mask=False)


# ---------------------------------------------------------------- measuring


def in_new_process(function: Callable, *arguments):
    """The function's answer from a process that has loaded torch and the model's code, and done nothing yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["memory", "timing", "modeling_mrl_redimnet", "mrl_redimnet.export"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


@torch.inference_mode()
def measure(point: Point, onnx: Path | None, threads: int) -> dict:
    """A process's work: quartiles of a call's seconds, how many were timed, growth of the process's peak in bytes."""
    torch.set_num_threads(threads)
    embed = embedder(point, onnx, threads)
    waves = torch.randn(point.batch, round(point.seconds * SAMPLING_RATE)) * 0.1
    embed(waves[:1, : SAMPLING_RATE // 10])
    before, times = resident(), []

    def timed():
        start = time.perf_counter()
        embed(waves)
        times.append(time.perf_counter() - start)

    peak = peak_resident(timed) - before
    if times[0] < ONCE_SECONDS:  # the first call has asked the system for its memory, which takes a while
        times.clear()
        while not times or (sum(times) < TIMING_SECONDS and len(times) < MOST_CALLS):
            timed()
    spread = quartiles(times) if len(times) > 1 else dict.fromkeys(("median", "low", "high"), times[0])
    return {"time_s": spread, "calls": len(times), "peak_bytes": max(0, peak)}


def embedder(point: Point, onnx: Path | None, threads: int) -> Callable[[torch.Tensor], object]:
    """What embeds waveforms [B, T]."""
    if onnx is None:
        whole = {"window_seconds": 2 * LENGTHS[-1]} if point.curve == "piece" else {}
        return MRLReDimNetModel(MRLReDimNetConfig.from_size(point.model, **whole)).eval()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(onnx), options, providers=["CPUExecutionProvider"])
    return lambda waves: session.run(None, {"input_values": waves.numpy()})


# ---------------------------------------------------------------- telling


def tell(row: dict):
    times = row["time_s"]
    print(
        f"{row['curve']:<7} {row['model']:<5} {row['backend']:<13} {row['batch']:>3} x {row['seconds']:<6g} s: "
        f"{1e3 * times['median']:,.1f} ms ({row['calls']} calls), {row['peak_bytes'] / 2**20:,.0f} MiB",
        flush=True,
    )


def curves(record: dict, kind: str) -> dict[tuple[str, str], list[dict]]:
    """{(model, backend): rows by growing x} of one kind of curve."""
    found: dict[tuple[str, str], list[dict]] = {}
    for row in record["points"].values():
        if row["curve"] == kind:
            found.setdefault((row["model"], row["backend"]), []).append(row)
    return {key: sorted(rows, key=x_of) for key, rows in found.items()}


def x_of(row: dict) -> float:
    return row["batch"] if row["curve"] == "batch" else row["seconds"]


def exponents(rows: list[dict]) -> list[float]:
    """Of time, between neighbouring points: 1 is in proportion, 2 is with the square."""
    return [
        math.log(b["time_s"]["median"] / a["time_s"]["median"]) / math.log(x_of(b) / x_of(a)) for a, b in pairwise(rows)
    ]


def report(record: dict, picture: str) -> str:
    """Markdown: how it was measured, the steepest places, and a table per curve."""
    settings = record["settings"]
    versions = ", ".join(f"{name} {number}" for name, number in settings["versions"].items())
    quick = "; a quick try" if settings["quick"] else ""
    text = f"""# Time and memory over length and batch size

```bash
{chr(10).join(record["commands"])}
```

![Time and memory]({picture})

{settings["machine"]}, threads: {settings["threads"]}, {versions}{quick}. float32, a hop of 10 ms, random weights,
noise; each point in a process of its own. Time: median [quartiles] of calls in a row after a first one, for
{TIMING_SECONDS:g} s and at most {MOST_CALLS}; where the first takes more than {ONCE_SECONDS:g} s, it is the one that
counts. Memory: growth of the process's peak in its first call at that size, weights and audio not counted. Real-time
factor: time by the audio's duration. Exponent: p where time grows as the p-th power between a point and the one before;
below 1 where a fixed cost is shared, 2 where the square rules.

| curve | model | backend | steepest | between |
|---|---|---|---:|---|
"""
    for kind, (title, axis) in CURVES.items():
        for (model, backend), rows in curves(record, kind).items():
            if len(rows) > 1:
                steepest, (a, b) = max(zip(exponents(rows), pairwise(rows), strict=True), key=lambda pair: pair[0])
                where = f"{x_of(a):g} and {x_of(b):g} {axis}"
                text += f"| {title} | {model} | {backend} | {steepest:.2f} | {where} |\n"
    for kind, (title, axis) in CURVES.items():
        for (model, backend), rows in curves(record, kind).items():
            text += table(f"{model}, {backend}: {title}", axis, rows)
    return text


def table(title: str, axis: str, rows: list[dict]) -> str:
    lines = ["", f"## {title}", "", f"| {axis} | ms | calls | real-time factor | exponent | memory, MiB |"]
    lines.append("|" + "---:|" * 6)
    for row, exponent in zip(rows, [None, *exponents(rows)], strict=True):
        times = [f"{1e3 * row['time_s'][name]:,.1f}" for name in ("median", "low", "high")]
        factor = row["time_s"]["median"] / (row["batch"] * row["seconds"])
        cells = [f"{x_of(row):g}", f"{times[0]} [{times[1]}, {times[2]}]", str(row["calls"]), f"{factor:.4f}"]
        cells += ["" if exponent is None else f"{exponent:.2f}", f"{row['peak_bytes'] / 2**20:,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(record: dict) -> Figure:
    """Time above, memory below; length in windows and in one piece to the left, batch size to the right."""
    figure = Figure(figsize=(13, 9), layout="constrained")
    axes = figure.subplots(2, 2)
    colours = {model: f"C{i}" for i, model in enumerate(dict.fromkeys(r["model"] for r in record["points"].values()))}
    for row, (value, label) in enumerate(
        ((lambda r: r["time_s"]["median"], "seconds"), (lambda r: r["peak_bytes"] / 2**20, "MiB above what was there"))
    ):
        for column, kinds in enumerate((("length", "piece"), ("batch",))):
            ax = axes[row, column]
            for kind in kinds:
                plot_curves(ax, record, kind, value, colours)
            ax.set(xscale="log", yscale="log", xlabel=CURVES[kinds[0]][1], ylabel=label)
            ax.set_title(("time" if row == 0 else "memory") + " of " + ("one utterance", "a batch of 3 s each")[column])
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_major_formatter("{x:g}")
                axis.set_minor_formatter(NullFormatter())
            ax.grid(alpha=0.3, which="both")
            ax.legend(fontsize=8)
    return figure


def plot_curves(ax: Axes, record: dict, kind: str, value: Callable[[dict], float], colours: dict[str, str]):
    for (model, backend), rows in curves(record, kind).items():
        style = {"color": colours[model], "linestyle": "--" if kind == "piece" else "-", "markersize": 4}
        label = f"{model}, {backend}" + (", in one piece" if kind == "piece" else "")
        mark = "o" if backend == EAGER else "s"
        face = None if backend == EAGER else "white"
        ax.plot([x_of(r) for r in rows], [value(r) for r in rows], label=label, marker=mark, mfc=face, **style)


if __name__ == "__main__":
    main()
