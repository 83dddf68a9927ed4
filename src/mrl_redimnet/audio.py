"""Reading speech: one waveform convention (float32, mono, 16 kHz unless told otherwise) for every format.

A source of audio is the path of a file, or `Encoded`: the bytes of one, as data sets hold them.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil, gcd
from os import PathLike
from pathlib import Path

import av
import numpy as np
import soundfile as sf
import torch
from torchaudio.functional import resample

SAMPLING_RATE = 16_000

# libsndfile reads these; everything else (m4a/AAC above all) goes to PyAV, which brings its own FFmpeg libraries.
_SOUNDFILE_SUFFIXES = frozenset({".aif", ".aiff", ".au", ".flac", ".mp3", ".ogg", ".opus", ".sph", ".w64", ".wav"})
# First bytes of formats that libsndfile reads, for bytes whose name has no suffix.
_SOUNDFILE_MAGIC = (b"RIFF", b"RF64", b"fLaC", b"OggS", b"FORM", b"ID3", b"\xff\xfb", b"\xff\xf3", b"\xff\xf2")
# libsndfile reports this many frames or more when a stream's header does not say how long it is.
_UNKNOWN_FRAMES = 2**62
# Decoded before a seek target and thrown away: AAC overlaps its frames, so the first one after a seek is wrong.
_PREROLL_SECONDS = 0.3
# Read on both sides of a stretch that is resampled, so that its edges see the same samples as in the whole file.
_RESAMPLING_MARGIN_SECONDS = 0.05


class AudioError(ValueError):
    """A file that cannot be used as audio. The message says what is wrong, in which file, and what to do."""


@dataclass(frozen=True)
class AudioInfo:
    """What the header of an audio file says: length in seconds, sampling rate in Hz, number of channels."""

    seconds: float
    sampling_rate: int
    channels: int


@dataclass(frozen=True)
class Encoded:
    """The whole content of an audio file. Its name says what format it is (by its suffix), and is told in errors."""

    name: str
    data: bytes = field(repr=False)


Source = str | PathLike | Encoded


def audio_info(source: Source) -> AudioInfo:
    """Length, sampling rate and channels of an audio file (its path, or `Encoded`), without decoding it.

    Raises AudioError for a file that is missing, empty (no bytes or no samples), or not readable as audio. Damage
    behind an intact header shows only in `read_audio`.
    """
    with _opened(source) as reader:
        return AudioInfo(reader.frames / reader.sampling_rate, reader.sampling_rate, reader.channels)


def read_audio(
    source: Source, start: float = 0.0, seconds: float | None = None, sampling_rate: int = SAMPLING_RATE
) -> np.ndarray:
    """The stretch of `seconds` (None: to the end) from `start` seconds on, as float32 mono [samples].

    `source` is a file's path, or `Encoded`: the same bytes give the same samples either way. Only that
    stretch is decoded. Several channels are averaged to mono; a file at another rate is resampled to `sampling_rate`
    Hz (torchaudio's windowed sinc). Either way the result equals the same slice of the whole file, to within rounding
    (Opus and AAC's noise substitution: to within the codec's own noise). It holds round(seconds * sampling_rate)
    samples, fewer when the file ends before.

    Raises AudioError for a file that is missing, empty, corrupt, holds NaN or infinite samples, or ends before
    `start`; ValueError for a negative `start` or a `seconds` that is less than one sample.
    """
    first = round(start * sampling_rate)
    length = None if seconds is None else round(seconds * sampling_rate)
    if start < 0 or (length is not None and length < 1):
        raise ValueError(f"start={start} must be at least 0 and seconds={seconds} at least one sample")
    with _opened(source) as reader:
        common = gcd(reader.sampling_rate, sampling_rate)
        step_in, step_out = reader.sampling_rate // common, sampling_rate // common
        total = ceil(reader.frames * step_out / step_in)
        last = total if length is None else min(first + length, total)
        if first >= total:
            raise AudioError(
                f"{name_of(source)} is {reader.frames / reader.sampling_rate:.3f} s long, nothing is left from "
                f"{start:.3f} s on: choose an earlier start, or scan the folder again if the file has changed"
            )
        # Blocks of step_in samples of the file become blocks of step_out samples of the result.
        margin = 0 if step_in == step_out else ceil(_RESAMPLING_MARGIN_SECONDS * reader.sampling_rate / step_in)
        block = max(0, first // step_out - margin)
        end = (ceil(last / step_out) + margin) * step_in
        wave = reader.read(block * step_in, min(end, reader.frames))
    if step_in != step_out:
        wave = resample(torch.from_numpy(wave), step_in, step_out).numpy()
    wave = np.ascontiguousarray(wave[first - block * step_out : last - block * step_out])
    if wave.size == 0:
        raise AudioError(
            f"{name_of(source)} ends before {start:.3f} s although its header claims more: copy or encode it again"
        )
    if not np.isfinite(wave).all():
        raise AudioError(f"{name_of(source)} holds NaN or infinite samples: encode it again or remove it")
    return wave


@dataclass(frozen=True)
class _Reader:
    """An open file. `read(first, last)` gives its samples [first, last), averaged over channels, float32."""

    sampling_rate: int
    channels: int
    frames: int
    read: Callable[[int, int], np.ndarray]


def name_of(source: Source) -> str:
    """What a source is called in messages: its path, or the name of its bytes."""
    return source.name if isinstance(source, Encoded) else str(source)


@contextmanager
def _opened(source: Source) -> Iterator[_Reader]:
    """The source opened by the library for its suffix; that library's errors, here or in the body, as AudioError."""
    name = name_of(source)
    path = Path(name)
    if isinstance(source, Encoded):
        size = len(source.data)
    elif not path.is_file():
        raise AudioError(f"{path} is not there or not a file: check the path and that the disk is mounted")
    else:
        size = path.stat().st_size
    if size == 0:
        raise AudioError(f"{name} is empty (0 bytes): copy or download it again, or remove it")
    by_soundfile = path.suffix.lower() in _SOUNDFILE_SUFFIXES
    if isinstance(source, Encoded) and not path.suffix:
        by_soundfile = source.data.startswith(_SOUNDFILE_MAGIC)
    backend = _soundfile_reader if by_soundfile else _av_reader
    try:
        with backend(io.BytesIO(source.data) if isinstance(source, Encoded) else path, name) as reader:
            if reader.frames == 0:
                raise AudioError(f"{name} is empty (0 samples): encode it again or remove it")
            yield reader
    except (sf.SoundFileError, av.FFmpegError) as error:
        raise AudioError(
            f"{name} cannot be read as audio, it is damaged or of another format than its name says ({error}): "
            "copy, download or encode it again, or remove it"
        ) from error


@contextmanager
def _soundfile_reader(file: Path | io.BytesIO, name: str) -> Iterator[_Reader]:
    with sf.SoundFile(file) as file:
        if file.frames >= _UNKNOWN_FRAMES:
            raise AudioError(f"{name} does not say how long it is (it was written to a pipe): encode it again")

        def read(first: int, last: int) -> np.ndarray:
            start = 0 if file.format == "OGG" else first  # libsndfile's seek into an Ogg's last pages misses
            file.seek(start)
            return file.read(last - start, dtype="float32", always_2d=True)[first - start :].mean(axis=1)

        yield _Reader(file.samplerate, file.channels, file.frames, read)


@contextmanager
def _av_reader(file: Path | io.BytesIO, name: str) -> Iterator[_Reader]:
    with av.open(file, metadata_errors="ignore") as container:
        if not container.streams.audio:
            raise AudioError(f"{name} holds no audio stream: extract its audio track or remove it")
        stream = container.streams.audio[0]
        rate = stream.codec_context.sample_rate
        # Only the MP4 family has exact times and seeking; a bare AAC stream is counted and decoded from its start.
        exact = bool(stream.duration) and "mp4" in container.format.name.split(",")
        ticks = stream.duration if exact else sum(packet.duration or 0 for packet in container.demux(stream))
        frames = round(ticks * stream.time_base * rate)

        def read(first: int, last: int) -> np.ndarray:
            seeking = exact and first > _PREROLL_SECONDS * rate
            target = round((first / rate - _PREROLL_SECONDS) / stream.time_base) if seeking else 0
            origin = (stream.start_time or 0) if exact else 0
            if seeking or not exact:
                container.seek(origin + target, stream=stream)
            to_float = av.AudioResampler(format="fltp")
            pieces, begin, count = [], 0, 0
            for decoded in container.decode(stream):
                if not pieces and seeking:
                    begin = round((decoded.pts - origin) * decoded.time_base * rate)
                for frame in to_float.resample(decoded):
                    pieces.append(frame.to_ndarray().mean(axis=0))
                    count += frame.samples
                if begin + count >= last:
                    break
            if begin > first:
                raise AudioError(f"{name} has a broken index, seeking in it overshoots: encode it again or remove it")
            wave = np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
            return wave[first - begin : last - begin]

        yield _Reader(rate, stream.codec_context.channels, frames, read)
