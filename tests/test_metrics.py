"""The metrics and the speaker bootstrap against plain loops, published implementations, exact cases, invariances."""

import functools
import itertools
import json
import math
import tracemalloc
from fractions import Fraction
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrl_redimnet.scoring import metrics
from mrl_redimnet.scoring.metrics import (
    act_dcf,
    auc,
    bootstrap_interval,
    bootstrap_together,
    bootstrap_values,
    cllr,
    eer,
    eer_convex_hull,
    error_curve,
    mean_interval,
    min_cllr,
    min_dcf,
    quantile_interval,
)

METRICS = {
    "eer": eer,
    "eer_convex_hull": eer_convex_hull,
    "min_dcf": functools.partial(min_dcf, p_target=0.3),
    "min_cllr": min_cllr,
    "auc": auc,
    "act_dcf": functools.partial(act_dcf, p_target=0.9),
    "cllr": cllr,
}
OF_ORDER = [name for name in METRICS if name not in ("act_dcf", "cllr")]  # whatever the scale of the scores


# ---------------------------------------------------------------- oracles: loops over every threshold


def loop_points(scores, labels, weights=None):
    """(miss, false alarm) at a threshold below, between and above the distinct scores, by counting."""
    weights = [1.0] * len(scores) if weights is None else weights
    trials = list(zip(scores, labels, weights, strict=True))
    targets = sum(w for _, label, w in trials if label == 1)
    impostors = sum(w for _, label, w in trials if label == 0)
    points = []
    for threshold in [*sorted(set(scores)), math.inf]:
        missed = sum(w for score, label, w in trials if label == 1 and score < threshold)
        accepted = sum(w for score, label, w in trials if label == 0 and score >= threshold)
        points.append((missed / targets, accepted / impostors))
    return points


def loop_eer(scores, labels, weights=None):
    """Where the polyline through the points meets the line miss = false alarm."""
    points = loop_points(scores, labels, weights)
    for (miss, accept), (next_miss, next_accept) in zip(points, points[1:], strict=False):
        if miss <= accept and next_miss >= next_accept and (miss, accept) != (next_miss, next_accept):
            # miss + t * rise = accept - t * fall
            t = (accept - miss) / ((next_miss - miss) + (accept - next_accept))
            return miss + t * (next_miss - miss)
    raise AssertionError("the curve runs from (0, 1) to (1, 0) and must cross")


def loop_min_dcf(scores, labels, p_target, c_miss, c_fa, weights=None):
    points = loop_points(scores, labels, weights)
    costs = [c_miss * p_target * miss + c_fa * (1 - p_target) * accept for miss, accept in points]
    return min(costs) / min(c_miss * p_target, c_fa * (1 - p_target))


def loop_eer_convex_hull(scores, labels, weights=None):
    """The lowest point with equal rates on a line between any two points of the ROC."""
    points = loop_points(scores, labels, weights)
    rates = [0.5]
    for (miss, accept), (next_miss, next_accept) in itertools.combinations(points, 2):
        slope = (next_miss - miss) + (accept - next_accept)
        if miss <= accept and next_miss >= next_accept and slope > 0:
            rates.append(miss + (accept - miss) / slope * (next_miss - miss))
    return min(rates)


def loop_act_dcf(llrs, labels, p_target, c_miss, c_fa, weights=None):
    """Decide trial by trial for the lesser expected cost, at the posterior odds that llr and prior give."""
    weights = [1.0] * len(llrs) if weights is None else weights
    costs, totals = {0: 0.0, 1: 0.0}, {0: 0.0, 1: 0.0}
    for llr, label, weight in zip(llrs, labels, weights, strict=True):
        totals[label] += weight
        accepts = c_miss * p_target * math.exp(llr) >= c_fa * (1 - p_target)
        costs[label] += weight * (accepts != bool(label))
    expected = c_miss * p_target * costs[1] / totals[1] + c_fa * (1 - p_target) * costs[0] / totals[0]
    return expected / min(c_miss * p_target, c_fa * (1 - p_target))


def loop_cllr(llrs, labels, weights=None):
    weights = [1.0] * len(llrs) if weights is None else weights
    bits, totals = {0: 0.0, 1: 0.0}, {0: 0.0, 1: 0.0}
    for llr, label, weight in zip(llrs, labels, weights, strict=True):
        totals[label] += weight
        if weight:
            bits[label] += weight * math.log2(1 + math.exp(-llr if label else llr))
    return (bits[1] / totals[1] + bits[0] / totals[0]) / 2


def loop_pav_llrs(scores, labels, weights=None):
    """Llr of each trial after the best rising calibration, by the max-min formula of isotonic regression.

    The calibrated share of targets at a score is the maximum over lower scores, of the minimum over higher scores, of
    the share in between; scores of no weight get None.
    """
    weights = [1] * len(scores) if weights is None else weights
    held = {score: [0, 0] for score in sorted(set(scores))}
    for score, label, weight in zip(scores, labels, weights, strict=True):
        held[score][label] += weight
    steps = [(score, *pair) for score, pair in held.items() if sum(pair)]
    impostors, targets = (sum(step[kind] for step in steps) for kind in (1, 2))

    def share(low, high):
        between = [sum(step[kind] for step in steps[low : high + 1]) for kind in (1, 2)]
        return Fraction(between[1], sum(between))

    llrs = dict.fromkeys(held)
    for place, step in enumerate(steps):
        p = max(min(share(low, high) for high in range(place, len(steps))) for low in range(place + 1))
        odds = p / (1 - p) * Fraction(impostors, targets) if p < 1 else math.inf
        llrs[step[0]] = math.log(odds) if 0 < odds < math.inf else (math.inf if odds else -math.inf)
    return [llrs[score] for score in scores]


