"""`mrl-redimnet verify | identify`: from files to decisions and names."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mrl_redimnet.audio.io import AudioError, audio_info
from mrl_redimnet.audio.levels import read_utterance
from mrl_redimnet.audio.scan import files_below, printable
from mrl_redimnet.embedding import embed_files, problems_told
from mrl_redimnet.scoring.calibration import RULE_OF, THRESHOLDS_FILE, Threshold
from mrl_redimnet.scoring.scorers import Scorer, make_scorer, speaker_means
from mrl_redimnet.scoring.trials import Trials
from mrl_redimnet.systems import Material, System

ACCEPTED, REJECTED, UNDECIDED = 0, 1, 3  # exit status of `verify`; 2 is that of an error


# ---------------------------------------------------------------- decisions


@dataclass(frozen=True)
class Judge:
    """Accepts or rejects scores by a threshold given by hand, else by saved ones; with neither, it does not decide.

    saved: {number of enrolment utterances: the threshold saved for it, or the nearest there is}. speakers: how many are
    compared in one decision. lowest: {number of enrolment utterances: accepted from this on}, {} where `problem` says
    why the saved thresholds cannot decide.
    """

    given: float | None
    saved: dict[int, Threshold]
    speakers: int
    lowest: dict[int, float]
    rests_on: int = 0
    problem: str = ""

    @classmethod
    def of(
        cls, arguments, system: System, dim: int, scorer: Scorer, counts: Iterable[int], speakers: int = 1
    ) -> "Judge":
        """From --threshold and --thresholds, for enrolments of so many utterances each.

        ValueError where thresholds are saved, but none for this dimension, adapter or scorer.
        """
        thresholds, saved = system.thresholds(arguments.thresholds, arguments.model), {}
        try:
            for count in sorted(set(counts)) if thresholds else ():
                saved[count] = thresholds.find_nearest(dim, system.adapter, scorer, system.weights, count)
        except ValueError:
            if arguments.threshold is None:
                raise
            saved = {}
        try:
            found = {count: entry.for_search(speakers) for count, entry in saved.items()}
        except ValueError as error:
            return cls(arguments.threshold, saved, speakers, {}, problem=str(error))
        lowest = {count: threshold for count, (threshold, _) in found.items()}
        return cls(arguments.threshold, saved, speakers, lowest, min((each for _, each in found.values()), default=0))

    @property
    def uses_seconds(self) -> bool:
        """Whether it is to be given durations."""
        return any(entry.calibration.uses_seconds for entry in self.saved.values())

    def __call__(
        self, scores: np.ndarray, counts: Sequence[int], seconds: np.ndarray | None
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Scores [T], enrolment utterances [T], seconds [T, 2] of both sides -> accepted [T] or None, natural-log LLRs
        [T] or None."""
        accepted, llrs = np.zeros(len(scores), bool), np.zeros(len(scores))
        for row, count in enumerate(counts if self.saved else ()):
            entry, both = self.saved[count], None if seconds is None else seconds[row : row + 1]
            (llrs[row],) = entry.calibration(scores[row : row + 1], both)
            value = llrs[row] if entry.calibration.uses_seconds else scores[row]
            accepted[row] = bool(self.lowest) and value >= self.lowest[count]
        if self.given is not None:
            accepted = scores >= self.given
        decides = self.given is not None or self.lowest
        return accepted if decides else None, llrs if self.saved else None

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


def _utterances(count: int) -> str:
    return f"{count} enrolled utterance{'' if count == 1 else 's'}"


def verify(arguments) -> int:
    """`mrl-redimnet verify`."""
    system = System.load(arguments)
    dim = system.dim(arguments.dim)
    scorer = system.scorer(arguments)
    enrol, test = ([str(path) for path in paths] for paths in (arguments.enrol, arguments.test))
    models = {"enrolment": list(dict.fromkeys(enrol))}
    count = len(models["enrolment"])
    judge = Judge.of(arguments, system, dim, scorer, [count])
    trials = Trials(np.zeros(len(test), np.int8), ["enrolment"] * len(test), test, models)  # labels are not used
    material = Material.load(system, [trials], Path(), refuse_silence=True)
    scores = material.scores(trials, dim, scorer)
    accepted, llrs = judge(scores, [count] * len(test), material.seconds(trials) if judge.uses_seconds else None)
    print(f"{_title(system, dim)}, {scorer}: {judge}.")
    for row, path in enumerate(test):
        told = "undecided" if accepted is None else "accepted" if accepted[row] else "rejected"
        print(
            f"{told:<10} score {scores[row]:.4f}{'' if llrs is None else f'  LLR {llrs[row]:+.2f}'}  {printable(path)}"
        )
    if accepted is None:
        return UNDECIDED
    return ACCEPTED if accepted.all() else REJECTED


