"""Error rates of groups of speakers, such as women and men: within each, between them, and how they differ.

The rates of a group come from the trials with both speakers in it: its EER, which has a threshold of its own, and its
miss and false-alarm rates at the one threshold that all groups share in use. The first says how well the group's voices
can be told apart, the others who bears the errors. Impostor trials across groups belong to no group: they have a row of
their own, and are the easier ones where groups sound different, so the overall EER can be better than every group's.

Intervals are of 95 % from a bootstrap over the speakers of the row, the threshold held. Groups have no speakers in
common, so a difference is of independent resamples of the two groups.
"""

import csv
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mrl_redimnet.files import NotTextError, text_lines
from mrl_redimnet.rows import BETWEEN, RATES, GroupRow, Rate, group_cells, group_notes
from mrl_redimnet.scoring.metrics import bootstrap_values, eer, error_curve, quantile_interval
from mrl_redimnet.scoring.trials import Trials, speaker_of
from mrl_redimnet.tables import text_table

# With fewer speakers a bootstrap over them tells little, with fewer trials a rate moves in steps of more than 3 %.
LEAST_SPEAKERS, LEAST_TRIALS = 5, 30


def read_groups(file: str | os.PathLike[str], column: str) -> dict[str, str]:
    """The group of every speaker, from a CSV file with a heading.

    The file has the column named `column`, and "speaker" or, without it, "path", whose first folder is the speaker.
    A speaker may have many lines, all of one group; lines without a group are left out.

    Raises FileNotFoundError, or ValueError, naming file and line, for a column that is not there (lists those that
    are), a line without a speaker, a speaker of two groups, or a file without any group.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}; expected a CSV file with the columns speaker (or path) and {column}.")
    group_of: dict[str, str] = {}
    try:
        table = csv.DictReader(text_lines(file))
        source = _source_column(file, table.fieldnames or [], column)
        for row in table:
            group, named = (row[column] or "").strip(), (row[source] or "").strip()
            if group:
                _add_group(group_of, named, source, group, f"{file}, line {table.line_num}")
    except (NotTextError, csv.Error) as error:
        raise ValueError(f"{file} is not a CSV file: {error}") from error
    if not group_of:
        raise ValueError(f"{file}: no line has a value in the column {column}.")
    return group_of


def read_groups_for(lists: Iterable[Trials], file: str | os.PathLike[str], column: str) -> dict[str, str]:
    """As `read_groups`; ValueError also where speakers of the trial lists are not in the file."""
    group_of = read_groups(file, column)
    speakers = {str(name) for trials in lists for side in trials.speakers for name in side}
    if lacking := sorted(speakers.difference(group_of)):
        raise ValueError(
            f"{file}: no {column} for {len(lacking)} of the {len(speakers)} speakers: " + ", ".join(lacking[:5])
        )
    return group_of


def _source_column(file: Path, columns: Sequence[str], column: str) -> str:
    source = next((name for name in ("speaker", "path") if name in columns), None)
    if column not in columns or source is None:
        raise ValueError(f"{file}: expected the columns speaker (or path) and {column}, got {', '.join(columns)}.")
    return source


def _add_group(group_of: dict[str, str], named: str, source: str, group: str, where: str) -> None:
    if not named:
        raise ValueError(f"{where}: no {source}.")
    try:
        speaker = speaker_of(named) if source == "path" else named
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if group_of.setdefault(speaker, group) != group:
        raise ValueError(f"{where}: speaker {speaker} is of group {group} here and of {group_of[speaker]} before.")


# ---------------------------------------------------------------- rates at a threshold


def miss_rate(scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None, *, threshold: float) -> float:
    """Share of the weight of the target trials with a score below the threshold, in [0, 1]."""
    scores, targets = np.asarray(scores), np.asarray(labels) == 1
    return _share(scores < threshold, targets, weights)


def false_alarm_rate(
    scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None, *, threshold: float
) -> float:
    """Share of the weight of the impostor trials with a score that reaches the threshold, in [0, 1]."""
    scores, impostors = np.asarray(scores), np.asarray(labels) == 0
    return _share(scores >= threshold, impostors, weights)


def _share(wrong: NDArray, of: NDArray, weights: ArrayLike | None) -> float:
    weights = of.astype(np.float64) if weights is None else np.asarray(weights) * of
    return float(np.sum(weights * wrong) / np.sum(weights))


def eer_threshold(scores: ArrayLike, labels: ArrayLike) -> float:
    """The score, of those in the list, at which miss and false-alarm rate are nearest to each other; errors as of
    `metrics.error_curve`.
    """
    miss, false_alarm = error_curve(scores, labels)
    thresholds = np.unique(np.asarray(scores, dtype=np.float64))
    return float(thresholds[np.argmin(np.abs(miss - false_alarm)[:-1])])  # the last one rejects all


# ---------------------------------------------------------------- by group


def error_rates(
    trials: Trials,
    scores: ArrayLike,
    group_of: Mapping[str, str],
    resamples: int = 1000,
    threshold: float | None = None,
    dim: int | None = None,
) -> list[GroupRow]:
    """A row per group, by name, and one for the impostor trials between groups where there are any.

    Args:
        trials: [T] trials. scores: [T] of one system at one dimension.
        group_of: group of every speaker of the trials, such as from `read_groups`; others do no harm.
        resamples: of the intervals, 0 for none.
        threshold: where scores are accepted; by default that of the EER of all the trials.
        dim: noted in the rows.

    A group with fewer than `LEAST_SPEAKERS` speakers, or than `LEAST_TRIALS` target or impostor trials, has counts and
    no rates. Differences are to the group with the most speakers among those that have rates (of equals the first).

    Raises ValueError for scores that do not fit the trials, a threshold that is not finite, speakers without a group
    (lists them), a group called `BETWEEN`, or as `Trials.speakers` and `metrics.eer` do.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.shape != (len(trials),):
        raise ValueError(f"scores: expected one per trial, shape ({len(trials)},), got {scores.shape}.")
    threshold = eer_threshold(scores, trials.labels) if threshold is None else float(threshold)
    if not np.isfinite(threshold):
        raise ValueError(f"threshold: got {threshold}, expected a finite score.")
    groups = _groups_of_sides(trials, group_of)
    parts = {group: _Part.of(trials, scores, (groups == group).all(0)) for group in np.unique(groups).tolist()}
    # Every resample must have targets and impostors. Trials across groups have no targets: all targets lie beside them,
    # which the false-alarm rate does not count.
    between = _Part.of(trials, scores, groups[0] != groups[1], beside=trials.labels == 1)
    values = {group: part.rates(threshold, resamples, seed) for seed, (group, part) in enumerate(parts.items())}
    rated = [group for group, rates in values.items() if rates]
    reference = max(rated, key=lambda group: parts[group].counts["speakers"], default=None)
    rows = []
    for group, part in parts.items():
        rates: dict[str, Any] = {name: _rate(drawn) for name, drawn in values[group].items()}
        if rates and group != reference:
            less = {name: _rate(values[group][name] - values[reference][name]) for name in RATES}
            rates |= {"against": reference, **{f"{name}_difference": rate for name, rate in less.items()}}
        rows.append(GroupRow(group, dim, threshold, **part.counts, **rates))
    if between.counts["impostors"]:
        rows.append(GroupRow(BETWEEN, dim, threshold, **between.counts, **between.false_alarm(threshold, resamples)))
    return rows


