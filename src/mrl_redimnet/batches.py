"""Training batches: which crop, from which utterance, with what done to it. All of it a function of (seed, draw).

A draw is a number 0, 1, 2, ... that counts training examples over the whole run and all processes. Everything random
about example n comes from generators seeded by (seed, n), so a run that is resumed, or has another number of workers,
sees the same examples.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torchaudio
from datasets import Dataset

from mrl_redimnet.audio import SAMPLING_RATE, AudioError, read_audio
from mrl_redimnet.corpus import AUDIO_SUFFIXES, SpeakerTable

SAMPLERS = ("speaker", "utterance")


class InDomain:
    """Brings crops into a domain (see `mrl_redimnet.domains`), except for a share that stays as it is."""

    def __init__(self, domain, base_share: float = 0.1):
        self.domain, self.base_share = domain, base_share

    def __call__(self, crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """crop [samples] float32 -> the same in the domain, by the generator's draws."""
        return crop if rng.random() < self.base_share else self.domain(crop, rng)


class AddNoise:
    """Adds a stretch of a drawn noise file at a drawn signal-to-noise ratio, with some probability.

    folder: noise files, at any depth. snr: [low, high] in dB, drawn uniformly; a ratio of powers over the crop.
    """

    def __init__(self, folder: str | Path, snr: tuple[float, float] = (0.0, 15.0), probability: float = 0.6):
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"noise folder: {folder} is not a folder.")
        self.files = sorted(str(p) for p in Path(folder).rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES)
        if not self.files:
            raise FileNotFoundError(f"noise folder: no audio ({', '.join(AUDIO_SUFFIXES)}) below {folder}.")
        self.snr, self.probability = snr, probability

    def __call__(self, crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """crop [samples] float32 -> the same with noise, by the generator's draws."""
        if rng.random() >= self.probability:
            return crop
        noise = fitted(read_audio(self.files[rng.integers(len(self.files))]), len(crop), rng)
        return mix_at_snr(crop, noise, rng.uniform(*self.snr))


def mix_at_snr(signal: np.ndarray, noise: np.ndarray, snr: float) -> np.ndarray:
    """signal + noise, both [samples], the noise scaled so that 10 log10 (signal power / noise power) = snr dB.

    A silent signal or noise stays as it is: there is no such ratio.
    """
    signal_power, noise_power = float(np.mean(signal**2)), float(np.mean(noise**2))
    if signal_power == 0 or noise_power == 0:
        return signal
    gain = np.sqrt(signal_power / noise_power * 10 ** (-snr / 10))
    return (signal + gain * noise).astype(np.float32)


def fitted(audio: np.ndarray, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Exactly `samples` of audio: a drawn stretch of a longer one, a shorter one repeated from a drawn start."""
    if len(audio) > samples:
        start = rng.integers(len(audio) - samples + 1)
        return audio[start : start + samples]
    if len(audio) == samples:
        return audio
    start = rng.integers(len(audio))
    return np.resize(np.roll(audio, -start), samples)


@dataclass
class Problem:
    """An example that could not be read."""

    path: str
    reason: str


@dataclass
class CropDataset(torch.utils.data.Dataset):
    """Example n of a training run: {"input_values": [samples] float32, "label": int}, or a Problem.

    corpus: from `load_corpus`, usable rows only. sampler: "utterance" passes over all utterances in a new order each
    epoch; "speaker" passes over all speakers and draws an utterance of each, longer ones more often.
    speeds: playback speeds, one drawn per example. Each but the first is a set of speakers of its own (speed moves
    pitch and formants): label = speaker + len(speakers) * index of the speed.
    targets: labels of the corpus's rows where it is not the speakers that are learnt; speeds do not change them.
    """

    corpus: Dataset
    speakers: SpeakerTable
    crop_seconds: float = 2.0
    sampler: str = "speaker"
    speeds: tuple[float, ...] = (1.0,)
    augmentations: list = field(default_factory=list)
    seed: int = 0
    targets: np.ndarray | None = None

    def __post_init__(self):
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler: got {self.sampler!r}, expected one of {', '.join(SAMPLERS)}.")
        self._files = [audio["path"] for audio in self.corpus["audio"]]
        self._seconds = np.array(self.corpus["seconds"])
        names = np.array(self.corpus["speaker"])
        self._labels = np.array([self.speakers.id(name) for name in names])
        order = np.argsort(self._labels, kind="stable")
        edges = np.flatnonzero(np.diff(self._labels[order])) + 1
        self._rows_of_speaker = np.split(order, edges)
        self._epoch, self._order = -1, np.empty(0, dtype=int)

    @property
    def num_labels(self) -> int:
        """Classes: speakers times speeds."""
        return len(self.speakers) * len(self.speeds)

    @property
    def epoch_length(self) -> int:
        """Draws in one pass over the utterances, or over the speakers."""
        return len(self._files) if self.sampler == "utterance" else len(self._rows_of_speaker)

    def __getitem__(self, draw: int) -> dict | Problem:
        rng = np.random.default_rng([self.seed, 1, draw])
        row = self._row(draw, rng)
        speed = int(rng.integers(len(self.speeds)))
        try:
            crop = self._crop(row, self.speeds[speed], rng)
            for augment in self.augmentations:
                crop = augment(crop, rng)
        except AudioError as error:
            return Problem(self._files[row], str(error))
        if self.targets is not None:
            return {"input_values": crop, "label": self.targets[row].item()}
        return {"input_values": crop, "label": int(self._labels[row]) + speed * len(self.speakers)}

    def _row(self, draw: int, rng: np.random.Generator) -> int:
        epoch, position = divmod(draw, self.epoch_length)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, 0, epoch]).permutation(self.epoch_length)
            self._epoch = epoch
        chosen = self._order[position]
        if self.sampler == "utterance":
            return int(chosen)
        rows = self._rows_of_speaker[chosen]
        return int(rng.choice(rows, p=self._seconds[rows] / self._seconds[rows].sum()))

    def _crop(self, row: int, speed: float, rng: np.random.Generator) -> np.ndarray:
        """A drawn stretch of one utterance, played at `speed`, [crop samples] float32."""
        samples = round(self.crop_seconds * SAMPLING_RATE)
        wanted = self.crop_seconds * speed
        start = rng.uniform(0, max(0.0, self._seconds[row] - wanted))
        audio = read_audio(self._files[row], start=start, seconds=wanted)
        if speed != 1.0:
            faster = torchaudio.functional.resample(
                torch.from_numpy(audio), round(SAMPLING_RATE * speed), SAMPLING_RATE
            )
            audio = faster.numpy()
        if abs(len(audio) - samples) <= 2:  # rounding of the stretch, not a short utterance
            return np.resize(audio, samples)
        return fitted(audio, samples, rng)


@dataclass(frozen=True)
class DrawBatches:
    """Batches of draw numbers for one process: micro-batches from `first` to before `stop`.

    Micro-batch k of all processes together holds B * world draws from k * B * world on; each process has its B.
    """

    batch_size: int
    rank: int = 0
    world: int = 1
    first: int = 0
    stop: int = 0

    def __len__(self) -> int:
        return self.stop - self.first

    def __iter__(self) -> Iterator[list[int]]:
        for k in range(self.first, self.stop):
            start = (k * self.world + self.rank) * self.batch_size
            yield list(range(start, start + self.batch_size))


def collate(examples: list[dict | Problem]) -> dict:
    """Examples to {"input_values": [B, T], "labels": [B], "problems": [(path, reason)]}; B counts the readable ones."""
    good = [example for example in examples if not isinstance(example, Problem)]
    problems = [(example.path, example.reason) for example in examples if isinstance(example, Problem)]
    if not good:
        listed = "; ".join(f"{path}: {reason}" for path, reason in problems[:3])
        raise AudioError(f"No example of a whole batch of {len(examples)} could be read: {listed}")
    return {
        "input_values": torch.from_numpy(np.stack([example["input_values"] for example in good])),
        "labels": torch.tensor([example["label"] for example in good]),
        "problems": problems,
    }
