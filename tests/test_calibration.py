"""Calibration on scores whose likelihood ratios are known, thresholds by counting, and their file."""

import json
import math
import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mrl_redimnet.scoring.calibration import (
    THRESHOLDS_FILE,
    Calibration,
    Threshold,
    Thresholds,
    threshold_at,
)


def gaussian_trials(seed=0, targets=4000, impostors=40000, distance=3.0):
    """Scores of two unit Gaussians at +-distance / 2, whose log-likelihood ratio is distance * score."""
    rng = np.random.default_rng(seed)
    labels = np.repeat([1, 0], [targets, impostors])
    return rng.normal(size=len(labels)) + distance * (labels - 0.5), labels


# ---------------------------------------------------------------- calibration


@pytest.mark.parametrize("prior", [0.01, 0.5, 0.9])
def test_finds_known_likelihood_ratios_whatever_the_prior(prior):
    scores, labels = gaussian_trials()
    calibration = Calibration.fit(scores, labels, prior=prior)
    assert calibration.slope == pytest.approx(3.0, rel=0.1)
    assert calibration.offset == pytest.approx(0.0, abs=0.25)
    assert (calibration.prior, calibration.targets, calibration.impostors) == (prior, 4000, 40000)
    llrs = calibration(scores)
    assert llrs == pytest.approx(calibration.offset + calibration.slope * scores)


def test_the_proportion_of_targets_plays_no_part():
    scores, labels = gaussian_trials()
    several = Calibration.fit(np.append(scores, scores[labels == 1]), np.append(labels, np.ones(4000)))
    assert several.slope == pytest.approx(Calibration.fit(scores, labels).slope, rel=1e-4)
    assert several.offset == pytest.approx(Calibration.fit(scores, labels).offset, abs=1e-3)


def test_minimises_the_weighted_loss():
    """No step away from the solution lowers the prior-weighted cross entropy, in any direction."""
    scores, labels = gaussian_trials(1, 300, 700, 2.0)
    seconds = np.random.default_rng(1).uniform(1, 10, (1000, 2))
    found = Calibration.fit(scores, labels, seconds, prior=0.1)
    logs = np.log(np.sort(seconds, axis=1))

    def loss(solution):
        slopes = solution[1] + solution[4] * logs[:, 0]
        odds = solution[0] + slopes * scores + logs @ solution[2:4] + np.log(0.1 / 0.9)
        wrong = np.logaddexp(0, np.where(labels == 1, -odds, odds))
        return 0.1 * wrong[labels == 1].mean() + 0.9 * wrong[labels == 0].mean()

    best = np.array([found.offset, found.slope, found.shorter, found.longer, found.steeper])
    for step in np.random.default_rng(0).normal(size=(50, 5)):
        assert loss(best + 0.05 * step) > loss(best)


def test_duration_terms_take_out_what_durations_do():
    """Both kinds of trial score lower by ln of the shorter side: only the duration terms can know."""
    scores, labels = gaussian_trials()
    seconds = np.random.default_rng(2).uniform(1, 20, (len(scores), 2))
    lowered = scores + 2.0 * np.log(seconds.min(1))
    calibration = Calibration.fit(lowered, labels, seconds)
    assert calibration.slope == pytest.approx(3.0, rel=0.1)
    assert calibration.steeper == pytest.approx(0.0, abs=0.15)
    assert calibration.shorter == pytest.approx(-6.0, rel=0.1)
    assert calibration.longer == pytest.approx(0.0, abs=0.3)
    assert np.abs(calibration(lowered, seconds) - 3.0 * scores).max() < 1.5
    assert Calibration.fit(lowered, labels).slope < 2.0
    assert np.array_equal(calibration(lowered, seconds), calibration(lowered, seconds[:, ::-1]))


