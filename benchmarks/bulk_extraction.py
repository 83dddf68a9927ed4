"""Bulk extraction: two processes against one, memory over a long list, and the command against the model alone.

    OMP_NUM_THREADS=1 python benchmarks/bulk_extraction.py SPEECH --out docs/results/bulk_extraction [--quick]

SPEECH: a folder of audio. Weights are random; every process computes with one thread. Needs two cores, and that
nothing else runs. Writes OUT.json and OUT.md. --quick: few utterances, to see that it runs.

Two processes: each embeds its share, with its own decoding, of a list that is the same for one; both start at once when
both are ready, and the slower one counts. Memory: a list names a few short pieces of speech again and again under
100,000 ids, a tiny network embeds it; the resident memory of the process and of its decoding process is read at every
5,000. The model alone: it is given the very batches of the command, decoded before.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import soundfile
import torch
from timing import machine, quartiles

from configuration_mrl_redimnet import MRLReDimNetConfig
from modeling_mrl_redimnet import MRLReDimNetModel
from mrl_redimnet.audio.io import SAMPLING_RATE, audio_info, read_audio
from mrl_redimnet.audio.scan import drawn, files_below
from mrl_redimnet.encoder import SpeakerEncoder
from mrl_redimnet.extraction.bulk import (
    Batch,
    Embedder,
    Extraction,
    Made,
    Parts,
    Process,
    Work,
    embed_corpus,
    part_files,
    part_size,
    whole,
)
from mrl_redimnet.extraction.inputs import Inputs
from mrl_redimnet.files import replace_file

STAGES = [dict(frequency_stride=stride, blocks=1, expansion=1, reduction=None) for stride in (1, 2)]
TINY = dict(num_mel_bins=24, base_channels=4, stages=STAGES, group_divisor=2, pooling_bottleneck=16)
PIECES, SHORTEST, LONGEST = 40, 0.3, 0.8  # of speech, in seconds, for the long list
WARM = 0.2  # of the long list, left out of the slope: the caches for the shapes of batches fill


@dataclass(frozen=True)
class Effort:
    """How much is measured. shared: utterances that two processes share, whole blocks for each; alone: those of the
    command against the model, by its size."""

    rounds: int
    shared: int
    alone: dict[str, int]
    long_list: int
    every: int


WHOLE = Effort(3, 384, {"nano": 192, "b0": 48}, 100_000, 5_000)
QUICK = Effort(2, 32, {"nano": 32}, 2_000, 200)
SHARED = "nano"


def main():
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("speech", type=Path)
    parser.add_argument("--out", type=Path, help="without suffix")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--child", nargs=4, metavar=("MANIFEST", "FOLDER", "SIZE", "WORKERS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != "1":
        parser.error("set OMP_NUM_THREADS=1: every process is to compute with one thread")
    torch.set_num_threads(1)
    if arguments.child is not None:
        child(arguments.speech, *arguments.child)
        return
    if arguments.out is None:
        parser.error("--out is needed")
    effort = QUICK if arguments.quick else WHOLE
    record = {
        "command": f"OMP_NUM_THREADS=1 python benchmarks/bulk_extraction.py SPEECH --out {arguments.out.name}"
        + (" --quick" if arguments.quick else ""),
        "machine": machine(),
        "threads": 1,
        "torch": torch.__version__,
    }
    for measure in (two_processes, against_model, memory):
        record[measure.__name__] = measure(arguments.speech, effort)
        text = report(record)
        write(arguments.out.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
        write(arguments.out.with_suffix(".md"), text)
    print(text)


def write(file: Path, text: str):
    replace_file(file, lambda target: target.write_text(text))


def encoder_of(size: str) -> SpeakerEncoder:
    """A network with random weights, always the same."""
    torch.manual_seed(0)
    config = MRLReDimNetConfig(**TINY) if size == "tiny" else MRLReDimNetConfig.from_size(size)
    model = MRLReDimNetModel(config).eval()
    return SpeakerEncoder(model, size)


def listed(speech: Path, file: Path, count: int) -> Path:
    """A manifest of `count` utterances, drawn; where there are fewer files, files come again under other ids."""
    files = drawn(files_below(speech), count)
    with file.open("w", newline="") as opened:
        rows = [(f"{number:06d}", files[number % len(files)].absolute()) for number in range(count)]
        csv.writer(opened).writerows([("id", "path"), *rows])
    return file


# ---------------------------------------------------------------- the command against the model


def against_model(speech: Path, effort: Effort) -> dict[str, dict]:
    """Of each size, `one_against_model`."""
    return {name: one_against_model(speech, name, count, effort.rounds) for name, count in effort.alone.items()}


def one_against_model(speech: Path, name: str, count: int, rounds: int) -> dict:
    """Utterances a second of the command with one decoding process and of the model alone, taking turns."""
    encoder = encoder_of(name)
    with tempfile.TemporaryDirectory() as folder:
        inputs = Inputs.find([listed(speech, Path(folder) / "list.csv", count)])
        embedder, how = Embedder(encoder), Extraction(workers=1)
        parts = Parts(Path(folder), Made.by(embedder), "")
        size = part_size(inputs.rows, how.part_size)
        work = Work(inputs, whole(inputs), parts, size, {}, embedder.extractor, how)
        batches = [item for item in work if isinstance(item, Batch)]
        seconds = sum(float(batch.lengths.sum()) for batch in batches) / SAMPLING_RATE
        padded = sum(batch.waves.numel() for batch in batches) / SAMPLING_RATE
        rates: dict[str, list[float]] = {"model": [], "command": []}
        for number in range(rounds + 1):
            began = time.perf_counter()
            for batch in batches:
                embedder(batch)
            between = time.perf_counter()
            done = embed_corpus(encoder, inputs, Path(folder) / f"{number}", how, Process())
            ended = time.perf_counter()
            if done.embedded != count:
                raise RuntimeError(f"{done.embedded} of {count} utterances were embedded: {done.problems[:3]}")
            if number:  # the first round warms up
                rates["model"].append(count / (between - began))
                rates["command"].append(count / (ended - between))
    spread = {of: quartiles(values) for of, values in rates.items()}
    ratio = quartiles([one / other for one, other in zip(rates["command"], rates["model"], strict=True)])
    print(f"{name}: the command at {ratio['median']:.2f} of the model's rate", flush=True)
    return {"utterances": count, "audio_s": seconds, "padding": padded / seconds - 1, **spread, "ratio": ratio}


# ---------------------------------------------------------------- two processes against one


def two_processes(speech: Path, effort: Effort) -> dict:
    """Utterances a second of one process and of two, taking turns, and how much of twice the one the two reach."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        manifest = listed(speech, Path(folder) / "list.csv", effort.shared)
        for number in range(effort.rounds):
            for processes in (1, 2):
                out = Path(folder) / f"{number}-{processes}"
                rates[processes].append(effort.shared / slowest(speech, manifest, out, SHARED, processes))
    efficiency = quartiles([two / one / 2 for one, two in zip(rates[1], rates[2], strict=True)])
    print(f"{SHARED}: two processes at {efficiency['median']:.2f} of twice one", flush=True)
    return {
        "model": SHARED,
        "utterances": effort.shared,
        "one": quartiles(rates[1]),
        "two": quartiles(rates[2]),
        "efficiency": efficiency,
    }


