"""Lists of verification trials: the formats of the official ones, enrolment models, drawing trials from utterances."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from glob import escape
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from configuration_mrl_redimnet import MRLReDimNetError
from mrl_redimnet.files import NotTextError, replace_text, text_lines


class UnknownSpeakersError(MRLReDimNetError, ValueError):
    """A trial list does not tell whose speech its utterances are, so nothing can be resampled over speakers."""


@dataclass(frozen=True, eq=False)  # eq=False: the generated == would compare arrays and raise
class Trials:
    """Verification trials, one per index.

    Attributes:
        labels: int8 [trials], 1 target (one speaker) or 0 impostor (two speakers).
        enrol: [trials] what is enrolled: a name in `models` or, without models, the path of one utterance.
        test: [trials] path of the test utterance.
        models: of each enrolment model, the paths of its utterances; None where every enrolment is one utterance.
        speaker_names: speaker of each path, where a list comes with them; None: the paths name the speakers.

    Raises:
        ValueError: different lengths, a label other than 0/1, an enrolment without a model or a model without
            utterances.
    """

    labels: NDArray[np.int8]
    enrol: list[str]
    test: list[str]
    models: dict[str, list[str]] | None = None
    speaker_names: dict[str, str] | None = None

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
        if self.models is not None:
            unknown = set(self.enrol).difference(self.models)
            if unknown:
                raise ValueError(f"no enrolment model is called {_some(unknown)}")
            empty = [name for name, paths in self.models.items() if not paths]
            if empty:
                raise ValueError(f"enrolment models without an utterance: {_some(empty)}")
        object.__setattr__(self, "labels", labels.astype(np.int8))

    def __len__(self) -> int:
        return len(self.enrol)

    @cached_property
    def utterances(self) -> list[str]:
        """The distinct paths of both sides, sorted; of enrolment models, those of their utterances."""
        if self.models is None:
            return sorted({*self.enrol, *self.test})
        return sorted({*(path for paths in self.enrolments.values() for path in paths), *self.test})

    @cached_property
    def enrolments(self) -> dict[str, list[str]]:
        """What may be enrolled, and its utterances: the models of these trials or, without models, every utterance."""
        if self.models is None:
            return {path: [path] for path in self.utterances}
        return {name: self.models[name] for name in dict.fromkeys(self.enrol)}

    @cached_property
    def rows(self) -> tuple[NDArray, NDArray]:
        """Of each trial, the row of its enrolment in `enrolments` and of its test in `utterances`, both [trials]."""
        return _rows(self.enrol, list(self.enrolments)), _rows(self.test, self.utterances)

    @cached_property
    def speakers(self) -> tuple[NDArray, NDArray]:
        """Speakers of the enrolments and of the tests, both [trials], as the bootstrap over speakers takes them.

        Raises UnknownSpeakersError, saying why, where the list does not tell them or they contradict its labels.
        """
        of_utterance = {path: self._speaker(path) for path in self.utterances}
        of_enrolment = []
        for name, paths in self.enrolments.items():
            owners = sorted({of_utterance[path] for path in paths})
            if len(owners) > 1:
                raise UnknownSpeakersError(f"enrolment {name!r} has utterances of several speakers: {_some(owners)}")
            of_enrolment.append(owners[0])
        enrol_rows, test_rows = self.rows
        enrol = np.array(of_enrolment)[enrol_rows]
        test = np.array(list(of_utterance.values()))[test_rows]
        bad = (enrol == test) != (self.labels == 1)
        if bad.any():
            first = int(np.argmax(bad))
            raise UnknownSpeakersError(
                f"{np.count_nonzero(bad)} of {len(self)} labels contradict the speakers in the paths, first at trial "
                f"{first}: label {self.labels[first]} for {self.enrol[first]} of {enrol[first]} and "
                f"{self.test[first]} of {test[first]}; the paths do not name the speakers, or the label is wrong"
            )
        return enrol, test

    def _speaker(self, path: str) -> str:
        if self.speaker_names is None:
            return _speaker_in(path)
        if path not in self.speaker_names:
            raise UnknownSpeakersError(f"the list does not say whose speech {path} is")
        return self.speaker_names[path]


@dataclass(frozen=True)
class TrialFormat:
    """How the lines of a trial list look.

    Attributes:
        line: one line in words, for messages.
        labels: what the label's words mean.
        label_field: position of the label among a line's three fields; enrolment and test are the other two.
        enrolments: the list that says which utterances each enrolment has, where the format cannot do without.
        source: where the format is described.
    """

    line: str
    labels: dict[str, int]
    label_field: int
    source: str
    enrolments: str | None = None

    def fits(self, fields: list[str]) -> bool:
        """Whether a line with these fields is one of this format."""
        return len(fields) == 3 and fields[self.label_field] in self.labels


FORMATS = {
    "voxceleb": TrialFormat(
        "'label pathA pathB' with label 1 (target) or 0 (impostor) and paths without white space",
        {"1": 1, "0": 0},
        label_field=0,
        source="https://www.robots.ox.ac.uk/~vgg/data/voxceleb/ (veri_test2.txt); also VoxSRC's validation lists",
    ),
    "kaldi": TrialFormat(
        "'enrolment path target' or 'enrolment path nontarget'",
        {"target": 1, "nontarget": 0},
        label_field=2,
        source="the trials files of Kaldi's egs/voxceleb and of wespeaker",
    ),
    "cnceleb": TrialFormat(
        "'enrolment path label' with label 1 (target) or 0 (impostor), e.g. 'id00800-enroll test/id00800-x.wav 1'",
        {"1": 1, "0": 0},
        label_field=2,
        source="eval/lists/trials.lst of https://www.openslr.org/82/",
        enrolments="eval/lists/enroll.lst (one recording each) or enroll.map (several)",
    ),
    "sitw": TrialFormat(
        "'model path tgt' or 'model path imp', e.g. '12013 audio/unotx.flac tgt'",
        {"tgt": 1, "imp": 0},
        label_field=2,
        source="keys/core-core.lst of Speakers in the Wild and the corpus's README",
        enrolments="lists/enroll-core.lst",
    ),
}

# Name, trials and, of these, targets of official lists, by format and file name: a list that a download cut short
# scores as well. VoxCeleb1: "trial summary" in PaddleSpeech's examples/voxceleb/README.md. CN-Celeb: 196 enrolments
# with each of 17,777 test recordings.
KNOWN_LISTS = {
    ("voxceleb", "veri_test.txt"): ("VoxCeleb1-O", 37_720, 18_860),
    ("voxceleb", "veri_test2.txt"): ("VoxCeleb1-O, cleaned", 37_611, 18_802),
    ("voxceleb", "list_test_all.txt"): ("VoxCeleb1-E", 581_480, 290_743),
    ("voxceleb", "list_test_all2.txt"): ("VoxCeleb1-E, cleaned", 579_818, 289_921),
    ("voxceleb", "list_test_hard.txt"): ("VoxCeleb1-H", 552_536, 276_270),
    ("voxceleb", "list_test_hard2.txt"): ("VoxCeleb1-H, cleaned", 550_894, 275_488),
    ("cnceleb", "trials.lst"): ("CN-Celeb", 3_484_292, 17_755),
}


def read_trials(
    path: str | os.PathLike[str],
    format: str = "auto",
    enrolments: str | os.PathLike[str] | None = None,
    suffix: str | None = None,
) -> Trials:
    """Read a trial list in one of `FORMATS`; blank lines are ignored.

    Args:
        path: the list. A file with the name of an official list but another number of trials is warned about.
        format: a name in `FORMATS`, or "auto": the one format that fits the first line.
        enrolments: list of enrolment models, 'name path [path ...]' a line; lines of one name add up. The formats
            "cnceleb" and "sitw" need it, in the others enrolments are utterances without it. CN-Celeb's enroll.map
            names recordings below data/ beside eval/: they become '../data/...', below eval/ like the other paths.
        suffix: replaces the suffix of every path, e.g. ".flac" for CN-Celeb, whose lists say .wav of FLAC files.

    SITW's paths name no speakers: they are read from keys/meta.lst where it lies beside the list.

    Raises:
        FileNotFoundError: no such list.
        ValueError: an unknown format; a first line that fits none or several; a malformed line or label (names file,
            line and content); lines without labels; no trials; not UTF-8 text; enrolments missing or without some
            model.
    """
    path, layout = Path(path), None
    labels, enrol, test = [], [], []
    same: dict[str, str] = {}
    for number, line, fields in _lines(path, "trial list", _expected(format)):
        if layout is None:
            format = _format_of(path, number, line, fields, format)
            layout = FORMATS[format]
            label_field, words = layout.label_field, layout.labels
            enrol_field, test_field = [field for field in range(3) if field != label_field]
        if len(fields) != 3 or fields[label_field] not in words:
            raise ValueError(f"{path}, line {number}: {line!r} is not a trial; expected {layout.line}")
        labels.append(words[fields[label_field]])
        enrol.append(same.setdefault(fields[enrol_field], fields[enrol_field]))  # one object for millions of mentions
        test.append(same.setdefault(fields[test_field], fields[test_field]))
    if layout is None:
        raise ValueError(f"{path}: no trials in it; expected lines {_expected(format)}")
    _check_known(path, format, labels)
    if enrolments is None and layout.enrolments is not None:
        raise ValueError(f"{path}: its first column names enrolments; give their list, {layout.enrolments}")
    models = None if enrolments is None else _read_models(Path(enrolments), path, format, enrol)
    names = _sitw_speakers(path.parent / "meta.lst") if format == "sitw" else None
    trials = Trials(np.array(labels, dtype=np.int8), enrol, test, models, names)
    return trials if suffix is None else _with_suffix(trials, suffix)


def write_trials(trials: Trials, path: str | os.PathLike[str]) -> None:
    """Write a trial list that :func:`read_trials` gives back; a reader sees the old file or the whole new one.

    Raises:
        ValueError: no trials, enrolment models, or a path that is empty or has white space (the format cannot hold
            these).
    """
    line = FORMATS["voxceleb"].line
    if len(trials) == 0:
        raise ValueError(f"{path}: no trials to write")
    if trials.models is not None:
        raise ValueError(f"{path}: trials with enrolment models do not fit the format; expected {line}")
    for utterance in trials.utterances:
        if utterance.split() != [utterance]:
            raise ValueError(f"{path}: utterance {utterance!r} does not fit the format; expected {line}")
    rows = zip(trials.labels.tolist(), trials.enrol, trials.test, strict=True)
    text = "".join(f"{label} {enrol} {test}\n" for label, enrol, test in rows)
    replace_text(Path(path), text, newline="\n")


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


def fitting_suffix(missing: Sequence[str], root: str | os.PathLike[str]) -> str | None:
    """The suffix with which all of `missing`, paths that are no files below `root`, would be there, None without one.

    CN-Celeb's lists say .wav of FLAC files, for instance.
    """
    if not missing:
        return None
    first = Path(root) / missing[0]
    there = sorted({path.suffix for path in first.parent.glob(f"{escape(first.stem)}.*") if path.is_file()})
    fits = (suffix for suffix in there if re.fullmatch(r"\.\w+", suffix))
    return next((s for s in fits if all((Path(root) / path).with_suffix(s).is_file() for path in missing)), None)


def _lines(path: Path, what: str, expected: str) -> Iterator[tuple[int, str, list[str]]]:
    """Number, content and fields of every line of a text file that is not blank."""
    try:
        for number, line in enumerate(text_lines(path), start=1):
            fields = line.split()
            if fields:
                yield number, line.rstrip("\r\n"), fields
    except (FileNotFoundError, IsADirectoryError) as error:
        raise FileNotFoundError(f"no {what} {path}; expected a text file of lines {expected}") from error
    except NotTextError as error:
        raise ValueError(f"{error}; expected lines {expected}") from error


def _expected(format: str) -> str:
    """The lines a format has, in words."""
    if format == "auto":
        return ", or ".join(layout.line for layout in FORMATS.values())
    if format not in FORMATS:
        raise ValueError(f"format: got {format!r}, expected 'auto' or one of {', '.join(FORMATS)}.")
    return FORMATS[format].line


def _format_of(path: Path, number: int, line: str, fields: list[str], format: str) -> str:
    """The name of a list's format: the given one, or the one that its first line fits."""
    if len(fields) == 2:
        raise ValueError(
            f"{path}, line {number}: {line!r} has no label. Error rates need labels: take the list with its key "
            "(SITW: keys/ instead of lists/; VoxSRC: the released test labels), or put them before the two paths"
        )
    if format != "auto":
        return format
    fitting = [name for name, layout in FORMATS.items() if layout.fits(fields)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise ValueError(f"{path}, line {number}: {line!r} fits several formats: give format={' or '.join(fitting)}")
    raise ValueError(f"{path}, line {number}: {line!r} is not a trial; expected {_expected(format)}")


def _check_known(path: Path, format: str, labels: list[int]) -> None:
    """Warns of a list that has the name of an official one but not its trials."""
    name, trials, targets = KNOWN_LISTS.get((format, path.name), ("", len(labels), sum(labels)))
    if (trials, targets) != (len(labels), sum(labels)):
        warnings.warn(
            f"{path} has {len(labels):,} trials, {sum(labels):,} of them targets, but {path.name} is the name of "
            f"{name} with {trials:,}, {targets:,} of them targets: its results are not those of the official list",
            stacklevel=3,
        )


def _read_models(path: Path, trials: Path, kind: str, enrol: list[str]) -> dict[str, list[str]]:
    """The utterances of the enrolment models that the trials name."""
    expected = "'name path [path ...]'"
    models: dict[str, list[str]] = {}
    for number, line, (name, *paths) in _lines(path, "enrolment list", expected):
        if not paths:
            raise ValueError(f"{path}, line {number}: {line!r} is no enrolment; expected {expected}")
        if any(_is_number(field) for field in paths):
            raise ValueError(
                f"{path}, line {number}: {line!r} enrols a segment between two times (SITW's 'assist' conditions): "
                "not supported; take a list of whole files (enroll-core.lst), or cut the segments out into files"
            )
        utterances = models.setdefault(name, [])
        for utterance in paths:
            if kind == "cnceleb" and not utterance.startswith("enroll/"):
                utterance = f"../data/{utterance}"
            if utterance in utterances:
                raise ValueError(f"{path}, line {number}: enrolment {name!r} has {utterance} twice")
            utterances.append(utterance)
    unknown = sorted(set(enrol).difference(models))
    if unknown:
        raise ValueError(f"{path}: no enrolment for {len(unknown)} names of {trials}: {_some(unknown)}")
    used = set(enrol)
    return {name: utterances for name, utterances in models.items() if name in used}


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[0-9.]+", text) is not None


def _sitw_speakers(meta: Path) -> dict[str, str]:
    """Speakers of SITW's audio files, 'path speaker ...' a line; none without the file."""
    if not meta.is_file():
        return {}
    speakers = {}
    for number, line, fields in _lines(meta, "list of speakers", "'path speaker ...'"):
        if len(fields) < 2:
            raise ValueError(f"{meta}, line {number}: {line!r} names no speaker; expected 'path speaker ...'")
        speakers[fields[0]] = fields[1]
    return speakers


def _with_suffix(trials: Trials, suffix: str) -> Trials:
    """The trials with another suffix on every path."""
    if not re.fullmatch(r"\.\w+", suffix):
        raise ValueError(f"suffix must be a point and letters, such as '.flac', got {suffix!r}")
    new = {path: str(PurePosixPath(path).with_suffix(suffix)) for path in trials.utterances}
    names = trials.speaker_names and {new.get(path, path): name for path, name in trials.speaker_names.items()}
    test = [new[path] for path in trials.test]
    if trials.models is None:
        return Trials(trials.labels, [new[path] for path in trials.enrol], test, None, names)
    models = {name: [new[path] for path in paths] for name, paths in trials.models.items()}
    return Trials(trials.labels, trials.enrol, test, models, names)


# VoxCeleb: 'id10270/...', VoxSRC 2020: 'voxceleb1/id10955/...', CN-Celeb: 'test/id00800-singing-01-001.wav'
_SPEAKER_ID = re.compile(r"(?:^|/)(id\d{5})[-/]")


def _speaker_in(path: str) -> str:
    """Speaker of an utterance in the path: an id of VoxCeleb's or CN-Celeb's kind, or the first folder."""
    found = _SPEAKER_ID.search(path)
    if found:
        return found[1]
    try:
        return speaker_of(path)
    except ValueError as error:
        raise UnknownSpeakersError(str(error)) from error


def _rows(names: list[str], distinct: list[str]) -> NDArray:
    """Position of each of `names` [T] in `distinct` -> [T]."""
    row_of = {name: row for row, name in enumerate(distinct)}
    return np.fromiter(map(row_of.__getitem__, names), np.int64, len(names))


def _some(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(repr, names[:5])) + more


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
