"""Augmentations of training crops: noise, music, babble, rooms, codecs and channels, chained as a recipe says.

An augmentation is a callable: augment(crop [samples] float32 at 16 kHz, generator) -> [the same samples] float32, all
its draws from the generator, the crop itself left alone. A recipe's entry is a mapping: `kind`, of `AUGMENTATIONS`;
`probability` (1 unless given), with which it is applied; and the kind's options:

    - {kind: one_of, probability: 0.6, choices: [{kind: reverberation}, {kind: noise, snr: [0, 15]}]}
    - {kind: codec, probability: 0.2}

A new kind is an entry in `AUGMENTATIONS`: a class or function whose parameters are the kind's options, `sources` aside.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from configuration_mrl_redimnet import SAMPLING_RATE
from mrl_redimnet.audio.codecs import CODECS, band_limited, through_codec
from mrl_redimnet.audio.io import audio_info, read_audio
from mrl_redimnet.audio.material import draw_readable, usable_files
from mrl_redimnet.audio.rooms import RoomBank, reverberate
from mrl_redimnet.settings import nearest

Augmentation = Callable[[np.ndarray, np.random.Generator], np.ndarray]

# Files up to this length are decoded whole, which costs little more than to seek in them.
_SHORT_SECONDS = 10.0
_BAND_LIMIT_ORDER = 8  # of a low-pass run forwards and backwards: 96 dB an octave


# ---------------------------------------------------------------- recordings to draw from


class Talkers(Protocol):
    """Speech for babble."""

    def draw(self, rng: np.random.Generator, samples: int) -> np.ndarray:
        """[samples] float32 of one talker, who and from where is drawn by `rng`."""


@dataclass
class Recordings:
    """Audio files to draw stretches from. Of a long file only the stretch is decoded.

    files: paths of audio files. seconds: their lengths where they are known, else each file's header tells when it is
    first drawn. what: they are, for messages. Raises ValueError for no files.
    """

    files: Sequence[str]
    seconds: Sequence[float] | None = None
    what: str = "recording"
    _lengths: dict[int, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.files) == 0:
            raise ValueError("files: got none, expected at least one audio file.")
        if self.seconds is not None and len(self.seconds) != len(self.files):
            raise ValueError(f"seconds: got {len(self.seconds):,}, expected one for each of {len(self.files):,} files.")

    def draw(self, rng: np.random.Generator, samples: int) -> np.ndarray:
        """[samples] float32: a drawn stretch of a drawn file, each as often; a shorter file repeated, see `fitted`.

        A file that cannot be read is told once, as what it is, and another one drawn; `OTHER_DRAWS` in a row raise
        MaterialError.
        """
        return draw_readable(lambda: self._stretch(rng, samples), self.what)

    def _stretch(self, rng: np.random.Generator, samples: int) -> np.ndarray:
        index = int(rng.integers(len(self.files)))
        length = self._length(index)
        if length <= max(samples, _SHORT_SECONDS * SAMPLING_RATE):
            return fitted(read_audio(self.files[index]), samples, rng)
        start = int(rng.integers(length - samples + 1))
        stretch = read_audio(self.files[index], start=start / SAMPLING_RATE, seconds=samples / SAMPLING_RATE)
        return np.resize(stretch, samples)  # what a header promises may not be there

    def _length(self, index: int) -> int:
        """Samples at 16 kHz of one file."""
        if self.seconds is not None:
            return int(self.seconds[index] * SAMPLING_RATE)
        if index not in self._lengths:
            info = audio_info(self.files[index])
            frames = round(info.seconds * info.sampling_rate)
            self._lengths[index] = -(-frames * SAMPLING_RATE // info.sampling_rate)
        return self._lengths[index]


@dataclass
class FileTalkers(Recordings):
    """Talkers for babble from files of speech, one talker each."""

    what: str = "speech for babble"


def fitted(audio: np.ndarray, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Exactly `samples` of audio: a drawn stretch of a longer one, a shorter one repeated from a drawn start."""
    if len(audio) > samples:
        start = rng.integers(len(audio) - samples + 1)
        return audio[start : start + samples]
    if len(audio) == samples:
        return audio
    start = rng.integers(len(audio))
    return np.resize(np.roll(audio, -start), samples)


