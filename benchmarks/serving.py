"""What serving embeddings through adapters costs: cold starts, memory, swaps, mixed batches, concurrent callers.

    python benchmarks/serving.py --out docs/results/serving [--quick]

b2 with random weights, LoRA adapters on all its linear layers (r=8) made here, noise of 3 s. What is compared takes
turns; a cold start is a process of its own, with the files in the system's cache. OUT.md and OUT.json are rewritten
after each part. Run it while nothing else runs.
"""

import argparse
import importlib.util
import json
import queue
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from adapter_costs import ADAPTERS, NO_DATA, SWAPPED, build_base, embedding_of, give_effect, noise, paragraph, table_row
from memory import in_fresh_process, resident
from timing import machine, quartiles, speedup, take_turns
from transformers.utils.logging import disable_progress_bar

from mrl_redimnet.adapters import AdapterBank, AdapterFacts, Base, fingerprint
from mrl_redimnet.adapters.strategies import Vanilla
from mrl_redimnet.export import export_onnx

SECONDS = 3.0  # of an utterance
KINDS = 8  # different adapters
BATCH = 8
CALLERS = (1, 4, 16)
AGREEMENT = 1e-4  # relative, of embeddings by all ways
# Programs of the cold starts: arguments are the time they were started at, threads, and what is loaded.
TIMED = """
import json, sys, time
marks = [float(sys.argv[1]), time.time()]
{imports}
marks.append(time.time())
{load}
marks.append(time.time())
for _ in range(2):
    {embed}
    marks.append(time.time())
pages = int(open("/proc/self/statm").read().split()[1])
print(json.dumps([b - a for a, b in zip(marks, marks[1:])] + [pages * 4096 / 2**20]))
"""
TORCH = "import torch\ntorch.set_num_threads(int(sys.argv[2]))"
COLD_STARTS = {
    "eager": TIMED.format(
        imports=f"{TORCH}\nfrom mrl_redimnet import MRLReDimNetModel",
        load="model, x = MRLReDimNetModel.from_pretrained(sys.argv[3]).eval(), torch.zeros(1, 48000)",
        embed="with torch.inference_mode(): model(x)",
    ),
    "bank with one adapter": TIMED.format(
        imports=f"{TORCH}\nfrom mrl_redimnet.adapters import AdapterBank",
        load="bank, x = AdapterBank.load(sys.argv[3], {'one': sys.argv[4]}), torch.zeros(1, 48000)",
        embed="bank.embed(x, adapter='one')",
    ),
    "onnxruntime": TIMED.format(
        imports="import numpy, onnxruntime\noptions = onnxruntime.SessionOptions()\n"
        "options.intra_op_num_threads = int(sys.argv[2])",
        load="session = onnxruntime.InferenceSession(sys.argv[5], options, providers=['CPUExecutionProvider'])\n"
        "x = {'input_values': numpy.zeros((1, 48000), numpy.float32)}",
        embed="session.run(None, x)",
    ),
}
PHASES = ("interpreter", "imports", "load", "first embedding", "second embedding")


@dataclass(frozen=True)
class Effort:
    """starts: cold starts of each kind; loaded: adapters at once; swaps; rounds of batches: seconds, fewest, most;
    turns of the callers, and seconds of each."""

    starts: int = 5
    loaded: int = 50
    swaps: int = 50
    batches: tuple[float, int, int] = (40.0, 5, 50)
    turns: int = 3
    turn_seconds: float = 4.0


QUICK = Effort(starts=2, loaded=3, swaps=4, batches=(0.0, 2, 2), turns=1, turn_seconds=1.0)