def loop_min_cllr(scores, labels, weights=None):
    weights = [1] * len(scores) if weights is None else weights
    llrs = loop_pav_llrs(scores, labels, weights)
    trials = [row for row in zip(llrs, labels, weights, strict=True) if row[2]]
    return loop_cllr(*map(list, zip(*trials, strict=True)))


def loop_auc(scores, labels, weights=None):
    weights = [1.0] * len(scores) if weights is None else weights
    won = total = 0.0
    rows = list(zip(scores, labels, weights, strict=True))
    for (one, target, of_one), (other, impostor, of_other) in itertools.product(rows, rows):
        if target and not impostor:
            total += of_one * of_other
            won += of_one * of_other * ((one > other) + (one == other) / 2)
    return won / total


LOOPS = {
    "eer": loop_eer,
    "eer_convex_hull": loop_eer_convex_hull,
    "min_dcf": lambda *trials: loop_min_dcf(*trials[:2], 0.3, 1, 1, *trials[2:]),
    "min_cllr": loop_min_cllr,
    "auc": loop_auc,
    "act_dcf": lambda *trials: loop_act_dcf(*trials[:2], 0.9, 1, 1, *trials[2:]),
    "cllr": loop_cllr,
}


@st.composite
def trial_sets(draw, weighted=False):
    """Few distinct integer scores, so that ties are frequent; at least one target and one impostor."""
    row = st.tuples(st.integers(-6, 6), st.integers(0, 1), st.integers(0, 3))
    rows = draw(st.lists(row, max_size=25))
    rows += [(draw(st.integers(-6, 6)), label, draw(st.integers(1, 3))) for label in (0, 1)]
    scores, labels, weights = (list(column) for column in zip(*rows, strict=True))
    return ([float(s) for s in scores], labels, weights) if weighted else ([float(s) for s in scores], labels)


def gaussian_trials(count, shift, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, size=count)
    return rng.standard_normal(count) + shift * labels, labels


# ---------------------------------------------------------------- EER and minDCF


@pytest.mark.parametrize(
    ("scores", "labels", "expected"),
    [
        ([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1], 0.0),  # perfectly separated
        ([0.1, 0.2, 0.8, 0.9], [1, 1, 0, 0], 1.0),  # perfectly wrong
        ([1, 2, 3, 1, 2, 3], [0, 0, 0, 1, 1, 1], 0.5),  # identical distributions
        ([7, 7, 7], [1, 0, 0], 0.5),  # one tie: a straight line from (0, 1) to (1, 0)
        ([1, 2, 3, 4], [0, 1, 0, 1], 0.5),  # an operating point with miss = false alarm = 1/2
        ([1, 2, 3, 4, 5, 6], [0, 0, 1, 0, 1, 1], 1 / 3),  # likewise 1/3
        # (miss, fa) = (0, 1/3) at threshold 2, then the tie at 2 moves to (1/2, 0): crossing at t = 2/5
        ([0, 1, 2, 2, 3], [0, 0, 0, 1, 1], 0.2),
        # no tie: (0, 1/3) then (1/2, 1/3), a straight rise that crosses at 1/3
        ([0, 1, 2, 3, 4], [0, 0, 1, 0, 1], 1 / 3),
    ],
)
def test_eer_known_values(scores, labels, expected):
    assert eer(scores, labels) == pytest.approx(expected, abs=1e-12)


def test_min_dcf_known_values():
    assert min_dcf([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1]) == 0.0
    assert min_dcf([0.1, 0.2, 0.8, 0.9], [1, 1, 0, 0]) == 1.0
    # impostors 1, 3 and targets 2, 4: rejecting all but 4 misses 1/2 without a false alarm
    assert min_dcf([1, 3, 2, 4], [0, 0, 1, 1], p_target=0.01) == pytest.approx(0.5)
    # p = 0.9: the default cost is 0.1 (false alarms); accepting 2, 3, 4 costs 0.1 * 1/2
    assert min_dcf([1, 3, 2, 4], [0, 0, 1, 1], p_target=0.9) == pytest.approx(0.5)
    # equal costs: 1/2 * 1/2 over 1/2
    assert min_dcf([1, 3, 2, 4], [0, 0, 1, 1], p_target=0.5) == pytest.approx(0.5)
    # SRE 2008 costs, p = 0.01, c_miss = 10, c_fa = 1: default 0.1; miss 1/2 costs 0.05
    assert min_dcf([1, 3, 2, 4], [0, 0, 1, 1], 0.01, 10.0, 1.0) == pytest.approx(0.5)


def test_two_gaussians_have_the_theoretical_rates():
    # targets N(2, 1), impostors N(0, 1): EER = Phi(-1); minDCF minimises over the threshold in closed form
    normal = NormalDist()
    scores, labels = gaussian_trials(400_000, 2.0, seed=1)
    assert eer(scores, labels) == pytest.approx(normal.cdf(-1.0), abs=0.002)
    threshold = 1.0 + math.log(0.95 / 0.05) / 2.0  # likelihood ratio = (1 - p) / p
    exact = (0.05 * normal.cdf(threshold - 2.0) + 0.95 * normal.cdf(-threshold)) / 0.05
    assert min_dcf(scores, labels, p_target=0.05) == pytest.approx(exact, abs=0.01)


@given(trial_sets(weighted=True))
def test_curve_equals_the_loops(trials):
    scores, labels, weights = trials
    miss, false_alarm = error_curve(scores, labels, weights)
    np.testing.assert_allclose(np.column_stack([miss, false_alarm]), loop_points(*trials), atol=1e-12)
    assert (miss[0], false_alarm[0], miss[-1], false_alarm[-1]) == (0.0, 1.0, 1.0, 0.0)


