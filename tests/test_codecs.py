"""Codecs: that they are real, rates, place, level, bands; bands cut out of speech; lost packets."""

import re

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.signal import welch
from sounds import lag, likeness, power

from mrl_redimnet.audio import codecs
from mrl_redimnet.audio.codecs import (
    CODECS,
    TELEPHONE_RATE,
    Codec,
    band_limited,
    lose_packets,
    resampled,
    telephone_codecs,
    through_codec,
    transcode,
)
from mrl_redimnet.audio.io import SAMPLING_RATE, AudioError
from mrl_redimnet.data.synthetic import synthesise

WIDE = [name for name in CODECS if name not in telephone_codecs()]


@pytest.fixture(scope="module")
def speech() -> list[np.ndarray]:
    return [synthesise(0, speaker, 0, 0, (2.0, 2.0)).astype(np.float32) for speaker in (1, 2, 3)]


@pytest.fixture(scope="module")
def white() -> np.ndarray:
    return 0.1 * np.random.default_rng(0).standard_normal(3 * SAMPLING_RATE, dtype=np.float32)


def to_line(audio: np.ndarray) -> np.ndarray:
    """Speech at 8 kHz in the telephone band, as `transcode` takes it."""
    return band_limited(resampled(audio, SAMPLING_RATE, TELEPHONE_RATE), 300, 3400, rate=TELEPHONE_RATE)


# ---------------------------------------------------------------- at 8 kHz


# Signal-to-noise ratios in dB: G.711's is about 38 at most, of the vocoders' waveforms less than half is left.
@pytest.mark.parametrize(
    ("codec", "low", "high"),
    [("mulaw", 30, 42), ("alaw", 30, 42), ("gsm", 6, 25), ("amr_nb", 2, 15), ("opus", 4, 25)],
)
def test_codecs_are_real(codec, low, high, speech):
    for seed, audio in enumerate(speech):
        line = to_line(audio)
        decoded = transcode(codec, line, np.random.default_rng(seed))
        assert decoded.shape == line.shape and decoded.dtype == np.float32
        assert low < 10 * np.log10(power(line) / power(decoded - line)) < high


@pytest.mark.parametrize(("codec", "rates"), [("amr_nb", 8), ("opus", 50)])
def test_bit_rates_are_drawn(codec, rates, speech):
    line = to_line(speech[0][:3200])
    decoded = {transcode(codec, line, np.random.default_rng(seed)).tobytes() for seed in range(60)}
    assert len(decoded) == rates if codec == "amr_nb" else len(decoded) > 10


def test_g711_is_that_of_the_standard():
    """Values of ITU-T G.711's decoders, 14 and 13 bits scaled to 16: end points and steps near zero."""
    values = [0, 8, 16, 132, 1000, 2**15 - 1, -(2**15)]
    expected = {
        "mulaw": [0, 2 * 4, 4 * 4, 33 * 4, 247 * 4, 8031 * 4, -8031 * 4],
        "alaw": [1 * 8, 1 * 8, 3 * 8, 17 * 8, 126 * 8, 4032 * 8, -4032 * 8],
    }
    audio = np.resize(values, 160).astype(np.float32) / 2**15
    for codec, decoded in expected.items():
        assert (transcode(codec, audio, np.random.default_rng(0))[: len(values)] * 2**15).tolist() == decoded


# ---------------------------------------------------------------- at 16 kHz


@given(st.integers(1, 5000), st.floats(-80, 20), st.integers(0, 10**6))
@example(1, 0.0, 0)
@example(3200, 0.0, 0)  # whole packets: the codec's delay has to come from somewhere
def test_a_codec_keeps_length_and_type(samples, decibels, seed):
    audio = np.random.default_rng(seed).standard_normal(samples, dtype=np.float32) * np.float32(10 ** (decibels / 20))
    before = audio.copy()
    for name in CODECS:
        out = through_codec(name, audio, np.random.default_rng(seed))
        assert out.shape == audio.shape and out.dtype == np.float32 and np.isfinite(out).all(), name
    assert np.array_equal(audio, before)


@pytest.mark.parametrize("codec", CODECS)
def test_a_codec_keeps_place_and_most_of_the_level(codec, speech):
    for seed, audio in enumerate(speech):
        out = through_codec(codec, audio, np.random.default_rng(seed))
        middle = [band_limited(wave, 500, 3000) for wave in (audio, out)]  # Opus's high-pass turns the phase below
        assert abs(lag(*middle)) <= 2
        assert 0.4 < power(out) / power(audio) < 1.2


@pytest.mark.parametrize(
    ("codec", "low", "high"),
    [("opus_wide", 2, 25), ("g722", 15, 40), ("mp3", 10, 40), ("aac", 10, 45), ("vorbis", 8, 45)],
)
def test_wide_codecs_are_real(codec, low, high, speech):
    """Signal-to-noise ratios in dB: something is lost, and what is left is the same waveform."""
    for seed, audio in enumerate(speech):
        out = through_codec(codec, audio, np.random.default_rng(seed))
        assert low < 10 * np.log10(power(audio) / power(out - audio)) < high


