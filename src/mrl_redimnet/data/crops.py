"""Training batches: which crop, from which utterance, with what done to it. All of it a function of (seed, draw).

A draw is a number 0, 1, 2, ... that counts training examples over the whole run and all processes. Everything random
about example n comes from generators seeded by (seed, n), so a run that is resumed, or has another number of workers
or processes, sees the same examples.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from datasets import Dataset
from torchaudio.transforms import Resample

from configuration_mrl_redimnet import SAMPLING_RATE
from mrl_redimnet.audio.augmentation import Chain, InDomain, fitted
from mrl_redimnet.audio.io import AudioError, Encoded, name_of, read_audio
from mrl_redimnet.audio.material import MaterialError, draw_readable
from mrl_redimnet.data.corpus import SpeakerTable, audio_source, labels_of, seconds_of
from mrl_redimnet.streams import Stream

SAMPLERS = ("speaker", "utterance")


@dataclass
class Problem:
    """An example that could not be read."""

    path: str
    reason: str


@dataclass(frozen=True)
class CropMaker:
    """How a stretch of an utterance becomes a training example.

    speakers: how many there are. speeds: playback speeds, one drawn per example. Each but the first is a set of
    speakers of its own (speed moves pitch and formants): label = speaker + speakers * index of the speed.
    augment: augment(crop, rng, strength) -> crop, see `mrl_redimnet.audio.augmentation.Chain`; None: crops as they are.
    keep_clean: examples also hold the crop as it was before `augment`, for a teacher.
    """

    speakers: int
    speeds: tuple[float, ...] = (1.0,)
    augment: Callable | None = None
    keep_clean: bool = False

    def draw_speed(self, rng: np.random.Generator) -> int:
        """The index of a drawn speed."""
        return int(rng.integers(len(self.speeds)))

    def make(
        self,
        source: str | Encoded,
        utterance_seconds: float,
        speaker: int,
        rng: np.random.Generator,
        seconds: float,
        strength: float = 1.0,
        speed: int | None = None,
    ) -> dict | Problem:
        """A crop of `seconds` -> {"input_values": [samples] float32, "label": int, "made_in": seconds of work}.

        With `keep_clean` there is also "clean_values" [samples] float32, the same crop before it was augmented.
        speed: an index into `speeds`; None draws one. A file that cannot be read gives a Problem.
        """
        began = time.perf_counter()
        speed = self.draw_speed(rng) if speed is None else speed
        try:
            crop = clean = self._crop(source, utterance_seconds, self.speeds[speed], rng, seconds)
            if not crop.any():
                raise AudioError(
                    f"{name_of(source)} is silent where a crop was drawn from: leave it out if all of it is"
                )
            if self.augment is not None:
                crop = self.augment(crop, rng, strength)
        except MaterialError:  # of what the crop is augmented with: not this utterance's fault
            raise
        except AudioError as error:
            return Problem(source.name if isinstance(source, Encoded) else source, str(error))
        label = speaker + speed * self.speakers
        example = {"input_values": crop, "label": label}
        if self.keep_clean:
            example["clean_values"] = clean
        return {**example, "made_in": time.perf_counter() - began}

    def _crop(
        self, source: str | Encoded, available: float, speed: float, rng: np.random.Generator, seconds: float
    ) -> np.ndarray:
        """A drawn stretch of one utterance, played at `speed`, [crop samples] float32."""
        samples, wanted = round(seconds * SAMPLING_RATE), seconds * speed
        start = rng.uniform(0, max(0.0, available - wanted))
        audio = read_audio(source, start=start, seconds=wanted)
        if speed != 1.0:
            audio = _player(speed)(torch.from_numpy(audio)).numpy()
        if abs(len(audio) - samples) <= 2:  # rounding of the stretch, not a short utterance
            return np.resize(audio, samples)
        return fitted(audio, samples, rng)


def augmented(
    chain: Chain, domain: InDomain | None, crop: np.ndarray, rng: np.random.Generator, strength: float
) -> np.ndarray:
    """crop [samples] float32, augmented, then brought into a domain."""
    crop = chain(crop, rng, strength)
    return crop if domain is None else domain(crop, rng)


@dataclass
class CorpusTalkers:
    """Talkers for babble: the training speech itself."""

    corpus: Dataset

    def __post_init__(self) -> None:
        self._seconds = seconds_of(self.corpus).astype(np.float32)

    def draw(self, rng: np.random.Generator, samples: int) -> np.ndarray:
        """`samples` of a drawn utterance, from a drawn place, float32; a shorter one is repeated, another one drawn for
        one that cannot be read.
        """
        return draw_readable(lambda: self._stretch(rng, samples), "training speech for babble")

    def _stretch(self, rng: np.random.Generator, samples: int) -> np.ndarray:
        row, wanted = int(rng.integers(len(self.corpus))), samples / SAMPLING_RATE
        start = rng.uniform(0, max(0.0, float(self._seconds[row]) - wanted))
        return fitted(read_audio(audio_source(self.corpus, row), start=start, seconds=wanted), samples, rng)


@lru_cache
def _player(speed: float) -> Resample:
    """Plays audio at `speed`; kept, because its filter takes longer to make than to use."""
    return Resample(round(SAMPLING_RATE * speed), SAMPLING_RATE)


@dataclass
class CropDataset(torch.utils.data.Dataset):
    """Example n of a training run: what `CropMaker.make` makes of an utterance, or a Problem.

    Examples also have "utterance": the corpus's row that the crop is from, -1 where it is played at another speed than
    1.0 and therefore sounds like somebody else.

    corpus: from `load_corpus`, usable rows only; speakers: of them. sampler: "utterance" passes over all utterances
    in a new order each epoch; "speaker" passes over all speakers and draws `utterances_per_speaker` utterances of
    each, longer ones more often, none twice where there are enough; they follow each other and have one speed.
    crop_seconds: (shortest, longest), drawn anew every `batch` examples. strength: the augmentations' at a draw.
    targets: labels of the corpus's rows where it is not the speakers that are learnt; speeds do not change them.
    """

    corpus: Dataset
    speakers: SpeakerTable
    maker: CropMaker
    crop_seconds: tuple[float, float] = (2.0, 2.0)
    batch: int = 1
    sampler: str = "speaker"
    utterances_per_speaker: int = 1
    strength: Callable[[int], float] | None = None
    seed: int = 0
    targets: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler: got {self.sampler!r}, expected one of {', '.join(SAMPLERS)}.")
        self._seconds = seconds_of(self.corpus).astype(np.float32)
        self._labels = labels_of(self.corpus, self.speakers)
        self._by_speaker = np.argsort(self._labels, kind="stable").astype(np.int32)
        self._first = np.flatnonzero(np.diff(self._labels[self._by_speaker], prepend=-1))
        self._epoch, self._order = -1, np.empty(0, dtype=int)

    @property
    def epoch_length(self) -> int:
        """Draws in one pass over the utterances, or over the speakers."""
        return len(self._labels) if self.sampler == "utterance" else len(self._first) * self.utterances_per_speaker

    def __getitem__(self, draw: int) -> dict | Problem:
        rng = Stream.CROP.generator(self.seed, draw)
        row, speed = self.corpus_row(draw, rng)
        speed = self.maker.draw_speed(rng) if speed is None else speed
        shortest, longest = self.crop_seconds
        if longest > shortest:
            shortest = Stream.CROP_SECONDS.generator(self.seed, draw // self.batch).uniform(shortest, longest)
        example = self.maker.make(
            audio_source(self.corpus, row),
            float(self._seconds[row]),
            int(self._labels[row]),
            rng,
            shortest,
            1.0 if self.strength is None else self.strength(draw),
            speed,
        )
        if isinstance(example, Problem):
            return example
        if self.targets is not None:
            example["label"] = self.targets[row].item()
        return {**example, "utterance": row if speed == 0 else -1}

    def corpus_row(self, draw: int, rng: np.random.Generator) -> tuple[int, int | None]:
        """The corpus's row of a draw, and its speed where that is the group's and not its own."""
        if self.sampler == "utterance":
            return int(self._in_order(draw, len(self._labels))), None
        group, member = divmod(draw, self.utterances_per_speaker)
        speaker = self._in_order(group, len(self._first))
        end = self._first[speaker + 1] if speaker + 1 < len(self._first) else len(self._by_speaker)
        rows = self._by_speaker[self._first[speaker] : end]
        shares = self._seconds[rows].astype(np.float64)
        shares /= shares.sum()
        if self.utterances_per_speaker == 1:
            return int(rng.choice(rows, p=shares)), None
        of_group = Stream.SPEAKER_GROUP.generator(self.seed, group)
        chosen = of_group.choice(rows, min(self.utterances_per_speaker, len(rows)), replace=False, p=shares)
        return int(chosen[member % len(chosen)]), self.maker.draw_speed(of_group)

    def _in_order(self, count: int, length: int) -> int:
        """Item `count` of an endless sequence of permutations of `length` items."""
        epoch, position = divmod(count, length)
        if epoch != self._epoch:
            self._order = Stream.CORPUS_ORDER.generator(self.seed, epoch).permutation(length).astype(np.int32)
            self._epoch = epoch
        return int(self._order[position])


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
    """Examples to {"input_values": [B, T], "labels": [B], "problems": [(path, reason)], "made_in": seconds}.

    Where the examples have them, also "clean_values" [B, T] and "utterances" [B], see `CropMaker` and `CropDataset`.
    B counts the readable ones; made_in is the work of one process on all of them. Raises AudioError when none is.
    """
    good = [example for example in examples if not isinstance(example, Problem)]
    problems = [(example.path, example.reason) for example in examples if isinstance(example, Problem)]
    if not good:
        listed = "; ".join(f"{path}: {reason}" for path, reason in problems[:3])
        raise AudioError(f"No example of a whole batch of {len(examples)} could be read: {listed}")
    batch = {
        "input_values": torch.from_numpy(np.stack([example["input_values"] for example in good])),
        "labels": torch.tensor([example["label"] for example in good]),
        "problems": problems,
        "made_in": sum(example["made_in"] for example in good),
    }
    if "clean_values" in good[0]:
        batch["clean_values"] = torch.from_numpy(np.stack([example["clean_values"] for example in good]))
    if "utterance" in good[0]:
        batch["utterances"] = torch.tensor([example["utterance"] for example in good])
    return batch