@given(trial_sets(weighted=True), st.floats(0.001, 0.999), st.floats(0.1, 10.0), st.floats(0.1, 10.0))
def test_metrics_equal_the_loops(trials, p_target, c_miss, c_fa):
    scores, labels, weights = trials
    assert eer(scores, labels) == pytest.approx(loop_eer(scores, labels), abs=1e-12)
    assert eer(scores, labels, weights) == pytest.approx(loop_eer(scores, labels, weights), abs=1e-12)
    for trial_weights in (None, weights):
        cost = min_dcf(scores, labels, p_target, c_miss, c_fa, trial_weights)
        assert cost == pytest.approx(loop_min_dcf(scores, labels, p_target, c_miss, c_fa, trial_weights), abs=1e-9)
        assert 0.0 <= cost <= 1.0 + 1e-12


@pytest.mark.parametrize("name", METRICS)
@given(trials=trial_sets(weighted=True))
def test_every_metric_equals_its_loop(name, trials):
    scores, labels, weights = trials
    assert METRICS[name](scores, labels) == pytest.approx(LOOPS[name](scores, labels), abs=1e-12)
    assert METRICS[name](scores, labels, weights=weights) == pytest.approx(LOOPS[name](*trials), abs=1e-12)


@pytest.mark.parametrize("name", METRICS)
@given(trials=trial_sets(weighted=True), random=st.randoms(use_true_random=False))
def test_the_order_of_trials_changes_no_bit(name, trials, random):
    rows = list(zip(*trials, strict=True))
    random.shuffle(rows)
    shuffled = list(zip(*rows, strict=True))
    assert METRICS[name](*shuffled[:2], weights=shuffled[2]) == METRICS[name](*trials[:2], weights=trials[2])
    assert METRICS[name](*shuffled[:2]) == METRICS[name](*trials[:2])


@pytest.mark.parametrize("name", METRICS)
@given(trials=trial_sets(weighted=True))
def test_weights_repeat_trials(name, trials):
    scores, labels, weights = (np.array(column) for column in trials)
    repeated = METRICS[name](np.repeat(scores, weights), np.repeat(labels, weights))
    assert METRICS[name](scores, labels, weights=weights) == pytest.approx(repeated, abs=1e-12)
    assert METRICS[name](scores, labels, weights=weights * 0.37) == pytest.approx(repeated, abs=1e-9)


@pytest.mark.parametrize("name", OF_ORDER)
@given(trials=trial_sets(weighted=True))
def test_only_the_order_of_scores_counts(name, trials):
    scores, labels, weights = (np.array(column) for column in trials)
    value = METRICS[name](scores, labels, weights=weights)
    ends = np.where(scores == scores.max(), np.inf, np.where(scores == scores.min(), -np.inf, scores))
    rising = [scores**3 + 2 * scores, np.exp(scores / 4), 5 * scores - 100, 1e300 * scores]
    if len(set(scores)) > 1:
        rising.append(ends)  # the infinite is a score like others
    for other in rising:
        assert METRICS[name](other, labels, weights=weights) == value


@given(trial_sets(weighted=True))
def test_targets_and_impostors_in_each_others_place(trials):
    scores, labels, weights = (np.array(column) for column in trials)
    turned = -scores, 1 - labels, weights
    for metric in (eer, eer_convex_hull, auc, cllr, min_cllr):
        assert metric(*turned) == pytest.approx(metric(*trials), abs=1e-12)
    for metric in (min_dcf, act_dcf):  # no score is at a Bayes threshold of these priors
        turned_cost = metric(*turned[:2], p_target=0.7, c_miss=1.5, c_fa=2.5, weights=weights)
        cost = metric(*trials[:2], p_target=0.3, c_miss=2.5, c_fa=1.5, weights=weights)
        assert turned_cost == pytest.approx(cost, abs=1e-12)
    assert auc(-scores, labels, weights) == pytest.approx(1.0 - auc(*trials), abs=1e-12)
    assert cllr(-scores, labels, weights) >= 1.0 or cllr(*trials) >= 1.0  # only one sign can be better than llr = 0


@given(trial_sets(weighted=True), st.floats(0.001, 0.999), st.floats(-3, 3), st.floats(0.1, 3))
def test_no_calibration_is_better_than_the_best(trials, p_target, offset, slope):
    scores, labels, weights = (np.array(column) for column in trials)
    llrs = offset + slope * scores
    best = min_cllr(scores, labels, weights)
    assert -1e-12 <= best <= min(1.0, cllr(llrs, labels, weights)) + 1e-12
    least = min_dcf(scores, labels, p_target, weights=weights)
    assert 0.0 <= least <= min(1.0, act_dcf(llrs, labels, p_target, weights=weights)) + 1e-12


@given(trial_sets(), st.floats(0.001, 0.999))
def test_the_best_calibration_reaches_the_minima(trials, p_target):
    """Infinite llrs at the ends included; at a prior where two thresholds are equally good, either is the minimum."""
    scores, labels = trials
    llrs = loop_pav_llrs(scores, labels)
    assert cllr(llrs, labels) == pytest.approx(min_cllr(scores, labels), abs=1e-12)
    assert min_cllr(llrs, labels) == pytest.approx(min_cllr(scores, labels), abs=1e-12)
    assert act_dcf(llrs, labels, p_target) == pytest.approx(min_dcf(scores, labels, p_target), abs=1e-9)


@given(trial_sets(weighted=True))
def test_the_eer_of_the_hull_bounds_and_is_bounded(trials):
    hull = eer_convex_hull(*trials)
    assert 0.0 <= hull <= min(eer(*trials), 0.5) + 1e-12
    for p_target in (0.1, 0.5, 0.8):  # no Bayes error rate is above it
        cost = min_dcf(*trials[:2], p_target=p_target, weights=trials[2])
        assert cost * min(p_target, 1 - p_target) <= hull + 1e-12


