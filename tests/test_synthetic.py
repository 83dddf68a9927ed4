"""The synthetic corpus: layout, determinism, sane audio, and a verification task neither trivial nor hopeless."""

import csv
import filecmp
import json
from collections import Counter

import numpy as np
import pytest
import soundfile

from configuration_mrl_redimnet import SAMPLING_RATE
from mrl_redimnet.data import synthetic
from mrl_redimnet.data.synthetic import draw_speaker, make_corpus, synthesise

SMALL = dict(train_speakers=2, test_speakers=24, sessions=3, utterances=2, seconds=(1.5, 2.0), seed=3)
TINY = dict(train_speakers=1, test_speakers=2, sessions=2, utterances=1, seconds=(0.5, 0.6), seed=5)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("synthetic") / "corpus", **SMALL)


def read_trials(root):
    lines = (root / "test" / "trials.txt").read_text().splitlines()
    return [(int(label), left, right) for label, left, right in (line.split(" ") for line in lines)]


def files(root):
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())


def test_layout_and_counts(corpus):
    names = files(corpus)
    assert [n for n in names if not n.endswith(".wav")] == [
        "README.txt", "corpus.json", "metadata.csv", "test/trials.txt",
    ]  # fmt: skip
    assert sum(n.startswith("train/wav/id0") for n in names) == 2 * 3 * 2
    assert sum(n.startswith("test/wav/id1") for n in names) == 24 * 3 * 2
    assert "train/wav/id00001/s00/00000.wav" in names and "test/wav/id10024/s02/00001.wav" in names
    assert "SYNTHETIC" in (corpus / "README.txt").read_text()
    assert list(corpus.parent.iterdir()) == [corpus]  # the scratch folder is gone


def test_metadata_and_audio(corpus):
    rows = list(csv.DictReader((corpus / "metadata.csv").read_text().splitlines()))
    assert sorted(r["path"] for r in rows) == [n for n in files(corpus) if n.endswith(".wav")]
    assert Counter(r["gender"] for r in rows if r["split"] == "test") == {"m": 72, "f": 72}
    levels = []
    for row in rows:
        info = soundfile.info(corpus / row["path"])
        assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")
        audio, _ = soundfile.read(corpus / row["path"])
        assert row["path"].split("/")[2] == row["speaker"]
        assert float(row["seconds"]) == pytest.approx(audio.size / SAMPLING_RATE, abs=0.005)
        assert 1.5 <= audio.size / SAMPLING_RATE <= 2.0
        assert np.abs(audio).max() < 0.99  # no clipping
        levels.append(20 * np.log10(np.sqrt(np.mean(audio**2))))
        assert -40 < levels[-1] < -15
    assert np.ptp(levels) > 3  # sessions differ in level


def test_trials_are_valid(corpus):
    trials = read_trials(corpus)
    gender = {r["speaker"]: r["gender"] for r in csv.DictReader((corpus / "metadata.csv").read_text().splitlines())}
    assert Counter(label for label, *_ in trials) == {1: 24 * 12, 0: 24 * 12}
    assert len({frozenset(pair) for _, *pair in trials}) == len(trials)
    for label, left, right in trials:
        assert (corpus / "test" / "wav" / left).is_file() and (corpus / "test" / "wav" / right).is_file()
        (a, session_a, _), (b, session_b, _) = left.split("/"), right.split("/")
        assert label == (a == b)
        assert not label or session_a != session_b
        assert gender[a] == gender[b]
    assert set(Counter((label, left.split("/")[0]) for label, left, _ in trials).values()) == {12}


@pytest.mark.parametrize(("speakers", "sessions", "utterances"), [(2, 2, 1), (3, 2, 2), (16, 3, 4), (9000, 2, 1)])
def test_trial_list_sizes(speakers, sessions, utterances):
    parameters = dict(SMALL, test_speakers=speakers, sessions=sessions, utterances=utterances)
    trials = list(synthetic.trial_rows(parameters))
    labels = Counter(label for label, *_ in trials)
    assert labels[0] == labels[1] > 0 and len(trials) <= synthetic.MAX_TRIALS
    assert all((left[:7] == right[:7]) == label for label, left, right in trials)
    assert len({frozenset(pair) for _, *pair in trials}) == len(trials)