def slowest(speech: Path, manifest: Path, out: Path, size: str, processes: int) -> float:
    """Seconds that the slower of some processes takes for its share, after all are ready."""
    running = [start(speech, manifest, out, size, 0, number, processes) for number in range(processes)]
    for process in running:
        expect(process, "ready")
    for process in running:
        process.stdin.write("go\n")
        process.stdin.flush()
    return max(float(expect(process, "seconds").split()[1]) for process in running)


def start(speech: Path, manifest: Path, out: Path, size: str, workers: int, number: int = 0, count: int = 1):
    """This script as one process of a run, which says when it is ready and waits for a line."""
    command = [sys.executable, __file__, str(speech), "--child", str(manifest), str(out), size, str(workers)]
    environment = {**os.environ, "RANK": str(number), "WORLD_SIZE": str(count), "LOCAL_RANK": str(number)}
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def expect(process: subprocess.Popen, word: str) -> str:
    """The next line of a process, which begins with a word."""
    line = process.stdout.readline()
    if not line.startswith(word):
        raise RuntimeError(f"a process said {line!r} where {word!r} was expected")
    return line


def child(speech: Path, manifest: str, folder: str, size: str, workers: str):
    """One process of a run: loads, warms up, says so, waits, embeds, says how long that took."""
    encoder, how = encoder_of(size), Extraction(workers=int(workers))
    with torch.inference_mode():
        encoder.model(torch.zeros(1, SAMPLING_RATE))
    inputs = Inputs.find([manifest])
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    problems = embed_corpus(encoder, inputs, folder, how).problems
    if problems:
        raise RuntimeError(f"{len(problems)} utterances could not be embedded: {problems[:3]}")
    print(f"seconds {time.perf_counter() - began}", flush=True)


# ---------------------------------------------------------------- memory