def test_the_slope_follows_the_shorter_side():
    """Unit Gaussians whose distance grows with ln of the shorter side: it is the slope of their likelihood ratio."""
    rng = np.random.default_rng(0)
    seconds, labels = np.exp(rng.uniform(0, 2, (60_000, 2))), rng.integers(0, 2, 60_000)
    distance = 1.0 + 1.5 * np.log(seconds.min(axis=1))
    scores = rng.normal(size=len(labels)) + distance * (labels - 0.5)
    calibration = Calibration.fit(scores, labels, seconds, prior=0.5)
    assert (calibration.slope, calibration.steeper) == pytest.approx((1.0, 1.5), abs=0.1)
    assert (calibration.offset, calibration.shorter, calibration.longer) == pytest.approx((0, 0, 0), abs=0.15)
    assert np.abs(calibration(scores, seconds) - distance * scores).mean() < 0.1


def test_a_slope_that_would_turn_stays_the_same():
    """Below 2 s impostors score higher than targets: no slope that depends on durations is positive everywhere."""
    rng = np.random.default_rng(0)
    seconds, labels = np.exp(rng.uniform(0, 3, (20_000, 2))), rng.integers(0, 2, 20_000)
    scores = rng.normal(size=len(labels)) + 2 * (np.log(seconds.min(axis=1)) - np.log(2)) * (labels - 0.5)
    calibration = Calibration.fit(scores, labels, seconds, prior=0.5)
    assert calibration.steeper == 0 and calibration.slope > 0 and calibration.shorter is not None


@given(st.integers(0, 10**6), st.booleans())
def test_a_ratio_belongs_to_one_score(seed, durations):
    rng = np.random.default_rng(seed)
    scores, labels = gaussian_trials(seed, 60, 120)
    seconds = rng.uniform(0.5, 9, (180, 2)) if durations else None
    calibration = Calibration.fit(scores, labels, seconds, prior=0.5)
    there = rng.uniform(0.1, 20, (5, 2))
    assert calibration.score_at(calibration(scores[:5], there), there) == pytest.approx(scores[:5], abs=1e-6)


def test_durations_outside_the_fit_count_as_the_nearest_inside():
    scores, labels = gaussian_trials(targets=200, impostors=400)
    calibration = Calibration.fit(scores, labels, np.random.default_rng(0).uniform(2, 9, (600, 2)))
    low, high = calibration.seconds
    outside, inside = calibration([0.0], [[0.1, 1000.0]]), calibration([0.0], [[low, high]])
    assert np.array_equal(outside, inside) and calibration([0.0], [[low, 5.0]]) != inside


def test_durations_all_alike_have_no_weight():
    scores, labels = gaussian_trials(targets=200, impostors=400)
    calibration = Calibration.fit(scores, labels, np.full((600, 2), 3.0))
    assert calibration.shorter == calibration.longer == 0.0
    assert calibration(scores, np.full((600, 2), 3.0)) == pytest.approx(Calibration.fit(scores, labels)(scores))


@given(st.integers(0, 10**6), st.floats(0.01, 0.99), st.booleans())
def test_a_higher_score_is_a_higher_ratio(seed, prior, durations):
    rng = np.random.default_rng(seed)
    labels = np.append([0, 1], rng.integers(0, 2, 28))
    scores = rng.normal(size=30) + labels
    assume(scores[labels == 1].mean() > scores[labels == 0].mean())
    seconds = rng.uniform(1, 9, (30, 2)) if durations else None
    try:
        calibration = Calibration.fit(scores, labels, seconds, prior)
    except ValueError as error:  # the duration terms, or the prior's weight on few trials, can turn the slope
        assert "do not score higher" in str(error)
        return
    for sides in ([2.0, 5.0], [0.1, 0.1], [50.0, 50.0]):
        llrs = calibration(np.sort(scores), np.repeat([sides], 30, axis=0))
        assert np.all(np.isfinite(llrs)) and np.all(np.diff(llrs) > 0)


