"""Embeddings of files in any order and length and domain, scores against a plain loop, and tables."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import tiny_config, tiny_model

from modeling_mrl_redimnet import MRLReDimNetForSequenceClassification, MRLReDimNetForXVector, MRLReDimNetModel
from mrl_redimnet.audio.domains import make_domain
from mrl_redimnet.audio.io import SAMPLING_RATE, AudioError, read_audio
from mrl_redimnet.audio.scan import drawn, files_below
from mrl_redimnet.audio.waveforms import into_domain
from mrl_redimnet.encoder import SpeakerEncoder
from mrl_redimnet.evaluation.results import (
    as_records,
    attribute_row,
    check_present,
    embed_trials,
    evaluate_trials,
    format_table,
    score_trials,
)
from mrl_redimnet.rows import METRICS, AttributeRow, VerificationRow
from mrl_redimnet.scoring.metrics import eer, mean_interval, min_dcf
from mrl_redimnet.scoring.trials import Trials, make_trials

SECONDS = [0.4, 1.1, 0.25, 0.8, 0.8, 0.3, 1.0, 0.55]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two utterances of each of four speakers, who differ in colour."""
    root, rng = tmp_path_factory.mktemp("speech"), np.random.default_rng(0)
    for i, seconds in enumerate(SECONDS):
        path = root / f"id{i // 2}" / f"{i % 2}.wav"
        path.parent.mkdir(exist_ok=True)
        noise = rng.standard_normal(round(seconds * SAMPLING_RATE) + 1)
        soundfile.write(path, 0.1 * (noise[1:] + (i // 2 - 1.5) * noise[:-1]), SAMPLING_RATE)
    return root


@pytest.fixture(scope="module")
def utterances(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.wav"))


@pytest.fixture(scope="module")
def trials(utterances):
    return make_trials(utterances, [path.split("/")[0] for path in utterances])


# ---------------------------------------------------------------- embeddings


@pytest.mark.parametrize("kind", [MRLReDimNetModel, MRLReDimNetForXVector, MRLReDimNetForSequenceClassification])
@pytest.mark.parametrize("batch_seconds", [0.1, 2.0, 60.0])
def test_files_answer_together_as_they_do_alone(folder, utterances, batch_seconds, kind):
    model = tiny_model(kind=kind)
    files = [folder / path for path in utterances]
    together = SpeakerEncoder(model).embed(files, batch_seconds=batch_seconds)
    assert together.shape == (8, 32) and together.dtype == np.float32
    for row, file in enumerate(files):
        wave, _ = soundfile.read(file, dtype="float32")
        with torch.inference_mode():
            alone = model(torch.from_numpy(wave)[None]).embeddings[0].numpy()
        assert np.abs(together[row] - alone).max() < 1e-4 * np.abs(alone).max()


def test_rows_follow_the_files(folder, utterances):
    model, files = tiny_model(), [str(folder / path) for path in utterances]
    order = [5, 0, 7, 3, 3]
    assert np.allclose(
        SpeakerEncoder(model).embed([files[i] for i in order]), SpeakerEncoder(model).embed(files)[order], atol=1e-4
    )


def test_no_files_give_no_embeddings():
    assert SpeakerEncoder(tiny_model()).embed([]).shape == (0, 32)


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_restored_and_statistics_stay(folder, utterances, training):
    model = tiny_model().train(training)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    first, second = (SpeakerEncoder(model).embed([folder / path for path in utterances]) for _ in range(2))
    assert np.array_equal(first, second)  # no dropout, no batch statistics
    assert all(module.training is training for module in model.modules())
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


def test_an_unreadable_file_is_named(folder, tmp_path):
    (tmp_path / "broken.wav").write_bytes(b"RIFF, once")
    with pytest.raises(AudioError, match="broken.wav"):
        SpeakerEncoder(tiny_model()).embed([folder / "id0/0.wav", tmp_path / "broken.wav"])


def test_what_is_embedded_is_what_was_read(folder, utterances):
    """Rows stay those of the files, although audio may have become shorter than the file."""
    model, files = tiny_model(), [str(folder / path) for path in utterances]
    read = []

    def prepare(file, audio):
        read.append(file)
        return audio[-3000::-1]

    together = SpeakerEncoder(model).embed(files, prepare=prepare)
    assert sorted(read) == files
    for row, file in enumerate(files):
        with torch.inference_mode():
            alone = model(torch.from_numpy(read_audio(file)[-3000::-1].copy())[None]).embeddings[0].numpy()
        assert np.abs(together[row] - alone).max() < 1e-4 * np.abs(alone).max()


@pytest.fixture
def mixed(folder, tmp_path):
    """Files that can be embedded, and between them one without bytes, one too short and one of NaN."""
    shutil.copy(folder / "id0/0.wav", tmp_path / "0.wav")
    (tmp_path / "1.wav").write_bytes(b"")
    soundfile.write(tmp_path / "2.wav", np.zeros(50), SAMPLING_RATE)
    shutil.copy(folder / "id1/0.wav", tmp_path / "3.wav")
    soundfile.write(tmp_path / "4.wav", np.full(9000, np.nan), SAMPLING_RATE, subtype="FLOAT")
    return [tmp_path / f"{i}.wav" for i in range(5)]


@pytest.mark.parametrize("batch_seconds", [0.1, 60.0])
def test_problems_are_collected_where_asked_for(mixed, batch_seconds):
    found = SpeakerEncoder(tiny_model()).embed_all(mixed, batch_seconds=batch_seconds)
    embeddings, problems = found.embeddings, found.problems
    assert list(problems) == [1, 2, 4] and all(mixed[row].name in problems[row] for row in problems)
    assert "0 bytes" in problems[1] and "50 samples" in problems[2] and "NaN" in problems[4]
    assert np.isnan(embeddings[[1, 2, 4]]).all()
    assert np.allclose(embeddings[[0, 3]], SpeakerEncoder(tiny_model()).embed([mixed[0], mixed[3]]), atol=1e-4)


@pytest.mark.parametrize("row", [1, 2, 4])
def test_a_problem_ends_the_embedding_otherwise(mixed, row):
    with pytest.raises(AudioError, match=mixed[row].name):
        SpeakerEncoder(tiny_model()).embed([mixed[0], mixed[row]])


def test_nothing_but_problems_gives_nothing_but_nan(mixed):
    found = SpeakerEncoder(tiny_model()).embed_all([mixed[1], mixed[2]])
    assert np.isnan(found.embeddings).all() and np.isnan(found.seconds).all() and len(found.problems) == 2


def test_audio_is_found_below_a_folder(folder, tmp_path):
    assert files_below(folder) == sorted(folder.rglob("*.wav"))
    (tmp_path / "LOUD.WAV").touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "odd.wav").mkdir()
    assert files_below(tmp_path) == [tmp_path / "LOUD.WAV"]
    for where, message in ((tmp_path / "odd.wav", "0 audio files"), (tmp_path / "x", "not a folder with audio")):
        with pytest.raises(FileNotFoundError, match=message):
            files_below(where)


def test_files_are_drawn_always_the_same_way_and_in_their_order():
    files = [Path(f"{i:03}.wav") for i in range(100)]
    assert drawn(files, 100) == drawn(files, 1000) == files
    few = drawn(files, 10)
    assert few == sorted(few) == drawn(files, 10) and len(set(few)) == 10 and few != files[:10]


# ---------------------------------------------------------------- scores


def test_scored_trials_equal_a_plain_loop(utterances, trials):
    embeddings = np.random.default_rng(1).standard_normal((8, 10)).astype(np.float32)
    embeddings += np.repeat(np.random.default_rng(2).standard_normal((4, 10)), 2, axis=0)  # speakers
    row_of = dict(zip(utterances, embeddings.astype(float), strict=True))
    for row in score_trials(trials, utterances, embeddings, [2, 10]):
        scores = []
        for one, other in zip(trials.enrol, trials.test, strict=True):
            a, b = row_of[one][: row.dim], row_of[other][: row.dim]
            scores.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        assert row.eer == eer(scores, trials.labels) and row.min_dcf == min_dcf(scores, trials.labels)
        assert row.eer_low is None and row.eer_high is None


def test_perfect_embeddings_make_no_errors(utterances, trials):
    rows = score_trials(trials, utterances, np.repeat(np.eye(4), 2, axis=0), [4], resamples=20)
    assert rows == [VerificationRow(4, 0.0, 0.0, 0.0, 0.0)]


def test_resamples_give_an_interval(utterances, trials):
    embeddings = np.random.default_rng(3).standard_normal((8, 6))
    (row,) = score_trials(trials, utterances, embeddings, [6], resamples=50)
    assert 0 <= row.eer_low <= row.eer_high <= 1


# ---------------------------------------------------------------- a trial list


def test_a_model_is_scored_at_its_own_dimensions(folder, utterances, trials):
    model = tiny_model(tiny_config(), kind=MRLReDimNetForXVector)
    embeddings = SpeakerEncoder(model).embed([folder / path for path in utterances])
    rows = evaluate_trials(model, trials, folder)
    assert [row.dim for row in rows] == [8, 16, 32]
    assert rows == score_trials(trials, utterances, embeddings, [8, 16, 32])


def test_other_dimensions_may_be_asked_for(folder, trials):
    assert [row.dim for row in evaluate_trials(tiny_model(), trials, folder, dims=[3, 32])] == [3, 32]


@pytest.mark.parametrize("there", ["all", "some"])
def test_a_wrong_suffix_of_a_list_is_told_where_another_fits_all(tmp_path, there):
    """CN-Celeb's lists say .wav of FLAC files."""
    trials = Trials([1, 0], ["test/a-01-001.wav", "test/a-01-001.wav"], ["test/a.b-02.wav", "test/c.wav"])
    (tmp_path / "test").mkdir()
    for name in ("a-01-001.flac", "a-01-001.txt", "a.b-02.flac", *(["c.flac"] if there == "all" else [])):
        (tmp_path / "test" / name).touch()
    with pytest.raises(FileNotFoundError, match="3 of the trial list's 3 utterances are not below") as error:
        check_present(trials, tmp_path)
    assert ("give --suffix .flac" in str(error.value)) is (there == "all")


def test_missing_utterances_are_listed(folder):
    trials = Trials([1, 0], ["id0/0.wav", "id0/gone.wav"], ["id0/1.wav", "id9/0.wav"])
    with pytest.raises(FileNotFoundError, match="2 of the trial list's 4 utterances .*: id0/gone.wav, id9/0.wav"):
        evaluate_trials(tiny_model(), trials, folder)


# ---------------------------------------------------------------- in a domain


@pytest.fixture(scope="module")
def telephone():
    return make_domain("telephony", codecs=["mulaw", "gsm"], loss=(0.2, 0.4))


def test_a_domain_changes_the_results_and_always_the_same_way(folder, utterances, trials, telephone):
    model = tiny_model()
    clean, once, again = (embed_trials(model, trials, folder, domain=d) for d in (None, telephone, telephone))
    assert np.array_equal(once, again) and np.array_equal(
        clean, SpeakerEncoder(model).embed([folder / p for p in utterances])
    )
    assert np.abs(once - clean).max(axis=1).min() > 0.01 * np.abs(clean).max()
    rows = evaluate_trials(model, trials, folder, [4, 32], domain=telephone)
    assert rows == score_trials(trials, utterances, once, [4, 32])


def test_an_utterance_sounds_the_same_when_the_folder_moves(folder, trials, telephone, tmp_path, monkeypatch):
    model = tiny_model()
    here = embed_trials(model, trials, folder, domain=telephone)
    moved = shutil.copytree(folder, tmp_path / "elsewhere" / "speech")
    assert np.array_equal(embed_trials(model, trials, moved, domain=telephone), here)
    monkeypatch.chdir(tmp_path)
    assert np.array_equal(embed_trials(model, trials, "elsewhere/speech", domain=telephone), here)


def test_the_same_audio_under_another_name_has_other_draws(folder, telephone, tmp_path):
    for name in ("a", "b"):
        shutil.copy(folder / "id0/1.wav", tmp_path / f"{name}.wav")
    prepare = into_domain(tmp_path, telephone)
    a, b = (prepare(file, read_audio(file)) for file in (tmp_path / "a.wav", tmp_path / "b.wav"))
    assert a.shape == b.shape and not np.array_equal(a, b)


def test_without_a_domain_audio_stays_as_it_is(folder):
    audio = read_audio(folder / "id0/1.wav")
    assert np.array_equal(into_domain(folder)(folder / "id0/1.wav", audio), audio)


# ---------------------------------------------------------------- attributes

SPEAKERS = np.array(["a", "a", "b", "b", "c", "c", "d", "d"])


def test_classes_are_judged_by_accuracy():
    answers, targets = np.array([0, 1, 2, 0, 1, 1, 2, 2]), np.array([0, 1, 2, 1, 1, 0, 2, 2])
    assert attribute_row(answers, targets, SPEAKERS, classes=True) == AttributeRow("accuracy", 0.75)
    row = attribute_row(answers, targets, SPEAKERS, classes=True, resamples=100)
    assert (row.low, row.high) == mean_interval(answers == targets, SPEAKERS, 100)
    assert row.low < row.value < row.high


def test_numbers_are_judged_by_the_mean_absolute_error():
    targets = np.array([20, 30, 40, 50, 20, 30, 40, 50], dtype=np.float32)
    answers = targets + np.array([1, -1, 2, -2, 0, 4, -5, 5], dtype=np.float32)
    assert attribute_row(answers, targets, SPEAKERS, classes=False) == AttributeRow("mean absolute error", 2.5)
    row = attribute_row(answers, targets, SPEAKERS, classes=False, resamples=100)
    assert (row.low, row.high) == mean_interval(np.abs(answers - targets), SPEAKERS, 100)


def test_a_row_of_an_attribute_has_one_of_the_known_metrics():
    assert [AttributeRow(metric, 0.5).metric for metric in METRICS] == list(METRICS)
    with pytest.raises(ValueError, match="metric: got 'Accuracy', expected one of accuracy, balanced accuracy, mean"):
        AttributeRow("Accuracy", 0.5)


# ---------------------------------------------------------------- tables


def test_a_table_shows_every_dimension_of_every_list():
    rows = [VerificationRow(64, 0.1234, 0.567, 0.101, 0.149), VerificationRow(256, 0.0421, 0.333)]
    text = format_table({"as trained": rows, "rotated": rows[::-1]})
    for part in ("64 dims", "256 dims", "as trained", "rotated", "12.34 [10.1, 14.9]", "4.21", "0.567", "0.333"):
        assert part in text
    assert text.count("EER %") == text.count("minDCF") == 2


def test_columns_line_up():
    rows = [VerificationRow(dim, 0.5, 1.0, 0.4, 0.6) for dim in (8, 16, 32)]
    header, *lines = format_table({"a": rows, "a longer name": rows}).splitlines()
    assert all(line[len(header) - 1] != " " and line[len(header)] == " " for line in lines)


def test_records_are_plain():
    assert as_records([VerificationRow(8, 0.5, 1.0)]) == [
        {"dim": 8, "eer": 0.5, "min_dcf": 1.0, "eer_low": None, "eer_high": None}
    ]


def test_attributes_have_a_line_per_system():
    text = format_table(
        {"base": [AttributeRow("accuracy", 0.875)], "the adapter": [AttributeRow("accuracy", 0.9375, 0.9, 0.975)]}
    )
    first, second = text.splitlines()
    assert first == "base         87.50   accuracy %"
    assert second == "the adapter  93.75 [90.0, 97.5]   accuracy %"


def test_errors_of_attributes_are_in_the_unit_of_the_labels():
    rows = [AttributeRow("mean absolute error", 7.254, 6.5, 8.125)]
    assert format_table({"age": rows}) == "age  7.25 [6.50, 8.12]   mean absolute error"


def test_records_of_attributes_are_plain():
    assert as_records([AttributeRow("accuracy", 0.5, 0.25, 0.75)]) == [
        {"metric": "accuracy", "value": 0.5, "low": 0.25, "high": 0.75}
    ]
