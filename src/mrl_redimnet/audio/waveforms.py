"""Speech as waveforms that a model takes: each file read once, checked, and batched by length."""

from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import TypeGuard

import fsspec
import numpy as np
import torch
from torchaudio.functional import resample

from feature_extraction_mrl_redimnet import MRLReDimNetFeatureExtractor
from mrl_redimnet.audio.io import SAMPLING_RATE, AudioError, Encoded, Source, name_of, read_audio
from mrl_redimnet.audio.levels import warn_of_silence

READ_AHEAD = 16  # batches whose waveforms are held at a time, to be sorted by length

# Changes or checks what was read: prepare(source, audio [samples] float32 at 16 kHz) -> the same. The source is the
# file's path, `Encoded`, or for audio that was given as an array what messages call it.
Prepare = Callable[[Source, np.ndarray], np.ndarray]


def is_source(value: object) -> TypeGuard[Source]:
    """Whether a value is a path or `Encoded`, which `read_audio` takes."""
    return isinstance(value, str | PathLike | Encoded)


def read_waveform(
    value: object,
    name: str,
    extractor: MRLReDimNetFeatureExtractor,
    prepare: Prepare | None = None,
    longest: float | None = None,
) -> np.ndarray:
    """One utterance -> [samples] float32 at 16 kHz, checked by the extractor.

    Args:
        value: the path of a file, a URL that fsspec opens, `Encoded`, an array or tensor [samples] (or [1, samples]) at
            16 kHz, or a pair of an array and its sampling rate in Hz. Floating point in -1 .. 1, int16 or int32.
        name: what messages call it.
        prepare: applied to the audio as it was read.
        longest: seconds beyond which it is cut.

    Raises:
        AudioError: it cannot be read, is too short for the model, has several channels (as an array), NaN or infinite
            samples. The message begins with the name.
    """
    source: Source = value if is_source(value) else name
    if isinstance(source, str) and "://" in source:
        audio = read_audio(_fetched(source))
    else:
        audio = read_audio(value) if is_source(value) else _from_array(value, name)
    if prepare is not None:
        audio = prepare(source, audio)
    if longest is not None:
        audio = audio[: round(longest * SAMPLING_RATE)]
    return _checked(audio, extractor, name)


def _fetched(url: str) -> Encoded:
    """The file that a URL names."""
    try:
        with fsspec.open(url, "rb") as file:
            return Encoded(url, file.read())
    except (OSError, ValueError, ImportError) as error:  # ImportError: a store that fsspec needs a package for
        raise AudioError(
            f"{url} cannot be fetched ({type(error).__name__}: {error}): check address and network"
        ) from error


def _from_array(value: object, name: str) -> np.ndarray:
    """An array, or a pair of an array and its rate in Hz, as [samples] float32 at 16 kHz."""
    array, rate = value if isinstance(value, tuple) and len(value) == 2 else (value, SAMPLING_RATE)
    if not isinstance(array, np.ndarray | torch.Tensor | list | tuple) or isinstance(rate, bool | np.ndarray):
        raise AudioError(
            f"{name}: {type(value).__name__} is no audio. Give the path of a file, `Encoded`, an array [samples] at "
            f"{SAMPLING_RATE:,} Hz, or a pair of an array and its sampling rate"
        )
    if not isinstance(rate, int | np.integer) or rate < 1:
        raise AudioError(f"{name}: its sampling rate is {rate!r}, expected a whole number of Hz")
    audio = _checked(array, MRLReDimNetFeatureExtractor(sampling_rate=int(rate), min_samples=1), name)
    return audio if rate == SAMPLING_RATE else resample(torch.from_numpy(audio), int(rate), SAMPLING_RATE).numpy()


def _checked(audio: object, extractor: MRLReDimNetFeatureExtractor, name: str) -> np.ndarray:
    """[samples] float32; by itself, so that a message is about this utterance."""
    try:
        return extractor.checked(audio, name)
    except (ValueError, TypeError) as error:
        raise AudioError(str(error)) from error


def length_batches(
    waveforms: Iterable[tuple[int, np.ndarray]], batch_seconds: float
) -> Iterator[dict[int, np.ndarray]]:
    """(row, waveform [samples]) in any order -> batches {row: waveform} of like lengths.

    A batch holds as many waveforms as fit `batch_seconds` of 16 kHz audio when they are padded to the longest of them,
    at least one. Lengths are known from the audio itself, which is so read once: the waveforms of `READ_AHEAD` batches
    are held and sorted at a time. That bounds memory however long the list is, and wastes hardly more padding than
    sorting all of it, which would mean opening every file twice.
    """
    held: dict[int, np.ndarray] = {}
    samples = 0
    for row, waveform in waveforms:
        held[row] = waveform
        samples += len(waveform)
        if samples >= READ_AHEAD * batch_seconds * SAMPLING_RATE:
            yield from _by_length(held, batch_seconds)
            held, samples = {}, 0
    yield from _by_length(held, batch_seconds)


def _by_length(held: dict[int, np.ndarray], batch_seconds: float) -> Iterator[dict[int, np.ndarray]]:
    """Batches of what is held, the longest first, so that memory runs out at the start or not at all."""
    batch: dict[int, np.ndarray] = {}
    longest = 0
    for row in sorted(held, key=lambda row: -len(held[row])):
        if batch and longest * (len(batch) + 1) > batch_seconds * SAMPLING_RATE:
            yield batch
            batch = {}
        longest = longest if batch else len(held[row])
        batch[row] = held[row]
    if batch:
        yield batch


def into_domain(folder: str | Path, domain: Callable | None = None) -> Prepare:
    """Brings files below `folder` into a domain of `mrl_redimnet.audio.domains` (None: leaves them as they are).

    A file's path relative to the folder fixes its random draws, so it always sounds the same. An AudioWarning names a
    file without a signal in it, which is used as it is.
    """

    def prepare(source: Source, audio: np.ndarray) -> np.ndarray:
        audio = warn_of_silence(source, audio)
        if domain is None:
            return audio
        from mrl_redimnet.audio.domains import simulate  # a domain was made, so this is imported already

        return simulate(domain, audio, Path(name_of(source)).relative_to(folder).as_posix())

    return prepare
