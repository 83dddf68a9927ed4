"""Whether there is a signal in an utterance: silence has an embedding too, and two silent files are very alike."""

import warnings
from dataclasses import dataclass

import numpy as np

from configuration_mrl_redimnet import SAMPLING_RATE
from mrl_redimnet.audio.io import AudioError, AudioWarning, Source, name_of, read_audio

FRAME = SAMPLING_RATE // 50  # samples: 20 ms
# The step of 16 bits. What stays within one and a half of it is dither or the rounding of nothing. Speech of -47 dBFS,
# 40 dB quieter and rounded to 16 bits again, still has 0.2 s of frames above it; so have no clicks: they take less than
# a tenth of a frame's samples.
_STEP = 2.0**-15
_SHARE_OF_FRAME = 0.1
_LEAST_SECONDS, _LEAST_SHARE = 0.1, 0.05  # of frames with sound; the share counts in utterances below 2 s
# Clipped speech: most of its loud samples lie near one value. Of real recordings, at most 13 % do; of a sine 29 %.
_CLIPPED_SHARE, _CLIPPED_PEAK = 0.5, 64 * _STEP
_SPEECH_DB = 30.0  # below the loud frames: softer ones are pauses


@dataclass(frozen=True)
class Levels:
    """What an utterance is like as mono.

    dbfs: its power, 0 for a square wave of full scale, -inf for silence. sound: seconds of it that hold sound. seconds:
    its length. problem: why no speaker can be heard in it, "" where one may be.
    """

    dbfs: float
    sound: float
    seconds: float
    problem: str

    def __str__(self) -> str:
        return f"level {self.dbfs:.1f} dBFS, {self.sound:.2f} s of {self.seconds:.2f} s with sound, as mono"


def levels(audio: np.ndarray) -> Levels:
    """audio [samples] float32 at 16 kHz, at least one -> its levels. Real speech, however quiet, has no problem as long
    as 16 bits can hold it.
    """
    power = float(np.mean(np.square(audio, dtype=np.float64)))
    dbfs = 10 * np.log10(power) if power > 0 else -np.inf
    frames = audio[: len(audio) // FRAME * FRAME].reshape(-1, FRAME) if len(audio) >= FRAME else audio[None]
    # By the median, as a click would move the mean.
    off = np.abs(frames - np.median(frames, axis=1, keepdims=True))
    sounding = np.mean(off > 1.5 * _STEP, axis=1) >= _SHARE_OF_FRAME
    seconds = len(audio) / SAMPLING_RATE
    sound = min(seconds, np.count_nonzero(sounding) * FRAME / SAMPLING_RATE)
    if len(audio) < FRAME // 2:
        problem = ""  # too short for any model, which says so
    elif np.ptp(audio) == 0:
        problem = "is silent" if audio[0] == 0 else f"holds nothing but the constant {audio[0]:.3g}"
    elif sound < min(_LEAST_SECONDS, _LEAST_SHARE * seconds):
        quiet = off.max() <= 1.5 * _STEP
        problem = "is far too quiet to hold speech" if quiet else "holds no speech, a few clicks at most"
    elif _is_clipped(frames[sounding] - np.median(audio)):
        problem = "is clipped for the most part"
    else:
        problem = ""
    return Levels(float(dbfs), float(sound), seconds, problem)


def _is_clipped(frames: np.ndarray) -> bool:
    """Whether most samples of the louder frames [n, samples] lie near the same magnitude."""
    power = np.mean(np.square(frames), axis=1)
    size = np.abs(frames[power >= 0.01 * power.max()])
    limit = np.percentile(size, 95)
    return bool(limit > _CLIPPED_PEAK and np.mean(size >= 0.9 * limit) > _CLIPPED_SHARE)


def speaking(audio: np.ndarray) -> np.ndarray:
    """audio [samples] at 16 kHz -> whether each frame of 20 ms is louder than a pause, bool [frames].

    The level alone tells that: less than 30 dB below the loud frames (their 95th percentile). In noise, pauses count as
    well. What is left behind the last whole frame is passed over.
    """
    frames = audio[: len(audio) // FRAME * FRAME].reshape(-1, FRAME)
    power = np.mean(np.square(frames, dtype=np.float64), axis=1)
    return power > np.percentile(power, 95) * 10 ** (-_SPEECH_DB / 10) if len(power) else np.zeros(0, dtype=bool)


def speech_seconds(audio: np.ndarray) -> float:
    """Seconds of audio [samples] at 16 kHz that are `speaking`, by the share of its frames."""
    loud = speaking(audio)
    return float(np.mean(loud)) * len(audio) / SAMPLING_RATE if len(loud) else 0.0


def refuse_silence(source: Source, audio: np.ndarray) -> np.ndarray:
    """The audio [samples] of a whole file as it is. Raises AudioError, naming the file, where no speaker can be heard
    in it.
    """
    found = levels(audio)
    if found.problem:
        raise AudioError(f"{name_of(source)} {found.problem} ({found}): record it again, or leave it out")
    return audio


def warn_of_silence(source: Source, audio: np.ndarray) -> np.ndarray:
    """As `refuse_silence`, but with an AudioWarning: a list's trials are all scored."""
    found = levels(audio)
    if found.problem:
        warnings.warn(f"{name_of(source)} {found.problem} ({found}). It is used as it is", AudioWarning, stacklevel=2)
    return audio


def read_utterance(source: Source) -> np.ndarray:
    """A whole file as `read_audio` gives it. Raises AudioError also as `refuse_silence` does."""
    return refuse_silence(source, read_audio(source))
