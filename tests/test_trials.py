"""Trial lists: the file format both ways, and drawing trials compared with all pairs listed by loops."""

import dataclasses
import os
import time
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrl_redimnet.trials import Trials, make_trials, missing_utterances, read_trials, speaker_of, write_trials

SETTINGS = settings(max_examples=80, deadline=None, derandomize=True, database=None)


def rows_of(trials):
    return list(zip(trials.labels.tolist(), trials.enrol, trials.test, strict=True))


# ---------------------------------------------------------------- Trials and its file


def test_trials_fields():
    trials = Trials([1, 0], ["b/1.wav", "a/1.wav"], ["b/2.wav", "b/1.wav"])
    assert len(trials) == 2
    assert trials.labels.dtype == np.int8
    assert trials.utterances == ["a/1.wav", "b/1.wav", "b/2.wav"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        trials.enrol = []


@pytest.mark.parametrize(
    ("labels", "enrol", "test", "message"),
    [
        ([1, 0], ["a"], ["b"], r"of one length, got shape \(2,\), 1 and 1"),
        ([1], ["a"], ["b", "c"], r"of one length, got shape \(1,\), 1 and 2"),
        ([[1]], ["a"], ["b"], r"must be 1-D and of one length, got shape \(1, 1\)"),
        ([1, 2], ["a", "a"], ["b", "b"], "label of trial 1 is 2, expected 1"),
        ([0.5], ["a"], ["b"], "label of trial 0 is 0.5, expected 1"),
    ],
)
def test_bad_trials(labels, enrol, test, message):
    with pytest.raises(ValueError, match=message):
        Trials(labels, enrol, test)


def test_reads_the_voxceleb_format(tmp_path):
    path = tmp_path / "veri_test2.txt"
    path.write_bytes(
        b"1 id10270/5r0dWxy17C8/00001.wav id10270/8jEAjG6SegY/00008.wav\n"
        b"\n  \r\n"
        b"0 id10270/5r0dWxy17C8/00001.wav id10300/ize_eiCFEg0/00003.wav\r\n"
        b"0\tid10271/a/00001.wav   id10272/b/00002.wav"
    )
    trials = read_trials(path)
    assert rows_of(trials) == [
        (1, "id10270/5r0dWxy17C8/00001.wav", "id10270/8jEAjG6SegY/00008.wav"),
        (0, "id10270/5r0dWxy17C8/00001.wav", "id10300/ize_eiCFEg0/00003.wav"),
        (0, "id10271/a/00001.wav", "id10272/b/00002.wav"),
    ]
    assert trials.labels.dtype == np.int8
    assert rows_of(read_trials(str(path))) == rows_of(trials)


@pytest.mark.parametrize(
    "line", ["1 a/1.wav", "1 a/1.wav a/2.wav a/3.wav", "2 a/1.wav b/1.wav", "target a/1 b/1", "01 a/1 b/1", "a/1 b/1 1"]
)
def test_malformed_line(tmp_path, line):
    path = tmp_path / "list.txt"
    path.write_text(f"1 a/1.wav a/2.wav\n\n{line}\n")
    with pytest.raises(ValueError) as caught:
        read_trials(path)
    for part in (str(path), "line 3", repr(line), "expected 'label pathA pathB' with label 1 (target) or 0 (impostor)"):
        assert part in str(caught.value)


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_empty_file(tmp_path, text):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(ValueError, match=r"list.txt: no trials in it; expected lines 'label pathA pathB'"):
        read_trials(tmp_path / "list.txt")


def test_missing_file_and_binary_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no trial list .*absent.txt; expected a text file of lines 'label"):
        read_trials(tmp_path / "absent.txt")
    (tmp_path / "audio.wav").write_bytes(b"RIFF\xff\xfe\x80")
    with pytest.raises(ValueError, match=r"audio.wav: not UTF-8 text .*expected lines 'label pathA pathB'"):
        read_trials(tmp_path / "audio.wav")


WORDS = st.text(min_size=1, max_size=8).filter(lambda text: text.split() == [text])


@SETTINGS
@given(st.lists(st.tuples(st.integers(0, 1), WORDS, WORDS), min_size=1, max_size=8))
def test_written_trials_are_read_back(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("lists") / "list.txt"
    labels, enrol, test = (list(column) for column in zip(*rows, strict=True))
    write_trials(Trials(labels, enrol, test), path)
    assert rows_of(read_trials(path)) == rows


def test_write_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("old")
    write_trials(Trials([1, 0], ["a/1", "a/1"], ["a/2", "b/1"]), path)
    assert path.read_bytes() == b"1 a/1 a/2\n0 a/1 b/1\n"
    assert os.listdir(tmp_path) == ["list.txt"]


@pytest.mark.parametrize("name", ["a b.wav", "", "a\n", " a", "a\u00a0b"])
def test_write_refuses_what_cannot_be_read_back(tmp_path, name):
    path = tmp_path / "list.txt"
    path.write_text("old")
    with pytest.raises(ValueError, match="does not fit the format") as caught:
        write_trials(Trials([1], [name], ["b"]), path)
    assert repr(name) in str(caught.value)
    with pytest.raises(ValueError, match="no trials to write"):
        write_trials(Trials([], [], []), path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["list.txt"]


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "list.txt"
    path.write_text("old")

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_trials(Trials([1], ["a/1"], ["a/2"]), path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["list.txt"]


# ---------------------------------------------------------------- drawing trials


def loop_pairs(utterances, speakers, sessions):
    """All target and all impostor pairs, as sets of unordered pairs."""
    count = {speaker: set() for speaker in speakers}
    for speaker, session in zip(speakers, sessions or speakers, strict=True):
        count[speaker].add(session)
    targets, impostors = set(), set()
    for one, two in combinations(range(len(utterances)), 2):
        pair = frozenset([utterances[one], utterances[two]])
        if speakers[one] != speakers[two]:
            impostors.add(pair)
        elif sessions is None or len(count[speakers[one]]) == 1 or sessions[one] != sessions[two]:
            targets.add(pair)
    return targets, impostors


def drawn_pairs(trials):
    """Target and impostor pairs of a drawn list, which must not repeat a pair."""
    pairs = [[], []]
    for label, enrol, test in rows_of(trials):
        assert enrol != test
        pairs[label].append(frozenset([enrol, test]))
    for kind in pairs:
        assert len(kind) == len(set(kind))
    return set(pairs[1]), set(pairs[0])


@st.composite
def corpora(draw):
    """At least one target and one impostor pair; session names are shared between speakers."""
    rows = draw(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("xyz")), max_size=12))
    rows += [("a", "x"), ("a", draw(st.sampled_from("xy"))), ("b", "x")]
    rows = draw(st.permutations(rows))
    speakers, sessions = [row[0] for row in rows], [row[1] for row in rows]
    utterances = [f"{speaker}/{session}/{index}.wav" for index, (speaker, session) in enumerate(rows)]
    return utterances, speakers, sessions if draw(st.booleans()) else None


@SETTINGS
@given(corpora(), st.integers(1, 10), st.integers(1, 40))
def test_draws_from_exactly_the_possible_pairs(corpus, most_targets, most_impostors):
    targets, impostors = loop_pairs(*corpus)
    assert drawn_pairs(make_trials(*corpus)) == (targets, impostors)  # the default maxima are above all pairs here
    some_targets, some_impostors = drawn_pairs(make_trials(*corpus, most_targets, most_impostors, seed=1))
    assert some_targets <= targets and len(some_targets) == min(most_targets, len(targets))
    assert some_impostors <= impostors and len(some_impostors) == min(most_impostors, len(impostors))


@SETTINGS
@given(corpora(), st.randoms(use_true_random=False))
def test_set_by_the_seed_not_by_the_order(corpus, random):
    trials = rows_of(make_trials(*corpus, 5, 9, seed=4))
    assert trials == rows_of(make_trials(*corpus, 5, 9, seed=4))
    order = list(range(len(corpus[0])))
    random.shuffle(order)
    shuffled = [column and [column[index] for index in order] for column in corpus]
    assert trials == rows_of(make_trials(*shuffled, 5, 9, seed=4))


def small_corpus(speakers=20, utterances=6):
    names = [f"id{speaker:03d}" for speaker in range(speakers) for _ in range(utterances)]
    return [f"{name}/{index % utterances}.wav" for index, name in enumerate(names)], names


def test_other_seeds_draw_other_trials_in_mixed_order():
    first, second = (make_trials(*small_corpus(), None, 50, 200, seed=seed) for seed in (0, 1))
    assert rows_of(first) != rows_of(second) and set(rows_of(first)) != set(rows_of(second))
    assert 5 < first.labels[:125].sum() < 45  # targets and impostors are mixed: about 25 in either half
    above = sum(enrol > test for _, enrol, test in rows_of(first))
    assert 80 < above < 170  # either utterance may be the enrolment


def test_pairs_are_drawn_uniformly():
    utterances, speakers = ["a/1", "a/2", "a/3", "b/1", "b/2", "c/1"], ["a", "a", "a", "b", "b", "c"]
    seen = Counter()
    for seed in range(1000):
        for kind in drawn_pairs(make_trials(utterances, speakers, max_targets=1, max_impostors=1, seed=seed)):
            seen.update(kind)
    targets, impostors = loop_pairs(utterances, speakers, None)
    assert all(abs(seen[pair] - 1000 / 4) < 70 for pair in targets)  # 5 standard deviations of 13.7
    assert all(abs(seen[pair] - 1000 / 11) < 46 for pair in impostors)  # 5 of 9.1


def test_same_session_only_for_speakers_with_one_session():
    utterances = ["a/x/1", "a/x/2", "a/y/1", "b/x/1", "b/x/2", "c/x/1"]
    speakers, sessions = [path.split("/")[0] for path in utterances], [path.split("/")[1] for path in utterances]
    targets, _ = drawn_pairs(make_trials(utterances, speakers, sessions))
    assert targets == {frozenset(pair) for pair in [("a/x/1", "a/y/1"), ("a/x/2", "a/y/1"), ("b/x/1", "b/x/2")]}
    without, _ = drawn_pairs(make_trials(utterances, speakers))
    assert frozenset(["a/x/1", "a/x/2"]) in without
    assert rows_of(make_trials(*map(np.array, (utterances, speakers, sessions)))) == rows_of(
        make_trials(utterances, speakers, sessions)
    )


def test_many_utterances_are_sampled_not_listed():
    utterances, speakers = small_corpus(speakers=1000, utterances=20)  # 2e8 pairs
    began = time.perf_counter()
    trials = make_trials(utterances, speakers)
    assert time.perf_counter() - began < 5.0  # listing the pairs takes minutes
    targets, impostors = drawn_pairs(trials)
    assert (len(targets), len(impostors)) == (2000, 20000)
    assert all((speaker_of(enrol) == speaker_of(test)) == label for label, enrol, test in rows_of(trials))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a", "b"], ["a"]), "speakers must have one entry per utterance: 1 for 2"),
        ((["a", "b"], ["a", "b"], ["x"]), "sessions must have one entry per utterance: 1 for 2"),
        ((["a", "b", "a"], ["a", "b", "a"]), "utterances must be distinct, 'a' comes twice"),
        ((["a/1", "b/1"], ["a", "b"]), "no target trial is possible: none of 2 speakers has two utterances"),
        (([], []), "no target trial is possible: none of 0 speakers"),
        ((["a/1", "a/2"], ["a", "a"]), "no impostor trial is possible: all 2 utterances are of speaker 'a'"),
        ((["a/1", "a/2"], ["a", "a"], None, 0), "max_targets must be at least 1, got 0"),
        ((["a/1", "a/2"], ["a", "a"], None, 1, -1), "max_impostors must be at least 1, got -1"),
    ],
)
def test_bad_corpora(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_trials(*arguments)


# ---------------------------------------------------------------- paths


def test_speaker_of():
    assert speaker_of("id10270/x6uYqmx31kE/00001.wav") == "id10270"
    assert speaker_of("./id10270/00001.wav") == "id10270"
    for path in ("/id10270/00001.wav", "//id10270/1.wav", "00001.wav", "", ".", "../id10270/00001.wav"):
        with pytest.raises(ValueError, match="no speaker in path .*; expected a relative path 'speaker/.../utterance'"):
            speaker_of(path)


def test_missing_utterances(tmp_path):
    trials = Trials([1, 0], ["a/1.wav", "a/1.wav"], ["a/2.wav", "b/1.wav"])
    assert missing_utterances(trials, tmp_path) == ["a/1.wav", "a/2.wav", "b/1.wav"]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.wav").touch()
    (tmp_path / "a" / "2.wav").mkdir()  # a folder is no utterance
    assert missing_utterances(trials, str(tmp_path)) == ["a/2.wav", "b/1.wav"]
    with pytest.raises(FileNotFoundError, match="no folder .*absent to look for"):
        missing_utterances(trials, tmp_path / "absent")
