"""Sounds that tests write, and what they measure of them."""

from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import correlate

from mrl_redimnet.audio.io import SAMPLING_RATE

OFFSET = 300  # of the direct path in the recorded responses, in samples at 16 kHz


def write(path: Path, wave: np.ndarray, rate: int = SAMPLING_RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, rate, subtype="FLOAT")
    return path


def write_responses(folder: Path) -> Path:
    """Responses at 8 and 16 kHz: noise far below the direct path before it, decaying noise after it."""
    for rate in (8000, 16000):
        taps = 0.05 * np.random.default_rng(rate).standard_normal(rate // 2)
        direct = OFFSET * rate // SAMPLING_RATE
        taps[direct:] *= np.exp(-20 * np.arange(len(taps) - direct) / rate)
        taps[:direct] *= 0.01
        taps[direct] = 1
        write(folder / "hall" / f"{rate}.wav", 0.3 * taps, rate)
    return folder


def power(wave: np.ndarray) -> float:
    return float(np.mean(wave.astype(np.float64) ** 2))


def lag(reference: np.ndarray, wave: np.ndarray) -> int:
    """How many samples late wave is."""
    return int(correlate(wave, reference, method="fft").argmax()) - len(reference) + 1


def likeness(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.dot(one, other) / np.linalg.norm(one) / np.linalg.norm(other))


def write_speaker(root: Path, speaker: int, utterances: int, seed: int = 0, samples: tuple[int, int] = (4000, 7000)):
    """Noise of one colour and lengths drawn from `samples`, a file per utterance."""
    rng = np.random.default_rng([seed, speaker])
    tone = 2 * np.pi * (200 + 450 * speaker) / SAMPLING_RATE
    for number in range(utterances):
        noise = rng.standard_normal(rng.integers(*samples))
        wave = 0.04 * noise + 0.1 * np.sin(tone * np.arange(len(noise)) + rng.uniform(0, 6))
        path = root / f"id{speaker}" / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, wave, SAMPLING_RATE)
