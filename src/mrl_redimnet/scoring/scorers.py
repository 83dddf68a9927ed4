"""Scores of verification trials from embeddings: cosine, centred cosine and adaptive score normalisation.

An utterance is embedded once; every dimension is scored from that: the prefix is cut first, then centred where the
scorer does that, then length-normalised, for the trials and for the cohort alike. An enrolment of several utterances is
the length-normalised average of their length-normalised prefixes, so each utterance counts the same.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mrl_redimnet.scoring.trials import Trials

TOP = 300
BLOCK = 1 << 22  # numbers of float64 in one intermediate array: 32 MiB


@dataclass(frozen=True)
class Kind:
    """What a scorer does beyond the cosine.

    centre: subtract the cohort's mean embedding, before length normalisation. The mean is that of the embeddings as the
    model gives them, as in wespeaker's bin/score.py; means and prefixes commute, so it fits every dimension.
    normalise: adaptive symmetric score normalisation with the cohort, see `Scorer`.
    """

    centre: bool = False
    normalise: bool = False

    @property
    def needs_cohort(self) -> bool:
        """Whether scores of this kind depend on embeddings of other speakers."""
        return self.centre or self.normalise


SCORERS = {
    "cosine": Kind(),
    "centred": Kind(centre=True),
    "as_norm": Kind(normalise=True),
    "centred_as_norm": Kind(centre=True, normalise=True),
}


@dataclass(frozen=True, eq=False)  # eq=False: the generated == would compare arrays and raise
class Scorer:
    """A way to score; made by `make_scorer`, used by `score`. `str()` names it together with its cohort.

    Adaptive symmetric normalisation (AS-norm) of a cosine s of enrolment e and test t:

        s' = ((s - mean_e) / std_e + (s - mean_t) / std_t) / 2

    with mean and standard deviation over the `top` highest scores of e, and of t, with the cohort (Matejka et al.,
    "Analysis of Score Normalization in Multilingual Speaker Recognition", Interspeech 2017: AS-norm 1).
    """

    name: str
    cohort: NDArray | None  # [C, D]
    top: int
    cohort_name: str

    def __str__(self) -> str:
        kind = SCORERS[self.name]
        if not kind.needs_cohort:
            return self.name
        top = f", top {self.top}" if kind.normalise else ""
        return f"{self.name}{top}, cohort {self.cohort_name}"

    def units(self, embeddings: NDArray, dim: int, names: Sequence[str] | None = None) -> NDArray:
        """Embeddings [N, D] cut to `dim`, centred where this scorer does, on the unit sphere -> float64 [N, dim].

        Raises ValueError, with the `names` of the rows, for a vector that is zero or has NaN or infinite numbers, and
        for a cohort of another model.
        """
        if self.cohort is not None and self.cohort.shape[1] != embeddings.shape[1]:
            raise ValueError(
                f"the cohort has embeddings of {self.cohort.shape[1]} numbers, the trials of {embeddings.shape[1]}: "
                "give whole embeddings of the same model"
            )
        cut = np.array(embeddings[:, :dim], dtype=np.float64)
        if SCORERS[self.name].centre and self.cohort is not None:
            cut -= self.cohort[:, :dim].mean(0, dtype=np.float64)
        return _unit(cut, names)

    def compare(self, enrol: NDArray, test: NDArray, rows: tuple[NDArray, NDArray]) -> NDArray:
        """Unit vectors enrol [E, dim] and test [U, dim], of each trial the rows in both [T] -> scores [T]."""
        enrol_rows, test_rows = rows
        scores = np.empty(len(enrol_rows))
        step = max(1, BLOCK // enrol.shape[1])
        for start in range(0, len(scores), step):
            part = slice(start, start + step)
            scores[part] = np.einsum("td,td->t", enrol[enrol_rows[part]], test[test_rows[part]])
        if not SCORERS[self.name].normalise or self.cohort is None:
            return scores
        cohort = self.units(
            self.cohort, enrol.shape[1], [f"row {row} of the cohort" for row in range(len(self.cohort))]
        )
        enrol_mean, enrol_std = self._cohort_statistics(enrol, cohort)
        test_mean, test_std = (enrol_mean, enrol_std) if test is enrol else self._cohort_statistics(test, cohort)
        by_enrol = (scores - enrol_mean[enrol_rows]) / enrol_std[enrol_rows]
        return (by_enrol + (scores - test_mean[test_rows]) / test_std[test_rows]) / 2

    def _cohort_statistics(self, units: NDArray, cohort: NDArray) -> tuple[NDArray, NDArray]:
        """Mean and standard deviation, both [N], of the `top` highest cosines of units [N, dim] and cohort [C, dim]."""
        mean, std = np.empty(len(units)), np.empty(len(units))
        step = max(1, BLOCK // len(cohort))
        for start in range(0, len(units), step):
            part = slice(start, start + step)
            highest = np.partition(units[part] @ cohort.T, -self.top, axis=1)[:, -self.top :]
            mean[part], std[part] = highest.mean(1), highest.std(1)
        if not np.all(std > 1e-9):
            raise ValueError(
                f"the {self.top} highest cohort scores of an utterance are all alike: the cohort has copies of one "
                "embedding; give one of different speakers, or a larger top"
            )
        return mean, std


def make_scorer(name: str, cohort: ArrayLike | None = None, top: int = TOP, cohort_name: str | None = None) -> Scorer:
    """A scorer by its name in `SCORERS`.

    Args:
        name: "cosine", "centred", "as_norm" or "centred_as_norm".
        cohort: [C, D] whole embeddings of other speakers than the trials': one per utterance, or their averages per
            speaker (`speaker_means`). Not used by "cosine".
        top: how many of the cohort's highest scores normalise a score, at least 2 and at most C.
        cohort_name: what `str()` calls the cohort, by which a threshold finds its scorer again; by default a hash of
            its numbers, which is another one when other hardware embeds the same speech.

    Raises:
        ValueError: an unknown name, no cohort where one is needed, a cohort that is no finite matrix, or one with fewer
            than `top` rows.
    """
    if name not in SCORERS:
        raise ValueError(f"scorer: got {name!r}, expected one of {', '.join(SCORERS)}.")
    kind = SCORERS[name]
    if not kind.needs_cohort:
        return Scorer(name, None, top, "")
    if cohort is None:
        raise ValueError(f"scorer {name!r} needs a cohort: embeddings of speakers who are not in the trials")
    cohort = np.asarray(cohort)
    if cohort.ndim != 2 or not cohort.size or not np.isfinite(cohort).all():
        raise ValueError(
            f"the cohort must be finite embeddings [C, D], got shape {cohort.shape} or a number that is not"
        )
    if kind.normalise and not (2 <= top <= len(cohort) and isinstance(top, int)):
        raise ValueError(f"top must be a whole number from 2 to the cohort's {len(cohort)} embeddings, got {top}")
    if cohort_name is None:
        content = np.ascontiguousarray(cohort, dtype=np.float32)
        cohort_name = hashlib.sha256(f"{content.shape}".encode() + content.tobytes()).hexdigest()[:16]
    return Scorer(name, cohort, top, cohort_name)


def score(
    trials: Trials, utterances: Sequence[str], embeddings: NDArray, dim: int, scorer: Scorer | None = None
) -> NDArray:
    """Scores of trials at one dimension.

    Args:
        trials: [T] trials.
        utterances: [N] paths, all those of the trials among them.
        embeddings: [N, D] whole embeddings of the utterances.
        dim: length of the prefix, 1 to D.
        scorer: by default the cosine.

    Returns:
        float64 [T], higher means more alike.

    Raises:
        ValueError: shapes that do not fit, utterances of the trials that are not there (lists them), a dimension out of
            range, or a zero or not finite embedding (names its utterance).
    """
    scorer = make_scorer("cosine") if scorer is None else scorer
    embeddings = np.asarray(embeddings)
    _check_embeddings(utterances, embeddings, dim)
    row_of = _row_of(trials, utterances)
    of_test = np.array([row_of[path] for path in trials.utterances], dtype=np.int64)
    units = scorer.units(embeddings[of_test], dim, trials.utterances)
    enrolled = _enrolled(trials, units) if trials.models else units
    return scorer.compare(enrolled, units, trials.rows)


def trial_seconds(trials: Trials, utterances: Sequence[str], seconds: ArrayLike) -> NDArray:
    """Durations [N] of `utterances` -> [T, 2] seconds of enrolment and of test; of a model, all its utterances' sum."""
    seconds = np.asarray(seconds, dtype=np.float64)
    if seconds.shape != (len(utterances),):
        raise ValueError(f"seconds must be one number per utterance, {len(utterances)}, got shape {seconds.shape}")
    row_of = _row_of(trials, utterances)
    enrol = np.array([sum(seconds[row_of[path]] for path in paths) for paths in trials.enrolments.values()])
    test = np.array([seconds[row_of[path]] for path in trials.utterances])
    enrol_rows, test_rows = trials.rows
    return np.column_stack([enrol[enrol_rows], test[test_rows]])