@pytest.mark.parametrize("gap", [1e-3, 1.0, 1e6])
def test_separated_trials_stay_finite_and_scale_with_the_scores(gap):
    calibration = Calibration.fit(np.array([0, 0.1, 0.2, 0.8, 0.9]) * gap, [0, 0, 0, 1, 1])
    llrs = calibration(np.array([0, 0.2, 0.8]) * gap)
    assert np.all(np.abs(llrs) < 40) and llrs[1] < 0 < llrs[2]
    assert llrs == pytest.approx(Calibration.fit([0, 0.1, 0.2, 0.8, 0.9], [0, 0, 0, 1, 1])([0, 0.2, 0.8]), rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.1, 0.2], [1]), r"one length, got \(2,\) and \(1,\)"),
        (([0.1, np.nan], [1, 0]), "scores must be finite and labels 1"),
        (([0.1, 0.2], [1, 2]), "scores must be finite and labels 1"),
        (([0.1, 0.2], [0, 0]), "0 targets and 2 impostors: at least one of each"),
        (([0.1, 0.1], [1, 0]), "all 2 scores are 0.1: nothing to calibrate"),
        (([0.1, 0.2], [1, 0]), "targets do not score higher than impostors .*1 targets and 1 impostors.*swapped"),
        (([0.1, 0.2], [0, 1], None, 1.0), "prior must be between 0 and 1 .*got 1.0"),
        (([0.1, 0.2], [0, 1], [1.0, 2.0]), r"seconds must be those of both sides, shape \(2, 2\), got \(2,\)"),
        (([0.1, 0.2], [0, 1], [[1.0, 0.0], [1, 1]]), "1 durations are not positive and finite, first 0.0"),
    ],
)
def test_bad_calibrations(arguments, message):
    with pytest.raises(ValueError, match=message):
        Calibration.fit(*arguments)


def test_durations_are_asked_for():
    scores, labels = gaussian_trials(targets=50, impostors=50)
    with pytest.raises(ValueError, match=r"has duration terms: give the seconds \[T, 2\]"):
        Calibration.fit(scores, labels, np.full((100, 2), 3.0))(scores)
    plain = Calibration.fit(scores, labels)
    assert np.array_equal(plain(scores), plain(scores, np.full((100, 2), 3.0)))


# ---------------------------------------------------------------- thresholds


@pytest.mark.filterwarnings("ignore:a false-accept rate")
@given(st.lists(st.integers(0, 30), min_size=1, max_size=200), st.floats(0.001, 0.999))
def test_the_lowest_threshold_that_keeps_the_rate(values, rate):
    impostors = np.array(values) / 10
    assume(math.floor(len(values) * rate + 1e-6) >= 1 and len(values) * rate >= 1)
    scores, labels = np.append(impostors, 99.0), np.append(np.zeros(len(values)), 1)
    threshold = threshold_at(scores, labels, rate)
    assert np.mean(impostors >= threshold) <= rate
    assert np.mean(impostors >= np.nextafter(threshold, -np.inf)) > rate  # any lower accepts too many


@pytest.mark.filterwarnings("ignore:a false-accept rate")
def test_threshold_by_hand():
    impostors = np.arange(100.0)
    scores, labels = np.append(impostors, [50.0, 200.0]), np.append(np.zeros(100), [1, 1])
    assert threshold_at(scores, labels, 0.29) == pytest.approx(70.0)  # 100 * 0.29 is 28.999...
    assert np.mean(impostors >= threshold_at(scores, labels, 0.29)) == 0.29
    tied = np.append(np.repeat([0.0, 1.0], 50), [2.0])
    assert threshold_at(tied, np.append(np.zeros(100), 1), 0.3) > 1.0  # all 50 or none: none


def test_too_few_impostors():
    scores, labels = gaussian_trials(targets=10, impostors=99)
    with pytest.raises(
        ValueError, match="99 impostor trials cannot show a .* of 0.01: it takes at least 100, and 3,000"
    ):
        threshold_at(scores, labels, 0.01)
    with pytest.warns(UserWarning, match="rate of 0.1 rests on 9 of 99 impostor trials: uncertain; 300 impostor"):
        threshold_at(scores, labels, 0.1)
    for rate in (0, 1, -0.1, float("nan")):
        with pytest.raises(ValueError, match="the wanted false-accept rate must be between 0 and 1"):
            threshold_at(scores, labels, rate)


