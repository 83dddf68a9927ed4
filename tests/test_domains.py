"""Acoustic domains: lengths, draws, rooms in the noisy domain, SNR, the telephone band, calls, errors."""

import pickle
import re
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.signal import welch
from sounds import lag, likeness, power, write, write_responses
from torch.utils.data import DataLoader

from mrl_redimnet.audio import codecs, domains
from mrl_redimnet.audio.codecs import Codec, telephone_codecs
from mrl_redimnet.audio.domains import DOMAINS, Noisy, Telephony, make_domain, simulate
from mrl_redimnet.audio.io import SAMPLING_RATE, AudioError
from mrl_redimnet.data.synthetic import synthesise

ROOMS = 4  # a small bank: simulating a room takes up to a second


@pytest.fixture(scope="module")
def noises(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("noises")
    for i in range(3):
        write(folder / f"{i}.wav", 0.1 * np.random.default_rng(i).standard_normal(20000 + 5000 * i))
    return folder


@pytest.fixture(scope="module")
def silence(tmp_path_factory) -> Path:
    """With noise of no power there is no SNR: the noisy domain gives the reverberated speech alone."""
    return write(tmp_path_factory.mktemp("silence") / "0.wav", np.zeros(16000)).parent


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    return write_responses(tmp_path_factory.mktemp("rooms"))


@pytest.fixture(scope="module")
def speech() -> list[np.ndarray]:
    return [synthesise(0, speaker, 0, 0, (2.0, 2.0)).astype(np.float32) for speaker in (1, 2, 3)]


@pytest.fixture(scope="module")
def white() -> np.ndarray:
    return 0.1 * np.random.default_rng(0).standard_normal(3 * SAMPLING_RATE, dtype=np.float32)


@pytest.fixture(scope="module")
def everything(noises) -> dict:
    """Every domain, and telephony with every codec alone."""
    options = {"noisy": dict(noise=noises, room_count=ROOMS)}
    named = {name: make_domain(name, **options.get(name, {})) for name in DOMAINS}
    return named | {codec: make_domain("telephony", codecs=(codec,)) for codec in telephone_codecs()}


# ---------------------------------------------------------------- all domains


@given(st.integers(400, 9000), st.floats(-120, 20), st.integers(0, 10**6))
@example(400, -20.0, 0)
@example(8000, -20.0, 0)  # whole packets: the codec's delay has to come from somewhere
def test_samples_in_samples_out(everything, samples, decibels, seed):
    audio = np.random.default_rng(seed).standard_normal(samples, dtype=np.float32) * np.float32(10 ** (decibels / 20))
    before = audio.copy()
    for name, domain in everything.items():
        out = domain(audio, np.random.default_rng(seed))
        assert out.shape == audio.shape and out.dtype == np.float32, name
        assert np.isfinite(out).all(), name
    assert np.array_equal(audio, before)


def test_silence_stays_silent_and_finite(everything):
    nothing = np.zeros(4000, np.float32)
    for name, domain in everything.items():
        out = domain(nothing, np.random.default_rng(0))
        assert not out.any(), name


def test_the_generator_draws_everything(everything, speech):
    for name, domain in everything.items():
        one, same, other = (domain(speech[0], np.random.default_rng(seed)) for seed in (5, 5, 6))
        assert np.array_equal(one, same), name
        assert name == "clean" or not np.array_equal(one, other), name


def test_clean_is_the_audio(speech):
    assert np.array_equal(make_domain("clean")(speech[0], np.random.default_rng(0)), speech[0])


def test_evaluation_does_not_depend_on_the_order(everything, speech):
    paths = ["a/0.wav", "a/1.wav", Path("b/0.wav")]
    for name in ("noisy", "telephony"):
        forwards = [simulate(everything[name], speech[0], path) for path in paths]
        backwards = [simulate(everything[name], speech[0], path) for path in reversed(paths)][::-1]
        assert all(map(np.array_equal, forwards, backwards))
        assert not np.array_equal(forwards[0], forwards[1])
        assert np.array_equal(simulate(everything[name], speech[0], "b/0.wav"), forwards[2])
        assert not np.array_equal(simulate(everything[name], speech[0], paths[0], seed=1), forwards[0])


def test_evaluation_draws_are_pinned(speech):
    """By values, not by a second call: they must outlive the process, whose hash() is salted."""
    drawn = []
    simulate(lambda audio, rng: drawn.append(rng.integers(10**6)) or audio, speech[0], "id1/s/0.wav", seed=3)
    assert drawn == [363762]


@pytest.mark.parametrize("name", DOMAINS)
def test_pickling_changes_nothing(everything, speech, name):
    copy = pickle.loads(pickle.dumps(everything[name]))
    one, other = (domain(speech[0], np.random.default_rng(1)) for domain in (everything[name], copy))
    assert np.array_equal(one, other)


class Simulated:
    """A data set of one utterance in a domain, under different paths."""

    def __init__(self, domain, audio):
        self.domain, self.audio = domain, audio

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return simulate(self.domain, self.audio, str(index))


@pytest.mark.parametrize("name", ["noisy", "telephony"])
def test_worker_processes_hear_the_same(everything, speech, name):
    data = Simulated(everything[name], speech[0])
    here, there = (list(DataLoader(data, batch_size=1, num_workers=workers)) for workers in (0, 2))
    assert all(map(np.array_equal, here, there))


# ---------------------------------------------------------------- rooms


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_share_of_utterances_in_a_room(silence, recorded, probability):
    domain = Noisy(silence, rooms=recorded, room_probability=probability)
    audio, rng = np.random.default_rng(0).standard_normal(500, dtype=np.float32), np.random.default_rng(0)
    changed = [not np.array_equal(audio, domain(audio, rng)) for _ in range(300)]
    assert np.mean(changed) == pytest.approx(probability, abs=0.08 if 0 < probability < 1 else 0)


def test_every_room_is_drawn(silence, recorded, speech):
    audio = speech[0][:2000]
    for options, count in ((dict(rooms=recorded), 2), (dict(room_count=ROOMS), ROOMS)):
        domain = Noisy(silence, room_probability=1.0, **options)
        assert len({domain(audio, np.random.default_rng(seed)).tobytes() for seed in range(40)}) == count
    seeds = [Noisy(silence, room_probability=1.0, room_count=1, room_seed=seed) for seed in (0, 1)]
    one, other = (domain(audio, np.random.default_rng(0)) for domain in seeds)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_the_ratio_is_that_of_reverberated_speech_to_noise(noises, silence, speech, probability):
    options = dict(snr=(5.0, 5.0), room_probability=probability, room_count=ROOMS)
    for seed, audio in enumerate(speech):
        mixed = Noisy(noises, **options)(audio, np.random.default_rng(seed))
        heard = Noisy(silence, **options)(audio, np.random.default_rng(seed))
        assert np.array_equal(heard, audio) == (probability == 0)
        assert 10 * np.log10(power(heard) / power(mixed - heard)) == pytest.approx(5.0, abs=0.01)


def test_a_bad_response_is_an_error(silence, tmp_path, speech):
    dumb = Noisy(silence, rooms=write(tmp_path / "dumb" / "0.wav", np.zeros(100)).parent, room_probability=1.0)
    with pytest.raises(AudioError, match="0.wav is silent"):
        dumb(speech[0], np.random.default_rng(0))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "0.wav").write_bytes(b"RIFF, once")
    with pytest.raises(AudioError, match="rooms: 1 of 1 files cannot be used: .*0.wav cannot be read as audio"):
        Noisy(silence, rooms=tmp_path / "bad", room_probability=1.0)