def with_enrolments(trials: Trials, count: int, seed: int = 0) -> Trials:
    """The same trials with averages of `count` utterances enrolled: a trial's own and others of its speaker.

    The others are drawn by `seed` among the list's utterances, never the trial's test. Trials of speakers with too few
    utterances are left out, so the result may have none.

    Raises ValueError where the enrolments are several utterances already, UnknownSpeakersError where the list does not
    tell whose speech an utterance is.
    """
    if trials.models is not None:
        raise ValueError("the trials have enrolments of their own: averages are made of trials of single utterances")
    if count == 1:
        return trials
    by_enrol, by_test = trials.speakers
    speaker_of = dict(zip([*trials.enrol, *trials.test], [*by_enrol, *by_test], strict=True))
    spoken: dict[str, list[str]] = {}
    for path in trials.utterances:
        spoken.setdefault(speaker_of[path], []).append(path)
    generator, order = np.random.default_rng(seed), {}
    for path in dict.fromkeys(trials.enrol):
        order[path] = [*generator.permutation([other for other in spoken[speaker_of[path]] if other != path])]
    kept, names, models = [], [], {}
    for row, (path, test) in enumerate(zip(trials.enrol, trials.test, strict=True)):
        others = [str(other) for other in order[path][:count] if other != test][: count - 1]
        if len(others) == count - 1:
            kept.append(row)
            names.append(" + ".join([path, *others]))
            models[names[-1]] = [path, *others]
    tests = [trials.test[row] for row in kept]
    return Trials(trials.labels[kept], names, tests, models, trials.speaker_names)


