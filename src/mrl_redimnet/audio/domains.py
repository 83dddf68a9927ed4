"""Acoustic domains simulated from clean speech: rooms with noise, and the telephone network.

A domain is a callable: domain(audio [samples] float32 at 16 kHz, generator) -> [the same samples] float32, all its
draws from the generator. A new domain is an entry in `DOMAINS`.
"""

import hashlib
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import numpy as np

from configuration_mrl_redimnet import SAMPLING_RATE
from mrl_redimnet.audio.augmentation import AddNoise, check_range
from mrl_redimnet.audio.codecs import (
    PACKET,
    TELEPHONE_RATE,
    band_limited,
    lose_packets,
    resampled,
    telephone_codecs,
    transcode,
)
from mrl_redimnet.audio.rooms import RoomBank, at_power_of, reverberate
from mrl_redimnet.settings import Number, near

Domain = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@dataclass
class Clean:
    """The audio as it is."""

    def __call__(self, audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """audio [samples] float32 -> the same."""
        return audio


@dataclass
class Noisy:
    """Speech in a room, in noise: a room's response with some probability, then noise at a drawn SNR.

    The response comes from a bank of simulated rooms or from recordings. Reverberated speech keeps its length, its
    power and its place: the direct path's delay is taken out. The SNR is that of reverberated speech to noise.

    noise: folder of noise files, at any depth. snr: (low, high) in dB, drawn uniformly.
    rooms, room_count, room_seed: a folder of recorded responses, or the bank of simulated rooms, see `RoomBank`.

    Raises ValueError for options out of range or no noise folder; FileNotFoundError for a folder without audio; when
    called, AudioError for a file that cannot be read or a silent response.
    """

    noise: str | Path | None = None
    snr: tuple[float, float] = (0.0, 15.0)
    room_probability: float = 0.5
    rooms: str | Path | None = None
    room_count: int = 64
    room_seed: int = 0

    def __post_init__(self) -> None:
        _check_noisy(**{f.name: getattr(self, f.name) for f in fields(self)})
        self._bank = RoomBank(self.rooms, self.room_count, self.room_seed)
        self._add_noise = AddNoise(cast("str | Path", self.noise), snr=self.snr, probability=1.0)

    def __call__(self, audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """audio [samples] float32 -> the same in a room (or not) and in noise, by the generator's draws."""
        if rng.random() < self.room_probability:
            audio = reverberate(audio, self._bank.draw(rng))
        return self._add_noise(audio, rng)


def _check_noisy(
    noise: object, snr: Any, room_probability: object, rooms: object, room_count: object, room_seed: object
) -> None:
    """The options of `Noisy`, without a look into the folders."""
    if noise is None:
        raise ValueError("noise: the noisy domain needs a folder of noise files, none was given.")
    for name, folder in (("noise", noise), ("rooms", rooms)):
        if folder is not None and not isinstance(folder, (str, Path)):
            raise ValueError(f"{name}: got {folder!r}, expected the path of a folder.")
    check_range("snr", snr, -100.0, 100.0)
    Number(least=0, most=1, expected="0 to 1")("room_probability", room_probability)
    Number(least=1, whole=True)("room_count", room_count)
    Number(least=0, whole=True)("room_seed", room_seed)


@dataclass
class Telephony:
    """A telephone call: 8 kHz, 300 to 3400 Hz, a drawn codec, lost packets, and back to 16 kHz.

    The band is limited at both ends of the line (codecs put energy back outside it), each time by a Butterworth of
    zero phase: fourth order, forwards and backwards. The result has the length and the power of the input and is
    aligned with it: the codecs' delays are taken out. A peak above full scale is scaled down for the codec; speech is
    not otherwise levelled, so that quantisation costs quiet speech as much as on the line.

    codecs: names of `telephone_codecs`, one drawn per call. loss: (low, high), the share of 20 ms packets that is
    lost, drawn uniformly, see `lose_packets`. band: (low, high) in Hz, where each filter is at -6 dB.

    Raises ValueError for unknown codecs or options out of range; when called, AudioError for a codec that fails.
    """

    codecs: Sequence[str] = ("mulaw", "alaw", "gsm", "amr_nb", "opus")
    loss: tuple[float, float] = (0.0, 0.05)
    band: tuple[float, float] = (300.0, 3400.0)

    def __post_init__(self) -> None:
        known = telephone_codecs()
        if not isinstance(self.codecs, (list, tuple)):
            raise ValueError(f"codecs: got {self.codecs!r}, expected a list of some of {', '.join(known)}.")
        unknown = [name for name in self.codecs if name not in known]
        if unknown or not self.codecs:
            hint = near(unknown[0], known) if unknown else ""
            raise ValueError(f"codecs: got {unknown or 'none'}, expected some of {', '.join(known)}.{hint}")
        check_range("loss", self.loss, 0.0, 1.0)
        check_range("band", self.band, 1.0, TELEPHONE_RATE / 2 - 1)
        if self.band[0] == self.band[1]:
            raise ValueError(f"band: {self.band[0]} Hz to the same leaves nothing.")

    def __call__(self, audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """audio [samples] float32 -> the same through a telephone call, by the generator's draws."""
        line = self._to_line(audio)
        line = transcode(self.codecs[int(rng.integers(len(self.codecs)))], line, rng)
        line = self._in_band(lose_packets(line, rng.uniform(*self.loss), rng))
        wide = resampled(line, TELEPHONE_RATE, SAMPLING_RATE)
        return at_power_of(audio, wide[: len(audio)])

    def _to_line(self, audio: np.ndarray) -> np.ndarray:
        """[samples] at 16 kHz -> [whole packets] float32 at 8 kHz, in the band and within full scale."""
        whole = np.pad(audio, (0, -len(audio) % (PACKET * SAMPLING_RATE // TELEPHONE_RATE)))
        narrow = resampled(whole, SAMPLING_RATE, TELEPHONE_RATE)
        line = self._in_band(narrow)
        return line / max(1.0, np.abs(line).max())

    def _in_band(self, line: np.ndarray) -> np.ndarray:
        return band_limited(line, *self.band, rate=TELEPHONE_RATE)


# ---------------------------------------------------------------- by name

DOMAINS: dict[str, Callable[..., Domain]] = {"clean": Clean, "noisy": Noisy, "telephony": Telephony}


def make_domain(name: str, noise: str | Path | None = None, **options: Any) -> Domain:
    """The domain `name` of `DOMAINS`, built with its options.

    noise: folder of noise files, for the domains that have noise; the others do without.

    Raises ValueError for an unknown domain or option, and whatever the domain's class says about its options.
    """
    builder, parameters = _builder(name, options)
    return builder(**({"noise": noise} if "noise" in parameters else {}), **options)


def check_domain(name: str, **options: Any) -> None:
    """Raises ValueError as `make_domain` does for the name, the options and their values; no folder is looked into."""
    builder, parameters = _builder(name, options)
    if builder is Noisy:
        _check_noisy(**{field.name: options.get(field.name, field.default) for field in fields(Noisy)})
    else:
        builder(**options)


def _builder(name: str, options: dict) -> tuple[Callable[..., Domain], Mapping[str, inspect.Parameter]]:
    """What builds a domain, and the options that it knows; ValueError for others."""
    if name not in DOMAINS:
        raise ValueError(f"domain: got {name!r}, expected one of {', '.join(DOMAINS)}.{near(name, DOMAINS)}")
    known = inspect.signature(DOMAINS[name]).parameters
    if unknown := sorted(set(map(str, options)) - set(known)):
        expected = ", ".join(sorted(set(known) - {"noise"})) or "none"
        raise ValueError(
            f"{name} domain: unknown option {', '.join(unknown)}; its options: {expected}.{near(unknown[0], known)}"
        )
    return DOMAINS[name], known


def simulate(domain: Domain, audio: np.ndarray, path: str | os.PathLike, seed: int = 0) -> np.ndarray:
    """audio [samples] float32 in the domain, [samples] float32, drawn by (seed, path) and nothing else.

    An utterance, named by its path, so sounds the same in every evaluation, whatever the order or the process. Give
    the path as the trial list has it: the string counts, not the file.
    """
    digest = hashlib.sha256(os.fsencode(path)).digest()
    return domain(audio, np.random.default_rng([seed, int.from_bytes(digest[:8], "little")]))
