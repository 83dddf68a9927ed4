"""Whether there is a signal in an utterance: silence, constants, clicks, clipping; quiet speech always is one."""

import numpy as np
import pytest
import soundfile
from hypothesis import assume, given
from hypothesis import strategies as st

from mrl_redimnet.audio.io import SAMPLING_RATE, AudioError, AudioWarning
from mrl_redimnet.audio.levels import levels, read_utterance, speaking, speech_seconds, warn_of_silence
from mrl_redimnet.data.synthetic import make_corpus

SECONDS = 3
RNG = np.random.default_rng(0)
ZEROS = np.zeros(SECONDS * SAMPLING_RATE, np.float32)


def clicks(*places: int, offset: float = 0.0, width: int = 8) -> np.ndarray:
    wave = ZEROS + np.float32(offset)
    for number, place in enumerate(places):
        wave[place : place + width] += 0.9 * (-1) ** number
    return wave


def speechlike(seconds: float = SECONDS) -> np.ndarray:
    """Noise in syllables, 4 a second."""
    time = np.arange(round(seconds * SAMPLING_RATE)) / SAMPLING_RATE
    return (0.1 * RNG.standard_normal(len(time)) * np.sin(4 * np.pi * time) ** 2).astype(np.float32)


NO_SIGNAL = {
    "silence": (ZEROS, "is silent"),
    "constant": (ZEROS + np.float32(0.1), "holds nothing but the constant 0.1"),
    "one click": (clicks(9_000), "a few clicks"),
    "clicks": (clicks(100, 20_000, 40_000), "a few clicks"),
    "clicks on a constant": (clicks(100, 20_000, offset=0.2), "a few clicks"),
    "dither": ((RNG.integers(-1, 2, len(ZEROS)) / 32768).astype(np.float32), "is far too quiet"),
    "clicks in dither": (clicks(5_000) + RNG.integers(-1, 2, len(ZEROS)).astype(np.float32) / 32768, "a few clicks"),
    "a step": (np.where(np.arange(len(ZEROS)) < 20_000, 0, 0.3).astype(np.float32), "a few clicks"),
    "speech of -120 dB": (1e-5 * speechlike(), "is far too quiet"),
    "clipped": (np.clip(1000 * speechlike(), -0.8, 0.8), "is clipped for the most part"),
}


@pytest.mark.parametrize("name", NO_SIGNAL)
def test_what_has_no_signal_is_told(name):
    wave, problem = NO_SIGNAL[name]
    found = levels(wave)
    assert problem in found.problem
    assert found.sound < 0.1 or "clipped" in problem


@pytest.fixture(scope="module")
def voices(tmp_path_factory):
    root = make_corpus(tmp_path_factory.mktemp("levels") / "corpus", 2, 2, sessions=2, utterances=2, seconds=(0.5, 2))
    return [soundfile.read(file, dtype="float32")[0] for file in sorted(root.rglob("*.wav"))]


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("gain", [0, -20, -40])
def test_quiet_speech_is_a_signal_in_floats_and_in_16_bits(voices, gain, rounded):
    for voice in (*voices, speechlike(0.05), speechlike(0.5), speechlike(30)):
        wave = voice * np.float32(10 ** (gain / 20))
        wave = (np.round(wave * 32768) / 32768).astype(np.float32) if rounded else wave
        assert levels(wave).problem == ""


@pytest.mark.parametrize(
    "wave",
    [
        speechlike() + clicks(5_000),
        0.01 * speechlike() + clicks(5_000, 9_000),
        speechlike() + np.float32(0.3),
        np.concatenate([ZEROS, ZEROS, speechlike(0.5), ZEROS]),
        np.clip(5 * speechlike(), -0.5, 0.5),
        np.sin(np.arange(SECONDS * SAMPLING_RATE) / 9).astype(np.float32),
    ],
)
def test_clicks_pauses_an_offset_or_some_clipping_in_speech_do_no_harm(wave):
    assert levels(wave).problem == ""


def test_what_is_too_short_for_any_model_is_left_to_it():
    assert levels(ZEROS[:1]).problem == levels(ZEROS[:100]).problem == "" and levels(ZEROS[:257]).problem


def test_numbers_of_a_level():
    found = levels(np.concatenate([ZEROS[:16_000], np.tile(np.float32([0.5, -0.5]), 8_000)]))
    assert found.dbfs == pytest.approx(-9.03, abs=0.01) and (found.sound, found.seconds) == (1.0, 2.0)
    assert str(levels(ZEROS)) == "level -inf dBFS, 0.00 s of 3.00 s with sound, as mono"


def test_a_file_without_a_signal_is_refused_or_warned_of_by_name(tmp_path):
    soundfile.write(tmp_path / "hush.wav", ZEROS, SAMPLING_RATE)
    with pytest.raises(
        AudioError, match=r"hush.wav is silent \(level -inf dBFS, 0.00 s of 3.00 s with sound, as mono\)"
    ):
        read_utterance(tmp_path / "hush.wav")
    with pytest.warns(AudioWarning, match="hush.wav is silent .*It is used as it is"):
        assert warn_of_silence(tmp_path / "hush.wav", ZEROS) is ZEROS


def test_channels_that_cancel_each_other_are_silence(tmp_path):
    """What is judged is what the model gets: the mean of the channels."""
    voice = speechlike()
    soundfile.write(tmp_path / "a.wav", np.stack([voice, -voice], axis=1), SAMPLING_RATE, subtype="FLOAT")
    with pytest.raises(AudioError, match="a.wav is silent"):
        read_utterance(tmp_path / "a.wav")
    soundfile.write(tmp_path / "b.wav", np.stack([voice, 0 * voice], axis=1), SAMPLING_RATE)
    assert len(read_utterance(tmp_path / "b.wav")) == len(voice)


@given(
    seconds=st.lists(st.floats(0.1, 3.0), min_size=1, max_size=4),
    pauses=st.floats(0.0, 3.0),
    gain=st.floats(-40.0, 0.0),
)
def test_seconds_of_speech_are_those_between_the_pauses_at_any_level(seconds, pauses, gain):
    """Pauses are 40 dB softer. Up to 19 times as long, as the loud frames are the loudest twentieth."""
    rng = np.random.default_rng(0)
    quiet = 0.001 * rng.standard_normal(round(pauses * SAMPLING_RATE))
    parts = [part for each in seconds for part in (0.1 * rng.standard_normal(round(each * SAMPLING_RATE)), quiet)]
    wave = (np.concatenate(parts) * 10 ** (gain / 20)).astype(np.float32)
    assume(len(wave) < 15 * sum(seconds) * SAMPLING_RATE)
    assert abs(speech_seconds(wave) - sum(seconds)) < 0.05 * len(parts)
    assert speech_seconds(wave) <= len(wave) / SAMPLING_RATE


def test_silence_and_less_than_a_frame_have_no_speech():
    assert speech_seconds(ZEROS) == speech_seconds(ZEROS[:100]) == speech_seconds(speechlike(0.01)) == 0.0
    assert speaking(ZEROS[:1000]).shape == (3,) and speaking(ZEROS[:100]).shape == (0,)
