"""Accept or reject: decisions on scores by saved thresholds, or by one that is given."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mrl_redimnet.scoring.calibration import RULE_OF, THRESHOLDS_FILE, Threshold, Thresholds

# Seconds of speech (`audio.levels.speech_seconds`) below which a decision is warned of: at its saved thresholds the
# packaged nano rejects more than half of the true speakers where one side or both have 1 to 2 s, and a quarter to a
# third at 2 to 4 s (64 and 256 numbers; docs/results/durations.md).
ENROL_SECONDS = 2.0
TEST_SECONDS = 2.0


@dataclass(frozen=True)
class Decision:
    """What was decided on one comparison.

    Attributes:
        score: of the comparison, higher means more alike.
        accepted: whether it is the same speaker; None where there is no threshold to decide by.
        threshold: accepted from this score on, at the durations of this comparison; None without.
        llr: natural-log likelihood ratio of "the same speaker"; None where no calibration is saved.
    """

    score: float
    accepted: bool | None = None
    threshold: float | None = None
    llr: float | None = None


@dataclass(frozen=True)
class Candidate(Decision):
    """An enrolled speaker whom a test utterance was compared with."""

    speaker: str = ""


@dataclass(frozen=True)
class Identification:
    """The enrolled speakers that a test utterance is most alike, the best one first."""

    candidates: tuple[Candidate, ...]

    @property
    def accepted(self) -> bool | None:
        """Whether the best one is accepted; None where nothing is decided."""
        return self.candidates[0].accepted

    @property
    def speaker(self) -> str | None:
        """The best one, None where it is rejected: then it is nobody who is enrolled."""
        return None if self.accepted is False else self.candidates[0].speaker


@dataclass(frozen=True)
class DecisionRule:
    """Accepts or rejects scores by a given threshold, else by saved ones; with neither, it does not decide.

    `str()` says in words from which score on is accepted, what that rests on, or why nothing is decided.

    Attributes:
        given: accept scores from this one on, whatever is saved.
        saved: {number of enrolment utterances: the threshold saved for that number, or for the nearest there is}.
        speakers: how many enrolled speakers are compared in one decision, 1 for verification.
        lowest: {number of enrolment utterances: accepted from here on}, scores, or LLRs where the calibration has
            duration terms; empty where `problem` says why the saved thresholds cannot decide.
        rests_on: how many accepted impostor trials the lowest thresholds were set by, at least.
    """

    given: float | None
    saved: dict[int, Threshold]
    speakers: int
    lowest: dict[int, float]
    rests_on: int = 0
    problem: str = ""

    @classmethod
    def of(
        cls,
        thresholds: Thresholds | None,
        dim: int,
        adapter: str | None,
        scorer: object,
        weights: str,
        enrolments: Iterable[int],
        *,
        given: float | None = None,
        speakers: int = 1,
    ) -> "DecisionRule":
        """The rule for enrolments of so many utterances each.

        thresholds: the saved ones. dim, adapter, scorer, weights: which of them, see `Thresholds.find_nearest`.
        given, speakers: as the attributes.

        Raises ValueError where thresholds are saved, but none for this dimension, adapter, scorer and weights, unless
        a threshold is given.
        """
        saved: dict[int, Threshold] = {}
        try:
            if thresholds:
                for count in sorted(set(enrolments)):
                    saved[count] = thresholds.find_nearest(dim, adapter, scorer, weights, count)
        except ValueError:
            if given is None:
                raise
            saved = {}
        try:
            found = {count: entry.for_search(speakers) for count, entry in saved.items()}
        except ValueError as error:
            return cls(given, saved, speakers, {}, problem=str(error))
        lowest = {count: threshold for count, (threshold, _) in found.items()}
        return cls(given, saved, speakers, lowest, min((each for _, each in found.values()), default=0))

    @property
    def uses_seconds(self) -> bool:
        """Whether a saved calibration depends on the durations of both sides."""
        return any(entry.calibration.uses_seconds for entry in self.saved.values())

    def decide(self, scores: NDArray, enrolments: Sequence[int], seconds: NDArray | None = None) -> list[Decision]:
        """A decision on each of some comparisons.

        Args:
            scores: [T]. enrolments: [T], how many utterances were averaged for each enrolment.
            seconds: [T, 2] durations of both sides, not needed unless `uses_seconds`.
        """
        return [
            self._decide(float(score), count, None if seconds is None else seconds[row : row + 1])
            for row, (score, count) in enumerate(zip(scores, enrolments, strict=True))
        ]

    def _decide(self, score: float, count: int, seconds: NDArray | None) -> Decision:
        llr, threshold = None, self.given
        if self.saved:
            calibration = self.saved[count].calibration
            llr = float(calibration(np.array([score]), seconds)[0])
            if threshold is None and self.lowest:
                threshold = self.lowest[count]
                if calibration.uses_seconds:  # then it is an LLR
                    threshold = float(calibration.score_at([threshold], seconds)[0])
        return Decision(score, None if threshold is None else score >= threshold, threshold, llr)

    def __str__(self) -> str:
        if self.given is not None:
            return f"accepted from a score of {self.given:g} on, as given{self._not_calibrated()}"
        if self.problem:
            search = f"{self.speakers} speakers are searched, and " if self.speakers > 1 else ""
            return f"no decision: {search}{self.problem}"
        if not self.saved:
            return (
                f"no decision: there is no {THRESHOLDS_FILE} beside the model. `mrl-redimnet calibrate` makes one from "
                "labelled trials, or give --threshold"
            )
        return (self._of_one() if self.speakers == 1 else self._of_search()) + self._not_calibrated()

    def _from(self) -> str:
        unit = "an LLR" if self.uses_seconds else "a score"
        low, high = min(self.lowest.values()), max(self.lowest.values())
        return f"accepted from {unit} of {low:.4f}{'' if low == high else f' to {high:.4f}'} on"

    def _of_one(self) -> str:
        (entry,) = self.saved.values()
        return (
            f"{self._from()}, set on {entry.trials} for {100 * entry.wanted:g} % false accepts "
            f"({100 * entry.misses:.1f} % misses there) with {_utterances(entry.enrolments)}"
        )

    def _of_search(self) -> str:
        entry = next(iter(self.saved.values()))
        rate = -100 * np.expm1(np.log1p(-entry.wanted) / self.speakers)
        uncertain = ": uncertain" if self.rests_on < RULE_OF else ""
        meant = "meant " if self._not_calibrated() else ""
        return (
            f"{self._from()}, {meant}so that about {100 * entry.wanted:g} % of strangers, or fewer, are taken for one "
            f"of the {self.speakers} ({rate:.2g} % in each comparison, {self.rests_on} of {entry.impostors:,} impostor "
            f"trials of {entry.trials}{uncertain})"
        )

    def _not_calibrated(self) -> str:
        """Says where a threshold for another number of enrolment utterances is used."""
        other = {count: entry.enrolments for count, entry in self.saved.items() if entry.enrolments != count}
        if not other:
            return ""
        wanted = " ".join(map(str, other))
        used = ", ".join(
            f"for {_utterances(count)} the threshold of {nearest} is used" for count, nearest in other.items()
        )
        return (
            f". Not calibrated: {used}; how many false accepts that lets through, and what the LLRs are worth, is not "
            f"known. `mrl-redimnet calibrate --enrolments {wanted}` sets what is missing"
        )


def short_speech(what: str, speech: Sequence[tuple[str, float]], least: float) -> list[str]:
    """A sentence on what has too little speech to be relied on, where there is such; else nothing.

    Args:
        what: they are, in the plural, such as "test utterances".
        speech: (name, seconds of speech) of each.
        least: seconds, `ENROL_SECONDS` or `TEST_SECONDS`.
    """
    short = [(name, seconds) for name, seconds in speech if seconds < least]
    if not short:
        return []
    name, seconds = min(short, key=lambda pair: pair[1])
    if len(speech) == 1:
        told = f"{name} has {seconds:.1f} s of speech"
    else:
        told = f"{len(short)} of {len(speech)} {what} have too little speech, {name} the least with {seconds:.1f} s"
    return [f"{told}: below {least:g} s true speakers are often rejected, so take more"]


def _utterances(count: int) -> str:
    return f"{count} enrolled utterance{'' if count == 1 else 's'}"
