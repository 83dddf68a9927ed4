"""Utterances cut to classes of duration (`mrl_redimnet.audio.cuts`), without and with noise: what a model makes of
them, and what is measured.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mrl_redimnet.audio.cuts import CUTS, cut
from mrl_redimnet.audio.io import SAMPLING_RATE, read_audio
from mrl_redimnet.audio.levels import FRAME, speech_seconds
from mrl_redimnet.audio.windows import Reader
from mrl_redimnet.diarization.activity import speech_in
from mrl_redimnet.encoder import SpeakerEncoder
from mrl_redimnet.evaluation.robustness import make_grid
from mrl_redimnet.scoring.trials import Trials

WHOLE = len(CUTS)  # the row of what is not cut, behind those of the cuts
CLASSES = (*CUTS, "over 4 s")
LONG_SECONDS = 4.0
CLEAN, NOISY = 0, 1
LEAST_SPEECH = 0.05  # seconds; a detector may find none

Condition = tuple[NDArray | int, NDArray | int]  # CLEAN or NOISY, and the cut: one for all trials, or [T]


@dataclass(frozen=True)
class Heard:
    """The utterances of a trial list.

    Attributes:
        trials: of single utterances.
        embeddings: [2, CUTS + 1, N, D] of the utterances (`trials.utterances`): without and with noise, of each cut and
            whole. NaN where an utterance is too short for a cut.
        seconds, speech, silero, snr: [2, CUTS + 1, N] duration; seconds of it that hold speech by level and by Silero's
            detector; an estimate of the signal-to-noise ratio in dB.
    """

    trials: Trials
    embeddings: NDArray
    seconds: NDArray
    speech: NDArray
    silero: NDArray
    snr: NDArray

    def has(self, number: int) -> NDArray:
        """[N] whether an utterance has this class, a number in `CLASSES`."""
        if number == WHOLE:
            return self.seconds[CLEAN, WHOLE] > LONG_SECONDS
        return np.isfinite(self.seconds[CLEAN, number])

    def scores(self, dim: int, enrol: Condition, test: Condition) -> NDArray:
        """Cosines [T] of the trials at `dim`, in the conditions of both sides."""
        units = self.embeddings[..., :dim] / np.linalg.norm(self.embeddings[..., :dim], axis=-1, keepdims=True)
        of_enrol, of_test = self.trials.rows
        return np.einsum("td,td->t", units[(*enrol, of_enrol)], units[(*test, of_test)])

    def sides_seconds(self, enrol: Condition, test: Condition) -> NDArray:
        """Seconds [T, 2] of both sides of the trials, in these conditions."""
        of_enrol, of_test = self.trials.rows
        return np.stack([self.seconds[(*enrol, of_enrol)], self.seconds[(*test, of_test)]], axis=1)

    def drawn(self, rows: NDArray, rng: np.random.Generator) -> NDArray:
        """The cut or the whole of each of the utterances `rows` [T], of those that there are with equal chances."""
        there = np.isfinite(self.seconds[CLEAN][:, rows])  # [CUTS + 1, T]
        return (rng.random(there.shape) * there).argmax(axis=0)


def hear(encoder: SpeakerEncoder, trials: Trials, folder: Path, noise: Path | None, kept: Path) -> Heard:
    """Cuts, embeds and measures; what is in the file `kept` is taken from there. noise: a folder; None: without."""
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.savez(kept, utterances=trials.utterances, **_heard(encoder, trials.utterances, folder, noise))
    with np.load(kept) as opened:
        found = dict(opened)
    if found.pop("utterances").tolist() != trials.utterances:
        raise ValueError(f"{kept}: holds other utterances than the list: remove it.")
    return Heard(trials, **found)


def _heard(encoder: SpeakerEncoder, utterances: list[str], folder: Path, noise: Path | None) -> dict[str, NDArray]:
    shape = (2, WHOLE + 1, len(utterances))
    found = {name: np.full(shape, np.nan) for name in MEASURES}
    found["embeddings"] = np.full((*shape, encoder.config.embedding_size), np.nan, dtype=np.float32)
    noises = [] if noise is None else [condition.perturb for condition in make_grid(noise, names=["noise"])]
    for number in tqdm(range(WHOLE + 1), desc=str(folder), mininterval=20):
        waves: dict[tuple[int, int], NDArray] = {}
        for row, path in enumerate(utterances):
            wave = read_audio(folder / path)
            if number != WHOLE:
                kind = CLASSES[number]
                if len(wave) < CUTS[kind][1] * SAMPLING_RATE:
                    continue
                wave = cut(wave, path, kind)
            waves[CLEAN, row] = wave
            if noises:
                waves[NOISY, row] = _noisy(wave, path, number, noises)
        for (kind, row), wave in waves.items():
            for name, measure in MEASURES.items():
                found[name][kind, number, row] = measure(wave)
        kinds, rows = (list(each) for each in zip(*waves, strict=True))
        found["embeddings"][kinds, number, rows] = encoder.embed([*waves.values()])
    return found


def _noisy(wave: NDArray, path: str, number: int, noises: list[Callable]) -> NDArray:
    """With noise of a drawn file at a drawn ratio."""
    rng = np.random.default_rng([zlib.crc32(path.encode()), number, NOISY])
    return noises[rng.integers(len(noises))](wave, rng)


def silero_seconds(wave: NDArray) -> float:
    """Seconds of wave [samples] in which Silero finds speech, with the settings of `mrl-redimnet diarize`."""
    spans = speech_in(Reader(len(wave), lambda first, end: wave[first:end]))
    return max(LEAST_SPEECH, sum(end - start for start, end in spans))


def level_range(wave: NDArray) -> float:
    """How far the loud frames of wave [samples] are above the soft ones, in dB: an estimate of the signal-to-noise
    ratio where there are pauses.
    """
    frames = wave[: len(wave) // FRAME * FRAME].reshape(-1, FRAME).astype(np.float64)
    low, high = np.percentile(np.square(frames).mean(axis=1), [10, 95])
    return float(10 * np.log10((high + 1e-10) / (low + 1e-10)))


MEASURES: dict[str, Callable[[NDArray], float]] = {
    "seconds": lambda wave: len(wave) / SAMPLING_RATE,
    "speech": lambda wave: max(LEAST_SPEECH, speech_seconds(wave)),
    "silero": silero_seconds,
    "snr": level_range,
}
