"""Who the speakers of recordings are: enrolled ones by name, unknown ones by the same number in all recordings."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from mrl_redimnet.audio.io import AudioWarning
from mrl_redimnet.audio.levels import refuse_silence
from mrl_redimnet.diarization.pipeline import EXCERPT, Diarization
from mrl_redimnet.encoder import SpeakerEncoder
from mrl_redimnet.scoring.decisions import ENROL_SECONDS, Decision, DecisionRule, short_speech
from mrl_redimnet.scoring.scorers import enrolment_units, make_scorer


@dataclass
class Roll:
    """The speakers that have names: those who were enrolled, and unknown ones as they come.

    A voice is compared with everybody who is enrolled, and gets the name of the one it is most alike where the rule
    accepts that; then with the unknown ones of earlier recordings. Who is nobody so far gets a new number.

    Attributes:
        speakers: {name: embedding of length one}.
        counts, seconds: {name: utterances that were enrolled, and how long they are in all}.
        enrolled, unknown: how is decided for enrolled speakers (None: there are none), and for unknown ones.
    """

    unknown: DecisionRule
    enrolled: DecisionRule | None = None
    speakers: dict[str, np.ndarray] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        encoder: SpeakerEncoder,
        enrolled: Mapping[str, Sequence] | None = None,
        dim: int | None = None,
        *,
        threshold: float | None = None,
        thresholds: str | Path | None = None,
        progress: str | None = None,
    ) -> "Roll":
        """The roll of a model's embeddings, cut to `dim` numbers [all].

        Args:
            enrolled: {name: utterances, as `SpeakerEncoder` takes them}.
            threshold, thresholds: accept from this score on; or the folder of saved thresholds [the model's].
            progress: title of a progress bar on a terminal.

        Raises:
            AudioError: an utterance that cannot be read, or in which nobody can be heard.
            ValueError: thresholds are saved, but none for this model; enrolled speakers, and nothing to decide by.
        """
        dim = encoder.dim(dim)
        rule_for = partial(encoder.decision_rule, dim=dim, threshold=threshold, thresholds=thresholds)
        unknown = rule_for((1,))
        if not enrolled:
            return cls(unknown)
        counts = {name: len(utterances) for name, utterances in enrolled.items()}
        rule = rule_for(counts.values(), speakers=len(counts))
        if rule.given is None and not rule.lowest:
            raise ValueError(f"enrolled: {rule}.")
        speech = [utterance for name in counts for utterance in enrolled[name]]
        found = encoder.embed_all(speech, dim, prepare=refuse_silence, progress=progress, strict=True)
        starts = np.cumsum([0, *counts.values()])
        rows = {name: range(starts[row], starts[row + 1]) for row, name in enumerate(counts)}
        units = enrolment_units(make_scorer("cosine").units(found.embeddings, dim), rows)
        seconds = {name: float(found.seconds[rows[name]].sum()) for name in counts}
        speech = [(name, float(found.speech[rows[name]].sum())) for name in counts]
        for sentence in short_speech("enrolments", speech, ENROL_SECONDS):
            warnings.warn(sentence, AudioWarning, stacklevel=2)
        return cls(unknown, rule, dict(zip(counts, units, strict=True)), counts, seconds)

    def named(self, found: Diarization) -> tuple[Diarization, dict[str, Decision]]:
        """A recording with names for its speakers, and how each of the enrolled ones among them was recognised.

        No two speakers of a recording get the same name. Unknown speakers are remembered for the next recording. Where
        nothing is saved to decide by, each gets a new number.
        """
        known = [name for name in self.speakers if name in self.counts]
        numbered = [name for name in self.speakers if name not in self.counts]
        recognised = self._assigned(found, [*found.voices], known, self.enrolled)
        others = [speaker for speaker in found.voices if speaker not in recognised]
        names = {
            speaker: name
            for speaker, (name, _) in {**recognised, **self._assigned(found, others, numbered, self.unknown)}.items()
        }
        for speaker, voice in found.voices.items():
            if speaker not in names:
                names[speaker] = self._new_number()
                self.speakers[names[speaker]] = _unit(voice)
                self.seconds[names[speaker]] = _heard(found, speaker)
        return found.renamed(names), dict(recognised.values())

    def _assigned(
        self, found: Diarization, voices: Sequence[str], names: Sequence[str], rule: DecisionRule | None
    ) -> dict[str, tuple[str, Decision]]:
        """{speaker of the recording: name, and the decision}, for those whom the rule accepts; of two that would get
        the same name, the one that is more alike, and so on.
        """
        if rule is None or not names or not voices:
            return {}
        scores = np.array([[_unit(found.voices[voice]) @ self.speakers[name] for name in names] for voice in voices])
        assigned: dict[str, tuple[str, Decision]] = {}
        for place in np.argsort(-scores, axis=None, kind="stable"):
            row, column = divmod(int(place), len(names))
            voice, name = voices[row], names[column]
            seconds = np.array([[self.seconds[name], _heard(found, voice)]])
            (decision,) = rule.decide(scores[row, [column]], [self.counts.get(name, 1)], seconds)
            if decision.accepted and voice not in assigned and name not in (taken for taken, _ in assigned.values()):
                assigned[voice] = name, decision
        return assigned

    def _new_number(self) -> str:
        number = 1
        while (name := f"speaker_{number:02}") in self.speakers:
            number += 1
        return name


def _unit(voice: np.ndarray) -> np.ndarray:
    return voice / np.linalg.norm(voice)


def _heard(found: Diarization, speaker: str) -> float:
    """Seconds of a speaker that the voice was made from."""
    return min(found.spoken(speaker), EXCERPT)
