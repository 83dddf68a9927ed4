"""Which adapter an utterance wants, by its sound: a few facts about the signal and a logistic regression on them.

    detector = DomainDetector.load("runs/detector")
    bank.embed(input_values, attention_mask, adapter=detector.choose(waveforms, bank.names))

It runs before any network, in about a millisecond. In doubt it answers the base: speech that it takes for clean,
domains without a loaded adapter, probabilities below its threshold, silence, and less than 0.3 s.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from configuration_mrl_redimnet import SAMPLING_RATE
from mrl_redimnet.files import replace_folder

CLEAN = "clean"  # the domain of the base
SETTINGS_FILE, WEIGHTS_FILE = "detector.json", "detector.safetensors"
# The lowest in steps of 0.05 at which at most 5 % of clean speech gets an adapter, for training speakers that the
# regression did not see: docs/results/domain_detector.md.
THRESHOLD = 0.75
L2 = 1e-3

MIN_SAMPLES = int(0.3 * SAMPLING_RATE)
MAX_SAMPLES = 30 * SAMPLING_RATE  # of longer audio the middle is listened to: bounded time and memory

# ---------------------------------------------------------------- facts about a signal

_FRAME, _HOP = 512, 256  # 32 ms every 16 ms
_HANN = np.hanning(_FRAME + 1)[:-1].astype(np.float32)
_HERTZ = np.fft.rfftfreq(_FRAME, 1 / SAMPLING_RATE)
# Nothing is below the first edge: two bins hold what a constant leaks into by the window.
_EDGES = (2.5 * SAMPLING_RATE / _FRAME, 250.0, 3400.0, 4000.0, SAMPLING_RATE / 2 + 1)
_BANDS = np.stack([(low <= _HERTZ) & (high > _HERTZ) for low, high in zip(_EDGES, _EDGES[1:], strict=False)], axis=1)
_LOW, _VOICE, _EDGE, _HIGH = range(4)
_HEARD = _BANDS.any(axis=1)
# What is 60 dB below the mean counts as nothing: the rounding to 16 bits of quiet speech is not far below that, and
# whether it is there or not says nothing about the domain.
_FLOOR = 1e-6
_QUIET = 0.2  # the share of frames that shows the background
_DECAY_HOPS = 4  # 64 ms, about a third of a syllable
_OCTAVES = np.log2(_HERTZ[_BANDS[:, _VOICE]] / 1000)

FEATURES: dict[str, str] = {
    "low_share": "dB, energy from 78 to 250 Hz relative to all energy (a telephone line has none)",
    "voice_share": "dB, the same of 250 to 3400 Hz, the telephone band",
    "edge_share": "dB, the same of 3400 to 4000 Hz, where the telephone's filter falls",
    "high_share": "dB, the same of 4 to 8 kHz, which 8 kHz sampling cannot hold",
    "rolloff_95": "kHz, below which 95 % of the energy lie",
    "rolloff_99": "kHz, below which 99 % of the energy lie",
    "tilt": "dB per octave, slope of the mean spectrum between 250 and 3400 Hz",
    "snr": "dB from the 10 % percentile of the frames' levels to the 95 %: background to speech",
    "snr_low": "dB, the same below 250 Hz, where hum and rumble are",
    "snr_voice": "dB, the same between 250 and 3400 Hz",
    "snr_high": "dB, the same above 4 kHz, where speech is weak and noise shows first",
    "quiet_low": "dB, energy below 250 Hz relative to all, in the quietest fifth of the frames",
    "quiet_high": "dB, energy above 4 kHz relative to all, in the quietest fifth of the frames",
    "quiet_flatness": "dB, geometric to arithmetic mean of the quietest fifth's spectrum, 250 to 3400 Hz (noise: 0)",
    "decay": "dB/s, the 10 % percentile of level changes over 64 ms: how fast speech ends (rooms make it slow)",
    "rise": "dB/s, the 90 % percentile of the same: how fast it begins",
    "spread": "dB, standard deviation of the frames' levels in the telephone band",
    "kurtosis": "excess kurtosis of those levels, a number: below 0 where speech and pauses make two heaps",
    "memory": "correlation of those levels with themselves 160 ms later, about a syllable, -1 to 1",
}  # fmt: skip
_MEMORY_HOPS = 10  # 160 ms


def features(waveform: ArrayLike) -> NDArray[np.float32]:
    """waveform [samples] at 16 kHz -> the facts of `FEATURES` about it, [K] float32, the same at every volume.

    Raises ValueError unless it is one-dimensional, finite, at least 0.3 s long and not silent.
    """
    wave = _checked(waveform)
    if not _is_sound(wave):
        raise ValueError(f"waveform: {len(wave) / SAMPLING_RATE:.3f} s; needed are 0.3 s that are not silent.")
    return _features(wave)


def _checked(waveform: ArrayLike) -> NDArray[np.float32]:
    """The part that is listened to."""
    if isinstance(waveform, torch.Tensor):
        waveform = waveform.detach().cpu().float().numpy()
    wave = np.asarray(waveform, dtype=np.float32)
    if wave.ndim != 1:
        raise ValueError(f"waveform: shape {wave.shape}, expected one channel [samples].")
    start = max(0, len(wave) - MAX_SAMPLES) // 2
    wave = wave[start : start + MAX_SAMPLES]
    if not np.isfinite(wave).all():
        raise ValueError("waveform: holds NaN or infinite samples.")
    return wave


def _is_sound(wave: NDArray[np.float32]) -> bool:
    """Whether there is anything to judge. A constant is silence too."""
    return len(wave) >= MIN_SAMPLES and bool(np.ptp(wave) > 0)


def _features(wave: NDArray[np.float32]) -> NDArray[np.float32]:
    power = _power(wave)
    bands = power @ _BANDS.astype(np.float32)  # [T, 4]
    total = bands.sum(axis=1)
    order = np.argsort(total)
    quiet = power[order[: max(2, int(_QUIET * len(order)))]].mean(axis=0)
    mean = power.mean(axis=0)
    voice = _levels(bands[:, _VOICE])
    values = {
        **dict(zip(("low_share", "voice_share", "edge_share", "high_share"), _shares(mean), strict=True)),
        "rolloff_95": _rolloff(mean, 0.95),
        "rolloff_99": _rolloff(mean, 0.99),
        "tilt": np.polyfit(_OCTAVES, _decibels(mean[_BANDS[:, _VOICE]], mean.mean()), 1)[0],
        "snr": _range(_levels(total)),
        "snr_low": _range(_levels(bands[:, _LOW])),
        "snr_voice": _range(voice),
        "snr_high": _range(_levels(bands[:, _HIGH])),
        "quiet_low": _shares(quiet)[_LOW],
        "quiet_high": _shares(quiet)[_HIGH],
        "quiet_flatness": _flatness(quiet[_BANDS[:, _VOICE]]),
        **_dynamics(voice),
    }
    return np.array([values[name] for name in FEATURES], dtype=np.float32)


def _power(wave: NDArray[np.float32]) -> NDArray:
    """Power spectra [T, 257] of the audio scaled to a peak of 1, so that no volume over- or underflows."""
    scaled = wave / np.abs(wave).max()
    spectra = np.fft.rfft(sliding_window_view(scaled, _FRAME)[::_HOP] * _HANN)
    return (spectra.real**2 + spectra.imag**2) * _HEARD


def _decibels(power: ArrayLike, reference: float) -> NDArray:
    """Power in dB relative to a reference, down to the floor."""
    return 10 * np.log10(
        np.asarray(power, dtype=np.float64) / max(reference, float(np.finfo(np.float32).tiny)) + _FLOOR
    )


def _levels(energies: NDArray) -> NDArray:
    """Frames' energies [T] of a band in dB relative to their mean."""
    return _decibels(energies, energies.mean())


