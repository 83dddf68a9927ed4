"""`mrl-redimnet verify | identify`: from files to decisions and names."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mrl_redimnet.audio import audio_info
from mrl_redimnet.calibration import THRESHOLDS_FILE, Threshold
from mrl_redimnet.evaluation import audio_below, embed_files
from mrl_redimnet.scoring import Scorer, make_scorer, speaker_means
from mrl_redimnet.search import SpeakerIndex
from mrl_redimnet.systems import Material, System
from mrl_redimnet.trials import Trials

ACCEPTED, REJECTED, UNDECIDED = 0, 1, 3  # exit status of `verify`; 2 is that of an error


# ---------------------------------------------------------------- decisions


@dataclass(frozen=True)
class Judge:
    """Accepts or rejects scores by a threshold given by hand, else by a saved one; with neither, it does not decide."""

    given: float | None
    saved: Threshold | None

    @classmethod
    def of(cls, arguments, system: System, dim: int, scorer: Scorer) -> "Judge":
        """From --threshold and --thresholds. ValueError where thresholds are saved, but none for this."""
        thresholds = system.thresholds(arguments.thresholds, arguments.model)
        try:
            saved = thresholds and thresholds.find(dim, system.adapter, scorer, system.weights)
        except ValueError:
            if arguments.threshold is None:
                raise
            saved = None
        return cls(arguments.threshold, saved)

    @property
    def uses_seconds(self) -> bool:
        """Whether it is to be given durations."""
        return self.saved is not None and self.saved.calibration.uses_seconds

    def __call__(self, scores: np.ndarray, seconds: np.ndarray | None) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Scores [T], seconds [T, 2] of both sides -> accepted [T] or None, natural-log LLRs [T] or None."""
        accepted, llrs = (None, None) if self.saved is None else self.saved.judge(scores, seconds)
        return (accepted if self.given is None else scores >= self.given), llrs

    def __str__(self) -> str:
        if self.given is not None:
            return f"accepted from a score of {self.given:g} on, as given"
        if self.saved is None:
            return (
                f"no decision: there is no {THRESHOLDS_FILE} beside the model. `mrl-redimnet calibrate` makes one from "
                "labelled trials, or give --threshold"
            )
        entry = self.saved
        unit = "an LLR" if self.uses_seconds else "a score"
        return (
            f"accepted from {unit} of {entry.threshold:.4f} on, set on {entry.trials} for {100 * entry.wanted:g} % "
            f"false accepts ({100 * entry.misses:.1f} % misses there)"
        )


def verify(arguments) -> int:
    """`mrl-redimnet verify`."""
    _check_files([*arguments.enrol, *arguments.test])
    system = System.load(arguments)
    dim = system.dim(arguments.dim)
    scorer = system.scorer(arguments)
    judge = Judge.of(arguments, system, dim, scorer)
    enrol, test = ([str(path) for path in paths] for paths in (arguments.enrol, arguments.test))
    models = {"enrolment": list(dict.fromkeys(enrol))}
    trials = Trials(np.zeros(len(test), np.int8), ["enrolment"] * len(test), test, models)  # labels are not used
    material = Material.load(system, [trials], Path())
    scores = material.scores(trials, dim, scorer)
    accepted, llrs = judge(scores, material.seconds(trials) if judge.uses_seconds else None)
    print(f"{_title(system, dim)}, {scorer}: {judge}.")
    for row, path in enumerate(test):
        told = "undecided" if accepted is None else "accepted" if accepted[row] else "rejected"
        print(f"{told:<10} score {scores[row]:.4f}{'' if llrs is None else f'  LLR {llrs[row]:+.2f}'}  {path}")
    if accepted is None:
        return UNDECIDED
    return ACCEPTED if accepted.all() else REJECTED


def _title(system: System, dim: int) -> str:
    return f"{system.name}{f' with {system.adapter}' if system.adapter else ''}, {dim} dimensions"


def _check_files(paths: Sequence[Path]):
    """Raises FileNotFoundError listing those that are no files."""
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"{len(missing)} of {len(paths)} files are not there: {', '.join(missing[:5])}")


# ---------------------------------------------------------------- identify


def identify(arguments):
    """`mrl-redimnet identify`."""
    files = audio_below(arguments.enrolled)
    speakers = [file.relative_to(arguments.enrolled).parts[0] for file in files]
    if loose := [str(file) for file in files if file.parent == arguments.enrolled]:
        raise ValueError(f"{loose[0]} lies in no speaker's folder: expected {arguments.enrolled}/SPEAKER/FILE.")
    tests = _named_files(arguments.test)
    system = System.load(arguments)
    dim = system.dim(arguments.dim)
    scorer = make_scorer("cosine")
    judge = Judge.of(arguments, system, dim, scorer)
    embeddings = embed_files(system.model, [*files, *tests.values()], progress="embedding")
    units = scorer.units(embeddings, dim, [*map(str, files), *map(str, tests.values())])
    names = sorted(set(speakers))
    index = SpeakerIndex(names, speaker_means(units[: len(files)], speakers), short=min(64, dim))
    found, scores = index.search(units[len(files) :], k=min(arguments.top_k, len(names)))
    lengths = _lengths(speakers, files, tests) if judge.uses_seconds else None
    print(f"{_title(system, dim)}, {len(names)} enrolled speakers: {judge}.")
    for row, test in enumerate(tests):
        seconds = lengths and np.array([[lengths[name], lengths[tests[test]]] for name in found[row]])
        accepted, llrs = judge(np.asarray(scores[row], dtype=np.float64), seconds)
        first = "unknown" if accepted is not None and not accepted[0] else found[row][0]
        ranked = ", ".join(f"{name} {value:.4f}" for name, value in zip(found[row], scores[row], strict=True))
        print(f"{first}\t{test}\t{ranked}")


def _lengths(speakers: Sequence[str], files: Sequence[Path], tests: dict[str, Path]) -> dict:
    """Seconds of speech of each speaker, by name, and of each test file, by path."""
    lengths: dict = dict.fromkeys(speakers, 0.0)
    for speaker, file in zip(speakers, files, strict=True):
        lengths[speaker] += audio_info(file).seconds
    return {**lengths, **{file: audio_info(file).seconds for file in tests.values()}}


def _named_files(paths: Sequence[Path]) -> dict[str, Path]:
    """Files, and the audio below folders: {name: file}, in a folder the path relative to it, else the path itself.

    Raises FileNotFoundError for what is not there or a folder without audio, ValueError for a name that comes twice.
    """
    files: dict[str, Path] = {}
    if missing := [str(path) for path in paths if not path.exists()]:
        raise FileNotFoundError(f"{len(missing)} of {len(paths)} paths are not there: {', '.join(missing[:5])}")
    for path in paths:
        for file in audio_below(path) if path.is_dir() else [path]:
            name = file.relative_to(path).as_posix() if path.is_dir() else str(path)
            if name in files:
                raise ValueError(f"{name} comes twice, as {files[name]} and {file}: give each once, or one folder.")
            files[name] = file
    return files
