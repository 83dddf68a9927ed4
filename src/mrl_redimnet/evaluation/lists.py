"""Several trial lists of the same speech: each utterance is embedded once, whatever the number of lists and dimensions.

Lists that name the same path mean the same file.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mrl_redimnet.audio.cuts import CUTS, cut
from mrl_redimnet.audio.io import Source, name_of
from mrl_redimnet.audio.waveforms import Prepare, into_domain
from mrl_redimnet.encoder import SpeakerEncoder
from mrl_redimnet.evaluation.measures import ScoredList
from mrl_redimnet.evaluation.results import check_present
from mrl_redimnet.files import replace_file
from mrl_redimnet.scoring.calibration import Threshold, Thresholds
from mrl_redimnet.scoring.scorers import Scorer, by_enrolments, score, trial_seconds, with_enrolments
from mrl_redimnet.scoring.trials import Trials, read_trials


def read_lists(
    files: Sequence[Path],
    folder: str | Path,
    format: str = "auto",
    enrolments: Path | None = None,
    suffix: str | None = None,
) -> dict[str, Trials]:
    """Trial lists by their names (`list_names`); format, enrolments and suffix as of `read_trials`.

    Raises ValueError as that does, FileNotFoundError listing utterances that are not below `folder`.
    """
    lists = {
        name: read_trials(file, format, enrolments, suffix) for name, file in zip(list_names(files), files, strict=True)
    }
    for trials in lists.values():
        check_present(trials, folder)
    return lists


def list_names(files: Sequence[Path]) -> list[str]:
    """The files' names without suffix, with as many of the folders above them as tell them apart.

    Raises ValueError for a file that is given twice.
    """
    paths = [file.resolve().with_suffix("").parts for file in files]
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"--trials: a list is given twice: {', '.join(map(str, files))}.")


@dataclass(frozen=True)
class EmbeddedSpeech:
    """The utterances of some trial lists.

    Attributes:
        utterances: [N] paths as the lists have them.
        embeddings: [N, D] float32.
        seconds: [N] durations.
    """

    utterances: list[str]
    embeddings: np.ndarray
    seconds: np.ndarray

    @classmethod
    def of(
        cls,
        encoder: SpeakerEncoder,
        lists: Iterable[Trials],
        folder: str | Path,
        domain: Callable | None = None,
        progress: str | None = None,
    ) -> "EmbeddedSpeech":
        """Embeds the utterances below `folder`, brought into a domain of `mrl_redimnet.audio.domains` (None: as they
        are). An AudioWarning names a file without a signal. Raises AudioError for files that cannot be read.
        """
        utterances = sorted({path for trials in lists for path in trials.utterances})
        files = [Path(folder) / path for path in utterances]
        found = encoder.embed_all(files, prepare=into_domain(folder, domain), progress=progress, strict=True)
        return cls(utterances, found.embeddings, found.seconds)

    def with_cuts(
        self, encoder: SpeakerEncoder, folder: str | Path, domain: Callable | None = None, progress: str | None = None
    ) -> "EmbeddedSpeech":
        """These utterances and, as utterances of their own, stretches of them: one of every class of `CUTS` that an
        utterance is long enough for, called as `cut_name` says. Arguments and errors as of `of`.
        """
        parts = [self]
        for kind, (_, longest) in CUTS.items():
            long = [path for path, seconds in zip(self.utterances, self.seconds, strict=True) if seconds >= longest]
            paths = {str(Path(folder) / path): path for path in long}
            prepare = partial(_stretch, kind=kind, paths=paths, prepare=into_domain(folder, domain))
            found = encoder.embed_all([*paths], prepare=prepare, progress=progress, strict=True)
            names = [cut_name(path, kind) for path in paths.values()]
            parts.append(EmbeddedSpeech(names, found.embeddings, found.seconds))
        return EmbeddedSpeech(
            [path for part in parts for path in part.utterances],
            np.concatenate([part.embeddings for part in parts]),
            np.concatenate([part.seconds for part in parts]),
        )

    def scores(self, trials: Trials, dim: int, scorer: Scorer) -> np.ndarray:
        """Scores [trials] at one dimension."""
        return score(trials, self.utterances, self.embeddings, dim, scorer)

    def trial_seconds(self, trials: Trials) -> np.ndarray:
        """Durations [trials, 2] of both sides."""
        return trial_seconds(trials, self.utterances, self.seconds)


def _stretch(source: Source, audio: np.ndarray, kind: str, paths: Mapping[str, str], prepare: Prepare) -> np.ndarray:
    """A stretch of a file that a list calls `paths[file]`, after it was prepared."""
    return cut(prepare(source, audio), paths[name_of(source)], kind)


def cut_name(path: str, kind: str) -> str:
    """What a stretch of an utterance is called; kind: one of `CUTS`."""
    return f"{path} ({kind})"


# ---------------------------------------------------------------- evaluation


def saved_thresholds(
    encoder: SpeakerEncoder,
    thresholds: Thresholds | None,
    lists: Mapping[str, Trials],
    dims: Sequence[int],
    scorer: Scorer,
) -> tuple[dict[str, dict[int, Threshold]], list[str]]:
    """Of each list, the saved thresholds by dimension that are for these weights and for as many enrolment utterances
    as the list has; and notes that say where there are none.
    """
    found: dict[str, dict[int, Threshold]] = {name: {} for name in lists}
    notes, weights = [], encoder.fingerprint if thresholds else ""
    for name, trials in lists.items():
        if not thresholds:
            break
        counts = list(by_enrolments(trials))
        if len(counts) > 1:
            notes.append(
                f"{name} averages {counts[0]} to {counts[-1]} enrolment utterances: no saved threshold is for it"
            )
            continue
        try:
            for dim in dims:
                found[name][dim] = thresholds.find(dim, encoder.adapter, scorer, weights, counts[0])
        except ValueError as error:
            notes.append(str(error))
    return found, list(dict.fromkeys(notes))


def score_lists(
    speech: EmbeddedSpeech,
    lists: Mapping[str, Trials],
    dims: Sequence[int],
    scorer: Scorer,
    saved: Mapping[str, Mapping[int, Threshold]],
) -> dict[str, ScoredList]:
    """Every list with its scores at every dimension. saved: from `saved_thresholds`."""
    scored = {}
    for name, trials in lists.items():
        scores = {dim: speech.scores(trials, dim, scorer) for dim in dims}
        timed = any(threshold.calibration.uses_seconds for threshold in saved[name].values())
        seconds = speech.trial_seconds(trials) if timed else None
        scored[name] = ScoredList(trials, scores, dict(saved[name]), seconds)
    return scored


def report_of(
    encoder: SpeakerEncoder,
    scored: Mapping[str, ScoredList],
    scorer: Scorer,
    priors: Sequence[float],
    resamples: int,
    *,
    command: str,
    domain: str = "clean",
    group_of: Mapping[str, str] | None = None,
) -> tuple[dict, list[str]]:
    """The report whose form `mrl_redimnet.evaluation.measures` describes, and notes on what could not be measured.

    resamples: of the intervals over speakers, 0 for none. command, domain: noted in the report. group_of: the group of
    every speaker, where error rates of groups are wanted.
    """
    conditions = {
        "command": command,
        "model": encoder.name,
        "weights": encoder.fingerprint,
        "adapter": encoder.adapter,
        "domain": domain,
        "scoring": str(scorer),
        "priors": priors,
        "resamples": resamples,
        "version": version("mrl-redimnet"),
    }
    records, notes = {}, []
    for name, each in scored.items():
        counts, of_list = each.counts(), resamples
        if counts["speakers"] is None and resamples:
            of_list = 0
            notes.append(f"{name} does not tell whose speech is whose: no intervals over speakers.")
        dims = tqdm(each.scores, desc=f"measuring {name}", leave=False, disable=None)
        records[name] = {**counts, "rows": [each.row(dim, priors, of_list) for dim in dims]}
        if group_of is not None:
            records[name]["groups"] = each.groups(group_of, of_list)
    return {"conditions": conditions, "lists": records}, notes


def write_scores(file: Path, lists: Mapping[str, ScoredList]) -> None:
    """list, label, enrol, test and a score per dimension of every trial: lines behind a heading (.tsv), or arrays
    (.npz). The file is written whole or not at all.
    """
    columns = {
        "list": np.concatenate([np.full(len(each.trials), name) for name, each in lists.items()]),
        "label": np.concatenate([each.trials.labels for each in lists.values()]),
        "enrol": np.concatenate([each.trials.enrol for each in lists.values()]),
        "test": np.concatenate([each.trials.test for each in lists.values()]),
    }
    dims = list(next(iter(lists.values())).scores)
    scores = np.column_stack([np.concatenate([each.scores[dim] for each in lists.values()]) for dim in dims])

    def write(target: Path):
        if file.suffix == ".npz":
            with target.open("wb") as opened:
                arrays: dict[str, Any] = {**columns, "dims": dims, "scores": scores}
                np.savez_compressed(opened, **arrays)
            return
        with target.open("w", encoding="utf-8") as opened:
            print(*columns, *dims, sep="\t", file=opened)
            for *facts, row in zip(*columns.values(), scores, strict=True):
                print(*facts, *(f"{value:.8f}" for value in row), sep="\t", file=opened)

    replace_file(file, write)


# ---------------------------------------------------------------- calibration


def by_enrolment_count(lists: Mapping[str, Trials], counts: Sequence[int]) -> tuple[dict[int, list[Trials]], list[str]]:
    """The trials by the number of enrolment utterances: averages made for `counts`, without counts the lists' own; and
    notes on trials that had to be left out.

    Raises ValueError where no trial is left for a number.
    """
    parts: dict[int, list[Trials]] = {}
    notes = []
    for name, trials in lists.items():
        made = {count: with_enrolments(trials, count) for count in counts} if counts else by_enrolments(trials)
        for count, each in made.items():
            parts.setdefault(count, []).append(each)
            if len(each) == 0:
                raise ValueError(f"--enrolments {count}: no speaker of {name} has so many utterances beside a test.")
            if counts and len(each) < len(trials):
                dropped = len(trials) - len(each)
                notes.append(f"{dropped:,} of {len(trials):,} trials of {name} have too few utterances for {count}.")
    return parts, notes


def at_drawn_lengths(trials: Trials, utterances: Iterable[str], seed: int = 0) -> Trials:
    """The same trials, each utterance of each of them whole or as one of its stretches, drawn with equal chances.

    utterances: what there is, as of `EmbeddedSpeech.with_cuts`. The result does not tell speakers.
    """
    rng, there = np.random.default_rng(seed), set(utterances)
    versions = {
        path: [path, *(name for kind in CUTS if (name := cut_name(path, kind)) in there)] for path in trials.utterances
    }

    def drawn(path: str) -> str:
        return versions[path][rng.integers(len(versions[path]))]

    tests = [drawn(path) for path in trials.test]
    if trials.models is None:
        return Trials(trials.labels, [drawn(path) for path in trials.enrol], tests)
    names = [f"{name} ({row})" for row, name in enumerate(trials.enrol)]  # each trial draws lengths of its own
    paths = [[drawn(path) for path in trials.models[name]] for name in trials.enrol]
    return Trials(trials.labels, names, tests, dict(zip(names, paths, strict=True)))


def fit_thresholds(
    encoder: SpeakerEncoder,
    speech: EmbeddedSpeech,
    trials: Sequence[Trials],
    dims: Sequence[int],
    scorer: Scorer,
    *,
    enrolments: int,
    false_accept: float,
    name: str,
    durations: bool = False,
) -> list[Threshold]:
    """Thresholds at every dimension for averages of `enrolments` utterances, each set on all of the trials together.

    false_accept: the share of impostors to accept. name: of the trials. durations: let the calibration depend on both
    sides' durations; each trial then counts twice, as it is and at drawn lengths (`speech` is `with_cuts`). Raises
    ValueError as `Threshold.fit` does.
    """
    if durations:
        trials = [*trials, *(at_drawn_lengths(each, speech.utterances) for each in trials)]
        name += ", whole and cut"
    labels, weights = np.concatenate([each.labels for each in trials]), encoder.fingerprint
    seconds = np.concatenate([speech.trial_seconds(each) for each in trials]) if durations else None
    return [
        Threshold.fit(
            np.concatenate([speech.scores(each, dim, scorer) for each in trials]),
            labels,
            wanted=false_accept,
            dim=dim,
            weights=weights,
            trials=name,
            adapter=encoder.adapter,
            scorer=scorer,
            seconds=seconds,
            enrolments=enrolments,
        )
        for dim in dims
    ]
