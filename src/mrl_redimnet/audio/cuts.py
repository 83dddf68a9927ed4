"""Utterances cut to classes of duration: short speech with known speakers, to measure and calibrate on.

Of ten drawn stretches the one with the most speech is taken, so that a short utterance is short speech and no pause.
All draws are functions of the utterance's name and the class: an utterance has the same cuts in every list and run.
"""

import zlib

import numpy as np

from mrl_redimnet.audio.io import SAMPLING_RATE
from mrl_redimnet.audio.levels import FRAME, speaking

CUTS = {"0.5-1 s": (0.5, 1.0), "1-2 s": (1.0, 2.0), "2-4 s": (2.0, 4.0)}  # seconds of a stretch: from, below
_STRETCHES = 10


def cut(audio: np.ndarray, name: str, kind: str) -> np.ndarray:
    """A stretch of an utterance whose length is drawn from a class, log-uniformly.

    Args:
        audio: [samples] float32 at 16 kHz.
        name: of the utterance, such as its path in a trial list; the draws follow from it.
        kind: one of `CUTS`.

    Returns:
        [n] a view of the audio.

    Raises:
        ValueError: the audio is shorter than the longest stretch of the class.
    """
    low, high = CUTS[kind]
    if len(audio) < high * SAMPLING_RATE:
        raise ValueError(f"{name}: {len(audio) / SAMPLING_RATE:.2f} s cannot be cut to {kind}: it takes {high:g} s.")
    rng = np.random.default_rng([zlib.crc32(name.encode()), list(CUTS).index(kind)])
    samples = round(low * (high / low) ** rng.random() * SAMPLING_RATE)
    starts = rng.integers(0, len(audio) - samples + 1, _STRETCHES)
    before = np.concatenate([[0], np.cumsum(speaking(audio))])  # frames with speech before each frame
    frames = [np.minimum(edge // FRAME, len(before) - 1) for edge in (starts, starts + samples)]
    start = starts[np.argmax(before[frames[1]] - before[frames[0]])]
    return audio[start : start + samples]
