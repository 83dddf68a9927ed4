"""Rooms: impulse responses, simulated or recorded, and speech as heard through them."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from configuration_mrl_redimnet import SAMPLING_RATE
from mrl_redimnet.audio.io import AudioError, read_audio
from mrl_redimnet.audio.material import draw_readable, usable
from mrl_redimnet.audio.scan import AUDIO_SUFFIXES, files_below
from mrl_redimnet.extras import extra

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
class RoomBank:
    """Responses to draw from: recordings, or simulated rooms.

    folder: recorded impulse responses, at any depth, one room each (channels are averaged). RIRS_NOISES (OpenSLR 28)
        as unpacked is such a folder: its noise, which lies among the responses, is left out by name.
    room_count, room_seed: without a folder, the bank is `simulated_response(room_seed, i)` for i below room_count; a
        process computes a response when it first needs it (up to a second for the longest) and keeps it.

    Raises ValueError for a room_count below 1; FileNotFoundError for a folder without responses.
    """

    folder: str | Path | None = None
    room_count: int = 64
    room_seed: int = 0

    def __post_init__(self) -> None:
        if self.room_count < 1:
            raise ValueError(f"room_count: got {self.room_count}, expected at least 1.")
        self.files = [] if self.folder is None else _response_files(self.folder)

    def draw(self, rng: np.random.Generator) -> RoomResponse:
        """One response, by the generator's draw. A recording that cannot be read, or is silent, is told and another one
        drawn, see `mrl_redimnet.audio.material`.
        """
        if self.files:
            return draw_readable(lambda: recorded_response(self.files[rng.integers(len(self.files))]), "rooms")
        return simulated_response(self.room_seed, int(rng.integers(self.room_count)))


# RIRS_NOISES: beside the responses of real_rirs_isotropic_noises, whose names have "rir" or (of the Aachen database)
# "air" there, lies <database>_type<n>_noise_<room>_<m>.wav; pointsource_noises is noise of MUSAN, under its own names.
_RECORDED_NOISE = re.compile(r"_type\d+_noise_|^noise-(free-sound|sound-bible)-", re.IGNORECASE)


def _response_files(folder: str | Path) -> list[str]:
    found = files_below(folder, "rooms")
    files = [str(file) for file in found if not _RECORDED_NOISE.search(file.name)]
    if not files:
        noise = f", only the {len(found):,} noise files of RIRS_NOISES"
        raise FileNotFoundError(f"rooms: no audio ({', '.join(AUDIO_SUFFIXES)}) below {folder}{noise}.")
    return usable(files, "rooms")


def reverberate(audio: np.ndarray, response: RoomResponse) -> np.ndarray:
    """audio [samples] float32 as heard in a room: the same length and power, direct path where the input is."""
    with extra("evaluation"):
        from scipy.signal import fftconvolve

    wet = fftconvolve(audio, response.taps)[response.delay : response.delay + len(audio)]
    return at_power_of(audio, wet)


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


def draw_talker(room: Room, rng: np.random.Generator) -> Room:
    """The same room and microphone with a talker somewhere else, as far from walls and microphone as in `draw_room`."""
    source = rng.uniform(_DISTANCE, room.size - _DISTANCE)
    while np.linalg.norm(source - room.microphone) < _DISTANCE:
        source = rng.uniform(_DISTANCE, room.size - _DISTANCE)
    return room._replace(source=source)


@cache
def simulated_response(seed: int, index: int) -> RoomResponse:
    """The response of `draw_room(seed, index)`."""
    return room_response(draw_room(seed, index))


def room_response(room: Room) -> RoomResponse:
    """The response of a room by the image source method (Allen & Berkley, JASA 65, 1979).

    The walls' absorption is Sabine's for the room's RT60. A box whose walls mirror decays up to a third slower or
    faster than Sabine's diffuse field, so the response is then faded to the RT60 that was drawn: reflections come at
    an even pace, so that an exponential in time is a change of the absorption.
    """
    with extra("evaluation"):
        import pyroomacoustics as pra  # takes most of a second, and only this domain needs it

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
def _one_thread(constants: Any) -> Iterator[None]:
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


def at_power_of(reference: np.ndarray, audio: np.ndarray) -> np.ndarray:
    """audio [samples], float32, scaled to the mean power of the reference; silence stays silence."""
    wanted, found = (float(np.mean(np.square(x, dtype=np.float64))) for x in (reference, audio))
    return (audio * np.sqrt(wanted / found) if found > 0 else audio).astype(np.float32)
