"""Embeddings of windows that slide over a recording."""

import numpy as np
import pytest
import soundfile
import torch
from conftest import tiny_config, tiny_model, waves
from hypothesis import given
from hypothesis import strategies as st

from mrl_redimnet import SpeakerEncoder
from mrl_redimnet.audio import windows
from mrl_redimnet.audio.io import AudioError
from mrl_redimnet.audio.windows import consecutive, window_starts
from mrl_redimnet.recordings import FIRST, OTHER_SPEAKER
from mrl_redimnet.scoring.scorers import make_scorer

RATE = 16_000


@given(samples=st.integers(1, 5_000), size=st.integers(1, 600), step=st.integers(1, 900), stretch=st.integers(1, 2_000))
def test_windows_reach_both_ends_and_are_grouped_in_order(samples, size, step, stretch):
    starts = window_starts(samples, size, step)
    assert starts[0] == 0 and (np.diff(starts) > 0).all() and (np.diff(starts) <= step).all()
    assert samples <= size or starts[-1] + size == samples or starts[-1] + size + step > samples + size - step
    assert starts[-1] + size >= samples and (starts <= max(samples - size, 0)).all()
    groups = consecutive(starts, size, stretch)
    assert np.concatenate(groups).tolist() == list(range(len(starts)))
    assert all(len(rows) == 1 or starts[rows[-1]] + size - starts[rows[0]] <= stretch for rows in groups)


@pytest.fixture
def encoder():
    return SpeakerEncoder(tiny_model())


def test_each_window_is_embedded_as_an_utterance(encoder, tmp_path, monkeypatch):
    """Of an array, and of a file that is read in stretches."""
    monkeypatch.setattr("mrl_redimnet.encoder.STRETCH", 2.0)
    wave = torch.cat(waves(*[RATE] * 5))[: 5 * RATE - 3_000].numpy()
    starts, embeddings = encoder.embed_windows(wave, 0.5, 0.3)
    assert starts.tolist() == pytest.approx([*np.arange(0, 4.3, 0.3), 4.3125])
    each = [wave[round(start * RATE) :][: RATE // 2] for start in starts]
    np.testing.assert_allclose(embeddings, encoder.embed(each), rtol=0, atol=1e-4)
    soundfile.write(tmp_path / "a.wav", wave, RATE, subtype="FLOAT")
    of_file = encoder.embed_windows(tmp_path / "a.wav", 0.5, 0.3, dim=8)
    np.testing.assert_array_equal(of_file[0], starts)
    np.testing.assert_allclose(of_file[1], embeddings[:, :8], rtol=0, atol=1e-5)


def test_a_short_recording_is_one_window(encoder):
    wave = waves(6_000)[0]
    for shared in (False, True):
        starts, embeddings = encoder.embed_windows(wave, shared=shared)
        np.testing.assert_allclose(embeddings, encoder.embed([wave]), rtol=0, atol=1e-4)
        assert starts.tolist() == [0]


def test_files_are_read_in_stretches(encoder, tmp_path, monkeypatch):
    """So that memory does not grow with their length."""
    soundfile.write(tmp_path / "a.flac", torch.cat(waves(*[RATE] * 9)).numpy(), RATE)
    seconds = []

    def read(source, start, length):
        seconds.append(length)
        return real(source, start, length)

    real = windows.read_audio
    monkeypatch.setattr(windows, "read_audio", read)
    monkeypatch.setattr("mrl_redimnet.encoder.STRETCH", 2.0)
    encoder.embed_windows(tmp_path / "a.flac", 1.0, 0.5)
    assert len(seconds) >= 5 and max(seconds) <= 2.0


@pytest.mark.parametrize("variant", ["convnext_convatt", "redimnet2_dual"])
def test_shared_windows_are_slices_of_the_frames(variant):
    """The same number of them, of the right part of the recording."""
    encoder = SpeakerEncoder(tiny_model(tiny_config(variant)))
    wave = torch.cat(waves(*[RATE] * 4))  # less than a stretch
    starts, embeddings = encoder.embed_windows(wave, 1.0, 0.5, shared=True)
    assert starts.tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3] and embeddings.shape == (7, 32)
    whole = encoder.embed_windows(wave, 4.0, 1.0, shared=True)[1]
    np.testing.assert_allclose(whole, encoder.embed([wave]), rtol=0, atol=1e-4)


def test_shared_windows_are_close_to_separate_ones():
    """Of the packaged model on speech of two speakers, one after the other: closer than windows of one speaker are."""
    encoder = SpeakerEncoder.from_pretrained("nano", device="cpu")
    wave = np.concatenate([soundfile.read(file, dtype="float32")[0] for file in (FIRST, OTHER_SPEAKER)])
    separate, shared = (encoder.embed_windows(wave, shared=shared)[1] for shared in (False, True))
    cosine = make_scorer("cosine")
    found = cosine.units(separate, 256) @ cosine.units(shared, 256).T
    assert found.diagonal().mean() > 0.8 and (found.argmax(1) == np.arange(len(found))).all()


@pytest.mark.parametrize("window, step", [(0.01, 0.5), (1.0, 0.0), (61.0, 1.0)])
def test_impossible_windows_are_refused(encoder, window, step):
    with pytest.raises(ValueError, match=f"window: got {window} s with a step of {step} s"):
        encoder.embed_windows(waves(RATE)[0], window, step)


def test_what_cannot_be_read(encoder, tmp_path):
    soundfile.write(tmp_path / "short.wav", np.zeros(100), RATE)
    for name, message in (("short.wav", "needs at least 0.016 s"), ("none.wav", "none.wav")):
        with pytest.raises(AudioError, match=message):
            encoder.embed_windows(tmp_path / name)
    encoder.adapters  # noqa: B018  loads the bank
    with pytest.raises(ValueError, match="shared: not with `adapters`"):
        encoder.embed_windows(waves(RATE)[0], shared=True)