def test_same_seed_same_bytes_and_larger_corpora_share_speakers(tmp_path):
    a, b = make_corpus(tmp_path / "a", **TINY), make_corpus(tmp_path / "deeper" / "b", **TINY)
    larger = make_corpus(tmp_path / "c", **{**TINY, "train_speakers": 2, "utterances": 2})
    other = make_corpus(tmp_path / "d", **{**TINY, "seed": 6})
    assert files(a) == files(b) == files(other)
    assert filecmp.cmpfiles(a, b, files(a), shallow=False)[1:] == ([], [])
    wavs = [n for n in files(a) if n.endswith(".wav")]
    assert filecmp.cmpfiles(a, larger, wavs, shallow=False)[0] == wavs
    assert filecmp.cmpfiles(a, other, wavs, shallow=False)[0] == []


def test_complete_corpus_is_reused(tmp_path, monkeypatch):
    root = tmp_path / "corpus"
    root.mkdir()  # an empty folder is fine
    make_corpus(root, **TINY)
    monkeypatch.setattr(synthetic, "synthesise", None)  # any synthesis would now fail
    assert make_corpus(str(root), **{**TINY, "seconds": [0.5, 0.6]}) == root
    with pytest.raises(FileExistsError, match="other parameters"):
        make_corpus(root, **{**TINY, "seed": 6})
    monkeypatch.setattr(synthetic, "GENERATOR_VERSION", -1)
    with pytest.raises(FileExistsError, match="generator_version"):
        make_corpus(root, **TINY)


@pytest.mark.parametrize("content", ["notes.txt", "corpus.json"])
def test_foreign_folder_is_refused_untouched(tmp_path, content):
    (tmp_path / content).write_text("mine")
    with pytest.raises(FileExistsError, match="choose another folder"):
        make_corpus(tmp_path, **TINY)
    assert files(tmp_path) == [content] and (tmp_path / content).read_text() == "mine"


def test_a_file_at_root_is_refused(tmp_path):
    (tmp_path / "corpus").write_text("mine")
    with pytest.raises(FileExistsError, match="choose another folder"):
        make_corpus(tmp_path / "corpus", **TINY)


def test_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(synthetic, "trial_rows", fail)
    with pytest.raises(RuntimeError, match="fire"):
        make_corpus(tmp_path / "corpus", **TINY)
    assert list(tmp_path.iterdir()) == []


def test_a_corpus_finished_meanwhile_by_another_process_is_used(tmp_path, monkeypatch):
    root, write = tmp_path / "corpus", synthetic.write_corpus

    def write_twice(folder, parameters):
        write(folder, parameters)
        write(root, parameters)

    monkeypatch.setattr(synthetic, "write_corpus", write_twice)
    assert make_corpus(root, **TINY) == root
    assert json.loads((root / "corpus.json").read_text())["seed"] == TINY["seed"]
    assert list(tmp_path.iterdir()) == [root]


