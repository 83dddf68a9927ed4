"""Simulated conversations of real speakers, with the turns that were made: to choose settings and to measure on.

Lengths of turns and of the gaps between them are drawn from distributions that have the statistics of real meetings.
A negative gap is speech of two at once. What is simulated has no back-channels that answer what was said, no laughter,
and each speaker reads: results on it compare systems and settings, they do not foretell a meeting's error rate.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configuration_mrl_redimnet import SAMPLING_RATE
from mrl_redimnet.audio.domains import Domain
from mrl_redimnet.audio.levels import read_utterance
from mrl_redimnet.audio.rooms import Room, draw_room, draw_talker, reverberate, room_response
from mrl_redimnet.diarization.turns import Turn, joined

_FRAME = SAMPLING_RATE // 100
_SPEECH_DB = 35.0  # a frame is speech that is at most this much quieter than the loud ones of its utterance
_PAUSE = 0.4  # seconds of silence that end a turn in the reference; shorter ones belong to it
_SHORTEST = 0.3  # seconds of a turn
_LEVELS = 4.0  # dB that talkers differ by, up and down


@dataclass(frozen=True)
class Statistics:
    """How people take turns.

    A turn's length is log-normal: exp(N(`length`, `length_spread`)) seconds. A gap to the turn before is Laplace's, of
    median `gap` and scale `gap_spread`, in seconds, at most `longest_gap`, and not before the turn before began.
    """

    length: float
    length_spread: float
    gap: float
    gap_spread: float
    longest_gap: float = 4.0

    @classmethod
    def of(cls, recordings: Mapping[str, Sequence[Turn]]) -> "Statistics":
        """Those of some recordings, by moments of the logarithm of lengths, and by the quartiles of gaps.

        Raises ValueError where no recording has two turns.
        """
        lengths = [turn.seconds for turns in recordings.values() for turn in turns]
        gaps = [
            after.start - before.end
            for turns in recordings.values()
            for before, after in zip(sorted(turns), sorted(turns)[1:], strict=False)
            if before.speaker != after.speaker
        ]
        if not gaps:
            raise ValueError("statistics of turns: no recording has turns of two speakers.")
        logs = np.log(np.maximum(lengths, 0.01))
        low, median, high = np.percentile(gaps, [25, 50, 75])
        # Half of a Laplace distribution lies within ln 2 scales of its median.
        scale = (high - low) / 2 / np.log(2)
        return cls(*(round(float(value), 2) for value in (logs.mean(), logs.std(), median, scale)))


# Of the turns in eleven half minutes of the AMI meetings (CC BY 4.0), by `Statistics.of`.
MEETINGS = Statistics(length=0.42, length_spread=1.07, gap=-0.18, gap_spread=1.89)


def simulate_conversation(
    speech: Mapping[str, Sequence[Path]],
    seconds: float,
    rng: np.random.Generator,
    *,
    statistics: Statistics = MEETINGS,
    in_room: bool = False,
    domain: Domain | None = None,
) -> tuple[NDArray, list[Turn]]:
    """A conversation of all the speakers of `speech`, who take turns at random.

    Args:
        speech: {speaker: files of utterances}, at least one each. An utterance is cut into turns; when a speaker's
            utterances are used up, they begin anew.
        seconds: the conversation's length, or a little more: the last turn is not cut.
        rng: of all draws.
        in_room: everybody talks in one simulated room, each from another place.
        domain: applied to the whole, such as a telephone line.

    Returns:
        The conversation [samples] float32 at 16 kHz, and its turns: each speaker's speech without pauses of more than
        0.4 s, by the level of the clean utterances.

    Raises:
        AudioError: a file that cannot be read, or in which nobody can be heard.
        ValueError: no speakers.
    """
    if not speech:
        raise ValueError("speech: a conversation needs at least one speaker.")
    room = draw_room(int(rng.integers(2**31)), 0) if in_room else None
    talkers = {name: _Talker(files, room, rng) for name, files in speech.items()}
    waves: list[tuple[int, NDArray]] = []
    turns: list[Turn] = []
    start = end = 0.0
    speaker = None
    while end < seconds:
        speaker = str(rng.choice([name for name in talkers if name != speaker or len(talkers) == 1]))
        length = max(_SHORTEST, np.exp(rng.normal(statistics.length, statistics.length_spread)))
        wave, spoken = talkers[speaker].turn(length, rng)
        gap = min(rng.laplace(statistics.gap, statistics.gap_spread), statistics.longest_gap)
        start = max(start, end + gap) if turns else abs(gap)
        end = max(end, start + len(wave) / SAMPLING_RATE)
        waves.append((round(start * SAMPLING_RATE), wave))
        turns += [Turn(start + first, start + last, speaker) for first, last in spoken]
    whole = np.zeros(max(at + len(wave) for at, wave in waves), dtype=np.float32)
    for at, wave in waves:
        whole[at : at + len(wave)] += wave
    whole *= min(1.0, 0.99 / max(np.abs(whole).max(), 1e-9))
    return domain(whole, rng) if domain else whole, joined(turns)


class _Talker:
    """A speaker's utterances, one after the other, as heard from one place and at one level."""

    def __init__(self, files: Sequence[Path], room: Room | None, rng: np.random.Generator) -> None:
        self._response = None if room is None else room_response(draw_talker(room, rng))
        self._gain = 10 ** (rng.uniform(-_LEVELS, _LEVELS) / 20)
        self._files = [files[row] for row in rng.permutation(len(files))]
        self._wave: NDArray = np.zeros(0, dtype=np.float32)

    def turn(self, seconds: float, rng: np.random.Generator) -> tuple[NDArray, list[tuple[float, float]]]:
        """The next turn, of at most `seconds`, and where in it there is speech, in seconds."""
        if len(self._wave) < _SHORTEST * SAMPLING_RATE:
            self._files.append(self._files.pop(0))
            wave = read_utterance(self._files[-1])
            self._wave = (wave * 0.05 / np.sqrt(np.mean(wave**2))).astype(np.float32)
            self._active = speech_frames(self._wave)
        samples = min(len(self._wave), round(seconds * SAMPLING_RATE))
        if len(self._wave) - samples < _SHORTEST * SAMPLING_RATE:
            samples = len(self._wave)  # nothing is left over that is too short for a turn
        part, active = self._wave[:samples], self._active[: samples // _FRAME]
        self._wave, self._active = self._wave[samples:], self._active[samples // _FRAME :]
        heard = part if self._response is None else reverberate(part, self._response)
        return heard * np.float32(self._gain), list(spoken_parts(active))


def speech_frames(wave: NDArray) -> NDArray:
    """wave [samples], clean and at 16 kHz -> whether each 10 ms of it is speech, by its level."""
    frames = wave[: len(wave) // _FRAME * _FRAME].reshape(-1, _FRAME)
    level = 10 * np.log10(np.mean(np.square(frames, dtype=np.float64), axis=1) + 1e-12)
    return level > np.percentile(level, 95) - _SPEECH_DB


def spoken_parts(active: NDArray) -> Iterator[tuple[float, float]]:
    """Frames of 10 ms that are speech or not -> where speech starts and ends, in seconds; short pauses are speech."""
    rows = np.flatnonzero(active)
    for part in np.split(rows, np.flatnonzero(np.diff(rows) > _PAUSE * 100) + 1) if len(rows) else ():
        yield part[0] / 100, (part[-1] + 1) / 100