def memory(speech: Path, effort: Effort) -> dict:
    """Resident megabytes of a process and its decoding process over a long list, and their slope."""
    samples = []
    with tempfile.TemporaryDirectory() as folder:
        pieces, out = Path(folder) / "pieces", Path(folder) / "out"
        cut_pieces(speech, pieces)
        manifest = listed(pieces, Path(folder) / "list.csv", effort.long_list)
        size = part_size(effort.long_list, Extraction().part_size)
        running = start(speech, manifest, out, "tiny", 1)
        expect(running, "ready")
        process, due = psutil.Process(running.pid), effort.every
        running.stdin.write("go\n")
        running.stdin.flush()
        while running.poll() is None and due <= effort.long_list - size:
            time.sleep(0.01)
            done = size * len(part_files(out)) if out.is_dir() else 0
            if done < due:
                continue
            try:
                used = [each.memory_info().rss / 1e6 for each in (process, *process.children())]
            except psutil.NoSuchProcess:
                break
            if len(used) == 1:  # the decoding process has read everything and is gone
                break
            samples.append({"utterances": done, "process_mb": used[0], "decoding_mb": used[1]})
            due = effort.every * (done // effort.every + 1)
        expect(running, "seconds")
    late = [sample for sample in samples if sample["utterances"] >= WARM * effort.long_list]
    slopes = {
        name: 1e5 * np.polyfit([s["utterances"] for s in late], [s[name] for s in late], 1)[0]
        for name in ("process_mb", "decoding_mb")
    }
    print("MB per 100,000 utterances: " + ", ".join(f"{name} {value:+.1f}" for name, value in slopes.items()))
    return {"utterances": effort.long_list, "samples": samples, "mb_per_100k": slopes}


def cut_pieces(speech: Path, folder: Path):
    """Short pieces of drawn files, of all lengths between two."""
    folder.mkdir()
    files = [file for file in files_below(speech) if audio_info(file).seconds >= LONGEST]
    if len(files) < 2:
        raise ValueError(f"{speech}: {len(files)} files of {LONGEST} s or more, at least two are needed")
    lengths = np.linspace(SHORTEST, LONGEST, PIECES)
    chosen = drawn(files, PIECES)
    for number, seconds in enumerate(lengths):
        wave = read_audio(chosen[number % len(chosen)], seconds=float(seconds))
        soundfile.write(folder / f"{number:02d}.wav", wave, SAMPLING_RATE)


# ---------------------------------------------------------------- what is written


def report(record: dict) -> str:
    """What is measured so far, as markdown."""
    text = [
        "# Bulk extraction",
        "",
        f"`{record['command']}`, {record['machine']}, one thread per process, torch {record['torch']}, random weights. "
        "Medians with quartiles; ratios are of runs that took turns.",
    ]
    sections = {"two_processes": told_processes, "against_model": told_against, "memory": told_memory}
    for name, lines_of in sections.items():
        text += ["", *lines_of(record[name])] if name in record else []
    return "\n".join(text) + "\n"


def told_processes(row: dict) -> list[str]:
    return [
        "## Two processes against one",
        "",
        "Utterances a second, each process with its own decoding inside; efficiency: two against twice one.",
        "",
        "| model | utterances | one process | two processes | efficiency |",
        "|---|---|---|---|---|",
        f"| {row['model']} | {row['utterances']} | {spread(row['one'])} | {spread(row['two'])} | "
        f"{spread(row['efficiency'], 2)} |",
    ]


def told_against(rows: dict[str, dict]) -> list[str]:
    return [
        "## The command against the model alone",
        "",
        "Utterances a second of `mrl-redimnet embed` (one process that embeds, one that decodes, from files to parts), "
        "and of the model given the same batches, decoded before. The start of the decoding process counts.",
        "",
        "| model | utterances | audio, s | padding | model alone | command | ratio |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {name} | {row['utterances']} | {row['audio_s']:.0f} | {100 * row['padding']:.1f} % | "
            f"{spread(row['model'])} | {spread(row['command'])} | {spread(row['ratio'], 2)} |"
            for name, row in rows.items()
        ),
    ]


def told_memory(held: dict) -> list[str]:
    slopes = held["mb_per_100k"]
    return [
        f"## Memory over {held['utterances']:,} utterances",
        "",
        f"Resident megabytes; slope after the first {100 * WARM:.0f} %: {slopes['process_mb']:+.1f} MB per 100,000 "
        f"utterances of the process that embeds, {slopes['decoding_mb']:+.1f} of the one that decodes.",
        "",
        "| utterances | embeds | decodes |",
        "|---|---|---|",
        *(f"| {s['utterances']:,} | {s['process_mb']:.0f} | {s['decoding_mb']:.0f} |" for s in held["samples"]),
    ]


def spread(values: dict[str, float], digits: int = 1) -> str:
    return f"{values['median']:.{digits}f} [{values['low']:.{digits}f}, {values['high']:.{digits}f}]"


if __name__ == "__main__":
    main()