# ---------------------------------------------------------------- telephony


@pytest.mark.parametrize("codec", telephone_codecs())
def test_a_telephone_passes_its_band_only(codec, white):
    domain = Telephony(codecs=(codec,), loss=(0.0, 0.0))
    hertz, density = welch(domain(white, np.random.default_rng(0)), SAMPLING_RATE, nperseg=1024)
    decibels = 10 * np.log10(density / density[(hertz > 400) & (hertz < 3000)].mean())
    assert decibels[hertz > 4000].max() < -40 and decibels[hertz < 190].max() < -25
    assert decibels[(hertz > 500) & (hertz < 2500)].min() > -12  # all of the band is there


def test_the_band_is_an_option(white):
    domain = Telephony(codecs=("mulaw",), loss=(0.0, 0.0), band=(1000, 2000))
    hertz, density = welch(domain(white, np.random.default_rng(0)), SAMPLING_RATE, nperseg=1024)
    inside = density[(hertz > 1200) & (hertz < 1700)].mean()
    assert density[(hertz < 700) | (hertz > 2700)].max() < 0.01 * inside


@pytest.mark.parametrize("codec", telephone_codecs())
def test_a_call_keeps_level_and_place(codec, speech):
    domain = Telephony(codecs=(codec,), loss=(0.0, 0.0))
    for seed, audio in enumerate(speech):
        out = domain(audio, np.random.default_rng(seed))
        assert power(out) == pytest.approx(power(audio), rel=1e-4)
        assert abs(lag(audio, out)) <= 4


