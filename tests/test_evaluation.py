"""Embeddings of files in any order and length, scores against a plain loop, and tables."""

import numpy as np
import pytest
import soundfile
import torch
from conftest import tiny_config, tiny_model

from modeling_mrl_redimnet import MRLReDimNetForSequenceClassification, MRLReDimNetForXVector, MRLReDimNetModel
from mrl_redimnet.audio import SAMPLING_RATE, AudioError
from mrl_redimnet.evaluation import (
    VerificationRow,
    as_records,
    cosine_scores,
    embed_files,
    evaluate_trials,
    format_table,
    score_trials,
)
from mrl_redimnet.metrics import eer, min_dcf
from mrl_redimnet.trials import Trials, make_trials

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
    together = embed_files(model, files, batch_seconds)
    assert together.shape == (8, 32) and together.dtype == np.float32
    for row, file in enumerate(files):
        wave, _ = soundfile.read(file, dtype="float32")
        with torch.inference_mode():
            alone = model(torch.from_numpy(wave)[None]).embeddings[0].numpy()
        assert np.abs(together[row] - alone).max() < 1e-4 * np.abs(alone).max()


def test_rows_follow_the_files(folder, utterances):
    model, files = tiny_model(), [str(folder / path) for path in utterances]
    order = [5, 0, 7, 3, 3]
    assert np.allclose(embed_files(model, [files[i] for i in order]), embed_files(model, files)[order], atol=1e-4)


def test_no_files_give_no_embeddings():
    assert embed_files(tiny_model(), []).shape == (0, 32)


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_restored_and_statistics_stay(folder, utterances, training):
    model = tiny_model().train(training)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    first, second = (embed_files(model, [folder / path for path in utterances]) for _ in range(2))
    assert np.array_equal(first, second)  # no dropout, no batch statistics
    assert all(module.training is training for module in model.modules())
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


def test_an_unreadable_file_is_named(folder, tmp_path):
    (tmp_path / "broken.wav").write_bytes(b"RIFF, once")
    with pytest.raises(AudioError, match="broken.wav"):
        embed_files(tiny_model(), [folder / "id0/0.wav", tmp_path / "broken.wav"])


# ---------------------------------------------------------------- scores


def test_scores_are_cosines_of_prefixes():
    embeddings = np.random.default_rng(0).standard_normal((6, 10)).astype(np.float32)
    enrol, test = np.array([0, 3, 2]), np.array([1, 3, 5])
    for dim in (1, 4, 10):
        expected = []
        for i, j in zip(enrol, test, strict=True):
            a, b = embeddings[i, :dim].astype(float), embeddings[j, :dim].astype(float)
            expected.append(float(np.dot(a, b) / np.sqrt(np.dot(a, a) * np.dot(b, b))))
        assert cosine_scores(embeddings, enrol, test, dim) == pytest.approx(expected, abs=1e-9)


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
    embeddings = embed_files(model, [folder / path for path in utterances])
    rows = evaluate_trials(model, trials, folder)
    assert [row.dim for row in rows] == [8, 16, 32]
    assert rows == score_trials(trials, utterances, embeddings, [8, 16, 32])


def test_other_dimensions_may_be_asked_for(folder, trials):
    assert [row.dim for row in evaluate_trials(tiny_model(), trials, folder, dims=[3, 32])] == [3, 32]


def test_missing_utterances_are_listed(folder):
    trials = Trials([1, 0], ["id0/0.wav", "id0/gone.wav"], ["id0/1.wav", "id9/0.wav"])
    with pytest.raises(FileNotFoundError, match="2 of the trial list's 4 utterances .*: id0/gone.wav, id9/0.wav"):
        evaluate_trials(tiny_model(), trials, folder)


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
