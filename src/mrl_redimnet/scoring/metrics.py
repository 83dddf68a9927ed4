"""Verification metrics over a list of trials, and intervals from a bootstrap over speakers.

A trial is a pair of utterances with a score; it is a target trial (label 1) when both are of one speaker and an
impostor trial (label 0) otherwise. A trial is accepted when its score reaches the threshold. The miss rate is the
share of targets rejected, the false-alarm rate the share of impostors accepted.

How well scores tell speakers apart, whatever their scale: :func:`eer`, :func:`eer_convex_hull`, :func:`min_dcf`,
:func:`min_cllr`, :func:`auc`. How good they are as natural-log likelihood ratios (LLRs) too: :func:`act_dcf`,
:func:`cllr`. Each is called as f(scores, labels, weights=...). Scores may be infinite, which a calibration by the PAV
algorithm makes them at both ends; NaN is refused. Trials may come in any order: with whole-numbered weights the result
is the same to the last bit.

Time is that of a sort. The bootstrap sorts once; a resample then costs a pass over the trials, and one over at most
65,536 numbers per metric.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mrl_redimnet.extras import extra

# A valid trial list loses one side in at most about three of four resamples (one target speaker, one impostor pair),
# so 100 failures in a row (0.75**100 < 1e-12) do not happen by chance.
_MAX_DRAWS = 100
_GROUPS = 1 << 15  # of scores in the bootstrap of long lists


def error_curve(scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> tuple[NDArray, NDArray]:
    """Miss and false-alarm rates at every threshold that tells two trials apart.

    Args:
        scores: [trials] higher means more alike; any numbers but NaN.
        labels: [trials] 1 target, 0 impostor.
        weights: [trials] finite, non-negative, positive for some target and some impostor; None counts each trial once.

    Returns:
        (miss, false_alarm), float64 [distinct scores + 1], thresholds ascending: miss rises from 0 to 1 and
        false_alarm falls from 1 to 0. Both ends (accept all, reject all) are included.

    Raises:
        ValueError: arrays not 1-D, empty or of different lengths; a label other than 0/1; no target or no impostor;
            a NaN score; bad weights.
    """
    _, targets, impostors = _weight_per_score(scores, labels, weights)
    return _rejected_share(targets), 1.0 - _rejected_share(impostors)


def eer(scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Equal error rate, in [0, 1]: the rate at which misses and false alarms are equally frequent.

    The curve of :func:`error_curve` has a point per threshold between distinct scores; where no point has equal rates,
    the two points around the crossing are joined by a straight line. This is the EER of the plain ROC polyline
    (as found by root search on an interpolated ROC), not of its convex hull.

    Args and errors: as for :func:`error_curve`.
    """
    return _crossing(*error_curve(scores, labels, weights))


