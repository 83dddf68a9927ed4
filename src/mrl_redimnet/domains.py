"""Acoustic domains simulated from clean speech: rooms with noise, and the telephone network.

A domain is a callable like the augmentations of `CropDataset`: domain(audio [samples] float32 at 16 kHz, generator) ->
[the same samples] float32, all its draws from the generator. A new domain is an entry in `DOMAINS`.
"""

import hashlib
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache, partial
from io import BytesIO
from math import ceil
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import soundfile as sf
import torch
from scipy.signal import butter, fftconvolve, sosfiltfilt
from torchaudio.functional import resample

from mrl_redimnet.audio import SAMPLING_RATE, AudioError, read_audio
from mrl_redimnet.batches import AddNoise
from mrl_redimnet.corpus import AUDIO_SUFFIXES

Domain = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@dataclass
class Clean:
    """The audio as it is."""

    def __call__(self, audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """audio [samples] float32 -> the same."""
        return audio


# ---------------------------------------------------------------- rooms and noise

# Simulated boxes: sizes in metres, reverberation times in seconds, and the least distance in metres of talker and
# microphone from the walls and from each other (closer, the direct path hides the decay that sets the RT60).
_SMALLEST_ROOM, _LARGEST_ROOM = (3.0, 3.0, 2.4), (9.0, 7.0, 4.0)
_SHORTEST_RT60, _LONGEST_RT60 = 0.2, 0.8
_DISTANCE = 0.5
# ISO 3382-1 has a response begin where it first comes within 20 dB of its maximum.
_ONSET = 10 ** (-20 / 20)


class Room(NamedTuple):
    """A box with a talker and a microphone: `size` and the two positions [3] in metres, `rt60` in seconds."""

    size: np.ndarray
    rt60: float
    source: np.ndarray
    microphone: np.ndarray


class RoomResponse(NamedTuple):
    """The impulse response of a room, `taps` [samples] float32 at 16 kHz, in which the direct path is at `delay`."""

    taps: np.ndarray
    delay: int


@dataclass
class Noisy:
    """Speech in a room, in noise: a room's response with some probability, then noise at a drawn SNR.

    The response comes from a bank of simulated rooms or from recordings. Reverberated speech keeps its length, its
    power and its place: the direct path's delay is taken out. The SNR is that of reverberated speech to noise.

    noise: folder of noise files, at any depth. snr: (low, high) in dB, drawn uniformly.
    rooms: folder of recorded impulse responses, at any depth, one room each (channels are averaged).
    room_count, room_seed: without `rooms`, the bank is `simulated_response(room_seed, i)` for i below room_count;
        a process computes a response when it first needs it (up to a second for the longest) and keeps it.

    Raises ValueError for options out of range or no noise folder; FileNotFoundError for a folder without audio; when
    called, AudioError for a file that cannot be read or a silent response.
    """

    noise: str | Path | None = None
    snr: tuple[float, float] = (0.0, 15.0)
    room_probability: float = 0.5
    rooms: str | Path | None = None
    room_count: int = 64
    room_seed: int = 0

    def __post_init__(self):
        if self.noise is None:
            raise ValueError("noise: the noisy domain needs a folder of noise files, none was given.")
        _check_range("snr", self.snr, -100.0, 100.0)
        if not 0 <= self.room_probability <= 1:
            raise ValueError(f"room_probability: got {self.room_probability}, expected 0 to 1.")
        if self.room_count < 1:
            raise ValueError(f"room_count: got {self.room_count}, expected at least 1.")
        self._add_noise = AddNoise(self.noise, snr=self.snr, probability=1.0)
        self._recorded = _audio_files(self.rooms) if self.rooms is not None else []

    def __call__(self, audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """audio [samples] float32 -> the same in a room (or not) and in noise, by the generator's draws."""
        if rng.random() < self.room_probability:
            audio = reverberate(audio, self._draw_response(rng))
        return self._add_noise(audio, rng)

    def _draw_response(self, rng: np.random.Generator) -> RoomResponse:
        if self._recorded:
            return recorded_response(self._recorded[rng.integers(len(self._recorded))])
        return simulated_response(self.room_seed, int(rng.integers(self.room_count)))


def _audio_files(folder: str | Path) -> list[str]:
    files = sorted(str(p) for p in Path(folder).rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES)
    if not files:
        raise FileNotFoundError(f"rooms: no audio ({', '.join(AUDIO_SUFFIXES)}) below {folder}.")
    return files


def reverberate(audio: np.ndarray, response: RoomResponse) -> np.ndarray:
    """audio [samples] float32 as heard in a room: the same length and power, direct path where the input is."""
    wet = fftconvolve(audio, response.taps)[response.delay : response.delay + len(audio)]
    return _at_power_of(audio, wet)


def draw_room(seed: int, index: int) -> Room:
    """Room `index` of the bank of `seed`, a function of the two: 3 x 3 x 2.4 to 9 x 7 x 4 m, RT60 0.2 to 0.8 s.

    Talker and microphone are anywhere at least 0.5 m from the walls and from each other.
    """
    rng = np.random.default_rng([seed, index])
    size = rng.uniform(_SMALLEST_ROOM, _LARGEST_ROOM)
    rt60 = float(rng.uniform(_SHORTEST_RT60, _LONGEST_RT60))
    source, microphone = rng.uniform(_DISTANCE, size - _DISTANCE, (2, 3))
    while np.linalg.norm(source - microphone) < _DISTANCE:
        source, microphone = rng.uniform(_DISTANCE, size - _DISTANCE, (2, 3))
    return Room(size, rt60, source, microphone)


@cache
def simulated_response(seed: int, index: int) -> RoomResponse:
    """The response of `draw_room(seed, index)` by the image source method (Allen & Berkley, JASA 65, 1979).

    The walls' absorption is Sabine's for the room's RT60. A box whose walls mirror decays up to a third slower or
    faster than Sabine's diffuse field, so the response is then faded to the RT60 that was drawn: reflections come at
    an even pace, so that an exponential in time is a change of the absorption.
    """
    import pyroomacoustics as pra  # takes most of a second, and only this domain needs it

    room = draw_room(seed, index)
    absorption, order = pra.inverse_sabine(room.rt60, room.size)
    box = pra.ShoeBox(room.size, fs=SAMPLING_RATE, materials=pra.Material(absorption), max_order=order)
    box.add_source(room.source)
    box.add_microphone(room.microphone)
    with _one_thread(pra.constants):
        box.compute_rir()
    # pyroomacoustics interpolates between samples by a sinc, whose half length comes before every reflection.
    distance = float(np.linalg.norm(room.source - room.microphone))
    delay = round(distance / pra.constants.get("c") * SAMPLING_RATE) + pra.constants.get("frac_delay_length") // 2
    taps = box.rir[0][0][: delay + ceil(room.rt60 * SAMPLING_RATE)]
    seconds = (np.arange(len(taps)) - delay) / SAMPLING_RATE
    fade = np.log(10**3) * (1 / room.rt60 - 1 / reverberation_time(taps))
    return RoomResponse((taps * np.exp(-fade * seconds)).astype(np.float32), delay)


@contextmanager
def _one_thread(constants) -> Iterator[None]:
    """The number of threads sets the order in which reflections are summed, and so the last bits of a response."""
    threads = constants.get("num_threads")
    constants.set("num_threads", 1)
    try:
        yield
    finally:
        constants.set("num_threads", threads)


def reverberation_time(taps: np.ndarray, sampling_rate: int = SAMPLING_RATE) -> float:
    """RT60 in seconds of an impulse response [samples]: T20 of ISO 3382-1.

    That is the time for 60 dB at the slope that Schroeder's backward integration has between -5 and -25 dB.
    """
    energy = np.cumsum(taps[::-1].astype(np.float64) ** 2)[::-1]
    decay = 10 * np.log10(np.maximum(energy / energy[0], 1e-12))
    part = np.flatnonzero((decay <= -5) & (decay >= -25))
    slope = np.polyfit(part / sampling_rate, decay[part], 1)[0]
    return float(-60 / slope)


@lru_cache(maxsize=256)
def recorded_response(path: str) -> RoomResponse:
    """The response recorded in the audio file at `path`, of any rate; AudioError for a silent or unreadable one."""
    taps = read_audio(path)
    size = np.abs(taps)
    if not size.any():
        raise AudioError(f"{path} is silent and no room response: remove it")
    return RoomResponse(taps, int(np.argmax(size >= _ONSET * size.max())))


# ---------------------------------------------------------------- telephony

_TELEPHONE_RATE = 8_000
_PACKET = 160  # samples of 20 ms at 8 kHz, the frame of every codec here and the usual payload of G.711 over RTP
_FADE_OUT = 480  # samples of 60 ms at 8 kHz, after which G.711's Appendix I has faded a concealment to silence
_AMR_MODES = (4750, 5150, 5900, 6700, 7400, 7950, 10200, 12200)  # bits per second, 3GPP TS 26.071
_OPUS_RATES = (6_000, 16_000)  # bits per second


@dataclass
class Telephony:
    """A telephone call: 8 kHz, 300 to 3400 Hz, a drawn codec, lost packets, and back to 16 kHz.

    The band is limited at both ends of the line (codecs put energy back outside it), each time by a Butterworth of
    zero phase: fourth order, forwards and backwards. The result has the length and the power of the input and is
    aligned with it: the codecs' delays are taken out. A peak above full scale is scaled down for the codec; speech is
    not otherwise levelled, so that quantisation costs quiet speech as much as on the line.

    codecs: names in `CODECS`, one drawn per call. loss: (low, high), the share of 20 ms packets that is lost, drawn
    uniformly, see `lose_packets`. band: (low, high) in Hz, where each filter is at -6 dB.

    Raises ValueError for unknown codecs or options out of range; when called, AudioError for a codec that fails.
    """

    codecs: Sequence[str] = ("mulaw", "alaw", "gsm", "amr_nb", "opus")
    loss: tuple[float, float] = (0.0, 0.05)
    band: tuple[float, float] = (300.0, 3400.0)

    def __post_init__(self):
        unknown = [name for name in self.codecs if name not in CODECS]
        if unknown or not self.codecs:
            raise ValueError(f"codecs: got {unknown or 'none'}, expected some of {', '.join(CODECS)}.")
        _check_range("loss", self.loss, 0.0, 1.0)
        _check_range("band", self.band, 1.0, _TELEPHONE_RATE / 2 - 1)
        if self.band[0] == self.band[1]:
            raise ValueError(f"band: {self.band[0]} Hz to the same leaves nothing.")

    def __call__(self, audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """audio [samples] float32 -> the same through a telephone call, by the generator's draws."""
        line = self._to_line(audio)
        line = transcode(self.codecs[rng.integers(len(self.codecs))], line, rng)
        line = self._in_band(lose_packets(line, rng.uniform(*self.loss), rng))
        wide = _resampled(line, _TELEPHONE_RATE, SAMPLING_RATE)
        return _at_power_of(audio, wide[: len(audio)])

    def _to_line(self, audio: np.ndarray) -> np.ndarray:
        """[samples] at 16 kHz -> [whole packets] float32 at 8 kHz, in the band and within full scale."""
        whole = np.pad(audio, (0, -len(audio) % (_PACKET * SAMPLING_RATE // _TELEPHONE_RATE)))
        narrow = _resampled(whole, SAMPLING_RATE, _TELEPHONE_RATE)
        line = self._in_band(narrow)
        return line / max(1.0, np.abs(line).max())

    def _in_band(self, line: np.ndarray) -> np.ndarray:
        return sosfiltfilt(_band_filter(*self.band), line).astype(np.float32)


@lru_cache(maxsize=8)
def _band_filter(low: float, high: float) -> np.ndarray:
    return butter(4, (low, high), "bandpass", fs=_TELEPHONE_RATE, output="sos")


def _resampled(audio: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """audio [samples] float32 at another rate. The long filter keeps what is near 4 kHz from appearing above it."""
    return resample(torch.from_numpy(audio), rate, new_rate, lowpass_filter_width=32).numpy()


def lose_packets(audio: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """audio [whole 20 ms packets] float32 at 8 kHz with every packet lost with the probability `share`.

    Lost packets are concealed on the decoded audio by repeating the last good one, faded linearly to silence over the
    first 60 ms of the gap (as ITU-T G.711 Appendix I, but by packets instead of pitch periods); the decoder's own
    state is not disturbed. Before the first good packet there is silence.
    """
    packets = audio.reshape(-1, _PACKET)
    positions = np.arange(len(packets))
    lost = rng.random(len(packets)) < share
    last_good = np.maximum.accumulate(np.where(lost, -1, positions))
    into_gap = (positions - last_good - 1)[:, None] * _PACKET + np.arange(_PACKET)
    gain = np.where(lost[:, None], np.clip(1 - into_gap / _FADE_OUT, 0, 1), 1.0)
    gain[last_good < 0] = 0
    return (packets[last_good] * gain).astype(np.float32).reshape(-1)


def transcode(name: str, audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """audio [whole 20 ms packets] float32 at 8 kHz, within full scale, encoded and decoded, without the codec's delay.

    name: in `CODECS`; the generator draws its bit rate where it has several. Raises AudioError for a codec that fails.
    """
    codec = CODECS[name]
    pcm = np.clip(np.round(audio * 2**15), -(2**15), 2**15 - 1).astype(np.int16)
    try:
        decoded = codec.run(pcm, rng)
    except (sf.SoundFileError, av.FFmpegError, av.codec.codec.UnknownCodecError) as error:
        raise AudioError(
            f"codec {name} failed on {len(pcm)} samples at 8 kHz ({error}): leave it out of codecs"
        ) from error
    aligned = decoded[codec.delay : codec.delay + len(pcm)]
    if len(aligned) < len(pcm):
        raise AudioError(f"codec {name} gave {len(decoded)} samples for {len(pcm)} at 8 kHz: leave it out of codecs")
    return aligned


def _run_sndfile(subtype: str, pcm: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """pcm [samples] int16 -> decoded [samples] float32, by libsndfile's codec `subtype`."""
    form = dict(samplerate=_TELEPHONE_RATE, format="RAW", subtype=subtype)
    coded = BytesIO()
    sf.write(coded, pcm, **form)
    coded.seek(0)
    return sf.read(coded, dtype="float32", channels=1, **form)[0]


def _run_amr_nb(pcm: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    decoded, _ = _run_ffmpeg("libopencore_amrnb", pcm, int(rng.choice(_AMR_MODES)))
    return decoded


def _run_opus(pcm: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    bit_rate = int(rng.integers(*_OPUS_RATES, endpoint=True))
    decoded, rate = _run_ffmpeg("libopus", pcm, bit_rate, {"application": "voip", "frame_duration": "20"})
    # FFmpeg decodes Opus at 48 kHz whatever the input. It holds nothing above 4 kHz then: the short filter will do.
    return resample(torch.from_numpy(decoded), rate, _TELEPHONE_RATE).numpy()


def _run_ffmpeg(
    name: str, pcm: np.ndarray, bit_rate: int, options: dict[str, str] | None = None
) -> tuple[np.ndarray, int]:
    """pcm [samples] int16 at 8 kHz -> decoded [samples] float32 and its rate, by the FFmpeg library's codec `name`."""
    encoder = av.CodecContext.create(name, "w")
    encoder.sample_rate, encoder.layout, encoder.format = _TELEPHONE_RATE, "mono", "s16"
    encoder.time_base, encoder.bit_rate, encoder.options = Fraction(1, _TELEPHONE_RATE), bit_rate, options or {}
    frame = av.AudioFrame.from_ndarray(pcm[None], format="s16", layout="mono")
    frame.sample_rate = _TELEPHONE_RATE
    packets = encoder.encode(frame) + encoder.encode(None)
    decoder = av.CodecContext.create(name, "r")
    decoder.sample_rate, decoder.layout, decoder.extradata = _TELEPHONE_RATE, "mono", encoder.extradata
    frames = [frame for packet in [*packets, None] for frame in decoder.decode(packet)]
    decoded = np.concatenate([frame.to_ndarray()[0] for frame in frames])  # both decoders give s16
    return decoded.astype(np.float32) / 2**15, decoder.sample_rate


class Codec(NamedTuple):
    """run(pcm [samples] int16 at 8 kHz, generator) -> decoded [samples] float32 at 8 kHz, `delay` samples late."""

    run: Callable[[np.ndarray, np.random.Generator], np.ndarray]
    delay: int


# Delays are the peaks of the cross-correlation of input and output, both resampled to 48 kHz, over four synthetic
# utterances, equal for every bit rate: 39.4 samples of AMR (its encoder looks 5 ms ahead), none of the others. The
# decoder of Opus takes out its own, which the encoder announces in its header.
CODECS = {
    "mulaw": Codec(partial(_run_sndfile, "ULAW"), delay=0),  # ITU-T G.711
    "alaw": Codec(partial(_run_sndfile, "ALAW"), delay=0),  # ITU-T G.711
    "gsm": Codec(partial(_run_sndfile, "GSM610"), delay=0),  # GSM 06.10 full rate, ETSI EN 300 961
    "amr_nb": Codec(_run_amr_nb, delay=39),  # 3GPP TS 26.071
    "opus": Codec(_run_opus, delay=0),  # RFC 6716
}


# ---------------------------------------------------------------- by name

DOMAINS: dict[str, Callable[..., Domain]] = {"clean": Clean, "noisy": Noisy, "telephony": Telephony}


def make_domain(name: str, noise: str | Path | None = None, **options) -> Domain:
    """The domain `name` of `DOMAINS`, built with its options.

    noise: folder of noise files, for the domains that have noise; the others do without.

    Raises ValueError for an unknown domain or option, and whatever the domain's class says about its options.
    """
    if name not in DOMAINS:
        raise ValueError(f"domain: got {name!r}, expected one of {', '.join(DOMAINS)}.")
    builder = DOMAINS[name]
    known = inspect.signature(builder).parameters
    if unknown := sorted(set(options) - set(known)):
        expected = ", ".join(sorted(set(known) - {"noise"})) or "none"
        raise ValueError(f"{name} domain: unknown option {', '.join(unknown)}; its options: {expected}.")
    return builder(**({"noise": noise} if "noise" in known else {}), **options)


def simulate(domain: Domain, audio: np.ndarray, path: str | os.PathLike, seed: int = 0) -> np.ndarray:
    """audio [samples] float32 in the domain, [samples] float32, drawn by (seed, path) and nothing else.

    An utterance, named by its path, so sounds the same in every evaluation, whatever the order or the process. Give
    the path as the trial list has it: the string counts, not the file.
    """
    digest = hashlib.sha256(os.fsencode(path)).digest()
    return domain(audio, np.random.default_rng([seed, int.from_bytes(digest[:8], "little")]))


def _check_range(name: str, limits: tuple[float, float], lowest: float, highest: float) -> None:
    low, high = limits
    if not lowest <= low <= high <= highest:
        raise ValueError(f"{name}: got {low} to {high}, expected values from {lowest:g} to {highest:g}, low first.")


def _at_power_of(reference: np.ndarray, audio: np.ndarray) -> np.ndarray:
    """audio [samples], float32, scaled to the mean power of the reference; silence stays silence."""
    wanted, found = (float(np.mean(np.square(x, dtype=np.float64))) for x in (reference, audio))
    return (audio * np.sqrt(wanted / found) if found > 0 else audio).astype(np.float32)