def _shares(spectrum: NDArray) -> NDArray:
    """[4] in dB: the energy of each band relative to all."""
    return _decibels(spectrum @ _BANDS, spectrum.sum())


def _rolloff(spectrum: NDArray, share: float) -> float:
    cumulated = np.cumsum(spectrum, dtype=np.float64)
    return _HERTZ[np.searchsorted(cumulated, share * cumulated[-1])] / 1000


def _range(levels: NDArray) -> float:
    low, high = np.percentile(levels, (10, 95))
    return high - low


def _flatness(spectrum: NDArray) -> float:
    return float(_decibels(spectrum, spectrum.mean()).mean())


def _dynamics(levels: NDArray) -> dict[str, float]:
    """How the levels [T] in dB move in time."""
    slopes = (levels[_DECAY_HOPS:] - levels[:-_DECAY_HOPS]) / (_DECAY_HOPS * _HOP / SAMPLING_RATE)
    decay, rise = np.percentile(slopes, (10, 90))
    centred = levels - levels.mean()
    variance = np.mean(centred**2) + 1e-6  # a tone's levels do not move at all
    memory = np.mean(centred[_MEMORY_HOPS:] * centred[:-_MEMORY_HOPS]) / variance
    kurtosis = np.mean(centred**4) / variance**2 - 3
    return dict(decay=decay, rise=rise, spread=np.sqrt(variance), kurtosis=kurtosis, memory=memory)