@pytest.mark.parametrize(
    ("scores", "labels", "expected"),
    [
        # thresholds at (miss, fa) = (0, 1/3), (1/3, 1/3), (1/3, 0): the hull leaves out the corner in between
        ([0, 1, 3, 2, 4, 5], [0, 0, 0, 1, 1, 1], {"eer": 1 / 3, "eer_convex_hull": 1 / 6, "auc": 8 / 9}),
        ([7, 7, 7], [1, 0, 0], {"eer_convex_hull": 0.5, "auc": 0.5, "min_cllr": 1.0}),
        ([1, 2], [1, 0], {"eer": 1.0, "eer_convex_hull": 0.5, "auc": 0.0, "min_cllr": 1.0}),
        ([1, 2], [0, 1], {"eer": 0.0, "eer_convex_hull": 0.0, "auc": 1.0, "min_cllr": 0.0}),
        ([0, 0, 0], [1, 0, 0], {"cllr": 1.0, "act_dcf": 1.0}),
        # blocks {0}, {1, 1}, {2}: half of each kind is told apart for certain, for the rest llr = 0
        ([0, 1, 1, 2], [0, 1, 0, 1], {"min_cllr": 0.5, "eer_convex_hull": 0.25, "auc": 7 / 8}),
        # log2(1 + 1/3) for the target, log2(1 + 1) for the impostor
        ([math.log(3), 0.0], [1, 0], {"cllr": (math.log2(4 / 3) + 1) / 2}),
    ],
)
def test_known_values(scores, labels, expected):
    for name, value in expected.items():
        assert METRICS[name](scores, labels) == pytest.approx(value, abs=1e-12), name


def test_llrs_of_two_gaussians_cost_what_theory_says():
    """Normal llrs of mean +-m and variance 2m are their own likelihood ratios: calibrated, so nothing can be gained."""
    shift = 2.0  # between unit normals: m = shift**2 / 2
    scores, labels = gaussian_trials(200_000, shift, seed=3)
    llrs = shift * scores - shift**2 / 2
    x = np.linspace(-12, 12, 20_001)
    density = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    exact = np.trapezoid(density * np.logaddexp(0, -(shift * x + shift**2 / 2)), x) / math.log(2)
    assert cllr(llrs, labels) == pytest.approx(exact, abs=0.005)
    assert min_cllr(llrs, labels) == pytest.approx(exact, abs=0.005)
    assert auc(scores, labels) == pytest.approx(NormalDist().cdf(shift / math.sqrt(2)), abs=0.002)
    assert act_dcf(llrs, labels, 0.05) == pytest.approx(min_dcf(llrs, labels, 0.05), abs=0.01)
    assert eer_convex_hull(llrs, labels) == pytest.approx(NormalDist().cdf(-shift / 2), abs=0.002)
    # the same decisions by llrs that are off: Cllr and actDCF notice, the others do not
    assert cllr(3 * llrs + 2, labels) > 1.5 * exact
    assert act_dcf(llrs + 2, labels, 0.05) > 1.2 * min_dcf(llrs, labels, 0.05)


def test_a_llr_at_the_bayes_threshold_is_accepted():
    assert act_dcf([0.0, -1.0], [1, 0], p_target=0.5) == 0.0
    assert act_dcf([1.0, 0.0], [1, 0], p_target=0.5) == 1.0
    threshold = math.log(2.0 * 0.9 / (3.0 * 0.1))
    for above, cost in ((1e-9, 0.0), (-1e-9, 1.0)):
        assert act_dcf([threshold + above, -1.0], [1, 0], 0.1, c_miss=3.0, c_fa=2.0) == pytest.approx(cost)


def test_infinite_llrs():
    right, wrong = [math.inf, -math.inf], [-math.inf, math.inf]
    assert cllr(right, [1, 0]) == act_dcf(right, [1, 0]) == min_cllr(right, [1, 0]) == 0.0
    assert cllr(wrong, [1, 0]) == math.inf
    assert act_dcf(wrong, [1, 0], 0.01) == pytest.approx(100.0)  # accepting an impostor at prior 0.01
    assert min_cllr(wrong, [1, 0]) == 1.0 and eer(wrong, [1, 0]) == 1.0 and auc(wrong, [1, 0]) == 0.0
    # what has no weight costs nothing, even if it is certain and wrong
    assert cllr([0.0, 0.0, -math.inf], [1, 0, 1], [1.0, 1.0, 0.0]) == 1.0
    # finite llrs beyond the range of exp
    assert cllr([800.0, -800.0], [1, 0]) == 0.0
    assert cllr([-800.0, 800.0], [1, 0]) == pytest.approx(800.0 / math.log(2.0))


@pytest.mark.parametrize("name", METRICS)
def test_memory_is_in_proportion(name):
    def peak(count):
        scores, labels = gaussian_trials(count, 2.0, seed=0)
        tracemalloc.start()
        METRICS[name](scores, labels)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    few, many = peak(20_000), peak(160_000)
    assert many < 8.2 * few
    assert many < 90 * 160_000  # bytes per trial


@given(trial_sets(weighted=True))
def test_turning_the_decision_round_turns_the_rates_round(trials):
    scores, *rest = trials
    assert eer([-score for score in scores], *rest) == pytest.approx(1.0 - eer(*trials), abs=1e-12)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int32])
def test_any_number_type_and_label_type(dtype):
    scores = np.array([1, 3, 2, 4], dtype=dtype)
    for labels in ([0, 0, 1, 1], np.array([False, False, True, True]), np.array([0.0, 0.0, 1.0, 1.0])):
        assert eer(scores, labels) == 0.5
    assert isinstance(eer(scores, [0, 0, 1, 1]), float) and isinstance(min_dcf(scores, [0, 0, 1, 1]), float)