@pytest.mark.parametrize(
    "change",
    [
        {"train_speakers": 0}, {"test_speakers": 1}, {"test_speakers": 10000}, {"sessions": 1}, {"utterances": 0},
        {"utterances": 2.0}, {"sessions": True}, {"seed": -1}, {"seed": None}, {"seconds": (3.0, 2.0)},
        {"seconds": 3.0}, {"seconds": (0.1, 2.0)}, {"seconds": (1.0, float("nan"))}, {"seconds": (1, 2, 3)},
    ],
)  # fmt: skip
def test_bad_parameters_are_named(tmp_path, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        make_corpus(tmp_path / "corpus", **{**TINY, **change})
    assert list(tmp_path.iterdir()) == []


def median_pitch(audio):
    """Median over voiced 50 ms frames of the autocorrelation peak between 60 and 400 Hz."""
    pitches = []
    for start in range(0, audio.size - 800, 400):
        frame = audio[start : start + 800] * np.hanning(800)
        r = np.fft.irfft(np.abs(np.fft.rfft(frame, 2048)) ** 2) / np.fft.irfft(
            np.abs(np.fft.rfft(np.hanning(800), 2048)) ** 2
        ).clip(1.0)  # the window's own autocorrelation would favour short lags
        lag = 40 + np.argmax(r[40:267])
        if r[lag] > 0.6 * r[0] and np.sum(frame**2) > 0.1 * np.mean(audio**2) * 800:
            pitches.append(SAMPLING_RATE / lag)
    return np.median(pitches)


@pytest.mark.parametrize("number", [1, 2, 10001, 10002])
def test_pitch_is_the_speakers(number):
    speaker = draw_speaker(0, number)
    assert (speaker.gender, speaker.f0 > 160) == (("f", True) if number % 2 == 0 else ("m", False))
    measured = np.median([median_pitch(synthesise(0, number, s, 0, (3.0, 3.0))) for s in range(3)])
    assert measured == pytest.approx(speaker.f0, rel=0.15)


def test_speakers_are_plausible_and_finite():
    speakers = [draw_speaker(1, n) for n in range(1, 401)]
    assert all(0.8 <= s.tract <= 1.25 and 80 < s.f0 < 300 and s.upper.max() < 7200 for s in speakers)
    for number in range(1, 41):
        audio = synthesise(1, number, number % 3, 0, (0.5, 0.8))
        assert np.isfinite(audio).all() and np.abs(audio).max() < 0.99


def test_sessions_and_utterances_differ():
    audio = [synthesise(0, 1, s, u, (1.0, 1.0)) for s, u in ((0, 0), (0, 1), (1, 0))]
    assert all(np.abs(np.corrcoef(audio[i], audio[j])[0, 1]) < 0.3 for i, j in ((0, 1), (0, 2), (1, 2)))


def baseline_feature(audio):
    """(820,) log standard deviation over time of 40 log-mel bands, and their correlations: a fixed channel cancels."""
    mel = np.linspace(20, 2595 * np.log10(1 + 7600 / 700), 42)
    edges = 700 * (10 ** (mel / 2595) - 1)
    hz = np.fft.rfftfreq(512, 1 / SAMPLING_RATE)
    bank = np.stack([np.interp(hz, edges[k : k + 3], [0, 1, 0], left=0, right=0) for k in range(40)])
    frames = np.lib.stride_tricks.sliding_window_view(audio, 400)[::160] * np.hamming(400)
    logmel = np.log(np.abs(np.fft.rfft(frames, 512)) ** 2 @ bank.T + 1e-6)
    return np.concatenate([np.log(logmel.std(axis=0)), np.corrcoef(logmel.T)[np.triu_indices(40, 1)]])


def equal_error_rate(targets, impostors):
    best = (2.0, 1.0)
    for threshold in np.concatenate([targets, impostors]):
        miss, false_alarm = np.mean(targets < threshold), np.mean(impostors >= threshold)
        best = min(best, (abs(miss - false_alarm), (miss + false_alarm) / 2))
    return best[1]


def test_verification_is_neither_trivial_nor_hopeless(corpus):
    trials = read_trials(corpus)
    wavs = sorted({wav for _, *pair in trials for wav in pair})
    features = {wav: baseline_feature(soundfile.read(corpus / "test" / "wav" / wav)[0]) for wav in wavs}
    centre = np.mean(list(features.values()), axis=0)
    scores = {0: [], 1: []}
    for label, left, right in trials:
        a, b = features[left] - centre, features[right] - centre
        scores[label].append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert np.mean(scores[1]) > np.mean(scores[0]) + 0.05
    assert 0.02 < equal_error_rate(np.array(scores[1]), np.array(scores[0])) < 0.45