# ---------------------------------------------------------------- the regression


@dataclass(frozen=True)
class Detection:
    """What an utterance sounds like.

    domain: None for the base, which is clean speech, or in doubt. probabilities: of every domain, summing to 1; all
    equal where there was nothing to hear.
    """

    domain: str | None
    probabilities: dict[str, float]


@dataclass(frozen=True, eq=False)
class DomainDetector:
    """Multinomial logistic regression on standardised features.

    domains: D names, "clean" first. mean, scale: [K] of the features; weight [D, K], bias [D], all float64. threshold:
    the least probability of a domain that is not left to the base.

    Raises ValueError for other names, shapes, or numbers that are not finite.
    """

    domains: tuple[str, ...]
    mean: NDArray[np.float64]
    scale: NDArray[np.float64]
    weight: NDArray[np.float64]
    bias: NDArray[np.float64]
    threshold: float = THRESHOLD

    def __post_init__(self) -> None:
        count = len(_checked_domains(self.domains))
        shapes = dict(mean=(len(FEATURES),), scale=(len(FEATURES),), weight=(count, len(FEATURES)), bias=(count,))
        for name, shape in shapes.items():
            array = getattr(self, name)
            if array.shape != shape or array.dtype != np.float64 or not np.isfinite(array).all():
                raise ValueError(f"{name}: expected {shape} finite float64, got {array.dtype} {array.shape}.")
        if not (self.scale > 0).all():
            raise ValueError("scale: expected positive numbers.")
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, int | float):
            raise ValueError(f"threshold: got {self.threshold!r}, expected a number.")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold: got {self.threshold}, expected a probability.")

    @classmethod
    def train(
        cls, waveforms_by_domain: Mapping[str, Iterable[ArrayLike]], *, l2: float = L2, threshold: float = THRESHOLD
    ) -> "DomainDetector":
        """A detector of the domains from examples of each, {"clean": waveforms, ...}, [samples] at 16 kHz.

        The same examples give the same detector. It knows durations and noises like those it was shown: give it short
        stretches too where short utterances will come. Raises ValueError as `features` and `fit` do.
        """
        domains = sorted(waveforms_by_domain, key=lambda name: name != CLEAN)  # a stable sort
        rows, labels = [], []
        for label, domain in enumerate(domains):
            found = [features(waveform) for waveform in waveforms_by_domain[domain]]
            rows += found
            labels += [label] * len(found)
        return cls.fit(np.array(rows), np.array(labels), domains, l2=l2, threshold=threshold)

    @classmethod
    def fit(
        cls,
        rows: NDArray,
        labels: NDArray,
        domains: Sequence[str],
        *,
        l2: float = L2,
        threshold: float = THRESHOLD,
    ) -> "DomainDetector":
        """The same from `features` [N, K] and labels [N], which count in `domains`.

        Each domain counts the same, however many rows it has. l2: factor of half the squared weights beside the mean
        cross-entropy. Raises ValueError for features or labels that do not fit, a domain without examples, or l2 below
        zero.
        """
        rows, labels = np.asarray(rows, dtype=np.float64), np.asarray(labels)
        if rows.shape != (len(labels), len(FEATURES)) or not np.isfinite(rows).all():
            raise ValueError(f"features: expected ({len(labels)}, {len(FEATURES)}) finite numbers, got {rows.shape}.")
        counts = _counts(labels, _checked_domains(tuple(domains)))
        if l2 < 0:
            raise ValueError(f"l2: got {l2}, expected 0 or more.")
        mean, scale = rows.mean(axis=0), rows.std(axis=0)
        scale[scale == 0] = 1  # such a feature says nothing, and its weight stays zero
        row_weights = 1 / (len(counts) * counts[labels])
        weight, bias = _regression((rows - mean) / scale, labels, row_weights, len(counts), l2)
        return cls(tuple(domains), mean, scale, weight, bias, threshold)

    def probabilities(self, rows: NDArray) -> NDArray[np.float64]:
        """`features` [N, K] -> probabilities [N, D] in the order of `domains`."""
        logits = (np.asarray(rows, dtype=np.float64) - self.mean) / self.scale @ self.weight.T + self.bias
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        return odds / odds.sum(axis=1, keepdims=True)

    def detect(self, waveform: ArrayLike) -> Detection:
        """waveform [samples] at 16 kHz -> what it sounds like; silence and less than 0.3 s are the base's.

        Raises ValueError unless it is one-dimensional and finite.
        """
        wave = _checked(waveform)
        if not _is_sound(wave):
            return Detection(None, dict.fromkeys(self.domains, 1 / len(self.domains)))
        values = self.probabilities(_features(wave)[None])[0]
        best = int(values.argmax())
        certain = best > 0 and values[best] >= self.threshold
        return Detection(self.domains[best] if certain else None, dict(zip(self.domains, values.tolist(), strict=True)))

    __call__ = detect

    def choose(self, waveforms: Iterable[ArrayLike], bank_names: Sequence[str]) -> list[str | None]:
        """For each waveform [samples] at 16 kHz the adapter to give to `AdapterBank.embed`, None for the base.

        bank_names: the adapters there are, `AdapterBank.names`, each called as its domain; a domain without one falls
        back to the base. Raises ValueError as `detect` does.
        """
        found = [self.detect(waveform).domain for waveform in waveforms]
        return [domain if domain in bank_names else None for domain in found]

    def save(self, folder: str | Path) -> None:
        """Writes `folder`, whole or not at all: weights in detector.safetensors, the rest in detector.json.

        Raises FileExistsError where the folder holds anything else: that would be lost.
        """
        folder = Path(folder)
        if folder.exists() and (others := {file.name for file in folder.iterdir()} - {SETTINGS_FILE, WEIGHTS_FILE}):
            raise FileExistsError(f"{folder} holds {sorted(others)[0]}, no part of a detector: give a new folder.")
        settings = dict(domains=self.domains, features=list(FEATURES), threshold=self.threshold)

        def write(target: Path) -> None:
            save_file({name: getattr(self, name) for name in _ARRAYS}, target / WEIGHTS_FILE)
            (target / SETTINGS_FILE).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")

        replace_folder(folder, write)

    @classmethod
    def load(cls, folder: str | Path) -> "DomainDetector":
        """What `save` wrote. Raises FileNotFoundError, or ValueError, naming the file, when it is something else."""
        file = Path(folder) / SETTINGS_FILE
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
            domains, names, threshold = tuple(settings["domains"]), settings["features"], settings["threshold"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file} is not a detector's description: {error!r}") from error
        if names != list(FEATURES):
            raise ValueError(f"{file} is of a detector on other features, {names}: train it again.")
        file = Path(folder) / WEIGHTS_FILE
        try:
            arrays = load_file(file)
            return cls(domains, **{name: arrays[name] for name in _ARRAYS}, threshold=threshold)
        except (ValueError, TypeError, KeyError, SafetensorError) as error:
            raise ValueError(f"{file}, beside {SETTINGS_FILE}, is not a detector: {error!r}") from error