def main():
    """Measures part by part; prints and writes what is known after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    parser.add_argument("--size", default="b2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="little of everything: to see that it runs")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    record = {"command": shlex.join(["python", *sys.argv]), "machine": machine(), "threads": arguments.threads}
    record |= {"torch": torch.__version__, "size": arguments.size}
    effort = QUICK if arguments.quick else Effort()
    with tempfile.TemporaryDirectory() as folder:
        files = save_all(arguments.size, Path(folder))
        bank = AdapterBank.load(files.base, {f"a{i}": path for i, path in enumerate(files.adapters)})
        parts = {
            "cold_starts": lambda: cold_starts(files, effort, arguments.threads),
            "memory": lambda: in_fresh_process(load_many, files, effort, preload=["mrl_redimnet.adapters.bank"]),
            "swaps_ms": lambda: swaps(files, effort),
            "batches": lambda: batches(bank, effort),
            "callers": lambda: callers(bank, effort),
        }
        for part, measure in parts.items():
            began = time.perf_counter()
            record[part] = measure()
            arguments.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
            arguments.out.with_suffix(".md").write_text(report(record))
            print(f"{part}: measured in {time.perf_counter() - began:.0f} s", flush=True)
    print(report(record))


# ----------------------------------------------------------------------------------------------------------------------
# Files


@dataclass(frozen=True)
class Files:
    """A saved base, adapters of it, and the base as an ONNX file; None where what exports it is not installed."""

    base: Path
    adapters: list[Path]
    onnx: Path | None


def save_all(size: str, folder: Path) -> Files:
    """Makes them below `folder`."""
    base = build_base(size)
    base.save_pretrained(folder / "base")
    facts = AdapterFacts("noise", Base(size, None, fingerprint(base)))
    adapters = [folder / f"adapter{seed}" for seed in range(KINDS)]
    for seed, path in enumerate(adapters):
        strategy = Vanilla(build_base(size), ADAPTERS[SWAPPED], NO_DATA)
        give_effect(strategy, seed)
        strategy.save(path)
        facts.save(path)
    onnx = None
    if all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
        onnx = export_onnx(base, folder / "base.onnx", mask=False)
    return Files(folder / "base", adapters, onnx)


# ----------------------------------------------------------------------------------------------------------------------
# Cold starts, memory, swaps


def cold_starts(files: Files, effort: Effort, threads: int) -> dict[str, dict]:
    """By kind: seconds of each phase and MiB of the process at its end, quartiles over starts that take turns."""
    kinds = [kind for kind in COLD_STARTS if kind != "onnxruntime" or files.onnx is not None]
    found = {kind: [] for kind in kinds}
    for _ in range(effort.starts + 1):
        for kind in kinds:
            paths = [str(files.base), str(files.adapters[0]), str(files.onnx)]
            command = [sys.executable, "-c", COLD_STARTS[kind], str(time.time()), str(threads), *paths]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            found[kind].append(json.loads(run.stdout))
    columns = {kind: list(zip(*rows[1:], strict=True)) for kind, rows in found.items()}  # the first fills the cache
    return {
        kind: {
            **{phase: quartiles(values) for phase, values in zip(PHASES, rows, strict=False)},
            "until the first": quartiles([sum(values) for values in zip(*rows[:4], strict=True)]),
            "memory_mib": quartiles(rows[-1]),
        }
        for kind, rows in columns.items()
    }


def load_many(files: Files, effort: Effort) -> dict[str, float]:
    """Loads many adapters into a bank, in a process of its own: MiB of each, and of its file; ms of the first (hashing
    the base), an early and a late one."""
    torch.set_num_threads(1)
    disable_progress_bar()
    bank = AdapterBank.load(files.base)
    seconds = []
    for index in range(effort.loaded + 1):
        if index == 1:  # the first brings libraries with it
            before = resident()
        start = time.perf_counter()
        bank.add(f"b{index}", files.adapters[index % KINDS])
        seconds.append(time.perf_counter() - start)
    each = (resident() - before) / effort.loaded
    numbers = sum(p.numel() for name, p in bank.peft.named_parameters() if "lora_" in name and ".b0." in name)
    return {
        "adapters": effort.loaded,
        "each_mib": each / 2**20,
        "numbers_mib": 4 * numbers / 2**20,
        "file_mib": (files.adapters[0] / "adapter_model.safetensors").stat().st_size / 2**20,
        "base_mib": 4 * sum(p.numel() for name, p in bank.peft.named_parameters() if "lora_" not in name) / 2**20,
        "add_first_ms": 1000 * seconds[0],
        "add_early_ms": 1000 * float(np.median(seconds[1:6])),
        "add_late_ms": 1000 * float(np.median(seconds[-5:])),
    }


def swaps(files: Files, effort: Effort) -> dict[str, dict]:
    """Milliseconds of `set_adapter` with few and many adapters loaded, by their number."""
    bank = AdapterBank.load(files.base)
    found = {}
    for count in (2, effort.loaded):
        for index in range(len(bank.names), count):
            bank.add(f"b{index}", files.adapters[index % KINDS])
        times = []
        for turn in range(effort.swaps):
            start = time.perf_counter()
            bank.set_adapter(bank.names[turn % count])
            times.append(1000 * (time.perf_counter() - start))
        found[str(count)] = quartiles(times) | {"p95": float(np.quantile(times, 0.95))}
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Batches, callers


def batches(bank: AdapterBank, effort: Effort) -> dict[str, dict]:
    """Utterances a second of batches of one kind and mixed ones, and their speed by that of the base."""
    waveforms, names = noise(BATCH, SECONDS), bank.names
    rows = {
        "the base": None,
        "one adapter": names[0],
        "two adapters": [names[i % 2] for i in range(BATCH)],
        f"{KINDS} adapters": [names[i % KINDS] for i in range(BATCH)],
        "half one adapter, half the base": [names[0] if i % 2 else None for i in range(BATCH)],
    }
    calls = {name: lambda adapter=adapter: bank.embed(waveforms, adapter=adapter) for name, adapter in rows.items()}
    mixed = rows[f"{KINDS} adapters"]
    alone = [bank.embed(x[None], adapter=name) for x, name in zip(waveforms, mixed, strict=True)]
    check_equal(bank.embed(waveforms, adapter=mixed), torch.cat(alone))
    times = take_turns(calls, *effort.batches)
    return {
        name: {
            "per_second": quartiles([BATCH / s for s in values]),
            "by_base": speedup(times, "the base", name),
            "by_one_adapter": speedup(times, "one adapter", name),
        }
        for name, values in times.items()
    }


class Gatherer:
    """Micro-batches: calls that wait while a batch runs make up the next one. All utterances are of one length."""

    def __init__(self, bank: AdapterBank, most: int = 16):
        self.bank, self.most, self.waiting = bank, most, queue.SimpleQueue()
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def embed(self, waveform: torch.Tensor, adapter: str | None) -> torch.Tensor:
        """[1, T] -> [1, D], from any thread."""
        answer = Future()
        self.waiting.put((waveform, adapter, answer))
        return answer.result()

    def close(self):
        """Ends the thread."""
        self.waiting.put(None)
        self.thread.join()

    def _serve(self):
        while (first := self.waiting.get()) is not None:
            batch = [first]
            while len(batch) < self.most and not self.waiting.empty():
                if (another := self.waiting.get()) is None:
                    return
                batch.append(another)
            waveforms, adapters, answers = zip(*batch, strict=True)
            try:
                embeddings = self.bank.embed(torch.cat(waveforms), adapter=list(adapters))
            except Exception as error:  # the callers' concern, each's
                for answer in answers:
                    answer.set_exception(error)
                continue
            for answer, embedding in zip(answers, embeddings.split(1), strict=True):
                answer.set_result(embedding)


def callers(bank: AdapterBank, effort: Effort) -> dict[str, dict]:
    """By way and number of callers, each in a thread that calls without pause: utterances a second, latencies in ms."""
    gatherer, plain = Gatherer(bank), embedding_of(bank.merged(bank.names[0]))
    ways = {
        "the model without a bank": lambda x, caller: plain(x),
        "a bank, one adapter": lambda x, caller: bank.embed(x, adapter=bank.names[0]),
        "a bank, an adapter for each": lambda x, caller: bank.embed(x, adapter=bank.names[caller % KINDS]),
        "micro-batches, one adapter": lambda x, caller: gatherer.embed(x, bank.names[0]),
        "micro-batches, an adapter for each": lambda x, caller: gatherer.embed(x, bank.names[caller % KINDS]),
    }
    waveform = noise(1, SECONDS)
    one, own, batched = (ways[name](waveform, 0) for name in list(ways)[1:4])
    check_equal(own, one)
    check_equal(batched, one)
    latencies = {(way, count): [] for way in ways for count in CALLERS}
    rates = {key: [] for key in latencies}
    for _ in range(effort.turns):
        for (way, count), found in latencies.items():
            new, elapsed = call_together(ways[way], waveform, count, effort.turn_seconds)
            found += new
            rates[way, count].append(len(new) / elapsed)
    gatherer.close()
    return {
        way: {
            str(count): {
                "per_second": float(np.median(rates[way, count])),
                "p50_ms": 1000 * float(np.quantile(latencies[way, count], 0.5)),
                "p99_ms": 1000 * float(np.quantile(latencies[way, count], 0.99)),
                "calls": len(latencies[way, count]),
            }
            for count in CALLERS
        }
        for way in ways
    }


def call_together(call: Callable, waveform: torch.Tensor, count: int, seconds: float) -> tuple[list[float], float]:
    """Seconds of every call that `count` threads made, each one after the other, and until the last had ended."""
    found: list[float] = []
    start = threading.Barrier(count)

    def work(caller: int):
        start.wait()
        end = time.perf_counter() + seconds
        while (began := time.perf_counter()) < end:
            call(waveform, caller)
            found.append(time.perf_counter() - began)

    threads = [threading.Thread(target=work, args=(caller,)) for caller in range(count)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found, time.perf_counter() - began


def check_equal(found: torch.Tensor, expected: torch.Tensor):
    """Raises RuntimeError where embeddings differ."""
    error = float((found - expected).norm() / expected.norm())
    if not error <= AGREEMENT:
        raise RuntimeError(f"The ways of embedding do not agree: relative error {error:.1e}.")


# ----------------------------------------------------------------------------------------------------------------------
# Report


def report(record: dict) -> str:
    """Markdown of the parts that were measured."""
    text = ["# What serving costs", "", f"```bash\n{record['command']}\n```", ""]
    text.append(
        paragraph(
            f"{record['machine']}, threads: {record['threads']}, torch {record['torch']}, float32. {record['size']}, "
            f"random weights, adapters: {SWAPPED}. Utterances of {SECONDS:g} s of noise. Median [quartiles]."
        )
    )
    sections = {"cold_starts": starts_report, "memory": memory_report, "swaps_ms": swaps_report}
    sections |= {"batches": batches_report, "callers": callers_report}
    for part, section in sections.items():
        if part in record:
            text += ["", *section(record[part])]
    return "\n".join(text) + "\n"


def starts_report(rows: dict) -> list[str]:
    """Seconds until the first embedding."""
    columns = ["", *(f"{phase}, s" for phase in PHASES), "until the first embedding, s", "by eager's", "memory, MiB"]
    text = ["## Cold start", "", table_row(columns), table_row(["---"] * len(columns))]
    for kind, row in rows.items():
        ratio = row["until the first"]["median"] / rows["eager"]["until the first"]["median"]
        cells = [spread(row[phase]) for phase in (*PHASES, "until the first")]
        text.append(table_row([kind, *cells, f"{ratio:.2f}", f"{row['memory_mib']['median']:.0f}"]))
    note = "A process of its own for each start, taking turns; files are in the system's cache. Memory: at its end."
    if "onnxruntime" not in rows:
        note += " onnxruntime: not measured, the packages that export are not installed."
    return [*text, "", paragraph(note)]


def memory_report(row: dict) -> list[str]:
    """What a loaded adapter costs."""
    return [
        "## Memory of adapters",
        "",
        paragraph(
            f"A bank with {row['adapters']} adapters: {row['each_mib']:.2f} MiB each, of which "
            f"{row['numbers_mib']:.2f} are its numbers (the file: {row['file_mib']:.2f}). The base's numbers: "
            f"{row['base_mib']:.1f} MiB, {row['base_mib'] / row['each_mib']:.0f} times as much as an adapter. Adding "
            f"one takes {row['add_early_ms']:.0f} ms while few are loaded, {row['add_late_ms']:.0f} ms as the last, "
            f"the first {row['add_first_ms']:.0f} ms."
        ),
    ]


def swaps_report(rows: dict) -> list[str]:
    """What a choice costs."""
    text = ["## Swaps", "", table_row(["adapters loaded", "`set_adapter`, ms", "95th percentile"])]
    text.append(table_row(["---"] * 3))
    return text + [table_row([count, spread(row), f"{row['p95']:.2f}"]) for count, row in rows.items()]


def batches_report(rows: dict) -> list[str]:
    """Throughput of batches."""
    columns = [f"{BATCH} utterances at once", "utterances a second", "speed by the base's", "by one adapter's"]
    text = ["## Mixed batches", "", table_row(columns), table_row(["---"] * len(columns))]
    for name, row in rows.items():
        text.append(table_row([name, *map(spread, (row["per_second"], row["by_base"], row["by_one_adapter"]))]))
    return text


def callers_report(rows: dict) -> list[str]:
    """Latency and throughput of concurrent callers."""
    columns = ["", "callers", "utterances a second", "by one caller's", "p50, ms", "by one caller's"]
    columns += ["p99, ms", "by one caller's p50", "calls"]
    text = ["## Concurrent callers", "", table_row(columns), table_row(["---"] * len(columns))]
    for way, counts in rows.items():
        alone = counts["1"]
        for count, row in counts.items():
            cells = [f"{row['per_second']:.1f}", f"{row['per_second'] / alone['per_second']:.2f}"]
            for quantile in ("p50_ms", "p99_ms"):
                cells += [f"{row[quantile]:.0f}", f"{row[quantile] / alone['p50_ms']:.2f}"]
            text.append(table_row([way, count, *cells, f"{row['calls']}"]))
    return [
        *text,
        "",
        paragraph(
            "Every caller is a thread that asks for one utterance after the other. Without micro-batches each call is "
            "a forward pass; a bank does one at a time, the model by itself as many as there are callers. "
            "Micro-batches: what waits while a batch runs is the next batch."
        ),
    ]


def spread(values: dict[str, float]) -> str:
    """Median and quartiles as a cell."""
    return f"{values['median']:.2f} [{values['low']:.2f}, {values['high']:.2f}]"


if __name__ == "__main__":
    main()
