"""Lists of verification trials in the VoxCeleb format: reading, writing and drawing them from a set of utterances."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

_FORMAT = "'label pathA pathB' with label 1 (target) or 0 (impostor) and paths without white space"


@dataclass(frozen=True, eq=False)  # eq=False: the generated == would compare arrays and raise
class Trials:
    """Verification trials, one per index.

    Attributes:
        labels: int8 [trials], 1 target (one speaker) or 0 impostor (two speakers).
        enrol: [trials] path of the enrolment utterance.
        test: [trials] path of the test utterance.

    Raises:
        ValueError: different lengths, or a label other than 0/1.
    """

    labels: NDArray[np.int8]
    enrol: list[str]
    test: list[str]

    def __post_init__(self) -> None:
        labels = np.asarray(self.labels)
        if labels.ndim != 1 or not len(labels) == len(self.enrol) == len(self.test):
            raise ValueError(
                f"labels, enrol and test must be 1-D and of one length, "
                f"got shape {labels.shape}, {len(self.enrol)} and {len(self.test)}"
            )
        bad = (labels != 0) & (labels != 1)
        if bad.any():
            first = int(np.argmax(bad))
            raise ValueError(f"label of trial {first} is {labels[first]!s}, expected 1 (target) or 0 (impostor)")
        object.__setattr__(self, "labels", labels.astype(np.int8))

    def __len__(self) -> int:
        return len(self.enrol)

    @property
    def utterances(self) -> list[str]:
        """The distinct paths of both sides, sorted."""
        return sorted({*self.enrol, *self.test})


def read_trials(path: str | os.PathLike[str]) -> Trials:
    """Read a VoxCeleb trial list: one 'label pathA pathB' per line, A the enrolment; blank lines are ignored.

    Format: https://www.robots.ox.ac.uk/~vgg/data/voxceleb/ (veri_test2.txt).

    Raises:
        FileNotFoundError: no such file.
        ValueError: a malformed line or label (names file, line and content), no trials, or not UTF-8 text.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no trial list {path}; expected a text file of lines {_FORMAT}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); expected lines {_FORMAT}") from error
    labels, enrol, test = [], [], []
    for number, line in enumerate(text.split("\n"), start=1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 3 or fields[0] not in ("0", "1"):
            raise ValueError(f"{path}, line {number}: {line!r} is not a trial; expected {_FORMAT}")
        labels.append(int(fields[0]))
        enrol.append(fields[1])
        test.append(fields[2])
    if not labels:
        raise ValueError(f"{path}: no trials in it; expected lines {_FORMAT}")
    return Trials(np.array(labels, dtype=np.int8), enrol, test)


def write_trials(trials: Trials, path: str | os.PathLike[str]) -> None:
    """Write a trial list that :func:`read_trials` gives back; a reader sees the old file or the whole new one.

    Raises:
        ValueError: no trials, or a path that is empty or has white space (the format cannot hold it).
    """
    if len(trials) == 0:
        raise ValueError(f"{path}: no trials to write")
    for utterance in trials.utterances:
        if utterance.split() != [utterance]:
            raise ValueError(f"{path}: utterance {utterance!r} does not fit the format; expected {_FORMAT}")
    rows = zip(trials.labels.tolist(), trials.enrol, trials.test, strict=True)
    text = "".join(f"{label} {enrol} {test}\n" for label, enrol, test in rows)
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(text, encoding="utf-8", newline="\n")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def make_trials(
    utterances: Sequence[str],
    speakers: Sequence[str],
    sessions: Sequence[str] | None = None,
    max_targets: int = 2000,
    max_impostors: int = 20000,
    seed: int = 0,
) -> Trials:
    """Draw trials from the pairs of different utterances, without replacement and in random order.

    A pair of one speaker is a target trial, a pair of two speakers an impostor trial; no pair comes twice, in either
    direction. All pairs are taken when they are no more than the maximum. Time and memory grow with the utterances
    and the trials drawn, not with the number of pairs.

    Args:
        utterances: [utterances] distinct paths.
        speakers: [utterances] speaker of each.
        sessions: [utterances] recording session of each (e.g. the video), compared within a speaker only. If given,
            target pairs come from different sessions, which is the harder and more honest test; only speakers with
            a single session give same-session pairs.
        max_targets, max_impostors: the most trials of each kind, at least 1.
        seed: of numpy's default generator; equal seeds give equal trials, whatever the order of the utterances.

    Raises:
        ValueError: different lengths, a path twice, a maximum below 1, or no pair of one of the kinds.
    """
    _check_utterances(utterances, speakers, sessions)
    for name, most in (("max_targets", max_targets), ("max_impostors", max_impostors)):
        if most < 1:
            raise ValueError(f"{name} must be at least 1, got {most}")
    if sessions is None:
        sessions = [""] * len(utterances)
    rows = sorted(zip(speakers, sessions, utterances, strict=True))
    here = np.arange(len(rows))
    speaker_start, session_start = _partner_bounds(rows)
    rng = np.random.default_rng(seed)
    # Sorted by speaker and session, the earlier partners of an utterance are one range of positions.
    targets = _draw_pairs(speaker_start, session_start, max_targets, rng)
    if not len(targets):
        raise ValueError(f"no target trial is possible: none of {len(set(speakers))} speakers has two utterances")
    impostors = _draw_pairs(np.zeros_like(here), speaker_start, max_impostors, rng)
    if not len(impostors):
        raise ValueError(f"no impostor trial is possible: all {len(rows)} utterances are of speaker {speakers[0]!r}")
    pairs = rng.permuted(np.concatenate([targets, impostors]), axis=1)  # either side may be the enrolment
    labels = np.repeat(np.array([1, 0], dtype=np.int8), [len(targets), len(impostors)])
    order = rng.permutation(len(pairs))
    enrol, test = ([rows[position][2] for position in side] for side in pairs[order].T.tolist())
    return Trials(labels[order], enrol, test)


def speaker_of(path: str) -> str:
    """Speaker of an utterance: the first part of its relative path (VoxCeleb: 'id10270/x6uYqmx31kE/00001.wav').

    Raises:
        ValueError: an absolute path, one without a folder, or one that starts with '..'.
    """
    parts = PurePosixPath(path).parts
    if len(parts) < 2 or parts[0] in ("/", "//", ".."):
        raise ValueError(f"no speaker in path {path!r}; expected a relative path 'speaker/.../utterance'")
    return parts[0]


def missing_utterances(trials: Trials, root: str | os.PathLike[str]) -> list[str]:
    """The paths of the trials, sorted, that are no file under the folder `root`.

    Raises:
        FileNotFoundError: `root` is no folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root} to look for the utterances in")
    return [utterance for utterance in trials.utterances if not (root / utterance).is_file()]


def _check_utterances(utterances: Sequence[str], speakers: Sequence[str], sessions: Sequence[str] | None) -> None:
    for name, values in (("speakers", speakers), ("sessions", sessions)):
        if values is not None and len(values) != len(utterances):
            raise ValueError(f"{name} must have one entry per utterance: {len(values)} for {len(utterances)}")
    seen: set[str] = set()
    for utterance in utterances:
        if utterance in seen:
            raise ValueError(f"utterances must be distinct, {utterance!r} comes twice")
        seen.add(utterance)


def _partner_bounds(rows: list[tuple[str, str, str]]) -> tuple[NDArray, NDArray]:
    """For rows (speaker, session, utterance) sorted: bounds (first, stop) of the earlier target partners, both [rows].

    The first is the first row of the speaker; the partners stop where the session starts or, for a speaker with
    a single session, at the row itself.
    """
    first, stop = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=np.int64)
    several = {row[0] for row, after in zip(rows, rows[1:], strict=False) if row[0] == after[0] and row[1] != after[1]}
    for here in range(1, len(rows)):
        (speaker, session, _), before = rows[here], rows[here - 1]
        first[here] = first[here - 1] if speaker == before[0] else here
        in_session = (speaker, session) == before[:2]
        stop[here] = stop[here - 1] if in_session and speaker in several else here
    return first, stop


def _draw_pairs(first: NDArray, stop: NDArray, most: int, rng: np.random.Generator) -> NDArray:
    """Up to `most` different pairs [pairs, 2] (row, partner), uniformly from the partners first[row]..stop[row]-1."""
    ends = np.cumsum(stop - first)  # numbers all pairs row by row: row r has those below ends[r], from ends[r - 1] on
    total = int(ends[-1]) if len(ends) else 0
    if total == 0:
        return np.empty((0, 2), dtype=np.int64)
    # choice keeps a set of the drawn, or an array of all when they are at most 50 times (or 10,000) those drawn
    drawn = rng.choice(total, size=min(most, total), replace=False)
    row = np.searchsorted(ends, drawn, side="right")
    partner = stop[row] - (ends[row] - drawn)
    return np.column_stack([row, partner])