def test_inputs_are_not_changed():
    scores, labels, weights = np.array([3.0, 1.0, 2.0]), np.array([1, 0, 0]), np.array([1.0, 2.0, 3.0])
    kept = scores.copy(), labels.copy(), weights.copy()
    eer(scores, labels, weights)
    for now, before in zip((scores, labels, weights), kept, strict=True):
        np.testing.assert_array_equal(now, before)


def test_agrees_with_the_kaldi_conventions():
    """Kaldi's compute_min_dcf.py puts a threshold after each sorted trial, its compute-eer takes the target rank
    where the impostor of the mirrored rank is below: same minDCF without ties, EER within a step of both ranks.
    """
    for seed in range(5):
        scores, labels = gaussian_trials(300, 1.5, seed)
        ranked = [int(label) for _, label in sorted(zip(scores, labels, strict=True))]
        targets, impostors = sum(ranked), len(ranked) - sum(ranked)
        costs = []
        for seen in range(1, len(ranked) + 1):
            rejected = sum(ranked[:seen])
            costs.append(0.05 * rejected / targets + 0.95 * (1 - (seen - rejected) / impostors))
        assert min_dcf(scores, labels, p_target=0.05) == pytest.approx(min(costs) / 0.05, abs=1e-12)

        target, impostor = sorted(scores[labels == 1]), sorted(scores[labels == 0])
        rank = 0
        while impostor[impostors - 1 - impostors * rank // targets] >= target[rank]:
            rank += 1
        assert eer(scores, labels) == pytest.approx(rank / targets, abs=1 / targets + 1 / impostors)


@pytest.mark.parametrize("metric", [*METRICS.values(), error_curve], ids=[*METRICS, "error_curve"])
def test_every_metric_checks_its_trials(metric):
    with pytest.raises(ValueError, match=r"not NaN: 1 of 3 trials break this, first at index 1 \(nan\)"):
        metric([1.0, math.nan, math.inf], [1, 0, 1])


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([1.0, 2.0], [1, 0, 1], "differ in length: 2 and 3"),
        ([[1.0, 2.0]], [[1, 0]], r"must be 1-D, got shapes \(1, 2\) and \(1, 2\)"),
        (1.0, 1, r"must be 1-D, got shapes \(\) and \(\)"),
        ([], [], "no trials"),
        ([1.0, 2.0, 3.0], [1, 2, -1], r"labels must be 1 .* 2 of 3 trials break this, first at index 1 \(2\)"),
        ([1.0, 2.0], [1, math.nan], r"labels must be .* 1 of 2 trials break this, first at index 1 \(nan\)"),
        ([1.0, 2.0], ["1", "0"], "labels must be .* 2 of 2 trials break this, first at index 0"),
        ([1.0, 2.0], [1, 1], "all 2 trials are target trials; at least one impostor trial is needed"),
        ([1.0, 2.0], [0, 0], "all 2 trials are impostor trials; at least one target trial is needed"),
    ],
)
def test_bad_trials(scores, labels, message):
    """One check serves every metric."""
    with pytest.raises(ValueError, match=message):
        eer(scores, labels)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, 1.0], r"one number per trial, shape \(3,\), got \(2,\)"),
        ([1.0, -1.0, 1.0], r"not negative: 1 of 3 trials break this, first at index 1 \(-1.0\)"),
        ([1.0, math.nan, math.inf], r"finite and not negative: 2 of 3 trials break this, first at index 1 \(nan\)"),
        ([0.0, 1.0, 1.0], "weights of the target trials must have a positive, finite sum, got 0.0"),
        ([1.0, 0.0, 0.0], "weights of the impostor trials must have a positive, finite sum, got 0.0"),
    ],
)
def test_bad_weights(weights, message):
    for metric in METRICS.values():
        with pytest.raises(ValueError, match=message):
            metric([1.0, 2.0, 3.0], [1, 0, 0], weights=weights)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"p_target": 0.0}, "p_target must be between 0 and 1"),
        ({"p_target": 1.0}, "p_target must be between 0 and 1"),
        ({"p_target": math.nan}, "p_target must be between 0 and 1"),
        ({"c_miss": 0.0}, "c_miss must be positive and finite, got 0.0"),
        ({"c_fa": -1.0}, "c_fa must be positive and finite, got -1.0"),
        ({"c_fa": math.inf}, "c_fa must be positive and finite, got inf"),
    ],
)
def test_bad_costs(setting, message):
    for metric in (min_dcf, act_dcf):
        with pytest.raises(ValueError, match=message):
            metric([1.0, 2.0], [0, 1], **setting)


# ---------------------------------------------------------------- published implementations

SCORES = Path(__file__).parent / "data/scores"  # made by benchmarks/record_metrics.py
PUBLISHED = json.loads((SCORES / "published.json").read_text())
COSTS = {"0.01": (0.01, 1.0, 1.0), "0.05": (0.05, 1.0, 1.0), "0.5": (0.5, 1.0, 1.0), "sre08": (0.01, 10.0, 1.0)}
TOLERANCE = {"speechbrain": 1e-6, "psrcal": 1e-6, "llreval": 1e-8}  # float32 inside; EER by a minimiser; else 1e-12
# EERs of one definition: the ROC's points joined by straight lines. The others take the threshold where the two rates
# are closest and average them (or, score-analysis, interpolate thresholds): equal within a step of the ROC.
JOINED = ("scikit-learn", "wespeaker-unofficial")
# (metric, implementation) and sets of which it says something else, by a rule of its own for ties: NIST's script (of
# wespeaker) cuts a run of tied trials anywhere, pyeer has no curve where all scores are equal.
APART = {
    ("eer", "wespeaker-unofficial"): {"ties", "tiny", "equal"},
    **{(f"min_dcf_{name}", "wespeaker-unofficial"): {"ties"} for name in COSTS},
    ("auc", "pyeer"): {"equal"},
}
# The same script has no point that accepts all trials, and raises an error where the crossing would need it.
FAILS = {("eer", "wespeaker-unofficial", name) for name in ("two", "one_impostor")}


