"""Trial lists: the file format both ways, and drawing trials compared with all pairs listed by loops."""

import dataclasses
import os
import time
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrl_redimnet.scoring.trials import (
    FORMATS,
    KNOWN_LISTS,
    Trials,
    UnknownSpeakersError,
    make_trials,
    missing_utterances,
    read_trials,
    speaker_of,
    write_trials,
)


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
    path = tmp_path / "list.txt"
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
def test_malformed_line(tmp_path, line):  # after a first line that tells the format
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
    with pytest.raises(FileNotFoundError, match=f"no trial list {tmp_path};"):
        read_trials(tmp_path)
    (tmp_path / "audio.wav").write_bytes(b"RIFF\xff\xfe\x80")
    with pytest.raises(ValueError, match=r"audio.wav: not UTF-8 text .*expected lines 'label pathA pathB'"):
        read_trials(tmp_path / "audio.wav")


WORDS = st.text(min_size=1, max_size=8).filter(lambda text: text.split() == [text])


@given(st.lists(st.tuples(st.integers(0, 1), WORDS, WORDS), min_size=1, max_size=8))
def test_written_trials_are_read_back(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("lists") / "list.txt"
    labels, enrol, test = (list(column) for column in zip(*rows, strict=True))
    write_trials(Trials(labels, enrol, test), path)
    assert rows_of(read_trials(path, "voxceleb")) == rows  # names such as "1" could be labels to "auto"


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

    monkeypatch.setattr(os, "replace", fail)  # what `folders.replace_file` ends with
    with pytest.raises(OSError, match="disk full"):
        write_trials(Trials([1], ["a/1"], ["a/2"]), path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["list.txt"]


# ---------------------------------------------------------------- formats of other lists


def written(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


LINES = {
    "voxceleb": "1 id10270/x/00001.wav id10270/y/00002.wav\n0 id10270/x/00001.wav id10271/z/00003.wav\n",
    "kaldi": "id10270/x/00001.wav id10270/y/00002.wav target\nid10270/x/00001.wav id10271/z/00003.wav nontarget\n",
    "cnceleb": "id00800-enroll test/id00800-singing-01-001.wav 1\nid00800-enroll test/id00801-vlog-01-001.wav 0\n",
    "sitw": "12013 audio/unotx.flac tgt\n12013 audio/aaabc.flac imp\n",
}
ENROLMENTS = {
    "cnceleb": "id00800-enroll enroll/id00800-enroll.wav\nid00999-enroll enroll/id00999-enroll.wav\n",
    "sitw": "12013 audio/first.flac\n12013 audio/second.flac\n",
}


def read(tmp_path, kind, format="auto", **options):
    enrolments = ENROLMENTS.get(kind) and written(tmp_path / "lists" / "enroll.lst", ENROLMENTS[kind])
    return read_trials(written(tmp_path / "keys" / "list.txt", LINES[kind]), format, enrolments, **options)


@pytest.mark.parametrize("kind", FORMATS)
def test_each_format_is_told_by_its_first_line(tmp_path, kind):
    trials = read(tmp_path, kind)
    assert rows_of(trials) == rows_of(read(tmp_path, kind, kind))
    assert trials.labels.tolist() == [1, 0]
    assert trials.enrol[0] == trials.enrol[1] and len(set(trials.test)) == 2
    for other in set(FORMATS) - {kind}:
        with pytest.raises(ValueError, match=r"list.txt, line 1: .* is not a trial; expected"):
            read(tmp_path, kind, other)
    with pytest.raises(ValueError, match="format: got 'vox', expected 'auto' or one of voxceleb, kaldi, cnceleb, sitw"):
        read(tmp_path, kind, "vox")


def test_a_first_line_that_fits_two_formats_is_refused(tmp_path):
    path = written(tmp_path / "list.txt", "1 0 1\n")
    with pytest.raises(ValueError, match="'1 0 1' fits several formats: give format=voxceleb or cnceleb"):
        read_trials(path)
    assert rows_of(read_trials(path, "voxceleb")) == [(1, "0", "1")]


def test_lists_without_labels_say_what_to_do(tmp_path):
    path = written(tmp_path / "list.txt", "\na/1.wav b/2.wav\n")
    for format in ("auto", "voxceleb", "sitw"):
        with pytest.raises(ValueError, match=r"line 2: 'a/1.wav b/2.wav' has no label. .*SITW: keys/"):
            read_trials(path, format)


def test_cnceleb_enrolments(tmp_path):
    trials = read(tmp_path, "cnceleb")
    assert trials.models == {"id00800-enroll": ["enroll/id00800-enroll.wav"]}  # others are not of these trials
    tests = ["test/id00800-singing-01-001.wav", "test/id00801-vlog-01-001.wav"]
    assert trials.utterances == ["enroll/id00800-enroll.wav", *tests]
    assert [side.tolist() for side in trials.speakers] == [["id00800", "id00800"], ["id00800", "id00801"]]
    several = written(tmp_path / "enroll.map", "id00800-enroll id00800/a-01.wav id00800/b-02.wav\n")
    trials = read_trials(tmp_path / "keys/list.txt", enrolments=several, suffix=".flac")
    assert trials.models == {"id00800-enroll": ["../data/id00800/a-01.flac", "../data/id00800/b-02.flac"]}
    assert trials.test == [name.replace(".wav", ".flac") for name in tests]
    assert trials.speakers[0].tolist() == ["id00800", "id00800"]


def test_sitw_speakers_come_from_meta(tmp_path):
    trials = read(tmp_path, "sitw")
    assert trials.models == {"12013": ["audio/first.flac", "audio/second.flac"]}
    with pytest.raises(UnknownSpeakersError, match="does not say whose speech audio/"):
        _ = trials.speakers
    meta = "audio/first.flac ZPYJ m video\naudio/second.flac ZPYJ m\naudio/unotx.flac ZPYJ m\naudio/aaabc.flac QQ f\n"
    written(tmp_path / "keys/meta.lst", meta)
    for suffix in (None, ".wav"):
        enrol, test = read(tmp_path, "sitw", suffix=suffix).speakers
        assert (enrol.tolist(), test.tolist()) == (["ZPYJ", "ZPYJ"], ["ZPYJ", "QQ"])
    written(tmp_path / "keys/meta.lst", meta.replace("second.flac ZPYJ", "second.flac QQ"))
    with pytest.raises(UnknownSpeakersError, match="'12013' has utterances of several speakers: 'QQ', 'ZPYJ'"):
        _ = read(tmp_path, "sitw").speakers
    written(tmp_path / "keys/meta.lst", "audio/first.flac\n")
    with pytest.raises(ValueError, match=r"meta.lst, line 1: 'audio/first.flac' names no speaker"):
        read(tmp_path, "sitw")


def test_enrolment_models_in_any_format(tmp_path):
    path = written(tmp_path / "list.txt", "1 alice a/3.wav\n0 alice b/1.wav\n")
    models = written(tmp_path / "models.txt", "alice a/1.wav a/2.wav\n\nalice a/4.wav\nbob b/2.wav\n")
    trials = read_trials(path, enrolments=models)
    assert trials.enrolments == {"alice": ["a/1.wav", "a/2.wav", "a/4.wav"]}
    assert trials.utterances == ["a/1.wav", "a/2.wav", "a/3.wav", "a/4.wav", "b/1.wav"]
    assert [side.tolist() for side in trials.speakers] == [["a", "a"], ["a", "b"]]
    with pytest.raises(ValueError, match="with enrolment models do not fit the format"):
        write_trials(trials, tmp_path / "out.txt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bob b/2.wav\n", r"models.txt: no enrolment for 1 names of .*list.txt: 'alice'"),
        ("alice\n", r"models.txt, line 1: 'alice' is no enrolment; expected 'name path \[path ...\]'"),
        ("alice a/1.wav\nalice a/1.wav\n", r"models.txt, line 2: enrolment 'alice' has a/1.wav twice"),
        ("alice a/1.wav 72.000 77.310\n", r"models.txt, line 1: .* enrols a segment between two times"),
    ],
)
def test_bad_enrolments(tmp_path, text, message):
    path = written(tmp_path / "list.txt", "1 alice a/3.wav\n")
    with pytest.raises(ValueError, match=message):
        read_trials(path, enrolments=written(tmp_path / "models.txt", text))


def test_missing_enrolments(tmp_path):
    path = written(tmp_path / "list.txt", LINES["cnceleb"])
    with pytest.raises(ValueError, match=r"names enrolments; give their list, eval/lists/enroll.lst .*enroll.map"):
        read_trials(path)
    with pytest.raises(FileNotFoundError, match="no enrolment list .*absent; expected a text file of lines 'name path"):
        read_trials(path, enrolments=tmp_path / "absent")
    with pytest.raises(ValueError, match=r"suffix must be a point and letters, such as '.flac', got 'flac'"):
        read_trials(written(path, LINES["voxceleb"]), suffix="flac")


def test_trials_check_their_models():
    with pytest.raises(ValueError, match="no enrolment model is called 'b'"):
        Trials([1, 0], ["a", "b"], ["x/1", "y/1"], {"a": ["x/2"]})
    with pytest.raises(ValueError, match="enrolment models without an utterance: 'a'"):
        Trials([1], ["a"], ["x/1"], {"a": []})


def test_an_official_list_cut_short_is_noticed(tmp_path, recwarn):
    name, (title, count, targets) = "veri_test2.txt", KNOWN_LISTS["voxceleb", "veri_test2.txt"]
    with pytest.warns(UserWarning, match=f"has 2 trials, 1 of them targets.*{title} with 37,611, 18,802"):
        read_trials(written(tmp_path / name, LINES["voxceleb"]))
    recwarn.clear()
    lines = "1 a/1.wav a/2.wav\n" * targets + "0 a/1.wav b/2.wav\n" * (count - targets)
    assert len(read_trials(written(tmp_path / name, lines))) == count
    assert not recwarn.list


@pytest.mark.parametrize(
    ("path", "speaker"),
    [
        ("id10270/x6uYqmx31kE/00001.wav", "id10270"),
        ("voxceleb1/id10955/fM25hh5Dd-E/00003.wav", "id10955"),  # VoxSRC 2020
        ("test/id00800-singing-01-001.flac", "id00800"),  # CN-Celeb
        ("an4_fash/session/1.wav", "an4_fash"),
    ],
)
def test_speakers_in_paths(path, speaker):
    trials = Trials([1], [path], [path])
    assert [side.tolist() for side in trials.speakers] == [[speaker], [speaker]]


def test_speakers_that_contradict_the_labels_are_not_used():
    trials = Trials([1, 0], ["VoxSRC2022_dev/1.wav"] * 2, ["VoxSRC2022_dev/2.wav", "VoxSRC2022_dev/3.wav"])
    with pytest.raises(UnknownSpeakersError, match="1 of 2 labels contradict the speakers .*first at trial 1: label 0"):
        _ = trials.speakers
    with pytest.raises(UnknownSpeakersError, match="no speaker in path '1.wav'"):
        _ = Trials([1], ["1.wav"], ["a/1.wav"]).speakers


def test_rows_point_at_enrolments_and_utterances():
    trials = Trials(
        [1, 0, 1], ["m", "n", "m"], ["a/1", "a/1", "a/3"], {"n": ["b/1"], "m": ["a/2", "a/4"], "o": ["c/1"]}
    )
    enrol, test = trials.rows
    assert [list(trials.enrolments)[row] for row in enrol] == trials.enrol
    assert [trials.utterances[row] for row in test] == trials.test
    plain = Trials([1, 0], ["b/1", "a/1"], ["a/2", "b/1"])
    assert [[plain.utterances[row] for row in side] for side in plain.rows] == [plain.enrol, plain.test]


def test_a_large_list_is_read_in_seconds(tmp_path):
    names = [f"id{10000 + index // 50}/abcdefghijk/{index % 50:05d}.wav" for index in range(20000)]
    pairs = np.random.default_rng(0).integers(20000, size=(300_000, 2)).tolist()
    lines = [f"{int(a // 50 == b // 50)} {names[a]} {names[b]}\n" for a, b in pairs]
    path = written(tmp_path / "list.txt", "".join(lines))
    began = time.process_time()
    trials = read_trials(path)
    assert len(trials.rows[0]) == len(trials.speakers[0]) == 300_000
    assert time.process_time() - began < 8.0  # about one on an idle core; comparing paths with paths takes hours


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


@given(corpora(), st.integers(1, 10), st.integers(1, 40))
def test_draws_from_exactly_the_possible_pairs(corpus, most_targets, most_impostors):
    targets, impostors = loop_pairs(*corpus)
    assert drawn_pairs(make_trials(*corpus)) == (targets, impostors)  # the default maxima are above all pairs here
    some_targets, some_impostors = drawn_pairs(make_trials(*corpus, most_targets, most_impostors, seed=1))
    assert some_targets <= targets and len(some_targets) == min(most_targets, len(targets))
    assert some_impostors <= impostors and len(some_impostors) == min(most_impostors, len(impostors))


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
    began = time.process_time()
    trials = make_trials(utterances, speakers)
    assert time.process_time() - began < 5.0  # listing the pairs takes minutes
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