@pytest.mark.parametrize("seed", range(3))
def test_a_search_accepts_strangers_at_the_wanted_rate(seed):
    """Strangers whose scores with all enrolled speakers are independent: the case in which the rate is exact."""
    scores, labels = gaussian_trials(seed, targets=100, impostors=200_000)
    found = Threshold.fit(scores, labels, wanted=0.01, dim=64, weights="sha256:aa", trials="vox")
    assert found.for_search(1)[0] == found.threshold
    strangers = np.random.default_rng(seed + 10).normal(-1.5, size=(20_000, 100))  # as gaussian_trials has impostors
    for speakers in (1, 2, 19, 100):
        threshold, rests_on = found.for_search(speakers)
        assert rests_on / 200_000 <= 1 - 0.99 ** (1 / speakers) < 1.15 * (rests_on + 1) / 200_000
        taken = np.mean(strangers[:, :speakers].max(axis=1) >= threshold)
        assert taken == pytest.approx(0.01, abs=0.005)
    with pytest.raises(ValueError, match="200,000 impostor trials cannot .*at least 994,993, and 29,849,764"):
        found.for_search(10_000)


def test_no_warning_from_thirty_errors_on(recwarn):
    threshold_at(*gaussian_trials(targets=10, impostors=3000), 0.01)
    assert not recwarn.list


def entry(dim=64, adapter=None, weights="sha256:aa", seconds=None, seed=0, scorer="cosine"):
    scores, labels = gaussian_trials(seed, 500, 4000)
    return Threshold.fit(
        scores,
        labels,
        wanted=0.01,
        dim=dim,
        weights=weights,
        trials="vox",
        adapter=adapter,
        scorer=scorer,
        seconds=seconds,
    )


@pytest.mark.parametrize("durations", [False, True])
def test_an_entry_measures_and_judges_its_own_trials(durations):
    scores, labels = gaussian_trials(0, 500, 4000)
    seconds = np.random.default_rng(5).uniform(1, 9, (4500, 2)) if durations else None
    found = entry(seconds=seconds)
    accepted, llrs = found.judge(scores, seconds)
    assert accepted[labels == 0].mean() == found.false_accepts <= 0.01 < found.false_accepts + 1 / 4000
    assert 1 - accepted[labels == 1].mean() == pytest.approx(found.misses) and 0 < found.misses < 0.4
    assert (found.targets, found.impostors, found.wanted) == (500, 4000, 0.01)
    assert np.array_equal(accepted, (llrs if durations else scores) >= found.threshold)
    assert np.array_equal(llrs, found.calibration(scores, seconds))


# ---------------------------------------------------------------- thresholds.json


def some_entries():
    seconds = np.random.default_rng(5).uniform(1, 9, (4500, 2))
    return [entry(16), entry(64, seconds=seconds), entry(64, "phone", "sha256:aa+sha256:bb", seed=1)]


def test_file_round_trip(tmp_path):
    thresholds = Thresholds()
    for each in reversed(some_entries()):
        thresholds.put(each)
    thresholds.save(tmp_path)
    assert os.listdir(tmp_path) == [THRESHOLDS_FILE]
    assert Thresholds.load(tmp_path).entries == thresholds.entries
    assert {each.key: each for each in thresholds.entries} == {each.key: each for each in some_entries()}
    again = json.loads((tmp_path / THRESHOLDS_FILE).read_text())
    assert again["version"] == 2 and again["entries"][0]["wanted"] == 0.01


