"""What the page to try a model on computes, without the page: recordings heard once, then compared at every size.

listener = Listener(SpeakerEncoder.from_pretrained("nano"))
first, second = listener.hear("a.wav"), listener.hear("b.wav")
listener.verify([first], second)[-1].decision.accepted
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mrl_redimnet.adapters.detector import CLEAN, Detection, DomainDetector
from mrl_redimnet.audio.io import SAMPLING_RATE, AudioError, AudioWarning, Encoded, audio_info, read_audio
from mrl_redimnet.audio.levels import levels, refuse_silence, speech_seconds
from mrl_redimnet.encoder import SpeakerEncoder
from mrl_redimnet.scoring.calibration import Threshold, Thresholds
from mrl_redimnet.scoring.decisions import TEST_SECONDS, Decision, DecisionRule
from mrl_redimnet.scoring.scorers import enrolment_units, make_scorer

OFF, AUTO = "off", "automatic"  # beside the adapters' names: the model itself, and the detector's choice
LONGEST = 120.0  # seconds of a recording, which bound memory and time, as in the service
MOST_FILES = 20  # that are compared at a time
POINTS = 400  # across a picture
# When a recording is warned of, though it is used. Of 500 recordings of the corpora in docs/results/README.md, levels
# were -41 to -13 dBFS, 27 % (1st percentile) to all of the frames were less than 30 dB below the loud ones, and 0.12 %
# of the samples of the worst were at full scale.
QUIET_DBFS = -45.0
SPEECH_SHARE = 0.27
FULL_SCALE, CLIPPED_SHARE = 0.99, 0.0015


@dataclass(frozen=True, eq=False)
class Take:
    """A recording as it was heard. The audio itself is not kept.

    Attributes:
        name: of its file. seconds: of it. sampling_rate: of the file, in Hz.
        rows: {adapter, or None for the model itself: whole embedding [D] float32}.
        heard: what the detector took it for; None without a detector.
        notes: what is wrong with it although it is used, in sentences.
        envelope: lowest and highest sample [2, P] of P stretches, P at most `POINTS`.
        mel: log-mel features [bins, P'] that the network gets, means of stretches, P' at most `POINTS`.
    """

    name: str
    seconds: float
    sampling_rate: int
    rows: Mapping[str | None, NDArray]
    heard: Detection | None
    notes: tuple[str, ...]
    envelope: NDArray
    mel: NDArray


@dataclass(frozen=True)
class Choice:
    """An adapter (None: the model itself) with the reason, a sentence."""

    adapter: str | None
    reason: str


@dataclass(frozen=True)
class Verdict:
    """A comparison at one size.

    Attributes:
        dim: how many numbers were compared. decision: on it.
        rule: how was decided, or why not, in words.
        saved: the threshold that decided, with the rates of the trials it was set on; None without one.
    """

    dim: int
    decision: Decision
    rule: str
    saved: Threshold | None

    @property
    def probability(self) -> float | None:
        """Of one speaker, where both cases are equally likely beforehand; None without a calibration."""
        llr = self.decision.llr
        return None if llr is None else float(0.5 * (1 + np.tanh(llr / 2)))


@dataclass(frozen=True)
class Match(Verdict):
    """A comparison with an enrolled speaker."""

    speaker: str = ""


class Listener:
    """A model with its adapters, detector and thresholds. Several threads may use it at once.

    Attributes:
        encoder: as given.
        dims: the sizes to choose from: those with thresholds, else those the model was trained at.
        adapters: the names of the loaded adapters.
        choices: what `adapter` may be: `OFF`, the adapters, and `AUTO` where there is a detector.
    """

    def __init__(
        self, encoder: SpeakerEncoder, detector: DomainDetector | None = None, thresholds: Thresholds | None = None
    ) -> None:
        """Args:
        encoder: with the adapters that are to be chosen from, in `encoder.adapters`; on a model with an adapter merged
            into it there are none.
        detector: chooses one of them by the sound.
        thresholds: to decide by [those beside the model].

        Raises:
            ValueError: a detector without adapters, or an adapter whose name has another meaning here.
        """
        self.encoder = encoder
        try:
            self.adapters, self._merged = encoder.adapters.names, None
        except ValueError:  # one is merged into the model, and others cannot be loaded
            self.adapters, self._merged = [], encoder.adapter
        if detector is not None and not self.adapters:
            raise ValueError("detector: it chooses among adapters, and none is loaded.")
        if taken := {OFF, AUTO} & set(self.adapters):
            raise ValueError(f"adapter: {taken.pop()!r} has a meaning on the page: take another name.")
        self.choices = [OFF, *self.adapters, *([] if detector is None else [AUTO])]
        self._detector = detector
        self._thresholds = encoder.thresholds() if thresholds is None else thresholds
        self._scorer = make_scorer("cosine")
        self._weights = {name: encoder.weights(name) for name in (None, *self.adapters)}
        entries = [] if self._thresholds is None else self._thresholds.entries
        self.dims = sorted({entry.dim for entry in entries if entry.scorer == str(self._scorer)}) or encoder.dims()

    @classmethod
    def load(
        cls,
        model: str | Path = "nano",
        adapters: Mapping[str, str | Path] | None = None,
        *,
        detector: str | Path | None = None,
        thresholds: str | Path | None = None,
        device: torch.device | str | None = None,
    ) -> "Listener":
        """A saved model, adapters {name: path or Hub id}, and the folders of a detector and of thresholds.

        Raises as the class, `SpeakerEncoder.from_pretrained`, `AdapterBank.add`, `DomainDetector.load` and
        `Thresholds.load` do.
        """
        encoder = SpeakerEncoder.from_pretrained(model, device=device)
        for name, source in (adapters or {}).items():
            encoder.adapters.add(name, source)
        return cls(
            encoder,
            None if detector is None else DomainDetector.load(detector),
            None if thresholds is None else Thresholds.load(thresholds),
        )

    # ------------------------------------------------------------ one recording

    def hear(self, file: str | Path) -> Take:
        """Reads a file of any common format and embeds it with every adapter.

        Raises AudioError for one that cannot be read, is too long or too short, or in which nobody can be heard.
        """
        try:
            source = Encoded(Path(file).name, Path(file).read_bytes())  # messages call it by its name alone
        except FileNotFoundError as error:  # the page deletes recordings after a while
            raise AudioError(f"{Path(file).name} is not there any more: record or choose it again") from error
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", AudioWarning)
            info = audio_info(source)
            if info.seconds > LONGEST:
                raise AudioError(
                    f"{source.name} has {info.seconds:.0f} s, here it may have {LONGEST:g} s: cut a part out"
                )
            wave = read_audio(source)
        least = self.encoder.config.min_samples
        if len(wave) < least:
            raise AudioError(
                f"{source.name} is too short: it has {len(wave) / SAMPLING_RATE:.2f} s, and the model needs "
                f"{least / SAMPLING_RATE:.2f} s"
            )
        refuse_silence(source, wave)
        names = [None, *self.adapters]
        waves = torch.from_numpy(wave).expand(len(names), -1)
        rows = self.encoder.embed_padded(waves, torch.full((len(names),), len(wave)), names)
        return Take(
            source.name,
            len(wave) / SAMPLING_RATE,
            info.sampling_rate,
            dict(zip(names, rows, strict=True)),
            None if self._detector is None else self._detector.detect(wave),
            (*(f"{each.message}." for each in told), *notes(wave, info.sampling_rate)),
            np.stack([fold.reduceat(wave, _starts(len(wave))) for fold in (np.minimum, np.maximum)]),
            self._mel(wave),
        )

    @torch.inference_mode()
    def _mel(self, wave: NDArray) -> NDArray:
        front_end = self.encoder.model.base_model.front_end
        features = front_end(torch.from_numpy(wave)[None].to(self.encoder.device))[0].T.cpu().numpy()
        starts = _starts(features.shape[1])
        return np.add.reduceat(features, starts, axis=1) / np.diff(starts, append=features.shape[1])

    def choose(self, adapter: str, takes: Sequence[Take]) -> Choice:
        """What is compared with: one of `choices`. For `AUTO`, what all of `takes` sound like, else the model itself.

        Raises ValueError for another one.
        """
        if adapter not in self.choices:
            raise ValueError(f"adapter: got {adapter!r}, expected one of {', '.join(self.choices)}.")
        if adapter == OFF:
            return Choice(None, "The model itself, without an adapter.")
        if adapter != AUTO:
            return Choice(adapter, f"The adapter {adapter}, as chosen.")
        said = [f"{take.name} sounds {_sounding(take.heard)}" for take in takes if take.heard is not None]
        found = {take.heard.domain for take in takes if take.heard is not None}
        domain = found.pop() if len(found) == 1 else None
        chosen = domain if domain in self.adapters else None
        if chosen:
            outcome = f"the adapter {chosen} is used"
        elif found:
            outcome = "they differ, and all must go through the same: no adapter is used"
        else:
            outcome = "no adapter is used"
        return Choice(chosen, f"{'; '.join(said)}: {outcome}.")

    # ------------------------------------------------------------ comparisons

    def verify(self, enrolled: Sequence[Take], test: Take, adapter: str | None = None) -> list[Verdict]:
        """Whether `test` is the speaker of `enrolled`, whose takes are averaged: at each of `dims`.

        adapter: the name of a loaded one, None for the model itself. Raises ValueError where nobody is enrolled.
        """
        if not enrolled:
            raise ValueError("enrolled: got no recording, expected at least one.")
        return [self._matches({"": enrolled}, test, dim, adapter)[0] for dim in self.dims]

    def identify(
        self, enrolled: Mapping[str, Sequence[Take]], test: Take, dim: int, adapter: str | None = None
    ) -> list[Match]:
        """The enrolled speakers, {name: takes}, that `test` is most alike, the nearest first.

        Thresholds are for the search among all of them. Raises as `verify`.
        """
        if not enrolled or not all(enrolled.values()):
            raise ValueError("enrolled: expected at least one speaker, and at least one recording of each.")
        return sorted(self._matches(enrolled, test, dim, adapter), key=lambda match: -match.decision.score)

    def _matches(
        self, enrolled: Mapping[str, Sequence[Take]], test: Take, dim: int, adapter: str | None
    ) -> list[Match]:
        counts = [len(takes) for takes in enrolled.values()]
        rule = self._rule(dim, adapter, counts, len(enrolled))
        takes = [take for several in enrolled.values() for take in several]
        units = self._units([*takes, test], dim, adapter)
        ends = np.cumsum(counts)
        rows = {name: range(end - count, end) for name, end, count in zip(enrolled, ends, counts, strict=True)}
        scores = enrolment_units(units[:-1], rows) @ units[-1]
        seconds = [[sum(take.seconds for take in several), test.seconds] for several in enrolled.values()]
        decisions = rule.decide(scores, counts, np.array(seconds))
        return [
            Match(dim, decision, str(rule), rule.saved.get(count), name)
            for name, decision, count in zip(enrolled, decisions, counts, strict=True)
        ]

    def similarities(self, takes: Sequence[Take], dim: int, adapter: str | None = None) -> NDArray:
        """Cosines [N, N] of N recordings."""
        units = self._units(takes, dim, adapter)
        return units @ units.T

    def thresholds(self, takes: Sequence[Take], dim: int, adapter: str | None = None) -> NDArray | None:
        """From which cosine on each two of N recordings are taken for one speaker, [N, N]; None where none is saved."""
        rule = self._rule(dim, adapter, [1], 1)
        if not rule.lowest:
            return None
        count, spoken = len(takes), [take.seconds for take in takes]
        seconds = np.stack(np.meshgrid(spoken, spoken), axis=-1).reshape(-1, 2)
        decisions = rule.decide(np.zeros(count * count), [1] * (count * count), seconds)
        return np.array([decision.threshold for decision in decisions]).reshape(count, count)

    def operating_points(self, adapter: str | None = None) -> list[Threshold]:
        """The saved thresholds of this adapter's weights for single recordings, by size."""
        found = [self._rule(dim, adapter, [1], 1).saved.get(1) for dim in self.dims]
        return [entry for entry in found if entry is not None and entry.enrolments == 1]

    def _units(self, takes: Sequence[Take], dim: int, adapter: str | None) -> NDArray:
        return self._scorer.units(np.stack([take.rows[adapter] for take in takes]), dim, [take.name for take in takes])

    def _rule(self, dim: int, adapter: str | None, counts: Sequence[int], speakers: int) -> DecisionRule:
        domain = self._merged
        if adapter is not None:
            facts = self.encoder.adapters.facts(adapter)
            domain = facts.domain if facts else adapter  # thresholds are saved by it
        weights = self._weights[adapter]
        try:
            return DecisionRule.of(self._thresholds, dim, domain, self._scorer, weights, counts, speakers=speakers)
        except ValueError:  # the scores are shown all the same
            whose = "the model" if domain is None else f"the adapter {domain}"
            problem = f"no threshold is saved for {whose} as it is here. `mrl-redimnet calibrate` sets one"
            return DecisionRule(None, {}, speakers, {}, problem=problem)


def _sounding(heard: Detection) -> str:
    name, probability = max(heard.probabilities.items(), key=lambda pair: pair[1])
    doubt = "" if name in (heard.domain, CLEAN) else ", which is too uncertain"
    return f"{name} ({100 * probability:.0f} %{doubt})"


def _starts(length: int) -> NDArray:
    """Where each of at most `POINTS` stretches of so many samples or frames begins."""
    return np.linspace(0, length, min(POINTS, length), endpoint=False, dtype=int)


def notes(wave: NDArray, sampling_rate: int = SAMPLING_RATE) -> list[str]:
    """wave [samples] at 16 kHz, sampling_rate in Hz of its file -> sentences on what makes a comparison uncertain."""
    found, facts, speech = [], levels(wave), speech_seconds(wave)
    if speech < TEST_SECONDS:
        found.append(f"Too short: {speech:.1f} s of speech. Speak for {TEST_SECONDS:g} s or longer; five are better.")
    if facts.dbfs < QUIET_DBFS:
        found.append(f"Too quiet: {facts.dbfs:.0f} dBFS. Come closer to the microphone, or raise its level.")
    if (share := np.mean(np.abs(wave) >= FULL_SCALE)) > CLIPPED_SHARE:
        found.append(f"Clipped: {100 * share:.1f} % of the samples are at full scale. Lower the microphone's level.")
    if speech < SPEECH_SHARE * facts.seconds:
        found.append(f"Mostly silence: {speech:.1f} s of {facts.seconds:.1f} s hold sound. Speak without long pauses.")
    if sampling_rate < SAMPLING_RATE:
        found.append(
            f"Sampled at {sampling_rate:,} Hz: nothing is left above {sampling_rate / 2000:g} kHz, and the model "
            f"was made for {SAMPLING_RATE:,} Hz. Scores of such speech are less certain."
        )
    return found


def flat_map(similarities: NDArray) -> tuple[NDArray, float]:
    """Cosines [N, N] of N >= 2 recordings -> places on a plane [N, 2], and how much of their spread it shows, 0 to 1.

    Classical multidimensional scaling (Torgerson 1952) of the distances of the unit vectors: the plane on which near
    recordings lie near, as far as a plane can show it. Its scale is that of the distances, 0 to 2. Raises ValueError
    for another shape.
    """
    count = len(similarities)
    if similarities.shape != (count, count) or count < 2:
        raise ValueError(f"similarities: shape {similarities.shape}, expected [N, N] of two recordings or more.")
    centre = np.eye(count) - 1 / count
    values, vectors = np.linalg.eigh(centre @ similarities @ centre)
    values, vectors = np.clip(values[::-1], 0, None), vectors[:, ::-1]
    places = np.zeros((count, 2))
    shown = min(2, count)
    places[:, :shown] = vectors[:, :shown] * np.sqrt(values[:shown])
    largest = np.abs(places).argmax(axis=0)  # an axis has no direction: its largest value is made positive
    places *= np.where(places[largest, [0, 1]] < 0, -1, 1)
    total = values.sum()
    return places, float(values[:2].sum() / total) if total > 0 else 1.0