def _groups_of_sides(trials: Trials, group_of: Mapping[str, str]) -> NDArray:
    """Group of the enrolled and of the tested speaker of every trial, [2, trials]."""
    sides = trials.speakers
    speakers = np.unique(np.concatenate(sides)).tolist()
    if missing := [speaker for speaker in speakers if speaker not in group_of]:
        raise ValueError(f"{len(missing)} of {len(speakers)} speakers have no group: {', '.join(missing[:5])}")
    if BETWEEN in group_of.values():
        raise ValueError(f"a group cannot be called {BETWEEN!r}: that is what trials across groups are called.")
    return np.array([[group_of[speaker] for speaker in side.tolist()] for side in sides])


@dataclass(frozen=True, eq=False)
class _Part:
    """The trials of a row, scores, labels and both sides' speakers, all [trials]; counts as in `GroupRow`."""

    scores: NDArray
    labels: NDArray
    speakers: tuple[NDArray, NDArray]
    counts: dict[str, Any]

    @classmethod
    def of(cls, trials: Trials, scores: NDArray, chosen: NDArray, beside: NDArray | None = None) -> "_Part":
        """chosen: [T] bool, the trials of the row. beside: [T] bool, trials that are kept and not counted."""
        enrol, test = trials.speakers
        targets = int(np.sum(trials.labels[chosen]))
        counts = {
            "speakers": len(np.unique([enrol[chosen], test[chosen]])),
            "targets": targets,
            "impostors": int(np.sum(chosen)) - targets,
        }
        kept = chosen if beside is None else chosen | beside
        return cls(scores[kept], trials.labels[kept], (enrol[kept], test[kept]), counts)

    def rates(self, threshold: float, resamples: int, seed: int) -> dict[str, NDArray]:
        """Of every rate [1 + resamples]: that of the trials, then those of the resamples; none where it tells little.

        seed: another one for every group, so that the resamples of two groups are independent.
        """
        if self._tells_little("targets", "impostors"):
            return {}
        metrics: dict[str, Callable[..., float]] = {"eer": eer, "miss": partial(miss_rate, threshold=threshold)}
        metrics["false_alarm"] = partial(false_alarm_rate, threshold=threshold)
        return {name: self._drawn(metric, resamples, seed) for name, metric in metrics.items()}

    def false_alarm(self, threshold: float, resamples: int) -> dict[str, Any]:
        """The one rate of `BETWEEN`, or none where it tells little."""
        if self._tells_little("impostors"):
            return {}
        return {"false_alarm": _rate(self._drawn(partial(false_alarm_rate, threshold=threshold), resamples, 0))}

    def _tells_little(self, *kinds: str) -> bool:
        return self.counts["speakers"] < LEAST_SPEAKERS or min(self.counts[kind] for kind in kinds) < LEAST_TRIALS

    def _drawn(self, metric: Callable[..., float], resamples: int, seed: int) -> NDArray:
        trials = (self.scores, self.labels)
        if not resamples:
            return np.array([metric(*trials)])
        return np.array([metric(*trials), *bootstrap_values(*trials, *self.speakers, metric, resamples, seed)])


def _rate(values: NDArray) -> Rate:
    """The rate and its interval from [1 + resamples]."""
    return Rate(float(values[0]), *(quantile_interval(values[1:]) if len(values) > 1 else ()))


def format_groups(rows: Sequence[GroupRow]) -> str:
    """A text table of the rows, and below it the differences between groups and the share of cross-group impostors."""
    return "\n".join([text_table(group_cells(rows)), *group_notes(rows)])
