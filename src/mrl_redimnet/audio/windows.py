"""Windows that slide over a recording, which is read in stretches."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from feature_extraction_mrl_redimnet import MRLReDimNetFeatureExtractor
from mrl_redimnet.audio.io import SAMPLING_RATE, AudioError, audio_info, read_audio
from mrl_redimnet.audio.waveforms import is_source, read_waveform


def window_starts(samples: int, size: int, step: int) -> NDArray[np.int64]:
    """Where windows of `size` samples start in a recording of so many: every `step`, and one more that ends with the
    recording where the others leave something over. A recording that is shorter than a window is one.
    """
    last = max(samples - size, 0)
    starts = np.arange(0, last + 1, step)
    return starts if starts[-1] + size >= samples else np.append(starts, last)


def consecutive(starts: NDArray, size: int, stretch: int) -> list[NDArray]:
    """Indices of windows in groups, each of which spans at most `stretch` samples (or is one window)."""
    groups, first = [], 0
    while first < len(starts):
        after = max(first + 1, int(np.searchsorted(starts, starts[first] + stretch - size, side="right")))
        groups.append(np.arange(first, after))
        first = after
    return groups


@dataclass(frozen=True)
class Reader:
    """A recording of so many `samples` at 16 kHz; a call gives those from `first` to before `end`, as float32."""

    samples: int
    stretch: Callable[[int, int], NDArray]

    def __call__(self, first: int, end: int) -> NDArray:
        """The samples; zeros behind the end of a file that is shorter than its header says."""
        wave = self.stretch(first, end)
        return wave if len(wave) == end - first else np.pad(wave, (0, end - first - len(wave)))


def stretch_reader(value: object, name: str, extractor: MRLReDimNetFeatureExtractor) -> Reader:
    """A reader of what `read_waveform` takes. Files are opened anew for each stretch, all else is read at once.

    Raises AudioError for what cannot be read or is too short for the model; so does the reader.
    """
    if not is_source(value) or (isinstance(value, str) and "://" in value):
        wave = read_waveform(value, name, extractor)
        return Reader(len(wave), lambda first, end: wave[first:end])
    samples = int(audio_info(value).seconds * SAMPLING_RATE)
    if samples < extractor.min_samples:
        raise AudioError(
            f"{name}: {samples / SAMPLING_RATE:.3f} s, the model needs at least "
            f"{extractor.min_samples / SAMPLING_RATE:.3f} s"
        )
    return Reader(samples, lambda first, end: read_audio(value, first / SAMPLING_RATE, (end - first) / SAMPLING_RATE))
