"""Verification error rates over a list of trials: EER, minDCF and intervals from a bootstrap over speakers.

A trial is a pair of utterances with a score; it is a target trial (label 1) when both are of one speaker and an
impostor trial (label 0) otherwise. A trial is accepted when its score reaches the threshold. The miss rate is the
share of targets rejected, the false-alarm rate the share of impostors accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

# A valid trial list loses one side in at most about three of four resamples (one target speaker, one impostor pair),
# so 100 failures in a row (0.75**100 < 1e-12) do not happen by chance.
_MAX_DRAWS = 100


def error_curve(scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> tuple[NDArray, NDArray]:
    """Miss and false-alarm rates at every threshold that tells two trials apart.

    Args:
        scores: [trials] finite, higher means more alike.
        labels: [trials] 1 target, 0 impostor.
        weights: [trials] finite, non-negative, positive for some target and some impostor; None counts each trial once.

    Returns:
        (miss, false_alarm), float64 [distinct scores + 1], thresholds ascending: miss rises from 0 to 1 and
        false_alarm falls from 1 to 0. Both ends (accept all, reject all) are included.

    Raises:
        ValueError: arrays not 1-D, empty or of different lengths; a label other than 0/1; no target or no impostor;
            a NaN or infinite score; bad weights.
    """
    scores, labels = _checked_trials(scores, labels)
    weights = np.ones(len(scores)) if weights is None else _checked_weights(weights, len(scores))
    # The linear check spares the bootstrap, which hands over sorted trials, one sort per resample.
    if np.any(scores[1:] < scores[:-1]):
        order = np.argsort(scores)
        scores, labels, weights = scores[order], labels[order], weights[order]
    # Tied trials fall on the same side of any threshold: keep only the last trial of each run of equal scores.
    last = np.append(np.flatnonzero(scores[1:] != scores[:-1]), len(scores) - 1)
    miss = _rejected_share(weights * labels, last, "target")
    false_alarm = 1.0 - _rejected_share(weights * ~labels, last, "impostor")
    return miss, false_alarm


def eer(scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Equal error rate, in [0, 1]: the rate at which misses and false alarms are equally frequent.

    The curve of :func:`error_curve` has a point per threshold between distinct scores; where no point has equal rates,
    the two points around the crossing are joined by a straight line. This is the EER of the plain ROC polyline
    (as found by root search on an interpolated ROC), not of its convex hull.

    Args and errors: as for :func:`error_curve`.
    """
    miss, false_alarm = error_curve(scores, labels, weights)
    gap = miss - false_alarm  # rises from -1 to 1
    after = int(np.searchsorted(gap, 0.0))  # first threshold with miss >= false alarm; never 0, as gap[0] = -1
    share = gap[after - 1] / (gap[after - 1] - gap[after])
    return float(miss[after - 1] + share * (miss[after] - miss[after - 1]))


def min_dcf(
    scores: ArrayLike,
    labels: ArrayLike,
    p_target: float = 0.01,
    c_miss: float = 1.0,
    c_fa: float = 1.0,
    weights: ArrayLike | None = None,
) -> float:
    """Minimum of the normalised detection cost over all thresholds, in [0, 1].

    cost = c_miss * p_target * miss + c_fa * (1 - p_target) * false_alarm, divided by the cost of the better of the two
    systems that ignore the speech, min(c_miss * p_target, c_fa * (1 - p_target)): NIST 2016 Speaker Recognition
    Evaluation Plan, section 3 (C_Det and C_Default). 1 means no better than ignoring the speech.

    Args:
        scores, labels, weights: as for :func:`error_curve`.
        p_target: prior probability of a target trial, in (0, 1).
        c_miss, c_fa: costs of a miss and of a false alarm, positive.

    Raises:
        ValueError: a prior or cost out of range, or as for :func:`error_curve`.
    """
    if not 0.0 < p_target < 1.0:
        raise ValueError(f"p_target must be between 0 and 1 (both excluded), got {p_target}")
    for name, cost in (("c_miss", c_miss), ("c_fa", c_fa)):
        if not 0.0 < cost < np.inf:
            raise ValueError(f"{name} must be positive and finite, got {cost}")
    miss, false_alarm = error_curve(scores, labels, weights)
    of_miss, of_false_alarm = c_miss * p_target, c_fa * (1.0 - p_target)
    return float(np.min(of_miss * miss + of_false_alarm * false_alarm) / min(of_miss, of_false_alarm))


