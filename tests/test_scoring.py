"""Scores of trials compared with loops over trials, and the rules every scorer keeps."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrl_redimnet.scoring import scorers as scoring
from mrl_redimnet.scoring.scorers import (
    SCORERS,
    by_enrolments,
    make_scorer,
    score,
    speaker_means,
    trial_seconds,
    with_enrolments,
)
from mrl_redimnet.scoring.trials import Trials, UnknownSpeakersError, make_trials

TOP = 5
NAMES = pytest.mark.parametrize("name", SCORERS)


def data(seed=0, trials=40, utterances=12, width=8, cohort=20, models=True):
    """Trials, utterances, embeddings and a cohort; enrolment models of one to four utterances."""
    rng = np.random.default_rng(seed)
    paths = [f"s{index % 4}/{index:02d}.wav" for index in range(utterances)]
    members = {f"m{size}": [str(path) for path in rng.permutation(paths)[:size]] for size in range(1, 5)}
    enrol = [str(name) for name in rng.choice(list(members) if models else paths, trials)]
    drawn = Trials(
        rng.integers(0, 2, trials),
        enrol,
        [str(path) for path in rng.choice(paths, trials)],
        members if models else None,
    )
    return drawn, paths, rng.normal(0.3, 1, (utterances, width)), rng.normal(0.3, 1, (cohort, width))


def loop_scores(name, trials, paths, embeddings, cohort, dim):
    """The definition, trial by trial."""
    kind = SCORERS[name]

    def unit(vector):
        return vector / np.sqrt(np.sum(vector**2))

    def prefix(vector):
        return unit(vector[:dim] - (np.mean([row[:dim] for row in cohort], axis=0) if kind.centre else 0))

    others, scores = [prefix(row) for row in cohort], []
    for enrol, test in zip(trials.enrol, trials.test, strict=True):
        members = trials.models[enrol] if trials.models else [enrol]
        sides = [unit(sum(prefix(embeddings[paths.index(path)]) for path in members))]
        sides.append(prefix(embeddings[paths.index(test)]))
        cosine = sides[0] @ sides[1]
        if kind.normalise:
            best = [sorted((side @ other for other in others), reverse=True)[:TOP] for side in sides]
            cosine = np.mean([(cosine - np.mean(top)) / np.std(top) for top in best])
        scores.append(cosine)
    return np.array(scores)


@NAMES
@pytest.mark.parametrize("models", [True, False])
@pytest.mark.parametrize("dim", [3, 8])
def test_equals_the_definition(name, models, dim):
    trials, paths, embeddings, cohort = data(models=models)
    scores = score(trials, paths, embeddings, dim, make_scorer(name, cohort, TOP))
    assert scores.dtype == np.float64
    assert scores == pytest.approx(loop_scores(name, trials, paths, embeddings, cohort, dim), abs=1e-9)


def test_cosine_is_the_default():
    trials, paths, embeddings, _ = data()
    assert np.array_equal(
        score(trials, paths, embeddings, 4), score(trials, paths, embeddings, 4, make_scorer("cosine"))
    )


@NAMES
@given(st.integers(0, 100), st.integers(2, 7), st.floats(0.01, 100))
def test_numbers_beyond_the_prefix_play_no_part(name, seed, dim, size):
    """Cut first, then centre and normalise: for trials, models and cohort alike."""
    trials, paths, embeddings, cohort = data(seed)
    scores = score(trials, paths, embeddings, dim, make_scorer(name, cohort, TOP))
    embeddings[:, dim:] *= size
    cohort[:, dim:] += size
    assert np.array_equal(scores, score(trials, paths, embeddings, dim, make_scorer(name, cohort, TOP)))
    cut = make_scorer(name, cohort[:, :dim], TOP)
    assert scores == pytest.approx(score(trials, paths, embeddings[:, :dim], dim, cut), abs=1e-12)


@given(st.integers(0, 100), st.lists(st.floats(0.01, 100), min_size=12, max_size=12))
def test_no_utterance_s_size_plays_a_part_without_centring(seed, sizes):
    trials, paths, embeddings, cohort = data(seed)
    for name in ("cosine", "as_norm"):
        scorer = make_scorer(name, cohort, TOP)
        scores = score(trials, paths, embeddings, 5, scorer)
        assert score(trials, paths, embeddings * np.array(sizes)[:, None], 5, scorer) == pytest.approx(scores, abs=1e-8)


@NAMES
@given(st.integers(0, 100), st.floats(0.01, 100), st.randoms(use_true_random=False))
def test_neither_common_size_nor_any_order_plays_a_part(name, seed, size, random):
    trials, paths, embeddings, cohort = data(seed)
    scores = score(trials, paths, embeddings, 5, make_scorer(name, cohort, TOP))
    order, others = (random.sample(range(n), n) for n in (len(paths), len(cohort)))
    scorer = make_scorer(name, size * cohort[others], TOP)
    again = score(trials, [paths[row] for row in order], size * embeddings[order], 5, scorer)
    assert again == pytest.approx(scores, abs=1e-8)


@NAMES
def test_blocks_give_the_same_as_one_go(name, monkeypatch):
    trials, paths, embeddings, cohort = data(trials=101)
    scorer = make_scorer(name, cohort, TOP)
    whole = score(trials, paths, embeddings, 6, scorer)
    for block in (1, 70, 200):
        monkeypatch.setattr(scoring, "BLOCK", block)
        assert score(trials, paths, embeddings, 6, scorer) == pytest.approx(whole, abs=1e-12)


def test_normalisation_brings_every_side_s_impostors_to_one_scale():
    """Two conditions whose impostors score 0.0 and 0.6: no one threshold fits both before, one does after."""
    rng = np.random.default_rng(0)
    speakers = rng.normal(size=(60, 64))
    loud = np.eye(64)[0] * 10  # what the second condition adds to every embedding
    cohort = np.concatenate([rng.normal(size=(200, 64)), rng.normal(size=(200, 64)) + loud])
    embeddings = np.concatenate([speakers[:30], speakers[30:] + loud])
    paths = [f"s{row}/1" for row in range(60)]
    pairs = [(a, b) for part in (range(30), range(30, 60)) for a in part for b in part if a < b]
    trials = Trials([0] * len(pairs), [paths[a] for a, _ in pairs], [paths[b] for _, b in pairs])
    half = len(pairs) // 2
    cosine = score(trials, paths, embeddings, 64)
    normalised = score(trials, paths, embeddings, 64, make_scorer("as_norm", cohort, 100))
    assert cosine[half:].mean() - cosine[:half].mean() > 3 * cosine[:half].std()
    assert abs(normalised[half:].mean() - normalised[:half].mean()) < 0.7 * normalised[:half].std()


def test_more_enrolment_utterances_make_a_better_model():
    rng = np.random.default_rng(0)
    speakers = np.repeat(rng.normal(size=(50, 16)), 4, axis=0)
    paths = [f"s{row // 4}/{row % 4}" for row in range(200)]
    embeddings = speakers + rng.normal(size=speakers.shape)
    models = {f"s{who}": [f"s{who}/{number}" for number in (1, 2, 3)] for who in range(50)}
    enrol, test = zip(*((who, f"s{other}/0") for who in models for other in range(50)), strict=True)
    labels = [int(path.startswith(f"{who}/")) for who, path in zip(enrol, test, strict=True)]
    several = score(Trials(labels, list(enrol), list(test), models), paths, embeddings, 16)
    one = score(Trials(labels, [f"{who}/1" for who in enrol], list(test)), paths, embeddings, 16)
    targets = np.array(labels) == 1
    assert several[targets].mean() > one[targets].mean() + 0.08  # 0.61 and 0.5 by theory


def test_no_trials_have_no_scores():
    for models in (None, {}):
        assert score(Trials([], [], [], models), ["a"], np.ones((1, 4)), 2).shape == (0,)


def test_a_scorer_is_named_with_its_cohort():
    cohort = data()[3]
    assert str(make_scorer("cosine", cohort)) == "cosine"
    names = [str(make_scorer("as_norm", cohort, 5)), str(make_scorer("as_norm", cohort, 6))]
    names += [str(make_scorer("as_norm", cohort + 1e-3, 5)), str(make_scorer("centred", cohort))]
    assert names[0].startswith("as_norm, top 5, cohort ") and len(set(names)) == 4
    assert names[0] == str(make_scorer("as_norm", cohort.copy(), 5))
    assert str(make_scorer("as_norm", cohort, 5, "vox2")) == "as_norm, top 5, cohort vox2"


def test_speaker_means():
    embeddings = np.arange(8.0).reshape(4, 2)
    assert speaker_means(embeddings, ["b", "a", "b", "b"]).tolist() == [[2, 3], [10 / 3, 13 / 3]]
    for bad in (embeddings[0], embeddings[:3]):
        with pytest.raises(ValueError, match="of 4 speakers expected, got shape"):
            speaker_means(bad, ["b", "a", "b", "b"])


def test_trial_seconds():
    trials = Trials([1, 0], ["m", "n"], ["a/1", "a/2"], {"m": ["a/2", "b/1"], "n": ["b/1"]})
    seconds = trial_seconds(trials, ["b/1", "a/1", "a/2"], [1.0, 2.0, 4.0])
    assert seconds.tolist() == [[5, 2], [1, 4]]
    with pytest.raises(ValueError, match=r"one number per utterance, 3, got shape \(2,\)"):
        trial_seconds(trials, ["b/1", "a/1", "a/2"], [1.0, 2.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plda",), "scorer: got 'plda', expected one of cosine, centred, as_norm, centred_as_norm"),
        (("as_norm",), "scorer 'as_norm' needs a cohort: embeddings of speakers who are not in the trials"),
        (("centred",), "scorer 'centred' needs a cohort"),
        (("centred", np.ones(4)), r"the cohort must be finite embeddings \[C, D\], got shape \(4,\)"),
        (("centred", np.ones((0, 4))), r"got shape \(0, 4\)"),
        (("centred", [[1.0, np.nan]]), "or a number that is not"),
        (("as_norm", np.ones((9, 4)), 10), "top must be a whole number from 2 to the cohort's 9 embeddings, got 10"),
        (("as_norm", np.ones((9, 4)), 2.5), "top must be a whole number from 2 to the cohort's 9 embeddings, got 2.5"),
        (("as_norm", np.ones((9, 4)), 1), "from 2 to the cohort's 9 embeddings, got 1"),
        (("as_norm", np.ones((9, 4))), "from 2 to the cohort's 9 embeddings, got 300"),
    ],
)
def test_bad_scorers(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_scorer(*arguments)


def test_bad_embeddings():
    trials, paths, embeddings, cohort = data(models=False)
    for dim in (0, -1, 9):
        with pytest.raises(ValueError, match=f"dim must be from 1 to the embeddings' 8 numbers, got {dim}"):
            score(trials, paths, embeddings, dim)
    with pytest.raises(ValueError, match=r"must be \[N, D\] for 12 utterances, got shape \(11, 8\)"):
        score(trials, paths, embeddings[1:], 4)
    with pytest.raises(ValueError, match="1 of the trials' 12 utterances have no embedding: s0/00.wav"):
        score(trials, paths[1:], embeddings[1:], 4)
    with pytest.raises(ValueError, match="utterances must be distinct: 12 paths, 11 different ones"):
        score(trials, [paths[1], *paths[1:]], embeddings, 4)
    with pytest.raises(ValueError, match="the cohort has embeddings of 7 numbers, the trials of 8"):
        score(trials, paths, embeddings, 4, make_scorer("centred", cohort[:, :7]))
    embeddings[3, :4] = 0
    with pytest.raises(ValueError, match="1 of 12 .* first 4 numbers, first that of s3/03.wav, which is zero"):
        score(trials, paths, embeddings, 4)
    score(trials, paths, embeddings, 5)
    for value in (np.nan, np.inf):
        embeddings[3, 0] = value
        with pytest.raises(ValueError, match="first that of s3/03.wav, which has numbers that are not finite"):
            score(trials, paths, embeddings, 4)


def test_bad_cohort_rows():
    trials, paths, embeddings, cohort = data()
    cohort[2, :4] = 0
    with pytest.raises(ValueError, match="first that of row 2 of the cohort, which is zero"):
        score(trials, paths, embeddings, 4, make_scorer("as_norm", cohort, TOP))
    with pytest.raises(ValueError, match="the 5 highest cohort scores of an utterance are all alike"):
        score(trials, paths, embeddings, 4, make_scorer("as_norm", np.ones((20, 8)), TOP))
    opposite = Trials([1], ["m"], ["a"], {"m": ["a", "b"]})
    with pytest.raises(ValueError, match="first that of m, which is zero"):
        score(opposite, ["a", "b"], np.array([[1.0, 0], [-1, 0]]), 2)


def some_trials() -> Trials:
    """All pairs of utterances of speakers with 2, 3, 4 and 5 of them."""
    paths = [f"id{speaker}/{number}.wav" for speaker in range(4) for number in range(speaker + 2)]
    return make_trials(paths, [path.split("/")[0] for path in paths])


def test_averaged_enrolments_keep_trials_and_never_hold_the_test():
    trials = some_trials()
    assert with_enrolments(trials, 1) is trials
    averaged = with_enrolments(trials, 3)
    assert by_enrolments(averaged).keys() == {3} and by_enrolments(trials).keys() == {1}
    for label, enrol, test in zip(averaged.labels, averaged.enrol, averaged.test, strict=True):
        paths = averaged.models[enrol]
        assert len(set(paths)) == 3 and test not in paths and len({path.split("/")[0] for path in paths}) == 1
        assert (paths[0].split("/")[0] == test.split("/")[0]) == (label == 1)
    speakers = {path.split("/")[0] for path in trials.enrol}
    assert {paths[0].split("/")[0] for paths in averaged.models.values()} == speakers - {"id0"}
    targets = [enrol[:3] for enrol, label in zip(averaged.enrol, averaged.labels, strict=True) if label]
    assert set(targets) == {"id2", "id3"}  # id1 has no third utterance beside a test
    assert with_enrolments(trials, 3).enrol == averaged.enrol != with_enrolments(trials, 3, seed=1).enrol
    assert len(with_enrolments(trials, 9)) == 0
    with pytest.raises(ValueError, match="enrolments of their own"):
        with_enrolments(averaged, 2)
    with pytest.raises(UnknownSpeakersError):
        with_enrolments(Trials(np.array([1, 0]), ["a/x", "a/x"], ["b/y", "a/z"]), 2)


def test_trials_by_the_number_of_their_enrolment_utterances():
    models = {"a": ["a/1"], "b": ["b/1", "b/2"], "c": ["c/1", "c/2"]}
    parts = by_enrolments(Trials(np.array([1, 0, 0, 1]), ["a", "b", "c", "b"], ["a/9", "a/9", "a/9", "b/9"], models))
    assert {count: (part.enrol, part.labels.tolist()) for count, part in parts.items()} == {
        1: (["a"], [1]),
        2: (["b", "c", "b"], [0, 0, 1]),
    }