_ARRAYS = ("mean", "scale", "weight", "bias")


def _checked_domains(domains: tuple[str, ...]) -> tuple[str, ...]:
    named = all(isinstance(name, str) and name for name in domains)
    if not named or len(set(domains)) != len(domains) or len(domains) < 2 or domains[0] != CLEAN:
        raise ValueError(f"domains: got {domains}, expected different names, {CLEAN!r} and others, it first.")
    return domains


def _counts(labels: NDArray, domains: Sequence[str]) -> NDArray:
    """How many of the labels each domain has, all of them some."""
    if labels.dtype.kind not in "iu" or not ((labels >= 0) & (labels < len(domains))).all():
        raise ValueError(f"labels: expected integers from 0 to {len(domains) - 1}.")
    counts = np.bincount(labels, minlength=len(domains))
    if missing := [domain for domain, count in zip(domains, counts, strict=True) if not count]:
        raise ValueError(f"{', '.join(missing)}: no examples.")
    return counts


def _regression(
    rows: NDArray, labels: NDArray, row_weights: NDArray, classes: int, l2: float
) -> tuple[NDArray, NDArray]:
    """Weights [classes, K] and biases [classes] of the minimum, which is one: from zeros, by all rows at once."""
    x, y, importance = torch.from_numpy(rows), torch.from_numpy(labels).long(), torch.from_numpy(row_weights)
    weight = torch.zeros(classes, rows.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=1000, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        errors = torch.nn.functional.cross_entropy(x @ weight.T + bias, y, reduction="none")
        value = (importance * errors).sum() + 0.5 * l2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return weight.detach().numpy(), bias.detach().numpy()
