"""Reading speech: one waveform convention (float32, mono, 16 kHz unless told otherwise) for every format.

A source of audio is the path of a file, or `Encoded`: the bytes of one, as data sets hold them.
"""

import io
import itertools
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil
from os import PathLike
from pathlib import Path

import av
import numpy as np
import soundfile as sf
import torch
from torchaudio.functional import resample

from configuration_mrl_redimnet import SAMPLING_RATE, MRLReDimNetError

# libsndfile is asked first for these, PyAV (which brings its own FFmpeg libraries) for everything else, m4a/AAC above
# all; what the first of them cannot open is left to the other.
_SOUNDFILE_SUFFIXES = frozenset(
    {".aif", ".aifc", ".aiff", ".au", ".caf", ".flac", ".mp3", ".ogg", ".opus", ".rf64", ".snd", ".sph", ".voc"}
    | {".w64", ".wav"}
)
# First bytes of formats that libsndfile reads, for bytes whose name has no suffix.
_SOUNDFILE_MAGIC = (b"RIFF", b"RF64", b"fLaC", b"OggS", b"FORM", b"ID3", b"\xff\xfb", b"\xff\xf3", b"\xff\xf2")
# libsndfile reports this many frames or more when a stream's header does not say how long it is.
_UNKNOWN_FRAMES = 2**62
# Frames that libsndfile is asked for at a time: a damaged header may claim more than memory holds.
_BLOCK_FRAMES = 2**22
# What libsndfile notes of a file that was cut off: sizes that are not there ("data : 64000 (should be 31978)"), an Ogg
# stream without its end. A header of about 2**31 or 2**32 is a stream's, whose writer did not know its size.
_SIZE_NOTE = re.compile(r"^ *(?:data|SSND|Data size|riff|Riff size) *: (\d+) \(should be (\d+)\)", re.M | re.I)
_STREAMED_BYTES = 2**31 - 2**16
_OGG_NOTES = ("without an End-Of-Stream flag", "lacks an end-of-stream bit")
_CUT_SHARE = 0.99  # of a size: less is cut, more is padding
_CUT_SECONDS = 0.25  # that many fewer than a header claims are noticed
# FFmpeg's readers of playlists and lists of files: what they name lies elsewhere.
_LISTS = frozenset({"hls", "dash", "concat", "imf", "rtsp", "sdp"})
# Decoded before a seek target and thrown away: AAC overlaps its frames, so the first one after a seek is wrong.
_PREROLL_SECONDS = 0.3
# Read on both sides of a stretch that is resampled, so that its edges see the same samples as in the whole file.
_RESAMPLING_MARGIN_SECONDS = 0.05
# A header with a rate outside these is wrong. The ratio of two rates is taken as a fraction of at most this
# denominator: exact for all usual rates, within 1e-4 for odd ones, whose exact filter would not fit into memory.
_SLOWEST, _FASTEST, _LARGEST_STEP = 1_000, 768_000, 1_000


class AudioWarning(UserWarning):
    """Audio that is used, or files that are passed over, although something is wrong. The message names the file."""


class AudioError(MRLReDimNetError, ValueError):
    """A file that cannot be used as audio. The message says what is wrong, in which file, and what to do."""


@dataclass(frozen=True)
class AudioInfo:
    """What the header of an audio file says: length in seconds, sampling rate in Hz, number of channels."""

    seconds: float
    sampling_rate: int
    channels: int


