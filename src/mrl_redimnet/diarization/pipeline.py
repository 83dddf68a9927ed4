"""Diarisation of recordings: speech, windows over it, their embeddings, clusters of these, turns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from configuration_mrl_redimnet import SAMPLING_RATE
from feature_extraction_mrl_redimnet import MRLReDimNetFeatureExtractor
from mrl_redimnet.audio.windows import Reader, consecutive, stretch_reader
from mrl_redimnet.data.utterances import as_inputs
from mrl_redimnet.diarization.activity import Span, speech_in
from mrl_redimnet.diarization.clustering import clustered
from mrl_redimnet.diarization.turns import Turn, joined

STRETCH = 60.0  # seconds whose windows are embedded at a time
EXCERPT = 30.0  # seconds of a speaker that are kept to tell who it is
_SHORTEST = 0.3  # seconds of a window; shorter speech is embedded with what is around it
_GRID = 0.05  # seconds, to which a change of speaker is placed
# Below so many seconds of speech, windows are longer, and are clustered in another way.
FEW_SECONDS = 35.0
WINDOW, WINDOW_OF_FEW = 1.0, 1.5

Embed = Callable[[list[NDArray]], NDArray]  # waveforms [samples] float32 at 16 kHz -> embeddings [N, D]


@dataclass(frozen=True)
class Diarization:
    """Who spoke when in a recording.

    Attributes:
        recording: what it is called.
        seconds: its length.
        turns: in the order of their starts. No two overlap: of two people who speak at once, one is found.
        voices: of each speaker the embedding [D] of up to 30 s of their speech, taken as one utterance, to compare
            with others.
    """

    recording: str
    seconds: float
    turns: tuple[Turn, ...]
    voices: dict[str, NDArray] = field(repr=False)

    def spoken(self, speaker: str) -> float:
        """Seconds in all turns of a speaker."""
        return sum(turn.seconds for turn in self.turns if turn.speaker == speaker)

    def renamed(self, names: dict[str, str]) -> "Diarization":
        """With other names of speakers, each another one: {name: new name}."""
        voices = {names[name]: voice for name, voice in self.voices.items()}
        turns = tuple(Turn(turn.start, turn.end, names[turn.speaker]) for turn in self.turns)
        return Diarization(self.recording, self.seconds, turns, voices)


@dataclass(frozen=True)
class Diarizer:
    """Finds who spoke when.

        diarizer = Diarizer(encoder.embed)
        found = diarizer("meeting.wav")
        print(rttm_text("meeting", found.turns))

    Attributes:
        embed: gives embeddings of waveforms, such as `SpeakerEncoder.embed`, or `partial(encoder.embed, dim=64)`.
        window: seconds of the windows that are embedded [1.0; 1.5 where there are less than 35 s of speech].
        step: seconds from one to the next [half a window].
        most_speakers: how many are looked for where their number is not given.
        least_seconds: who speaks less in all is not taken for another speaker, where their number is not given.
    """

    embed: Embed
    window: float | None = None
    step: float | None = None
    most_speakers: int = 10
    least_seconds: float = 2.0

    def __post_init__(self) -> None:
        for window in (WINDOW, WINDOW_OF_FEW) if self.window is None else (self.window,):
            step = self._step(window)
            if not _SHORTEST <= window <= STRETCH or not 0 < step <= window:
                raise ValueError(
                    f"window: got {window} s with a step of {step} s, expected windows of {_SHORTEST} to {STRETCH:g} "
                    "s, and a step above 0 and at most as long."
                )
        if self.most_speakers < 1:
            raise ValueError(f"most_speakers: got {self.most_speakers}, expected at least 1.")

    def __call__(
        self,
        recording: object,
        *,
        speakers: int | None = None,
        speech: Sequence[Span] | None = None,
        progress: str | None = None,
    ) -> Diarization:
        """Diarises one recording of any length; memory holds little more than a minute of it.

        Args:
            recording: in any form that `SpeakerEncoder` takes.
            speakers: how many there are [found].
            speech: where there is speech, in seconds [by Silero's detector].
            progress: title of a progress bar on a terminal; None: no bar.

        Raises:
            AudioError: the recording cannot be read.
            ValueError: fewer than one speaker; speech outside the recording, or not in order.
            ModuleNotFoundError: without the `diarization` extra.
        """
        if speakers is not None and speakers < 1:
            raise ValueError(f"speakers: got {speakers}, expected at least 1.")
        (item,) = as_inputs([recording], "recording")
        read = stretch_reader(item.load(), item.name, MRLReDimNetFeatureExtractor(min_samples=1))
        seconds = read.samples / SAMPLING_RATE
        spans = speech_in(read) if speech is None else _checked(speech, seconds)
        if not spans:
            return Diarization(item.name, seconds, (), {})
        few = sum(end - start for start, end in spans) < FEW_SECONDS
        window = self.window or (WINDOW_OF_FEW if few else WINDOW)
        windows = np.concatenate([windows_over(*span, window, self._step(window)) for span in spans])  # [N, 2]
        units = self.embedded(read, windows, progress)
        lengths = windows[:, 1] - windows[:, 0]
        labels, means = clustered(units, lengths, speakers, self.most_speakers, self.least_seconds, few)
        turns = [turn for span in spans for turn in self._turns(span, windows, units @ means.T)]
        order = {name: f"speaker_{number:02}" for number, name in enumerate(dict.fromkeys(t.speaker for t in turns), 1)}
        turns = joined(Turn(turn.start, turn.end, order[turn.speaker]) for turn in turns)
        return Diarization(item.name, seconds, tuple(turns), self._voices(read, turns))

    def _step(self, window: float) -> float:
        return window / 2 if self.step is None else self.step

    def embedded(self, read: Reader, windows: NDArray, progress: str | None) -> NDArray:
        """windows [N, 2] in seconds -> [N, D] of length one. A stretch of the recording is held at a time."""
        missing = np.maximum(_SHORTEST - (windows[:, 1] - windows[:, 0]), 0) / 2
        samples = np.round((windows + np.column_stack([-missing, missing])) * SAMPLING_RATE).astype(np.int64)
        samples = samples.clip(0, read.samples)
        longest = int((samples[:, 1] - samples[:, 0]).max())
        found = []
        hidden = True if progress is None else None  # None: shown where it is a terminal
        groups = consecutive(samples[:, 0], longest, round(STRETCH * SAMPLING_RATE))
        for rows in tqdm(groups, desc=progress, disable=hidden, leave=False, unit=" min"):
            first = samples[rows[0], 0]
            wave = read(first, samples[rows, 1].max())
            found.append(self.embed([wave[start - first : end - first] for start, end in samples[rows]]))
        return _units(np.concatenate(found))

    def _turns(self, span: Span, windows: NDArray, scores: NDArray) -> list[Turn]:
        """Turns in one piece of speech: every 50 ms go to the speaker whom the windows there are most like, those in
        whose middle it lies counting most. scores [N, K]: similarity of each window to each speaker.
        """
        start, end = span
        rows = slice(*np.searchsorted(windows[:, 0], [start - 1e-6, end - 1e-6]))
        times = np.arange(start, end, _GRID) + _GRID / 2
        middle, half = windows[rows].mean(axis=1), (windows[rows, 1] - windows[rows, 0]) / 2
        weights = 1 - np.abs(times[:, None] - middle) / (half + _GRID)  # [T, n]
        best = (np.maximum(weights, 0) @ scores[rows]).argmax(axis=1)
        changes = np.flatnonzero(np.diff(best)) + 1
        borders = [start, *(times[changes] - _GRID / 2), end]
        return [
            Turn(float(borders[number]), float(borders[number + 1]), str(part[0]))
            for number, part in enumerate(np.split(best, changes))
        ]

    def _voices(self, read: Reader, turns: Sequence[Turn]) -> dict[str, NDArray]:
        """Of each speaker, the embedding of their longest turns as one utterance."""
        excerpts: dict[str, list[NDArray]] = {}
        held: dict[str, float] = {}
        for turn in sorted(turns, key=lambda turn: -turn.seconds):
            left = EXCERPT - held.get(turn.speaker, 0.0)
            if left >= _SHORTEST and (turn.seconds >= _SHORTEST or turn.speaker not in held):
                length = min(max(turn.seconds, _SHORTEST), left)
                first = max(0, min(round(turn.start * SAMPLING_RATE), read.samples - round(length * SAMPLING_RATE)))
                last = min(first + round(length * SAMPLING_RATE), read.samples)
                excerpts.setdefault(turn.speaker, []).append(read(first, last))
                held[turn.speaker] = held.get(turn.speaker, 0.0) + length
        names = sorted(excerpts)
        return dict(zip(names, self.embed([np.concatenate(excerpts[name]) for name in names]), strict=True))


def windows_over(start: float, end: float, window: float, step: float) -> NDArray:
    """Windows [n, 2] that cover speech from `start` to `end` evenly, at most a step apart, in seconds."""
    count = int(np.ceil(max(end - start - window, 0) / step - 1e-9)) + 1
    starts = np.linspace(start, max(end - window, start), count)
    return np.column_stack([starts, np.minimum(starts + window, end)])


def _checked(speech: Sequence[Span], seconds: float) -> list[Span]:
    """Given spans of speech; ValueError for those that are not in the recording, or not in order."""
    before = 0.0
    for start, end in speech:
        if not before <= start < end <= seconds + 0.05:
            raise ValueError(
                f"speech: got {start:.2f} to {end:.2f} s after {before:.2f} s, in a recording of {seconds:.2f} s: "
                "expected pieces in order, without overlaps, inside the recording."
            )
        before = end
    return [(start, min(end, seconds)) for start, end in speech if start < seconds]


def _units(embeddings: NDArray) -> NDArray:
    """[N, D] -> the same of length one."""
    return embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), np.finfo(np.float32).tiny)