def test_every_wide_codec_is_judged():
    assert set(WIDE) == {"opus_wide", "g722", "mp3", "aac", "vorbis"}


def spectrum(codec: str, white: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies in Hz, and power in dB that a codec leaves of white noise, averaged over ten draws."""
    outs = [through_codec(codec, white, np.random.default_rng(seed)) for seed in range(10)]
    hertz, densities = welch(np.array(outs), SAMPLING_RATE, nperseg=1024)
    return hertz, 10 * np.log10(densities.mean(axis=0) / welch(white, SAMPLING_RATE, nperseg=1024)[1].mean())


@pytest.mark.parametrize("codec", CODECS)
def test_wide_codecs_keep_the_upper_band_and_narrow_ones_do_not(codec, white):
    hertz, decibels = spectrum(codec, white[:SAMPLING_RATE])
    upper = decibels[(hertz > 4300) & (hertz < 6000)]
    if codec in WIDE:
        assert upper.min() > -12
    else:
        assert upper.max() < -35
    assert decibels[(hertz > 500) & (hertz < 2500)].min() > -12


@pytest.mark.parametrize("codec", CODECS)
def test_the_same_draws_give_the_same_bytes(codec, speech):
    one, same = (through_codec(codec, speech[0], np.random.default_rng(7)) for _ in range(2))
    assert np.array_equal(one, same)


@pytest.mark.parametrize(("codec", "rates"), [("mp3", 6), ("aac", 5), ("opus_wide", 5), ("vorbis", 5)])
def test_wide_bit_rates_are_drawn(codec, rates, speech):
    decoded = {through_codec(codec, speech[0][:6400], np.random.default_rng(seed)).tobytes() for seed in range(30)}
    assert len(decoded) >= rates


def test_loud_speech_goes_through_unclipped(speech):
    audio = speech[0] * np.float32(0.9 / np.abs(speech[0]).max())
    for codec in ("mulaw", "g722"):
        quiet, loud = (through_codec(codec, gain * audio, np.random.default_rng(0)) for gain in (1, 8))
        assert likeness(quiet, loud) > 0.995 and power(loud) / power(quiet) == pytest.approx(64, rel=0.02)


def test_a_codec_that_fails_says_at_which_rate(monkeypatch):
    for rate in (8000, 16000):
        monkeypatch.setitem(codecs.CODECS, "short", Codec(lambda pcm, rng: pcm[:100] / 2**15, delay=0, rate=rate))
        message = f"codec short gave 100 samples for {rate // 50 * 2} samples at {rate // 1000} kHz: leave it out"
        with pytest.raises(AudioError, match=re.escape(message)):
            through_codec("short", np.ones(640, np.float32), np.random.default_rng(0))


# ---------------------------------------------------------------- bands


@pytest.mark.parametrize(("low", "high"), [(300, 3400), (0, 2000), (0, 7000)])
def test_a_band_is_what_is_left(low, high, white):
    out = band_limited(white, low, high)
    hertz, density = welch(out, SAMPLING_RATE, nperseg=2048)
    decibels = 10 * np.log10(density / welch(white, SAMPLING_RATE, nperseg=2048)[1])
    assert out.dtype == np.float32 and out.shape == white.shape
    edge = decibels[np.abs(hertz - high).argmin()]
    assert edge == pytest.approx(-6, abs=1)
    assert decibels[(hertz > 1.4 * low) & (hertz < 0.75 * high)].min() > -2
    assert decibels[(hertz > 1.6 * high) | (hertz > 0) & (hertz < 0.5 * low)].max(initial=-99) < -25
    assert abs(lag(white, out)) == 0


@pytest.mark.parametrize("samples", [1, 2, 30])
def test_a_band_of_a_moment_has_its_length(samples):
    assert band_limited(np.ones(samples, np.float32), 0, 3000).shape == (samples,)


# ---------------------------------------------------------------- packets


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.5, 1.0])
def test_share_of_lost_packets(share):
    packets = 4000
    audio = np.repeat(np.arange(1, packets + 1, dtype=np.float32), 160)  # a value of its own for each
    out = lose_packets(audio, share, np.random.default_rng(0)).reshape(packets, 160)
    lost = (out != audio.reshape(packets, 160)).any(axis=1)
    assert lost.mean() == pytest.approx(share, abs=0.02 if 0 < share < 1 else 0)


@given(st.integers(1, 40), st.floats(0, 1), st.integers(0, 1000))
def test_a_gap_is_the_last_good_packet_fading_out(packets, share, seed):
    audio = np.random.default_rng(seed).uniform(0.5, 1, packets * 160).astype(np.float32)
    out = lose_packets(audio, share, np.random.default_rng(seed))
    assert out.dtype == np.float32
    last, gap = np.zeros(160), 0
    for was, now in zip(audio.reshape(-1, 160), out.reshape(-1, 160), strict=True):
        if np.array_equal(was, now):
            last, gap = was, 0
            continue
        fade = np.maximum(0, 1 - (gap + np.arange(160)) / 480)  # 60 ms
        assert now == pytest.approx(last * fade, abs=1e-6)
        gap += 160