def bootstrap_interval(
    scores: ArrayLike,
    labels: ArrayLike,
    enrol_speakers: Sequence[str] | NDArray,
    test_speakers: Sequence[str] | NDArray,
    metric: Callable[..., float] = eer,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of a metric from resampling the speakers with replacement.

    Speakers are resampled, not trials, because trials that share a speaker are not independent and an interval over
    trials is too narrow. A speaker drawn m times stands for m speakers: an impostor trial of speakers i and j weighs
    m_i * m_j and a target trial of speaker i weighs m_i. (Bolle, Ratha, Pankanti, "Error analysis of pattern
    recognition systems: the subsets bootstrap", 2004; the product of multiplicities is the vertex bootstrap of
    Snijders and Borgatti, "Non-parametric standard errors and tests for network statistics", 1999.)
    A resample without any target or any impostor trial is drawn again.

    Args:
        scores, labels: [trials], as for :func:`error_curve`.
        enrol_speakers, test_speakers: [trials] speaker of each side; equal for targets, different for impostors.
        metric: called as metric(scores, labels, weights=weights); :func:`eer`, :func:`min_dcf` or a
            functools.partial of it. The same seed draws the same resamples for every metric.
        resamples: how many, at least 1.
        confidence: probability that the interval covers, in (0, 1).
        seed: of numpy's default generator; equal seeds give equal intervals, whatever the order of the trials.

    Returns:
        (low, high) in the units of the metric.

    Raises:
        ValueError: bad trials, speakers that contradict the labels, a setting out of range.
    """
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be between 0 and 1 (both excluded), got {confidence}")
    values = bootstrap_values(scores, labels, enrol_speakers, test_speakers, metric, resamples, seed)
    return quantile_interval(values, confidence)


def quantile_interval(values: NDArray, confidence: float = 0.95) -> tuple[float, float]:
    """The interval between the quantiles that leave out equally much of `values` [resamples] at both ends."""
    low, high = np.quantile(values, [(1.0 - confidence) / 2.0, (1.0 + confidence) / 2.0])
    return float(low), float(high)


def bootstrap_values(
    scores: ArrayLike,
    labels: ArrayLike,
    enrol_speakers: Sequence[str] | NDArray,
    test_speakers: Sequence[str] | NDArray,
    metric: Callable[..., float] = eer,
    resamples: int = 1000,
    seed: int = 0,
) -> NDArray:
    """The metric of every resample behind :func:`bootstrap_interval`, [resamples] float64; same arguments and errors.

    Resample i weighs the same speakers whatever the scores: the differences between two systems' values on one trial
    list are those of a paired bootstrap, whose interval is much narrower than the two systems' own.
    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    scores, labels = _checked_trials(scores, labels)
    enrol, test, speakers = _checked_speakers(enrol_speakers, test_speakers, labels)
    order = np.argsort(scores)  # the only sort: error_curve sees that its scores are sorted
    scores, labels, enrol, test = scores[order], labels[order], enrol[order], test[order]
    rng = np.random.default_rng(seed)
    values = np.empty(resamples)
    for index in range(resamples):
        values[index] = metric(scores, labels, weights=_resampled_weights(labels, enrol, test, speakers, rng))
    return values


def mean_interval(values: ArrayLike, speakers: Sequence[str] | NDArray, resamples: int = 1000) -> tuple[float, float]:
    """95 % interval of the mean of values [N], an utterance each, from resampling their speakers with replacement.

    Raises ValueError when values and speakers differ in length, are empty, or resamples is below 1.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) != len(speakers) or not len(values) or resamples < 1:
        raise ValueError(f"{len(values)} values of {len(speakers)} speakers, {resamples} resamples: need some of each")
    _, owner = np.unique(np.asarray(speakers), return_inverse=True)
    sums, counts = np.bincount(owner, values), np.bincount(owner)
    drawn = np.random.default_rng(0).integers(len(sums), size=(resamples, len(sums)))
    return quantile_interval(sums[drawn].sum(1) / counts[drawn].sum(1))


def _resampled_weights(
    labels: NDArray, enrol: NDArray, test: NDArray, speakers: int, rng: np.random.Generator
) -> NDArray:
    """Trial weights [trials] of one resample of the speakers that keeps some target and some impostor trial."""
    for _ in range(_MAX_DRAWS):
        times_drawn = np.bincount(rng.integers(speakers, size=speakers), minlength=speakers).astype(np.float64)
        of_enrol = times_drawn[enrol]
        weights = np.where(labels, of_enrol, of_enrol * times_drawn[test])
        if np.any(weights[labels]) and np.any(weights[~labels]):
            return weights
    raise ValueError(f"{_MAX_DRAWS} resamples of {speakers} speakers in a row had no target or no impostor trial")


def _rejected_share(weights: NDArray, last: NDArray, kind: str) -> NDArray:
    """Share of the weight rejected at each threshold, [len(last) + 1], of trials sorted by score."""
    rejected = np.cumsum(weights)[last]
    if not 0.0 < rejected[-1] < np.inf:
        raise ValueError(f"the weights of the {kind} trials must have a positive, finite sum, got {rejected[-1]}")
    return np.concatenate(([0.0], rejected / rejected[-1]))


def _checked_trials(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray, NDArray]:
    """Scores as float64 and labels as bool (True: target), or ValueError."""
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if scores.ndim != 1 or labels.ndim != 1:
        raise ValueError(f"scores and labels must be 1-D, got shapes {scores.shape} and {labels.shape}")
    if len(scores) != len(labels):
        raise ValueError(f"scores and labels differ in length: {len(scores)} and {len(labels)}")
    if len(scores) == 0:
        raise ValueError("no trials: scores and labels are empty")
    targets = labels == 1
    bad = ~(targets | (labels == 0))
    if bad.any():
        raise ValueError(f"labels must be 1 (target) or 0 (impostor): {_count_and_first(bad, labels)}")
    bad = ~np.isfinite(scores)
    if bad.any():
        raise ValueError(f"scores must be finite: {_count_and_first(bad, scores)}")
    if targets.all() or not targets.any():
        have, lack = ("target", "impostor") if targets.all() else ("impostor", "target")
        raise ValueError(f"all {len(labels)} trials are {have} trials; at least one {lack} trial is needed")
    return scores, targets


def _checked_weights(weights: ArrayLike, trials: int) -> NDArray:
    """Weights as float64 [trials], finite and non-negative, or ValueError."""
    weights = np.asarray(weights, dtype=np.float64)
    if weights.shape != (trials,):
        raise ValueError(f"weights must have one number per trial, shape ({trials},), got {weights.shape}")
    bad = ~((weights >= 0.0) & (weights < np.inf))
    if bad.any():
        raise ValueError(f"weights must be finite and not negative: {_count_and_first(bad, weights)}")
    return weights


def _checked_speakers(enrol: ArrayLike, test: ArrayLike, labels: NDArray) -> tuple[NDArray, NDArray, int]:
    """Speakers of both sides as indices [trials] into the sorted distinct speakers, and how many those are."""
    enrol, test = np.asarray(enrol), np.asarray(test)
    for name, side in (("enrol_speakers", enrol), ("test_speakers", test)):
        if side.shape != labels.shape:
            raise ValueError(f"{name} must have one speaker per trial, shape {labels.shape}, got {side.shape}")
    bad = (enrol == test) != labels
    if bad.any():
        raise ValueError(
            "labels must be 1 exactly where the two speakers are equal: "
            + _count_and_first(bad, labels.astype(np.int8))
        )
    speakers, indices = np.unique(np.concatenate([enrol, test]), return_inverse=True)
    return indices[: len(enrol)], indices[len(enrol) :], len(speakers)


def _count_and_first(bad: NDArray, values: NDArray) -> str:
    first = int(np.argmax(bad))
    return f"{np.count_nonzero(bad)} of {len(bad)} trials break this, first at index {first} ({values[first]!s})"
