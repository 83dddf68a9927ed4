"""Error rates by group: those of the sub-lists, counted by loops; what is too little to tell; the file of groups."""

from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrl_redimnet.evaluation.groups import (
    LEAST_SPEAKERS,
    LEAST_TRIALS,
    eer_threshold,
    error_rates,
    false_alarm_rate,
    format_groups,
    miss_rate,
    read_groups,
)
from mrl_redimnet.evaluation.measures import ScoredList
from mrl_redimnet.rows import BETWEEN, Rate, group_notes, row_from
from mrl_redimnet.scoring.calibration import Threshold
from mrl_redimnet.scoring.metrics import eer
from mrl_redimnet.scoring.trials import Trials, UnknownSpeakersError


def all_pairs(speakers: int, utterances: int, seed: int = 0, hard: set = frozenset()) -> tuple[Trials, np.ndarray]:
    """All trials of speakers s0, s1, ..., and scores: targets of `hard` speakers are no higher than impostors."""
    names = [f"s{speaker}/{i}.wav" for speaker in range(speakers) for i in range(utterances)]
    pairs = [(a, b) for i, a in enumerate(names) for b in names[:i]]
    labels = np.array([a.split("/")[0] == b.split("/")[0] for a, b in pairs], dtype=np.int8)
    raised = [label and int(a[1 : a.index("/")]) not in hard for label, (a, _) in zip(labels, pairs, strict=True)]
    scores = np.random.default_rng(seed).normal(size=len(pairs)) + 2.0 * np.array(raised)
    return Trials(labels, *map(list, zip(*pairs, strict=True))), scores