def eer_convex_hull(scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Equal error rate on the convex hull of the ROC (ROCCH-EER), in [0, 1/2].

    The hull holds the error rates that are reached by drawing between thresholds; its EER is the largest Bayes error
    rate over all priors, min over thresholds of p miss + (1 - p) false_alarm, maximised over p. It is at most
    :func:`eer`, well below it where there are few trials. (Brummer and de Villiers, "The BOSARIS Toolkit user guide",
    2011; hull and PAV: Fawcett and Niculescu-Mizil, "PAV and the ROC convex hull", Machine Learning 68, 2007.)

    Args and errors: as for :func:`error_curve`.
    """
    targets, impostors = _pooled_weights(scores, labels, weights)
    return _crossing(_rejected_share(targets), 1.0 - _rejected_share(impostors))


def auc(scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Area under the ROC, in [0, 1]: the probability that a target scores above an impostor, ties counting half.

    This is the Mann-Whitney U statistic over the number of pairs (Hanley and McNeil, Radiology 143, 1982); each pair
    weighs the product of its two weights.

    Args and errors: as for :func:`error_curve`.
    """
    miss, false_alarm = error_curve(scores, labels, weights)
    return float(np.trapezoid(1.0 - false_alarm, miss))


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
    _check_costs(p_target, c_miss, c_fa)
    return float(np.min(_cost(*error_curve(scores, labels, weights), p_target, c_miss, c_fa)))


def act_dcf(
    llrs: ArrayLike,
    labels: ArrayLike,
    p_target: float = 0.01,
    c_miss: float = 1.0,
    c_fa: float = 1.0,
    weights: ArrayLike | None = None,
) -> float:
    """Normalised detection cost of decisions at the Bayes threshold, at least :func:`min_dcf` of the same trials.

    A trial is accepted when llr >= log(c_fa * (1 - p_target) / (c_miss * p_target)); the cost is that of
    :func:`min_dcf` at this threshold (NIST 2016 Speaker Recognition Evaluation Plan, section 3, actual cost). What it
    exceeds the minimum by is the calibration's fault. Above 1, the scores do more harm than no decision by speech.

    Args:
        llrs: [trials] natural-log likelihood ratios of target to impostor; scores of another scale give a number
            without meaning.
        labels, weights, p_target, c_miss, c_fa: as for :func:`min_dcf`.

    Raises:
        ValueError: as for :func:`min_dcf`.
    """
    _check_costs(p_target, c_miss, c_fa)
    distinct, targets, impostors = _weight_per_score(llrs, labels, weights)
    accepted = int(np.searchsorted(distinct, np.log(c_fa * (1.0 - p_target)) - np.log(c_miss * p_target)))
    miss = targets[:accepted].sum() / targets.sum()
    false_alarm = impostors[accepted:].sum() / impostors.sum()
    return float(_cost(miss, false_alarm, p_target, c_miss, c_fa))


def cllr(llrs: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Cost of log-likelihood ratios, in bits: 0 for certain and right ones, 1 for llr = 0 throughout, no upper bound.

    Cllr = (mean over targets of log2(1 + exp(-llr)) + mean over impostors of log2(1 + exp(llr))) / 2 (Brummer and
    du Preez, "Application-independent evaluation of speaker detection", Computer Speech and Language 20, 2006). It is
    infinite where a target has llr -inf or an impostor +inf: certain, and wrong.

    Args and errors: as for :func:`act_dcf`, without prior and costs.
    """
    distinct, targets, impostors = _weight_per_score(llrs, labels, weights)
    return (_mean_bits(targets, distinct) + _mean_bits(impostors, -distinct)) / 2.0


def min_cllr(scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Cllr after the best rising calibration of the scores, in [0, 1] bits: what telling speakers apart costs.

    The calibration is the PAV algorithm's (Brummer and du Preez 2006, see :func:`cllr`): a block of pooled trials that
    holds the shares a of all targets and b of all impostors has llr = log(a / b), so
    min Cllr = sum over blocks of (a log2((a + b) / a) + b log2((a + b) / b)) / 2, in which the infinite llrs of blocks
    of one kind cost nothing. cllr - min_cllr is the loss to calibration.

    Args and errors: as for :func:`error_curve`.
    """
    with extra("evaluation"):
        from scipy.special import rel_entr

    targets, impostors = _pooled_weights(scores, labels, weights)
    a, b = targets / targets.sum(), impostors / impostors.sum()
    gained = np.sum(rel_entr(a, a + b) + rel_entr(b, a + b))  # no term is above 0
    return float(abs(gained) / (2.0 * np.log(2.0)))


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
        metric: called as metric(scores, labels, weights=weights): any metric of this module or a functools.partial
            of it. The same seed draws the same resamples for every metric.
        resamples: how many, at least 1.
        confidence: probability that the interval covers, in (0, 1).
        seed: of numpy's default generator; equal seeds give equal intervals, whatever the order of the trials.

    Returns:
        (low, high) in the units of the metric.

    Raises:
        ValueError: bad trials, speakers that contradict the labels, a setting out of range.
    """
    values = bootstrap_values(scores, labels, enrol_speakers, test_speakers, metric, resamples, seed)
    return quantile_interval(values, confidence)


def quantile_interval(values: NDArray, confidence: float = 0.95) -> tuple[float, float]:
    """The interval between the quantiles that leave out equally much of `values` [resamples] at both ends.

    Quantiles between two values are interpolated; where some value is infinite, as :func:`cllr` can be, the outer one
    of the two is taken. Raises ValueError for a confidence outside (0, 1).
    """
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be between 0 and 1 (both excluded), got {confidence}")
    infinite = np.isinf(values).any()
    low = np.quantile(values, (1.0 - confidence) / 2.0, method="lower" if infinite else "linear")
    high = np.quantile(values, (1.0 + confidence) / 2.0, method="higher" if infinite else "linear")
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
    trials = scores, labels, enrol_speakers, test_speakers
    return bootstrap_together(*trials, {"": metric}, resamples, seed)[""]


def bootstrap_together(
    scores: ArrayLike,
    labels: ArrayLike,
    enrol_speakers: Sequence[str] | NDArray,
    test_speakers: Sequence[str] | NDArray,
    metrics: Mapping[str, Callable[..., float]],
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, NDArray]:
    """:func:`bootstrap_values` of several metrics by name, for little more than the time of one where trials are many.

    Of more than 65,536 trials the resamples see 32,768 groups of neighbouring scores, each at its lowest score, instead
    of every score: no metric moves by as much as a hundredth of its interval.
    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    scores, labels = _checked_trials(scores, labels)
    enrol, test, speakers = _checked_speakers(enrol_speakers, test_speakers, labels)
    order = np.argsort(scores)  # the only sort: a metric sees that its scores are sorted
    scores, labels, enrol, test = scores[order], labels[order], enrol[order], test[order]
    rng, cell = np.random.default_rng(seed), None
    if len(scores) > 2 * _GROUPS:
        seen_scores, cell = _grouped(scores, labels)
        seen_labels = np.tile([False, True], len(seen_scores) // 2)
    else:
        seen_scores, seen_labels = scores, labels
    values = {name: np.empty(resamples) for name in metrics}
    for index in range(resamples):
        weights = _resampled_weights(labels, enrol, test, speakers, rng)
        if cell is not None:
            weights = np.bincount(cell, weights, minlength=len(seen_scores))
        for name, metric in metrics.items():
            values[name][index] = metric(seen_scores, seen_labels, weights=weights)
    return values


def _grouped(scores: NDArray, labels: NDArray) -> tuple[NDArray, NDArray]:
    """Sorted trials in `_GROUPS` groups or fewer, of about equally many, equal scores in one.

    Returns the groups' lowest scores, each twice (of its impostors and of its targets), and each trial's place there.
    """
    positions = np.arange(len(scores))
    differs = np.concatenate(([True], scores[1:] != scores[:-1]))
    run = np.maximum.accumulate(np.where(differs, positions, 0))  # the first trial of equal score
    level = run * _GROUPS // len(scores)
    begins = np.concatenate(([True], level[1:] != level[:-1]))
    return np.repeat(scores[begins], 2), 2 * (np.cumsum(begins) - 1) + labels


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


def _weight_per_score(
    scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None
) -> tuple[NDArray, NDArray, NDArray]:
    """The distinct scores, ascending, and the weight of targets and of impostors at each; all float64 [distinct].

    Tied trials fall on the same side of any threshold, so that this is all that any metric may depend on.
    """
    scores, labels = _checked_trials(scores, labels)
    if weights is not None:
        weights = _checked_weights(weights, len(scores))
    # The linear check spares the bootstrap, which hands over sorted trials, one sort per resample.
    if np.any(scores[1:] < scores[:-1]):
        order = np.argsort(scores)
        scores, labels = scores[order], labels[order]
        weights = None if weights is None else weights[order]
    targets, impostors = (
        side.astype(np.float64) if weights is None else np.where(side, weights, 0.0) for side in (labels, ~labels)
    )
    differs = np.concatenate(([True], scores[1:] != scores[:-1]))
    if not differs.all():
        first = np.flatnonzero(differs)
        scores, targets, impostors = scores[first], np.add.reduceat(targets, first), np.add.reduceat(impostors, first)
    for kind, total in (("target", targets.sum()), ("impostor", impostors.sum())):
        if not 0.0 < total < np.inf:
            raise ValueError(f"the weights of the {kind} trials must have a positive, finite sum, got {total}")
    return scores, targets, impostors


def _rejected_share(weights: NDArray) -> NDArray:
    """Share of the weight [distinct] that each threshold rejects, [distinct + 1], from none to all."""
    rejected = np.zeros(len(weights) + 1)
    np.cumsum(weights, out=rejected[1:])
    rejected /= rejected[-1]
    return rejected


def _crossing(miss: NDArray, false_alarm: NDArray) -> float:
    """The rate at which the polyline through the points (miss, false alarm) has equal rates."""
    gap = miss - false_alarm  # rises from -1 to 1
    after = int(np.searchsorted(gap, 0.0))  # first point with miss >= false alarm; never 0, as gap[0] = -1
    share = gap[after - 1] / (gap[after - 1] - gap[after])
    return float(miss[after - 1] + share * (miss[after] - miss[after - 1]))


def _pooled_weights(scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None) -> tuple[NDArray, NDArray]:
    """Weight of targets and of impostors in each block of the PAV algorithm, [blocks], by rising share of targets.

    The blocks are the edges of the ROC's convex hull.
    """
    with extra("evaluation"):
        from scipy.optimize import isotonic_regression

    _, targets, impostors = _weight_per_score(scores, labels, weights)
    total = targets + impostors
    if not total.all():  # a resample may leave out every trial of some score
        targets, impostors, total = targets[total > 0], impostors[total > 0], total[total > 0]
    first = isotonic_regression(targets / total, weights=total).blocks[:-1]
    return np.add.reduceat(targets, first), np.add.reduceat(impostors, first)


def _mean_bits(weights: NDArray, log_odds: NDArray) -> float:
    """Weighted mean of log2(1 + exp(-log_odds)); both [distinct]. No weight, no cost, even an infinite one."""
    used = weights > 0.0
    weights = weights[used]
    return float(np.sum(weights * np.logaddexp(0.0, -log_odds[used])) / (np.log(2.0) * weights.sum()))


def _check_costs(p_target: float, c_miss: float, c_fa: float) -> None:
    if not 0.0 < p_target < 1.0:
        raise ValueError(f"p_target must be between 0 and 1 (both excluded), got {p_target}")
    for name, cost in (("c_miss", c_miss), ("c_fa", c_fa)):
        if not 0.0 < cost < np.inf:
            raise ValueError(f"{name} must be positive and finite, got {cost}")


def _cost(miss: NDArray, false_alarm: NDArray, p_target: float, c_miss: float, c_fa: float) -> NDArray:
    """Normalised detection cost, see :func:`min_dcf`, of error rates of any shape."""
    of_miss, of_false_alarm = c_miss * p_target, c_fa * (1.0 - p_target)
    return (of_miss * miss + of_false_alarm * false_alarm) / min(of_miss, of_false_alarm)


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
    bad = np.isnan(scores)
    if bad.any():
        raise ValueError(f"scores must be numbers, not NaN: {_count_and_first(bad, scores)}")
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