def recorded(name):
    with np.load(SCORES / "scores.npz") as file:
        return {key.split("/")[1]: file[key] for key in file if key.split("/")[0] == name}


def ours(metric, scores, labels):
    if metric.startswith(("min_dcf_", "act_dcf_")):
        function = min_dcf if metric.startswith("min") else act_dcf
        return function(scores, labels, *COSTS[metric[len("min_dcf_") :]])
    return METRICS[metric](scores, labels)


@pytest.mark.parametrize("name", PUBLISHED["numbers"])
def test_agrees_with_published_implementations(name):
    columns = recorded(name)
    scores, labels = columns["scores"], columns["labels"]
    for metric, numbers in PUBLISHED["numbers"][name].items():
        value = ours(metric, scores, labels)
        compared = 0
        for package, number in numbers.items():
            assert (number is None) == ((metric, package, name) in FAILS), (metric, package)
            if (
                number is None
                or name in APART.get((metric, package), ())
                or (metric == "eer" and package not in JOINED)
            ):
                continue
            tolerance = TOLERANCE.get(package, 1e-12)
            assert value == pytest.approx(number, abs=tolerance, rel=tolerance), (metric, package)
            compared += 1
        assert compared >= (1 if metric == "eer" else 2), metric


@pytest.mark.parametrize("name", PUBLISHED["numbers"])
def test_eers_of_other_definitions_are_within_a_step_of_the_roc(name):
    columns = recorded(name)
    scores, labels = columns["scores"], columns["labels"]
    step = max(np.abs(np.diff(rate)).max() for rate in error_curve(scores, labels))
    for package, number in PUBLISHED["numbers"][name]["eer"].items():
        if number is not None:
            assert abs(eer(scores, labels) - number) <= step + 1e-6, package


def test_the_recorded_sets_hold_what_they_are_for():
    real = recorded("model_256")
    assert len(real["scores"]) == 8385 and 700 < real["labels"].sum() < 800
    assert np.array_equal(real["enrol"] == real["test"], real["labels"] == 1)
    assert 0.04 < eer(real["scores"], real["labels"]) < eer(recorded("model_16")["scores"], real["labels"]) < 0.07
    assert len(set(recorded("ties")["scores"])) < 40
    assert np.abs(recorded("extreme")["scores"]).max() > 600
    assert set(PUBLISHED["versions"]) >= {"scikit-learn", "speechbrain", "llreval", "hyperion-ml", "lir"}


@pytest.mark.parametrize("name", METRICS)
def test_intervals_over_the_speakers_of_recorded_trials(name):
    real = recorded("model_256")
    llrs = 20.0 * real["scores"].astype(np.float64) - 8.0
    low, high = bootstrap_interval(llrs, real["labels"], real["enrol"], real["test"], METRICS[name], resamples=100)
    assert low < METRICS[name](llrs, real["labels"]) < high


# ---------------------------------------------------------------- bootstrap over speakers


def speaker_trials(speakers, utterances=3, seed=0):
    """All pairs of utterances; the score falls with the distance of points around a centre per speaker."""
    rng = np.random.default_rng(seed)
    centres = np.repeat(rng.standard_normal((speakers, 6)), utterances, axis=0)
    points = centres + 0.5 * rng.standard_normal(centres.shape)
    names = np.repeat([f"id{speaker:05d}" for speaker in range(speakers)], utterances)
    one, two = np.triu_indices(len(names), k=1)
    scores = -np.linalg.norm(points[one] - points[two], axis=1)
    return scores, (names[one] == names[two]).astype(int), names[one], names[two]


def loop_bootstrap(scores, labels, enrol, test, metric, resamples, confidence, seed):
    """Literal resampling: list the drawn speakers, and every trial between every two places in that list."""
    speakers = sorted({*enrol, *test})
    rng = np.random.default_rng(seed)
    values = []
    while len(values) < resamples:
        drawn = [speakers[index] for index in rng.integers(len(speakers), size=len(speakers))]
        kept_scores, kept_labels = [], []
        for score, label, one, two in zip(scores, labels, enrol, test, strict=True):
            if label == 1:
                places = [place for place in drawn if place == one]
            else:
                places = [(a, b) for a in drawn for b in drawn if a == one and b == two]
            kept_scores += [score] * len(places)
            kept_labels += [label] * len(places)
        if 0 < sum(kept_labels) < len(kept_labels):
            values.append(metric(kept_scores, kept_labels))
    return tuple(np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2]))


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
@pytest.mark.parametrize("speakers", [2, 9])
def test_bootstrap_equals_literal_resampling(metric, speakers):
    # with 2 speakers half the resamples have no impostors and are drawn again
    trials = speaker_trials(speakers, seed=speakers)
    interval = bootstrap_interval(*trials, metric=metric, resamples=40, confidence=0.8, seed=3)
    assert interval == pytest.approx(loop_bootstrap(*trials, metric, 40, 0.8, 3), abs=1e-12)
    assert speakers == 2 or 0.0 < interval[0] < interval[1]  # not a case where every resample agrees


def test_metrics_together_are_the_metrics_one_by_one():
    trials = speaker_trials(9)
    together = bootstrap_together(*trials, METRICS, resamples=30, seed=4)
    for name, metric in METRICS.items():
        assert np.array_equal(together[name], bootstrap_values(*trials, metric=metric, resamples=30, seed=4))