def _title(system: System, dim: int) -> str:
    return f"{system.name}{f' with {system.adapter}' if system.adapter else ''}, {dim} dimensions"


# ---------------------------------------------------------------- identify


def identify(arguments):
    """`mrl-redimnet identify`."""
    if arguments.top_k < 1:
        raise ValueError(f"--top-k: got {arguments.top_k}, expected at least 1.")
    files = files_below(arguments.enrolled)
    speakers = [file.relative_to(arguments.enrolled).parts[0] for file in files]
    if loose := [str(file) for file in files if file.parent == arguments.enrolled]:
        raise ValueError(f"{loose[0]} lies in no speaker's folder: expected {arguments.enrolled}/SPEAKER/FILE.")
    tests = _named_files(arguments.test)
    system = System.load(arguments)
    dim = system.dim(arguments.dim)
    scorer = make_scorer("cosine")
    names, counts = sorted(set(speakers)), Counter(speakers)
    judge = Judge.of(arguments, system, dim, scorer, counts.values(), len(names))
    problems: dict[int, str] = {}
    all_files = [*files, *tests.values()]
    embeddings = embed_files(system.model, all_files, progress="embedding", load=read_utterance, problems=problems)
    if problems:
        raise AudioError(problems_told(problems, len(all_files)))
    units = scorer.units(embeddings, dim, [*map(str, files), *map(str, tests.values())])
    enrolled = scorer.units(speaker_means(units[: len(files)], speakers), dim, names)
    similarities = units[len(files) :] @ enrolled.T  # [tests, names]
    order = np.argsort(-similarities, axis=1, kind="stable")[:, : arguments.top_k]
    scores = np.take_along_axis(similarities, order, axis=1)
    found = [[names[column] for column in row] for row in order]
    lengths = _lengths(speakers, files, tests) if judge.uses_seconds else None
    print(f"{_title(system, dim)}, {len(names)} enrolled speakers: {judge}.")
    for row, test in enumerate(tests):
        seconds = lengths and np.array([[lengths[name], lengths[tests[test]]] for name in found[row]])
        averaged = [counts[name] for name in found[row]]
        accepted, _ = judge(np.asarray(scores[row], dtype=np.float64), averaged, seconds)
        first = "unknown" if accepted is not None and not accepted[0] else found[row][0]
        pairs = zip(found[row], scores[row], strict=True)
        ranked = ", ".join(f"{printable(name)} {value:.4f}" for name, value in pairs)
        print(f"{printable(first)}\t{printable(test)}\t{ranked}")


def _lengths(speakers: Sequence[str], files: Sequence[Path], tests: dict[str, Path]) -> dict:
    """Seconds of speech of each speaker, by name, and of each test file, by path."""
    lengths: dict = dict.fromkeys(speakers, 0.0)
    for speaker, file in zip(speakers, files, strict=True):
        lengths[speaker] += audio_info(file).seconds
    return {**lengths, **{file: audio_info(file).seconds for file in tests.values()}}


def _named_files(paths: Sequence[Path]) -> dict[str, Path]:
    """Files, and the audio below folders: {name: file}, in a folder the path relative to it, else the path itself.

    Raises FileNotFoundError for a folder without audio, ValueError for a name that comes twice.
    """
    files: dict[str, Path] = {}
    for path in paths:
        for file in files_below(path) if path.is_dir() else [path]:
            name = file.relative_to(path).as_posix() if path.is_dir() else str(path)
            if name in files:
                raise ValueError(f"{name} comes twice, as {files[name]} and {file}: give each once, or one folder.")
            files[name] = file
    return files
