"""What a corpus of a million utterances costs in memory and time: its index, and streaming it.

    python benchmarks/corpus_scale.py [--utterances 1000000] [--speakers 6000] [--shards 100] [--out FILE.json]

The index is simulated: rows as `load_corpus` makes them of a folder, without audio. Shards are small parquet files of
random bytes in place of audio; what is streamed of them is counted, not decoded. Every measurement is of a process of
its own: resident memory in MB after it, and the peak.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from mrl_redimnet.data.corpus import SpeakerTable, labels_of, seconds_of, speakers_of, split_usable
from mrl_redimnet.data.prepare import FEATURES
from mrl_redimnet.data.streaming import SpeechStream

AUDIO_BYTES = 30_000  # an eight-second utterance of VoxCeleb2 in AAC, about
ROWS_PER_SHARD = 500
STREAMED = (1, 10, 100)


def main():
    """Prints a line per step, and writes all of them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--utterances", type=int, default=1_000_000)
    parser.add_argument("--speakers", type=int, default=6_000)
    parser.add_argument("--shards", type=int, default=100, help="small parquet files to stream (15 MB each)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--index", help=argparse.SUPPRESS)
    parser.add_argument("--stream", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.index is not None:
        print(json.dumps(measure_index(arguments.index)))
        return
    if arguments.stream is not None:
        print(json.dumps(measure_stream(arguments.stream[0], int(arguments.stream[1]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_index(Path(folder), arguments.utterances, arguments.speakers)
        steps = in_process("--index", folder)
        show(f"index of {arguments.utterances:,} utterances, {arguments.speakers:,} speakers", steps)
    with tempfile.TemporaryDirectory() as folder:
        make_shards(Path(folder), arguments.shards)
        streamed = [in_process("--stream", folder, str(n)) for n in STREAMED if n <= arguments.shards]
        show(f"streaming shards of {ROWS_PER_SHARD} x {AUDIO_BYTES / 1000:g} kB", [s for run in streamed for s in run])
    if arguments.out is not None:
        facts = {"utterances": arguments.utterances, "speakers": arguments.speakers, "rows_per_shard": ROWS_PER_SHARD}
        facts |= {"audio_bytes": AUDIO_BYTES, "index": steps, "streaming": [s for run in streamed for s in run]}
        arguments.out.write_text(json.dumps(facts, indent=1) + "\n")


def in_process(*options: str) -> list[dict]:
    """The measurements that this script prints when it is called with `options`."""
    command = [sys.executable, __file__, *options]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def show(title: str, steps: list[dict]):
    print(title)
    for step in steps:
        print("  {step:<44} {seconds:8.2f} s {resident:8.0f} MB, peak {peak:6.0f} MB".format(**step))


@dataclass
class Steps:
    """Time and memory after each of several steps."""

    done: list[dict] = field(default_factory=list)
    since: float = field(default_factory=time.perf_counter)

    def note(self, step: str):
        seconds = time.perf_counter() - self.since
        resident = psutil.Process().memory_info().rss / 1e6
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        self.done.append({"step": step, "seconds": seconds, "resident": resident, "peak": peak})
        self.since = time.perf_counter()


def make_index(folder: Path, utterances: int, speakers: int):
    """The Arrow table that `load_corpus` caches, sorted by path, with one file in a thousand unusable."""
    rng = np.random.default_rng(0)
    of_speaker = np.sort(rng.integers(speakers, size=utterances))
    text = datasets.Value("string")
    features = datasets.Features({"audio": datasets.Audio(decode=False), "path": text, "speaker": text})
    features |= {"session": text, "seconds": datasets.Value("float64"), "problem": text}
    features = datasets.Features(features)
    with pq.ParquetWriter(folder / "index.parquet", features.arrow_schema) as writer:
        for first in range(0, utterances, 100_000):
            names = [f"id{speaker:05d}" for speaker in of_speaker[first : first + 100_000]]
            paths = [f"{name}/{n // 8:011d}/{n % 8:05d}.m4a" for n, name in enumerate(names, first)]
            rows = {
                "audio": pa.array([{"bytes": None, "path": f"/data/vox2/dev/aac/{path}"} for path in paths]).cast(
                    features.arrow_schema.field("audio").type
                ),
                "path": paths,
                "speaker": names,
                "session": [path.split("/")[1] for path in paths],
                "seconds": rng.gamma(4, 2, len(paths)),
                "problem": ["broken" if draw == 0 else "" for draw in rng.integers(1000, size=len(paths))],
            }
            writer.write_table(pa.table(rows, schema=features.arrow_schema))


def measure_index(folder: str) -> list[dict]:
    """Loads the index and does what a training run does with it."""
    datasets.disable_progress_bars()
    source = {"data_files": f"{folder}/index.parquet", "split": "train", "cache_dir": f"{folder}/cache"}
    steps = Steps()
    steps.note("start (imports)")
    datasets.load_dataset("parquet", **source)
    steps.note("written to the cache (first use)")
    data = datasets.load_dataset("parquet", **source)
    steps.note("loaded from the cache")
    usable, problems = split_usable(data, 0.3)
    steps.note(f"split_usable ({len(problems):,} left out)")
    table = SpeakerTable(speakers_of(usable))
    steps.note(f"speakers_of ({len(table):,})")
    labels = labels_of(usable, table)
    steps.note("labels_of")
    seconds = seconds_of(usable)
    steps.note("seconds_of")
    order = np.random.default_rng([0, 0]).permutation(len(labels)).astype(np.int32)
    np.argsort(labels, kind="stable")
    steps.note("sampler order")
    for row in order[:1000].tolist():
        usable[row]["audio"]
    steps.note(f"1,000 random rows (of {seconds.sum() / 3600:,.0f} h)")
    return steps.done


def make_shards(folder: Path, shards: int):
    """Parquet files as `mrl-redimnet prepare` writes them, of random bytes."""
    rng = np.random.default_rng(0)
    for shard in range(shards):
        rows = [
            {
                "audio": {"bytes": rng.bytes(AUDIO_BYTES), "path": f"id{row}/v/{shard}.m4a"},
                "speaker": f"id{row}",
                "session": "v",
                "path": f"id{row}/v/{shard}.m4a",
                "seconds": 8.0,
            }
            for row in range(ROWS_PER_SHARD)
        ]
        table = pa.Table.from_pylist(rows, FEATURES.arrow_schema)
        pq.write_table(table, folder / f"{shard:05d}.parquet", row_group_size=100, compression="none")


def size_of(source, row, rng) -> int:
    """In place of a crop: how many bytes its audio has."""
    return len(source.data)


def measure_stream(folder: str, shards: int) -> list[dict]:
    """Reads the first `shards` files' worth of a stream."""
    datasets.disable_progress_bars()
    steps = Steps()
    stream = SpeechStream(folder, size_of)
    read = sum(item.example for item, _ in zip(stream, range(shards * ROWS_PER_SHARD), strict=False))
    steps.note(f"{shards} shards, {read / 1e6:,.0f} MB of audio")
    return steps.done


if __name__ == "__main__":
    main()