def test_numbers_of_enrolment_utterances_have_entries_of_their_own(tmp_path):
    thresholds = Thresholds()
    for count in (5, 1, 3):
        thresholds.put(replace(entry(64, seed=count), enrolments=count))
    thresholds.save(tmp_path)
    again = Thresholds.load(tmp_path)
    assert [each.enrolments for each in again.entries] == [1, 3, 5] and again.entries == thresholds.entries
    assert again.find(64) == entry(64, seed=1) and again.find(64, enrolments=3).enrolments == 3
    with pytest.raises(ValueError, match="no threshold for 64 dims, no adapter, cosine, 2 enrolment utterances; there"):
        again.find(64, enrolments=2)
    thresholds.put(entry(32))
    thresholds.put(entry(16))
    told = r"no threshold for 64 dims, noisy, cosine; there are: 64 dims, .*; 16 dims.*; 32 dims[^;]*; and 2 more\. "
    with pytest.raises(ValueError, match=told):
        thresholds.find(64, "noisy")
    assert [again.find_nearest(64, enrolments=count).enrolments for count in (1, 2, 3, 4, 5, 9)] == [1, 3, 3, 5, 5, 5]


def test_a_file_of_before_is_for_one_enrolment_utterance(tmp_path):
    Thresholds([entry(64)]).save(tmp_path)
    content = json.loads((tmp_path / THRESHOLDS_FILE).read_text())
    del content["entries"][0]["enrolments"], content["entries"][0]["tail"]
    (tmp_path / THRESHOLDS_FILE).write_text(json.dumps(content))
    found = Thresholds.load(tmp_path).find(64)
    assert found == replace(entry(64), tail=()) and found.enrolments == 1 and found.for_search(1)[0] == found.threshold
    with pytest.raises(ValueError, match="saved by an earlier version"):
        found.for_search(2)


def test_a_file_of_before_slopes_knew_durations_means_what_it_meant(tmp_path):
    """Version 1: what its LLR was is written out here."""
    Thresholds(some_entries()).save(tmp_path)
    content = json.loads((tmp_path / THRESHOLDS_FILE).read_text())
    content["version"] = 1
    for each in content["entries"]:
        del each["calibration"]["steeper"]
    (tmp_path / THRESHOLDS_FILE).write_text(json.dumps(content))
    plain, timed = Thresholds.load(tmp_path).find(16), Thresholds.load(tmp_path).find(64)
    assert plain == some_entries()[0]
    scores, seconds = np.array([-1.0, 0.5, 2.0]), np.array([[2.0, 8.0], [5.0, 3.0], [0.1, 99.0]])
    low, high = timed.calibration.seconds
    shorter, longer = np.log(np.sort(seconds.clip(low, high), axis=1)).T
    found = timed.calibration
    llrs = found.offset + found.slope * scores + found.shorter * shorter + found.longer * longer
    accepted, of_file = timed.judge(scores, seconds)
    assert of_file == pytest.approx(llrs) and np.array_equal(accepted, llrs >= timed.threshold)


def test_weights_that_were_named_without_their_configuration_are_the_same(tmp_path):
    named = "sha256:aa+config:11"
    thresholds = Thresholds([entry(64, weights="sha256:aa"), entry(64, "phone", "sha256:aa+sha256:bb")])
    assert thresholds.find(64, weights=named) and thresholds.find(64, "phone", weights=f"{named}+sha256:bb")
    with pytest.raises(ValueError, match="other weights"):
        Thresholds([entry(64, weights=named)]).find(64, weights="sha256:aa+config:22")


def test_put_replaces_the_entry_of_the_same_adapter_dimension_and_scorer():
    thresholds = Thresholds()
    for each in (entry(16), entry(64), entry(64, seed=3), entry(64, "phone"), entry(64, scorer="centred, cohort 12")):
        thresholds.put(each)
    assert len(thresholds.entries) == 4 and thresholds.find(64) == entry(64, seed=3)


def test_find():
    thresholds = Thresholds()
    for each in some_entries():
        thresholds.put(each)
    assert thresholds.find(16) == thresholds.find(16, weights="sha256:aa") == some_entries()[0]
    assert thresholds.find(64, "phone").adapter == "phone"
    for wanted in ({"dim": 32}, {"dim": 16, "adapter": "phone"}, {"dim": 16, "scorer": "as_norm, top 5, cohort ab"}):
        with pytest.raises(ValueError, match="there are: ") as told:
            thresholds.find(**wanted)
        assert all(str(each) in str(told.value) for each in some_entries()) and " more" not in str(told.value)
    with pytest.raises(
        ValueError, match=r"set on other weights \(sha256:aa\) than those here \(sha256:cc\): set it again"
    ):
        thresholds.find(16, weights="sha256:cc")
    with pytest.raises(ValueError, match="there are: none at all"):
        Thresholds().find(16)