@pytest.mark.parametrize("digits", [1, 6])  # with many ties and with hardly any
def test_groups_of_scores_leave_intervals_where_they_are(monkeypatch, digits):
    scores, *rest = speaker_trials(24)
    trials = np.round(scores, digits), *rest
    exact = bootstrap_together(*trials, METRICS, resamples=40)
    monkeypatch.setattr(metrics, "_GROUPS", 1000)
    seen = []
    grouped = bootstrap_together(*trials, {**METRICS, "": lambda *a, **k: seen.append(len(a[0])) or 0.0}, resamples=40)
    assert len(trials[0]) > 2 * 1000 >= max(seen)
    for name in METRICS:
        assert np.abs(grouped[name] - exact[name]).max() <= 0.1 * np.ptp(exact[name]), name


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_interval_holds_the_point(metric):
    trials = speaker_trials(40)
    low, high = bootstrap_interval(*trials, metric=metric, resamples=200)
    assert 0.0 <= low < metric(*trials[:2]) < high


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_no_metrics_interval_depends_on_the_order(metric):
    scores, *rest = speaker_trials(8)
    trials = (np.round(4 * scores) / 4, *rest)  # with ties
    order = np.random.default_rng(1).permutation(len(scores))
    values = bootstrap_values(*trials, metric=metric, resamples=20)
    assert np.array_equal(values, bootstrap_values(*(c[order] for c in trials), metric=metric, resamples=20))


def test_interval_of_infinite_costs():
    """One impostor of certain llr, and wrong: the cost of a resample is infinite unless it leaves the trial out."""
    scores, labels, enrol, test = speaker_trials(6)
    scores[np.flatnonzero(labels == 0)[0]] = np.inf
    values = bootstrap_values(scores, labels, enrol, test, metric=cllr, resamples=50)
    low, high = bootstrap_interval(scores, labels, enrol, test, metric=cllr, resamples=50)
    assert np.isinf(values).any() and np.isfinite(values).any()
    assert (low, high) == (np.sort(values)[1], np.inf)  # 2.5 % of the way is between the second and the third


def test_interval_is_set_by_the_seed_not_by_the_order():
    trials = speaker_trials(12)
    interval = bootstrap_interval(*trials, resamples=50, seed=5)
    assert interval == bootstrap_interval(*trials, resamples=50, seed=5)
    assert interval != bootstrap_interval(*trials, resamples=50, seed=6)
    order = np.random.default_rng(0).permutation(len(trials[0]))
    assert interval == bootstrap_interval(*(column[order] for column in trials), resamples=50, seed=5)
    as_lists = (column.tolist() for column in trials)
    assert interval == bootstrap_interval(*as_lists, resamples=50, seed=5)


def test_interval_narrows_with_speakers_and_widens_with_confidence():
    def width(speakers, confidence=0.95):
        low, high = bootstrap_interval(*speaker_trials(speakers), resamples=200, confidence=confidence)
        return high - low

    assert width(60) < 0.6 * width(10)
    assert width(10, confidence=0.5) < width(10, confidence=0.9)


def true_eer_of_speaker_trials():
    """Squared distances are 0.5 chi2(6) for targets and 2.5 chi2(6) for impostors: bisect for equal tails."""

    def above(x):  # P(chi2(6) > x)
        return math.exp(-x / 2) * (1 + x / 2 + x * x / 8)

    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        if above(middle / 0.5) > 1 - above(middle / 2.5):
            low = middle
        else:
            high = middle
    return above(low / 0.5)


def test_interval_covers_the_true_eer():
    truth = true_eer_of_speaker_trials()
    held = 0
    for seed in range(40):
        low, high = bootstrap_interval(*speaker_trials(25, seed=seed), resamples=100, confidence=0.9, seed=seed)
        held += low <= truth <= high
    assert 31 <= held  # 36 expected at exact coverage, standard deviation 1.9


def test_interval_over_speakers_is_wider_than_over_trials():
    scores, labels, enrol, test = speaker_trials(20, utterances=6)
    rng = np.random.default_rng(0)
    over_trials = []
    for _ in range(100):
        weights = np.bincount(rng.integers(len(scores), size=len(scores)), minlength=len(scores))
        over_trials.append(eer(scores, labels, weights))
    low, high = np.quantile(over_trials, [0.025, 0.975])
    speaker_low, speaker_high = bootstrap_interval(scores, labels, enrol, test, resamples=100)
    assert speaker_high - speaker_low > 1.5 * (high - low)


def test_perfect_scores_have_a_point_interval():
    scores, labels, enrol, test = speaker_trials(6)
    assert bootstrap_interval(labels * 1.0, labels, enrol, test, resamples=20) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resamples": 0}, "resamples must be at least 1, got 0"),
        ({"confidence": 0.0}, "confidence must be between 0 and 1"),
        ({"confidence": 1.0}, "confidence must be between 0 and 1"),
        ({"scores": [1.0, math.nan, 3.0]}, "scores must be numbers, not NaN"),
        ({"labels": [1, 1, 1]}, "at least one impostor trial is needed"),
        ({"enrol_speakers": ["a", "b"]}, r"enrol_speakers must have one speaker per trial, shape \(3,\), got \(2,\)"),
        ({"test_speakers": []}, r"test_speakers must have one speaker per trial, shape \(3,\), got \(0,\)"),
        ({"test_speakers": ["a", "a", "b"]}, r"speakers are equal: 1 of 3 trials break this, first at index 1 \(0\)"),
        ({"test_speakers": ["b", "b", "b"]}, r"speakers are equal: 1 of 3 trials break this, first at index 0 \(1\)"),
    ],
)
def test_bad_bootstrap_arguments(change, message):
    arguments = {
        "scores": [3.0, 1.0, 2.0],
        "labels": [1, 0, 0],
        "enrol_speakers": ["a", "a", "a"],
        "test_speakers": ["a", "b", "b"],
    }
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(**{**arguments, **change})


def test_redrawing_is_bounded(monkeypatch):
    monkeypatch.setattr(metrics, "_MAX_DRAWS", 1)  # half the resamples of two speakers have no impostors
    with pytest.raises(ValueError, match="1 resamples of 2 speakers in a row had no target or no impostor trial"):
        bootstrap_interval(*speaker_trials(2), resamples=50)