def halves(speakers: int) -> dict[str, str]:
    return {f"s{i}": "low" if i < speakers // 2 else "up" for i in range(speakers)}


def chosen(trials: Trials, group_of: dict, first: str, second: str) -> np.ndarray:
    """Which trials have one side in each of two groups, in a plain loop."""
    sides = zip(trials.enrol, trials.test, strict=True)
    found = [{group_of[path.split("/")[0]] for path in pair} for pair in sides]
    return np.array([groups == {first, second} for groups in found])


# ---------------------------------------------------------------- rates


def test_rates_are_those_of_the_sub_lists():
    trials, scores = all_pairs(12, 5, hard={0, 1})
    group_of = halves(12)
    low, up, between = error_rates(trials, scores, group_of, resamples=0, dim=64)
    threshold = eer_threshold(scores, trials.labels)
    assert [row.group for row in (low, up, between)] == ["low", "up", BETWEEN]
    for row in (low, up):
        of = chosen(trials, group_of, row.group, row.group)
        inside, labels = scores[of], trials.labels[of]
        assert (row.dim, row.threshold, row.speakers) == (64, threshold, 6)
        assert (row.targets, row.impostors) == (int(labels.sum()), int((1 - labels).sum()))
        assert row.eer == Rate(eer(inside, labels))
        assert row.miss.value == pytest.approx(sum(s < threshold for s in inside[labels == 1]) / row.targets)
        assert row.false_alarm.value == pytest.approx(sum(s >= threshold for s in inside[labels == 0]) / row.impostors)
    assert low.eer.value > up.eer.value + 0.05
    across = scores[chosen(trials, group_of, "low", "up")]
    assert (between.targets, between.impostors) == (0, len(across))
    assert between.false_alarm.value == pytest.approx(np.mean(across >= threshold))
    assert between.eer is None and between.miss is None and between.against is None


def test_groups_of_a_list_are_judged_by_a_threshold_that_knows_durations():
    trials, scores = all_pairs(12, 5)
    seconds = np.random.default_rng(0).uniform(0.5, 9, (len(trials), 2))
    scores = scores * np.log(1 + seconds.min(axis=1))
    saved = Threshold.fit(scores, trials.labels, wanted=0.1, dim=8, weights="", trials="", seconds=seconds)
    accepted, _ = saved.judge(scores, seconds)
    group_of, listed = halves(12), ScoredList(trials, {8: scores}, {8: saved}, seconds)
    for row in listed.groups(group_of, resamples=0):
        groups = (row["group"], row["group"]) if row["group"] != BETWEEN else ("low", "up")
        impostors = chosen(trials, group_of, *groups) & (trials.labels == 0)
        assert row["threshold"] == saved.threshold
        assert row["false_alarm"]["value"] == pytest.approx(accepted[impostors].mean()) and accepted[impostors].any()


@given(st.lists(st.sampled_from("abc"), min_size=15, max_size=15), st.floats(-1, 3))
def test_rows_share_out_the_trials(groups, threshold):
    """Every trial is in one row; the rows' errors add up to those of the whole list."""
    trials, scores = all_pairs(15, 4)
    group_of = {f"s{i}": group for i, group in enumerate(groups)}
    rows = error_rates(trials, scores, group_of, resamples=0, threshold=threshold)
    assert sum(row.targets for row in rows) == trials.labels.sum()
    assert sum(row.impostors for row in rows) == (1 - trials.labels).sum()
    assert sum(row.speakers for row in rows if row.group != BETWEEN) == 15
    assert [row.group for row in rows if row.group != BETWEEN] == sorted(set(groups))
    assert (rows[-1].group == BETWEEN) == (len(set(groups)) > 1)
    if all(row.false_alarm for row in rows):
        alarms = sum(row.false_alarm.value * row.impostors for row in rows)
        assert alarms == pytest.approx(np.sum(scores[trials.labels == 0] >= threshold))


def test_one_group_is_the_whole_list():
    trials, scores = all_pairs(8, 4)
    (row,) = error_rates(trials, scores, {f"s{i}": "all" for i in range(8)}, resamples=20)
    assert row.eer.value == eer(scores, trials.labels) and row.eer.low < row.eer.value < row.eer.high
    assert row.against is None
    # the threshold is that of equal rates: of these many trials they are nearly so
    assert row.miss.value == pytest.approx(row.false_alarm.value, abs=0.02)


def test_groups_that_are_too_small_have_no_rates():
    trials, scores = all_pairs(LEAST_SPEAKERS + 6, 4)
    for few, told in ((LEAST_SPEAKERS - 1, False), (LEAST_SPEAKERS, True)):
        group_of = {f"s{i}": "few" if i < few else "many" for i in range(LEAST_SPEAKERS + 6)}
        row, many, between = error_rates(trials, scores, group_of, resamples=5)
        assert row.speakers == few and row.targets == 6 * few and row.targets >= LEAST_TRIALS - 6
        assert many.eer is not None and between.false_alarm is not None
        assert (row.eer is not None) == (row.miss is not None) == (row.false_alarm is not None) == told
        assert (row.against == "many") == told
        assert ("too few" in format_groups([row, many, between])) == (not told)
    trials, scores = all_pairs(12, 3)  # 3 target trials a speaker: too few for six speakers
    rows = error_rates(trials, scores, halves(12), resamples=5)
    assert [row.targets for row in rows] == [18, 18, 0] and rows[0].eer is None and rows[1].eer is None
    assert rows[0].against is None and group_notes(rows) == ["55 % of the impostor trials are between groups."]


def test_difference_is_to_the_largest_group_and_of_independent_resamples():
    """Two groups with the same scores do not differ, and yet the difference is not certain."""
    one, scores = all_pairs(7, 4)
    enrol, test = ([path.replace("s", "t") for path in side] for side in (one.enrol, one.test))
    trials = Trials(np.tile(one.labels, 2), [*one.enrol, *enrol], [*one.test, *test])
    group_of = {f"{letter}{i}": letter for letter in "st" for i in range(7)}
    s, t = error_rates(trials, np.tile(scores, 2), group_of, resamples=200)
    assert s.eer.value == t.eer.value and s.against is None and t.against == "s"
    assert t.eer_difference.value == 0
    assert t.eer_difference.low < -0.01 and t.eer_difference.high > 0.01
    assert t.eer_difference.high - t.eer_difference.low > 1.1 * (t.eer.high - t.eer.low)

    trials, scores = all_pairs(13, 5, hard=set(range(6)))
    low, up, _ = error_rates(trials, scores, {f"s{i}": "low" if i < 6 else "up" for i in range(13)}, resamples=50)
    assert up.speakers == 7 and up.against is None and low.against == "up"
    for name in ("eer", "miss", "false_alarm"):
        difference = getattr(low, name).value - getattr(up, name).value
        assert getattr(low, f"{name}_difference").value == pytest.approx(difference)
    assert low.miss_difference.low > 0


def test_intervals_do_not_depend_on_the_order():
    trials, scores = all_pairs(10, 4)
    order = np.random.default_rng(1).permutation(len(trials)).tolist()
    shuffled = Trials(trials.labels[order], [trials.enrol[i] for i in order], [trials.test[i] for i in order])
    rows = error_rates(trials, scores, halves(10), resamples=10)
    others = error_rates(shuffled, scores[order], halves(10), resamples=10)
    for row, other in zip(rows, others, strict=True):
        for name in ("eer", "miss", "false_alarm"):
            one, two = getattr(row, name), getattr(other, name)
            assert one is two is None or np.allclose([one.value, one.low, one.high], [two.value, two.low, two.high])


@given(st.data())
def test_threshold_is_where_the_rates_are_nearest(data):
    scores = np.array(data.draw(st.lists(st.integers(-4, 4), min_size=4, max_size=20)), dtype=float)
    labels = np.array(
        [1, 0, *data.draw(st.lists(st.integers(0, 1), min_size=len(scores) - 2, max_size=len(scores) - 2))]
    )
    gaps = {}
    for threshold in scores:
        missed = np.mean(scores[labels == 1] < threshold)
        accepted = np.mean(scores[labels == 0] >= threshold)
        assert miss_rate(scores, labels, threshold=threshold) == pytest.approx(missed)
        assert false_alarm_rate(scores, labels, threshold=threshold) == pytest.approx(accepted)
        gaps[threshold] = abs(missed - accepted)
    assert gaps[eer_threshold(scores, labels)] == pytest.approx(min(gaps.values()))


def test_weights_count_like_repeated_trials():
    scores, labels, weights = [0.1, 0.9, 0.2, 0.7, 0.5], [1, 1, 0, 0, 0], [3, 1, 2, 2, 0]
    repeated = np.repeat([scores, labels], weights, axis=1)
    for rate in (miss_rate, false_alarm_rate):
        assert rate(scores, labels, weights, threshold=0.6) == pytest.approx(rate(*repeated, threshold=0.6))
    assert miss_rate(scores, labels, threshold=0.1) == 0 and false_alarm_rate(scores, labels, threshold=0.7) == 1 / 3


def test_wrong_input_is_refused():
    trials, scores = all_pairs(6, 3)
    with pytest.raises(ValueError, match="one per trial"):
        error_rates(trials, scores[1:], halves(6))
    with pytest.raises(ValueError, match="threshold: got nan"):
        error_rates(trials, scores, halves(6), threshold=float("nan"))
    with pytest.raises(ValueError, match="2 of 6 speakers have no group: s4, s5"):
        error_rates(trials, scores, halves(4))
    with pytest.raises(ValueError, match="cannot be called 'between groups'"):
        error_rates(trials, scores, {**halves(6), "s0": BETWEEN})
    with pytest.raises(UnknownSpeakersError):
        error_rates(Trials(trials.labels, ["x/" + path for path in trials.enrol], trials.test), scores, halves(6))


# ---------------------------------------------------------------- text and records


def test_rows_survive_their_record():
    trials, scores = all_pairs(12, 5)
    rows = error_rates(trials, scores, halves(12), resamples=10, dim=8)
    assert [row_from({**asdict(row), "later": 1}) for row in rows] == rows
    assert rows[1].eer_difference is not None
    with pytest.raises(TypeError):
        row_from({"group": "x"})


def test_text_has_rates_differences_and_the_share_between():
    trials, scores = all_pairs(12, 5)
    low, up, between = rows = error_rates(trials, scores, halves(12), resamples=10, dim=8)
    heading, *lines, differs, share = format_groups(rows).splitlines()
    assert heading.split()[:5] == ["group", "dims", "speakers", "targets", "impostors"]
    assert f"{100 * low.eer.value:.2f} [{100 * low.eer.low:.1f}, {100 * low.eer.high:.1f}]" in lines[0]
    assert lines[2].startswith("between groups") and lines[2].count("[") == 1
    assert differs.startswith(f"up less low at 8 dimensions, in points: EER {100 * up.eer_difference.value:+.2f} [")
    of_all = between.impostors / sum(row.impostors for row in rows)
    assert share == f"{100 * of_all:.0f} % of the impostor trials are between groups."


# ---------------------------------------------------------------- the file


def written(folder, text: str):
    (folder / "groups.csv").write_text(text, encoding="utf-8")
    return folder / "groups.csv"


@pytest.mark.parametrize(
    "text",
    [
        "speaker,gender\na,f\nb,m\nc,\n",
        "\ufeffx,speaker,gender\n1,a,f\n2,a,f\n3, b , m \n",
        "path,gender\na/1/x.wav,f\na/2/y.wav,f\nb/x.wav,m\n",
        'path,speaker,gender\nwrong/x.wav,a,f\n"with, comma",b,m\n',
    ],
)
def test_file_of_groups(tmp_path, text):
    assert read_groups(written(tmp_path, text), "gender") == {"a": "f", "b": "m"}


@pytest.mark.parametrize(
    "text, error",
    [
        ("", "expected the columns speaker"),
        ("name,gender\na,f\n", r"expected the columns speaker \(or path\) and gender, got name, gender"),
        ("speaker,sex\na,f\n", "got speaker, sex"),
        ("speaker,gender\na,f\nb,f\na,m\n", "line 4: speaker a is of group m here and of f before"),
        ("speaker,gender\n,f\n", "line 2: no speaker"),
        ("path,gender\nx.wav,f\n", "line 2: no speaker in path 'x.wav'"),
        ("speaker,gender\na,\nb\n", "no line has a value in the column gender"),
    ],
)
def test_wrong_files_are_refused(tmp_path, text, error):
    with pytest.raises(ValueError, match=rf"groups\.csv.*{error}"):
        read_groups(written(tmp_path, text), "gender")


def test_missing_and_unreadable_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.csv"):
        read_groups(tmp_path / "none.csv", "gender")
    (tmp_path / "x.csv").write_bytes(b"speaker,gender\n\xff\xfe,f\n")
    with pytest.raises(ValueError, match="x.csv is not a CSV file"):
        read_groups(tmp_path / "x.csv", "gender")