def by_enrolments(trials: Trials) -> dict[int, Trials]:
    """The trials by the number of utterances that are averaged for their enrolments, fewest first."""
    if trials.models is None:
        return {1: trials}
    counts = np.array([len(trials.models[name]) for name in trials.enrol])
    parts = {}
    for count in sorted(set(counts.tolist())):
        rows = np.flatnonzero(counts == count)
        enrol, test = ([names[row] for row in rows] for names in (trials.enrol, trials.test))
        parts[count] = Trials(trials.labels[rows], enrol, test, trials.models, trials.speaker_names)
    return parts


def speaker_means(embeddings: ArrayLike, speakers: Sequence[str]) -> NDArray:
    """Average embedding of each speaker, sorted by name: [N, D] of speakers [N] -> float64 [S, D], a cohort."""
    embeddings = np.asarray(embeddings)
    if embeddings.ndim != 2 or len(embeddings) != len(speakers) or not len(speakers):
        raise ValueError(f"embeddings [N, D] of {len(speakers)} speakers expected, got shape {embeddings.shape}")
    names, owner = np.unique(np.asarray(speakers), return_inverse=True)
    sums = np.zeros((len(names), embeddings.shape[1]))
    np.add.at(sums, owner, embeddings)
    return sums / np.bincount(owner)[:, None]


def enrolment_units(units: NDArray, enrolments: Mapping[str, Sequence[int]]) -> NDArray:
    """Averages of unit vectors for enrolments of several utterances.

    Args:
        units: [N, dim] of utterances, from `Scorer.units`.
        enrolments: {name: rows of its utterances, at least one}.

    Returns:
        [E, dim] unit vectors, in the order of the enrolments.

    Raises:
        ValueError: utterances that cancel each other out (names the enrolment).
    """
    counts = [len(rows) for rows in enrolments.values()]
    rows = np.array([row for rows in enrolments.values() for row in rows])
    starts = np.concatenate(([0], np.cumsum(counts)[:-1]))
    return _unit(np.add.reduceat(units[rows], starts, axis=0), list(enrolments))


def _enrolled(trials: Trials, units: NDArray) -> NDArray:
    """Unit vectors [U, dim] of `trials.utterances` -> unit vectors [E, dim] of `trials.enrolments`."""
    row_of = {path: row for row, path in enumerate(trials.utterances)}
    return enrolment_units(units, {name: [row_of[path] for path in paths] for name, paths in trials.enrolments.items()})


def _unit(vectors: NDArray, names: Sequence[str] | None) -> NDArray:
    """Divides the rows of `vectors` [N, dim] by their lengths, in place."""
    norms = np.linalg.norm(vectors, axis=1)
    bad = ~((norms > 0) & (norms < np.inf))
    if bad.any():
        first = int(np.argmax(bad))
        what = "is zero" if norms[first] == 0 else "has numbers that are not finite"
        raise ValueError(
            f"{np.count_nonzero(bad)} of {len(vectors)} embeddings have no direction in their first "
            f"{vectors.shape[1]} numbers, first that of {names[first] if names else f'row {first}'}, which {what}"
        )
    vectors /= norms[:, None]
    return vectors


def _check_embeddings(utterances: Sequence[str], embeddings: NDArray, dim: int) -> None:
    if embeddings.ndim != 2 or len(embeddings) != len(utterances):
        raise ValueError(f"embeddings must be [N, D] for {len(utterances)} utterances, got shape {embeddings.shape}")
    if not 1 <= dim <= embeddings.shape[1]:
        raise ValueError(f"dim must be from 1 to the embeddings' {embeddings.shape[1]} numbers, got {dim}")


def _row_of(trials: Trials, utterances: Sequence[str]) -> dict[str, int]:
    row_of = {path: row for row, path in enumerate(utterances)}
    if len(row_of) != len(utterances):
        raise ValueError(f"utterances must be distinct: {len(utterances)} paths, {len(row_of)} different ones")
    missing = [path for path in trials.utterances if path not in row_of]
    if missing:
        raise ValueError(
            f"{len(missing)} of the trials' {len(trials.utterances)} utterances have no embedding: "
            + ", ".join(missing[:5])
        )
    return row_of