# ---------------------------------------------------------------- two systems on one trial list


def target_weight(scores, labels, weights):
    """Tells the resample, not the scores."""
    return float(weights[labels].sum())


def impostor_weight(scores, labels, weights):
    return float(weights[~labels].sum())


@pytest.mark.parametrize("speakers", [3, 8])
@pytest.mark.parametrize("weight", [target_weight, impostor_weight])
def test_resamples_weigh_the_same_speakers_whatever_the_scores(speakers, weight):
    """With 3 speakers some resamples are drawn again. Some trials are left out: else targets always weigh the same."""
    scores, *rest = (column[:-5] for column in speaker_trials(speakers))
    values = bootstrap_values(scores, *rest, metric=weight, resamples=40, seed=5)
    others = np.random.default_rng(0).standard_normal(len(scores))
    for other in (-scores, others, np.zeros_like(scores)):
        assert np.array_equal(bootstrap_values(other, *rest, metric=weight, resamples=40, seed=5), values)
    assert not np.array_equal(bootstrap_values(scores, *rest, metric=weight, resamples=40, seed=6), values)


@pytest.mark.parametrize("metric", [eer, min_dcf])
def test_identical_systems_never_differ(metric):
    scores, *rest = speaker_trials(10)
    one, other = (bootstrap_values(s, *rest, metric=metric, resamples=50) for s in (scores, 3.0 * scores + 1.0))
    assert len(set(one)) > 10 and np.array_equal(one - other, np.zeros(50))


def test_a_paired_interval_is_narrower_than_those_of_the_systems():
    scores, *rest = speaker_trials(20)
    better = scores + 1.0 * np.asarray(rest[0])
    one, other = (bootstrap_values(s, *rest, resamples=200) for s in (scores, better))
    low, high = quantile_interval(one - other)
    assert 0 < low < eer(scores, rest[0]) - eer(better, rest[0]) < high
    own = quantile_interval(one)
    assert high - low < own[1] - own[0]


@pytest.mark.parametrize("confidence", [0.5, 0.95])
def test_the_interval_is_that_of_the_values(confidence):
    trials, setting = speaker_trials(9), dict(metric=min_dcf, resamples=60, seed=4)
    values = bootstrap_values(*trials, **setting)
    assert values.shape == (60,) and values.dtype == np.float64
    assert bootstrap_interval(*trials, **setting, confidence=confidence) == quantile_interval(values, confidence)


def test_an_interval_leaves_out_as_much_at_both_ends():
    values = np.random.default_rng(0).permutation(np.arange(1001.0))
    assert quantile_interval(values, 0.9) == pytest.approx((50.0, 950.0))
    assert quantile_interval(values) == pytest.approx((25.0, 975.0))


# ---------------------------------------------------------------- means over utterances


def loop_mean_interval(values, speakers, resamples):
    """Literal resampling: all utterances of every drawn speaker, as often as the speaker was drawn."""
    names = sorted(set(speakers))
    means = []
    for draw in np.random.default_rng(0).integers(len(names), size=(resamples, len(names))):
        pooled = [v for index in draw for v, name in zip(values, speakers, strict=True) if name == names[index]]
        means.append(sum(pooled) / len(pooled))
    return tuple(np.quantile(means, [0.025, 0.975]))


@pytest.mark.parametrize("kind", ["shares", "errors"])
def test_the_interval_of_a_mean_equals_literal_resampling(kind):
    rng = np.random.default_rng(1)
    speakers = [f"id{index}" for index in rng.integers(7, size=40)]  # of different lengths, in any order
    values = rng.random(40) < 0.7 if kind == "shares" else 20 * rng.random(40)
    interval = mean_interval(values, np.array(speakers), resamples=60)
    assert interval == pytest.approx(loop_mean_interval(values, speakers, 60), abs=1e-12)
    assert interval == mean_interval(values.tolist(), speakers, resamples=60)


def test_the_interval_of_a_mean_in_known_cases():
    assert mean_interval([2.0, 4.0, 6.0], ["a", "a", "a"]) == (4.0, 4.0)  # one speaker: nothing to resample
    assert mean_interval([5.0, 5.0, 5.0], ["a", "b", "c"]) == (5.0, 5.0)
    # drawn are a, a or b, b or one of each, a quarter, a quarter and a half: means of 0, 1 and 3/4
    assert mean_interval([0, 1, 1, 1], ["a", "b", "b", "b"]) == (0.0, 1.0)
    # one utterance each: the standard error of a share of 1/2 is 1/2 / sqrt(400) = 0.025
    low, high = mean_interval([0, 1] * 200, [str(index) for index in range(400)])
    assert (low, high) == pytest.approx((0.5 - 1.96 * 0.025, 0.5 + 1.96 * 0.025), abs=0.006)


def test_more_utterances_of_the_same_speakers_make_no_narrower_interval():
    values, speakers = np.random.default_rng(2).random(12), [str(index) for index in range(12)]
    repeated = mean_interval(np.tile(values, 10), speakers * 10, resamples=100)
    assert repeated == pytest.approx(mean_interval(values, speakers, resamples=100), abs=1e-12)


@pytest.mark.parametrize(
    ("values", "speakers", "resamples", "message"),
    [
        ([1.0, 2.0], ["a"], 10, "2 values of 1 speakers, 10 resamples"),
        ([], [], 10, "0 values of 0 speakers"),
        ([1.0], ["a"], 0, "1 values of 1 speakers, 0 resamples: need some of each"),
    ],
)
def test_bad_arguments_of_a_mean(values, speakers, resamples, message):
    with pytest.raises(ValueError, match=message):
        mean_interval(values, speakers, resamples)