def test_a_later_version_s_additions_are_passed_over(tmp_path):
    thresholds = Thresholds(some_entries())
    thresholds.save(tmp_path)
    content = json.loads((tmp_path / THRESHOLDS_FILE).read_text())
    content["entries"][0]["new"] = content["entries"][0]["calibration"]["newer"] = content["newest"] = 1
    (tmp_path / THRESHOLDS_FILE).write_text(json.dumps(content))
    assert Thresholds.load(tmp_path).entries == thresholds.entries


TIMED = {"offset": 0, "slope": 1, "shorter": 1, "longer": 0, "seconds": [1, 3]}


def changed(**fields):
    return lambda content: content["entries"][1].update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(version=3), "has version 3, this package reads 1 and 2"),
        (lambda content: content.pop("entries"), r"does not hold thresholds: KeyError\('entries'\)"),
        (lambda content: content.update(entries={}), "'entries' is no list"),
        (lambda content: content["entries"].append(content["entries"][0]), "entry 4: a second one for 16 dims"),
        (lambda content: content["entries"][1].pop("weights"), "entry 2: not a threshold: .*'weights'"),
        (lambda content: content["entries"][1].pop("calibration"), "entry 2: not a threshold: 'calibration'"),
        (lambda content: content["entries"].insert(0, 3), "entry 1: not a threshold: expected an object, got 3"),
        (changed(threshold="high"), "entry 2: not a threshold: threshold: got 'high'"),
        (changed(threshold=None), "entry 2: not a threshold: threshold: got None"),
        (changed(dim="64"), "entry 2: not a threshold: dim: got '64'"),
        (changed(weights=None), "entry 2: not a threshold: weights: got None"),
        (changed(calibration={"offset": 0, "slope": -1}), "entry 2: .* the slope positive"),
        (changed(calibration={"offset": "0", "slope": 1}), "entry 2: .*finite numbers"),
        (changed(calibration={"offset": 0, "slope": 1, "shorter": 1}), "entry 2: .*belong together"),
        (changed(calibration={**TIMED, "steeper": -1}), "entry 2: .*the slope positive"),  # at 3 s it is not
        (changed(calibration={**TIMED, "steeper": None}), "entry 2: .*finite numbers"),
        (changed(calibration={**TIMED, "seconds": [0, 3]}), "entry 2: .*durations and the slope positive"),
        (changed(enrolments=0), "entry 2: not a threshold: enrolments: got 0"),
        (changed(tail=[[1, "x"]]), "entry 2: not a threshold: tail: got"),
        (changed(tail=[3]), "entry 2: not a threshold: "),
        (changed(calibration=[]), "entry 2: not a threshold: calibration: got"),
    ],
)
def test_broken_files_are_named(tmp_path, change, message):
    Thresholds(some_entries()).save(tmp_path)
    content = json.loads((tmp_path / THRESHOLDS_FILE).read_text())
    change(content)
    (tmp_path / THRESHOLDS_FILE).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        Thresholds.load(tmp_path)
    assert str(tmp_path / THRESHOLDS_FILE) in str(caught.value)


def test_no_file_and_no_json(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*absent to save thresholds.json in"):
        Thresholds().save(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"no .*thresholds.json: `mrl-redimnet calibrate` sets thresholds"):
        Thresholds.load(tmp_path)
    (tmp_path / THRESHOLDS_FILE).write_text("{")
    with pytest.raises(ValueError, match="thresholds.json does not hold thresholds: JSONDecodeError"):
        Thresholds.load(tmp_path)


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    Thresholds([entry(16)]).save(tmp_path)

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        Thresholds([entry(64)]).save(tmp_path)
    assert [each.dim for each in Thresholds.load(tmp_path).entries] == [16]
    assert os.listdir(tmp_path) == [THRESHOLDS_FILE]