def test_every_codec_is_drawn(monkeypatch, speech):
    used = []

    def recording(name: str) -> Codec:
        return Codec(lambda pcm, rng: used.append(name) or pcm.astype(np.float32), delay=0)

    for name in telephone_codecs():
        monkeypatch.setitem(codecs.CODECS, name, recording(name))
    domain = Telephony(codecs=("gsm", "opus", "mulaw"))
    for seed in range(60):
        domain(speech[0][:800], np.random.default_rng(seed))
    assert set(used) == {"gsm", "opus", "mulaw"} and min(map(used.count, set(used))) > 8


def test_loud_speech_is_not_clipped(speech):
    domain = Telephony(codecs=("mulaw",), loss=(0.0, 0.0))
    loud = speech[0] * np.float32(4 / np.abs(speech[0]).max())
    out, reference = (domain(audio, np.random.default_rng(0)) for audio in (loud, loud / 8))
    assert likeness(out, reference) > 0.999


def test_a_call_loses_the_share_asked_for(monkeypatch, speech):
    shares = []
    monkeypatch.setattr(domains, "lose_packets", lambda audio, share, rng: shares.append(share) or audio)
    domain = Telephony(codecs=("mulaw",), loss=(0.1, 0.3))
    for seed in range(100):
        domain(speech[0][:800], np.random.default_rng(seed))
    assert 0.1 <= min(shares) < 0.12 and 0.28 < max(shares) <= 0.3


def test_losses_are_heard(speech):
    whole, broken = (Telephony(("mulaw",), loss=(share, share)) for share in (0.0, 0.3))
    one, other = (domain(speech[0], np.random.default_rng(0)) for domain in (whole, broken))
    assert likeness(one, other) < 0.95


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(name="marine"), "domain: got 'marine', expected one of clean, noisy, telephony."),
        (dict(name="noisy"), "noise: the noisy domain needs a folder of noise files"),
        (dict(name="clean", snr=(0, 1)), "clean domain: unknown option snr; its options: none."),
        (dict(name="telephony", los=(0, 0)), "telephony domain: unknown option los; its options: band, codecs, loss."),
        (dict(name="noisy", noise=".", reverb=1), "unknown option reverb; its options: room_count, room_probability"),
        (dict(name="noisy", noise=".", snr=(10, 5)), "snr: got 10 to 5"),
        (dict(name="noisy", noise=".", room_probability=1.5), "room_probability: got 1.5, expected 0 to 1"),
        (dict(name="noisy", noise=".", room_count=0), "room_count: got 0"),
        (dict(name="telephony", codecs=("gsm", "g729")), "codecs: got ['g729'], expected some of mulaw, alaw, gsm"),
        (dict(name="telephony", codecs=()), "codecs: got none"),
        (
            dict(name="telephony", codecs=("mp3",)),
            "codecs: got ['mp3'], expected some of mulaw, alaw, gsm, amr_nb, opus.",
        ),
        (dict(name="telephony", loss=(0.0, 1.1)), "loss: got 0.0 to 1.1, expected values from 0 to 1"),
        (dict(name="telephony", band=(300, 4000)), "band: got 300 to 4000"),
        (dict(name="telephony", band=(300, 300)), "band: 300 Hz to the same"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_domain(**arguments)


def test_folders_without_audio_are_refused(noises, tmp_path):
    with pytest.raises(FileNotFoundError, match="noise folder: no audio"):
        make_domain("noisy", noise=tmp_path)
    with pytest.raises(FileNotFoundError, match="rooms: no audio"):
        make_domain("noisy", noise=noises, rooms=tmp_path)


def test_domains_without_noise_ignore_the_folder(noises):
    assert isinstance(make_domain("telephony", noise=noises, loss=(0.1, 0.1)), Telephony)


def test_a_codec_that_fails_says_which(monkeypatch):
    def failing(error: Exception) -> Codec:
        def run(pcm, rng):
            raise error

        return Codec(run, delay=0)

    broken = {
        "ffmpeg": failing(av.FFmpegError(22, "Invalid argument")),
        "sndfile": failing(soundfile.LibsndfileError(1)),
        "missing": Codec(lambda pcm, rng: codecs.run_ffmpeg("no_such_codec", pcm, 8000, 8000), delay=0),
        "short": Codec(lambda pcm, rng: pcm[:100].astype(np.float32), delay=0),
    }
    for name, codec in broken.items():
        monkeypatch.setitem(codecs.CODECS, name, codec)
        with pytest.raises(AudioError, match=f"codec {name} .*320"):
            Telephony(codecs=(name,))(np.ones(640, np.float32), np.random.default_rng(0))