@dataclass(frozen=True)
class Encoded:
    """The whole content of an audio file. Its name says what format it is (by its suffix), and is told in errors.

    problem: why there is no content; reading raises it as AudioError.
    """

    name: str
    data: bytes = field(repr=False)
    problem: str = ""


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

    A file that ends before its header, or its format, says so gives what is there, with an AudioWarning.

    Raises AudioError for a file that is missing, empty, corrupt, holds NaN or infinite samples, or ends before
    `start`; ValueError for a negative `start` or a `seconds` that is less than one sample.
    """
    first = round(start * sampling_rate)
    length = None if seconds is None else round(seconds * sampling_rate)
    if start < 0 or (length is not None and length < 1):
        raise ValueError(f"start={start} must be at least 0 and seconds={seconds} at least one sample")
    with _opened(source) as reader:
        ratio = Fraction(reader.sampling_rate, sampling_rate).limit_denominator(_LARGEST_STEP)
        step_in, step_out = ratio.numerator, ratio.denominator
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
        end = min((ceil(last / step_out) + margin) * step_in, reader.frames)
        wave = reader.read(block * step_in, end)
        missing = (end - block * step_in - len(wave)) / reader.sampling_rate
        cut = missing > _CUT_SECONDS or (end == reader.frames and reader.is_cut())
    if step_in != step_out and wave.size:
        wave = resample(torch.from_numpy(wave), step_in, step_out).numpy()
    wave = np.ascontiguousarray(wave[first - block * step_out : last - block * step_out])
    if wave.size == 0:
        raise AudioError(
            f"{name_of(source)} ends before {start:.3f} s although its header claims more: copy or encode it again"
        )
    if not np.isfinite(wave).all():
        raise AudioError(f"{name_of(source)} holds NaN or infinite samples: encode it again or remove it")
    if cut:
        there = start + len(wave) / sampling_rate
        claims = f", its header claims {reader.frames / reader.sampling_rate:.2f} s" if missing > _CUT_SECONDS else ""
        warnings.warn(
            f"{name_of(source)} is cut off: it ends at {there:.2f} s{claims}. What is there is used; copy or encode "
            "it again if the rest matters",
            AudioWarning,
            stacklevel=2,
        )
    return wave


@dataclass(frozen=True)
class _Reader:
    """An open file. `read(first, last)` gives its samples [first, last), averaged over channels, float32, fewer where
    it ends before; once. `is_cut()`, after that: whether it ends where it should not, though no header says so.
    """

    sampling_rate: int
    channels: int
    frames: int
    read: Callable[[int, int], np.ndarray]
    is_cut: Callable[[], bool]


def name_of(source: Source) -> str:
    """What a source is called in messages: its path, or the name of its bytes."""
    return source.name if isinstance(source, Encoded) else str(source)


@contextmanager
def _opened(source: Source) -> Iterator[_Reader]:
    """The source opened by the library for its suffix, else by the other one; the errors of libraries, here or in the
    body, as AudioError.
    """
    name = name_of(source)
    path = Path(name)
    if isinstance(source, Encoded) and source.problem:
        raise AudioError(f"{name} {source.problem}")
    size = len(source.data) if isinstance(source, Encoded) else _size_of(path)
    if size == 0:
        raise AudioError(f"{name} is empty (0 bytes): copy or download it again, or remove it")
    by_soundfile = path.suffix.lower() in _SOUNDFILE_SUFFIXES
    if isinstance(source, Encoded) and not path.suffix:
        by_soundfile = source.data.startswith(_SOUNDFILE_MAGIC)
    backends = [_soundfile_reader, _av_reader] if by_soundfile else [_av_reader, _soundfile_reader]
    errors: list[Exception] = []
    with ExitStack() as stack:
        for backend in backends:
            try:
                with ExitStack() as opening:
                    reader = opening.enter_context(backend(source, name))
                    _check_header(reader, name)
                    stack.enter_context(opening.pop_all())
                    break
            except (sf.SoundFileError, av.FFmpegError, OSError, ValueError) as error:  # AudioError is a ValueError
                errors.append(error)
        else:
            raise _unreadable(name, errors[0])
        try:
            yield reader
        except AudioError:
            raise
        except (sf.SoundFileError, av.FFmpegError, OSError, ValueError) as error:  # OSError: of a failing disk
            raise _unreadable(name, error) from error


def _size_of(path: Path) -> int:
    """Bytes of a file. Raises AudioError for what is none or cannot be read."""
    try:
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode):
            with open(path, "rb"):
                return status.st_size
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        where = f"a link to {os.readlink(path)}, which is " if path.is_symlink() else ""
        raise AudioError(
            f"{path} is {where}not there or cannot be opened ({getattr(error, 'strerror', None) or error}): check the "
            "path, the permissions and that the disk is mounted"
        ) from error
    kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, a device or a socket"
    raise AudioError(f"{path} is {kind}, not a file: give a file")


def _check_header(reader: _Reader, name: str) -> None:
    if reader.frames == 0:
        raise AudioError(f"{name} is empty (0 samples): encode it again or remove it")
    if not _SLOWEST <= reader.sampling_rate <= _FASTEST:
        raise AudioError(
            f"{name} claims a sampling rate of {reader.sampling_rate:,} Hz, which no speech has: its header is wrong, "
            "encode it again or remove it"
        )


def _unreadable(name: str, error: Exception) -> AudioError:
    if isinstance(error, AudioError):
        return error
    return AudioError(
        f"{name} cannot be read as audio, it is damaged or of another format than its name says "
        f"({getattr(error, 'error_string', error)}): "
        "copy, download or encode it again, or remove it"
    )


@contextmanager
def _soundfile_reader(source: Source, name: str) -> Iterator[_Reader]:
    with sf.SoundFile(io.BytesIO(source.data) if isinstance(source, Encoded) else os.fsencode(source)) as file:
        if file.frames >= _UNKNOWN_FRAMES:
            raise AudioError(f"{name} does not say how long it is (it was written to a pipe): encode it again")

        def read(first: int, last: int) -> np.ndarray:
            # libsndfile's seek into an Ogg's last pages misses, and some codecs (GSM 6.10) cannot be sought in at all.
            start = first if file.seekable() and file.format != "OGG" else 0
            if start:
                file.seek(start)
            pieces, here = [np.zeros(0, np.float32)], start
            while here < last:
                block = file.read(min(_BLOCK_FRAMES, last - here), dtype="float32", always_2d=True)
                pieces.append(block.mean(axis=1)[max(0, first - here) :])
                here += len(block)
                if not len(block):
                    break
            return np.concatenate(pieces)

        def is_cut() -> bool:
            notes = file.extra_info
            sizes = ((int(claimed), int(there)) for claimed, there in _SIZE_NOTE.findall(notes))
            short = any(there < _CUT_SHARE * claimed for claimed, there in sizes if claimed < _STREAMED_BYTES)
            return short or any(note in notes for note in _OGG_NOTES)

        yield _Reader(file.samplerate, file.channels, file.frames, read, is_cut)


@contextmanager
def _av_reader(source: Source, name: str) -> Iterator[_Reader]:
    with _av_container(source) as container:
        if container.format.name in _LISTS:
            raise AudioError(f"{name} is a list of other files ({container.format.name}): give the files themselves")
        if not container.streams.audio:
            raise AudioError(f"{name} holds no audio stream: extract its audio track or remove it")
        stream = container.streams.audio[0]
        rate = stream.codec_context.sample_rate
        # Only the MP4 family has exact times and seeking; the packets of everything else are counted, and it is decoded
        # from its start.
        exact = bool(stream.duration) and "mp4" in container.format.name.split(",")
        bare = container.format.name == "aac"  # frames one after the other; the last one of a cut file is not whole
        ticks, tail = stream.duration if exact else 0, b""
        if not exact:
            for packet in container.demux(stream):
                ticks += packet.duration or 0
                tail = bytes(packet) or tail
        frames = round(ticks * stream.time_base * rate) if ticks else _decoded_frames(source)

        def read(first: int, last: int) -> np.ndarray:
            if not exact:
                with _av_container(source) as again:
                    packets = again.demux(again.streams.audio[0])
                    whole = (packet for packet in packets if not (bare and _adts_length(bytes(packet)) > packet.size))
                    return _joined((frame for packet in whole for frame in packet.decode()), 0, last)[first:last]
            seeking = first > _PREROLL_SECONDS * rate
            target = round((first / rate - _PREROLL_SECONDS) / stream.time_base) if seeking else 0
            origin, begin = stream.start_time or 0, 0
            if seeking:
                container.seek(origin + target, stream=stream)
            decoded = container.decode(stream)
            if seeking and (head := next(decoded, None)) is not None:
                begin = round((head.pts - origin) * head.time_base * rate)
                decoded = itertools.chain([head], decoded)
            wave = _joined(decoded, begin, last)
            if begin > first:
                raise AudioError(f"{name} has a broken index, seeking in it overshoots: encode it again or remove it")
            return wave[first - begin : last - begin]

        def is_cut() -> bool:
            return bare and _adts_length(tail) > len(tail)

        yield _Reader(rate, stream.codec_context.channels, frames, read, is_cut)


@contextmanager
def _av_container(source: Source) -> Iterator[av.container.InputContainer]:
    """Opened by FFmpeg, which is kept from opening anything else that the content names."""
    with io.BytesIO(source.data) if isinstance(source, Encoded) else open(source, "rb") as file:
        with av.open(file, metadata_errors="ignore", options={"protocol_whitelist": "none"}) as container:
            yield container


def _joined(frames: Iterator[av.AudioFrame], begin: int, last: int) -> np.ndarray:
    """Decoded frames, the first at sample `begin`, up to sample `last` or beyond, averaged to mono float32."""
    to_float = av.AudioResampler(format="fltp")
    pieces, count = [np.zeros(0, np.float32)], begin
    for decoded in frames:
        for frame in to_float.resample(decoded):
            pieces.append(frame.to_ndarray().mean(axis=0))
            count += frame.samples
        if count >= last:
            break
    return np.concatenate(pieces)


def _decoded_frames(source: Source) -> int:
    """The samples of a file whose packets do not say how long they are."""
    with _av_container(source) as container:
        return sum(frame.samples for frame in container.decode(container.streams.audio[0]))


def _adts_length(frame: bytes) -> int:
    """What the header of a bare AAC frame says is its length in bytes, 0 without a header (ISO 14496-3, 1.A.2.2)."""
    if len(frame) < 7 or frame[0] != 0xFF or frame[1] & 0xF0 != 0xF0:
        return 0
    return (frame[3] & 3) << 11 | frame[4] << 3 | frame[5] >> 5