# ---------------------------------------------------------------- added to the crop


def mix_at_snr(signal: np.ndarray, noise: np.ndarray, snr: float) -> np.ndarray:
    """signal + noise, both [samples], the noise scaled so that 10 log10 (signal power / noise power) = snr dB.

    A silent signal or noise stays as it is: there is no such ratio.
    """
    signal_power, noise_power = float(np.mean(signal**2)), float(np.mean(noise**2))
    if signal_power == 0 or noise_power == 0:
        return signal
    gain = np.sqrt(signal_power / noise_power * 10 ** (-snr / 10))
    return (signal + gain * noise).astype(np.float32)


class AddNoise:
    """Adds a stretch of a drawn noise file at a drawn signal-to-noise ratio, with some probability.

    folder: noise files, at any depth. snr: [low, high] in dB, drawn uniformly; a ratio of powers over the crop.
    Files whose headers cannot be read are told and left out. Raises FileNotFoundError for a folder that is missing or
    without audio, AudioError where none of it can be read.
    """

    def __init__(self, folder: str | Path, snr: tuple[float, float] = (0.0, 15.0), probability: float = 0.6) -> None:
        self.files = usable_files(folder, "noise folder")
        self.snr, self.probability = snr, probability
        self._recordings = Recordings(self.files, what="noise")

    def __call__(self, crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """crop [samples] float32 -> the same with noise, by the generator's draws."""
        if rng.random() >= self.probability:
            return crop
        noise = self._recordings.draw(rng, len(crop))
        return mix_at_snr(crop, noise, rng.uniform(*self.snr))


@dataclass
class Babble:
    """Several talkers at once, each of the same power over the crop, at a drawn signal-to-noise ratio.

    talkers: where the speech comes from. count: (fewest, most) of them. snr: (low, high) in dB, of the crop to all
    talkers together. As in Snyder et al., X-Vectors (ICASSP 2018).
    """

    talkers: Talkers
    count: tuple[int, int] = (3, 7)
    snr: tuple[float, float] = (13.0, 20.0)

    def __call__(self, crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """crop [samples] float32 -> the same with talkers behind it, by the generator's draws."""
        babble = np.zeros(len(crop))
        for _ in range(rng.integers(*self.count, endpoint=True)):
            voice = self.talkers.draw(rng, len(crop)).astype(np.float64)
            power = np.mean(voice**2)
            if power > 0:
                babble += voice / np.sqrt(power)
        return mix_at_snr(crop, babble, rng.uniform(*self.snr))


# ---------------------------------------------------------------- done to the crop


@dataclass
class Reverberation:
    """The crop as heard in a drawn room: the same power, the direct path in its place, see `reverberate`."""

    bank: RoomBank

    def __call__(self, crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """crop [samples] float32 -> the same in a room, by the generator's draws."""
        return reverberate(crop, self.bank.draw(rng))


@dataclass
class Transcoding:
    """The crop encoded and decoded again by a drawn codec, at a drawn bit rate where it has several; no packet is lost.

    codecs: names in `CODECS`, each drawn as often. Some run at 8 kHz and leave nothing above 4 kHz.
    """

    codecs: Sequence[str] = tuple(CODECS)

    def __post_init__(self) -> None:
        if not isinstance(self.codecs, (list, tuple)) or not self.codecs:
            raise ValueError(f"codecs: got {self.codecs!r}, expected a list of some of {', '.join(CODECS)}.")
        for name in self.codecs:
            if name not in CODECS:
                raise ValueError(f"codecs: no codec named {name!r}.{nearest(name, CODECS)}")

    def __call__(self, crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """crop [samples] float32 -> the same through a codec, by the generator's draws."""
        return through_codec(self.codecs[int(rng.integers(len(self.codecs)))], crop, rng)


@dataclass
class BandLimit:
    """The crop without what is above a drawn frequency. cutoff: (low, high) in Hz, where the low-pass is at -6 dB."""

    cutoff: tuple[float, float] = (2000.0, 7000.0)

    def __post_init__(self) -> None:
        check_range("cutoff", self.cutoff, 100.0, SAMPLING_RATE / 2 - 1)

    def __call__(self, crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """crop [samples] float32 -> its lower band, by the generator's draw."""
        return band_limited(crop, 0, rng.uniform(*self.cutoff), order=_BAND_LIMIT_ORDER)


@dataclass
class Gain:
    """The crop louder or quieter. gain: (low, high) in dB, drawn uniformly. It may go above full scale: floats do."""

    gain: tuple[float, float] = (-10.0, 10.0)

    def __post_init__(self) -> None:
        check_range("gain", self.gain, -100.0, 100.0)

    def __call__(self, crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """crop [samples] float32 -> the same at another level, by the generator's draw."""
        return crop * np.float32(10 ** (rng.uniform(*self.gain) / 20))


@dataclass
class Clipping:
    """The crop cut off, as by a microphone driven too hard.

    level: (low, high), where it is cut off, as a share of the crop's peak, drawn uniformly.
    """

    level: tuple[float, float] = (0.2, 0.8)

    def __post_init__(self) -> None:
        check_range("level", self.level, 0.01, 1.0)

    def __call__(self, crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """crop [samples] float32 -> the same without its peaks, by the generator's draw."""
        most = np.float32(rng.uniform(*self.level) * np.abs(crop).max())
        return np.clip(crop, -most, most)


class InDomain:
    """Brings crops into a domain (see `mrl_redimnet.audio.domains`), except for a ratio of them that stays as it is."""

    def __init__(self, domain: Augmentation, clean_ratio: float = 0.1) -> None:
        self.domain, self.clean_ratio = domain, clean_ratio

    def __call__(self, crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """crop [samples] float32 -> the same in the domain, by the generator's draws."""
        return crop if rng.random() < self.clean_ratio else self.domain(crop, rng)


# ---------------------------------------------------------------- chains


@dataclass
class Step:
    """An augmentation, and the probability with which it is applied."""

    augment: Augmentation
    probability: float = 1.0

    def __call__(self, crop: np.ndarray, rng: np.random.Generator, strength: float = 1.0) -> np.ndarray:
        """crop [samples] float32 -> the same, or augmented with `strength` times the probability."""
        return self.augment(crop, rng) if rng.random() < strength * self.probability else crop


@dataclass
class OneOf:
    """One of several steps, drawn by `weights` (None: each as often)."""

    choices: Sequence[Step]
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        weights = np.ones(len(self.choices)) if self.weights is None else np.array(self.weights, dtype=np.float64)
        if weights.shape != (len(self.choices),) or not (weights >= 0).all() or not 0 < weights.sum() < np.inf:
            raise ValueError(
                f"weights: got {self.weights}, expected one for each of the {len(self.choices)} choices, "
                "none below 0 and not all 0."
            )
        self._shares = weights / weights.sum()

    def __call__(self, crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """crop [samples] float32 -> what the drawn step makes of it."""
        return self.choices[rng.choice(len(self.choices), p=self._shares)](crop, rng)


@dataclass
class Chain:
    """Steps one after the other; from `make_augmentations`.

    Each step has a generator of its own, seeded by one draw: whether one is applied changes nothing in the others, and
    what is applied at one strength is, with the same draws, applied at every higher one.
    """

    steps: Sequence[Step] = ()

    def __call__(self, crop: np.ndarray, rng: np.random.Generator, strength: float = 1.0) -> np.ndarray:
        """crop [samples] float32 -> the same augmented; strength, 0 to 1, multiplies the steps' probabilities.

        A step inside another (of `OneOf`) keeps its probability. Raises ValueError for a strength out of range.
        """
        if not 0 <= strength <= 1:
            raise ValueError(f"strength: got {strength}, expected 0 to 1.")
        for step in self.steps:
            crop = step(crop, np.random.default_rng(rng.integers(2**63)), strength)
        return crop


# ---------------------------------------------------------------- from a recipe


@dataclass
class Sources:
    """What a run has to augment with: its settings' folders, and the talkers of its training corpus.

    noise: the root of MUSAN (noise/, music/, speech/ below it), or any folder of noise. rooms: a folder of recorded
    responses, see `RoomBank`; without one, rooms are simulated. talkers: for babble; without them MUSAN's speech.
    unread: only options are to be checked; no folder is looked into, and none has to be given.
    """

    noise: str | Path | None = None
    rooms: str | Path | None = None
    talkers: Talkers | None = None
    unread: bool = False


def make_augmentations(entries: Sequence[dict], sources: Sources | None = None) -> Chain:
    """The chain that a recipe's `augmentations` describe, in their order.

    Raises ValueError, naming the entry by its place, for an unknown kind or option (with the nearest known one), a
    value out of range, or a source that is needed and not there; FileNotFoundError for a folder without audio.
    """
    return Chain(_steps(entries, "augmentations", sources or Sources()))


def check_augmentations(entries: Sequence[dict]) -> None:
    """Raises ValueError as `make_augmentations` does for kinds, options and their values; no folder is looked into."""
    make_augmentations(entries, Sources(unread=True))


def _unread(crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What stands for an augmentation whose options are checked without its folder."""
    return crop


def _steps(entries: Sequence[dict], setting: str, sources: Sources) -> list[Step]:
    if not isinstance(entries, (list, tuple)):
        raise ValueError(f"{setting}: got {entries!r}, expected a list of entries such as {{kind: noise}}.")
    return [_step(entry, f"{setting}, entry {i}", sources) for i, entry in enumerate(entries, 1)]


def _step(entry: dict, where: str, sources: Sources) -> Step:
    kind = entry.get("kind") if isinstance(entry, dict) else None
    if not isinstance(kind, str):
        raise ValueError(f"{where}: got {entry!r}, expected a mapping with a kind.{nearest('', AUGMENTATIONS)}")
    if kind not in AUGMENTATIONS:
        raise ValueError(f"{where}: no kind named {kind!r}.{nearest(kind, AUGMENTATIONS)}")
    try:
        return _built(AUGMENTATIONS[kind], entry, sources)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{where} ({kind}): {error}") from error
    except ValueError as error:
        raise ValueError(f"{where} ({kind}): {error}") from error


def _built(build: Callable[..., Augmentation], entry: dict, sources: Sources) -> Step:
    parameters = inspect.signature(build).parameters
    options = {name: value for name, value in entry.items() if name not in ("kind", "probability")}
    known = [name for name in parameters if name != "sources"]
    for name in options:
        if name not in known:
            raise ValueError(f"no option named {name!r}.{nearest(name, [*known, 'probability'])}")
    for name in known:
        if parameters[name].default is inspect.Parameter.empty and name not in options:
            raise ValueError(f"{name}: is needed.")
    probability = entry.get("probability", 1.0)
    if not _is_number(probability) or not 0 <= probability <= 1:
        raise ValueError(f"probability: got {probability!r}, expected 0 to 1.")
    given = {"sources": sources} if "sources" in parameters else {}
    return Step(build(**given, **options), probability)


def _make_noise(sources: Sources, snr: Sequence[float] = (0.0, 15.0), folder: str | Path | None = None) -> Augmentation:
    """folder: noise of this entry's own, instead of the setting `noise`."""
    check_range("snr", snr, -100.0, 100.0)
    _check_folder(folder)
    if sources.unread:
        return _unread
    folder = _first_given(folder, sources.noise, "a folder of noise")
    part = Path(folder) / "noise"
    return AddNoise(part if part.is_dir() else folder, _pair(snr), probability=1.0)


def _make_music(sources: Sources, snr: Sequence[float] = (5.0, 15.0), folder: str | Path | None = None) -> Augmentation:
    """folder: music of this entry's own, instead of MUSAN's in the setting `noise`."""
    check_range("snr", snr, -100.0, 100.0)
    _check_folder(folder)
    if sources.unread:
        return _unread
    root = Path(_first_given(folder, sources.noise, "the root of MUSAN"))
    part = root / "music"
    if folder is None and not part.is_dir():
        raise ValueError(f"noise: {root} has no folder music: give the root of MUSAN there, or this entry a `folder`.")
    return AddNoise(part if part.is_dir() else root, _pair(snr), probability=1.0)


def _make_babble(
    sources: Sources,
    snr: Sequence[float] = Babble.snr,
    count: Sequence[int] = Babble.count,
    folder: str | Path | None = None,
) -> Augmentation:
    """folder: speech (or the root of MUSAN) of this entry's own, instead of the training corpus.

    Where there is no training corpus to draw from, because it is streamed, the talkers are those of MUSAN's speech in
    the setting `noise`.
    """
    check_range("snr", snr, -100.0, 100.0)
    check_range("count", count, 1, 100)
    if not all(isinstance(number, int) for number in count):
        raise ValueError(f"count: got {list(count)}, expected whole numbers.")
    _check_folder(folder)
    if sources.unread:
        return _unread
    talkers = sources.talkers
    if folder is None and talkers is None and sources.noise is not None and (Path(sources.noise) / "speech").is_dir():
        folder = sources.noise
    if folder is not None:
        part = Path(folder) / "speech"
        talkers = FileTalkers(usable_files(part if part.is_dir() else folder, "folder"))
    if talkers is None:
        raise ValueError(
            "folder: there is no training speech to draw talkers from, as where it is streamed; give this entry a "
            "`folder` of speech, or the setting `noise` the root of MUSAN, which has a folder speech."
        )
    return Babble(talkers, _pair(count), _pair(snr))


_Number = TypeVar("_Number", int, float)


def _pair(limits: Sequence[_Number]) -> tuple[_Number, _Number]:
    low, high = limits
    return low, high


def _make_reverberation(
    sources: Sources, folder: str | Path | None = None, room_count: int | None = None, room_seed: int = 0
) -> Augmentation:
    """folder: responses of this entry's own, instead of the setting `rooms`. room_count: simulated rooms instead."""
    if folder is not None and room_count is not None:
        raise ValueError("room_count: counts simulated rooms, and a folder of recorded ones is given; give only one.")
    for name, value, least in (("room_count", room_count, 1), ("room_seed", room_seed, 0)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ValueError(f"{name}: got {value!r}, expected a whole number, at least {least}.")
    _check_folder(folder)
    if sources.unread:
        return _unread
    if room_count is not None:
        return Reverberation(RoomBank(room_count=room_count, room_seed=room_seed))
    return Reverberation(RoomBank(folder or sources.rooms, room_seed=room_seed))


def _make_one_of(sources: Sources, choices: Sequence[dict], weights: Sequence[float] | None = None) -> Augmentation:
    steps = _steps(choices, "choices", sources)
    if not steps:
        raise ValueError("choices: got none, expected at least one entry.")
    if weights is not None and (not isinstance(weights, (list, tuple)) or not all(map(_is_number, weights))):
        raise ValueError(f"weights: got {weights!r}, expected a list of numbers.")
    return OneOf(steps, weights)


AUGMENTATIONS: dict[str, Callable[..., Augmentation]] = {
    "noise": _make_noise,
    "music": _make_music,
    "babble": _make_babble,
    "reverberation": _make_reverberation,
    "codec": Transcoding,
    "band_limit": BandLimit,
    "gain": Gain,
    "clipping": Clipping,
    "one_of": _make_one_of,
}


# ---------------------------------------------------------------- checks


def check_range(name: str, limits: Sequence[float], lowest: float, highest: float) -> None:
    """ValueError, naming the option, unless `limits` are two numbers, low and high, within lowest to highest."""
    if not isinstance(limits, (list, tuple)) or len(limits) != 2 or not all(map(_is_number, limits)):
        raise ValueError(f"{name}: got {limits!r}, expected two numbers, the lowest and the highest.")
    low, high = limits
    if not lowest <= low <= high <= highest:
        raise ValueError(f"{name}: got {low} to {high}, expected values from {lowest:g} to {highest:g}, low first.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _check_folder(folder: object) -> None:
    if folder is not None and (not isinstance(folder, (str, Path)) or not str(folder)):
        raise ValueError(f"folder: got {folder!r}, expected the path of a folder.")


def _first_given(folder: str | Path | None, setting: str | Path | None, what: str) -> str | Path:
    given = setting if folder is None else folder
    if given is None:
        raise ValueError(f"noise: {what} is needed; give the setting `noise`, or this entry a `folder`.")
    return given
