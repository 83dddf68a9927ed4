"""Augmentations: ratios, bands, levels, talkers, lengths, chances, draws, folders as MUSAN's, what is refused."""

import pickle
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scipy.signal import welch
from sounds import power, write

from mrl_redimnet.audio.augmentation import (
    AUGMENTATIONS,
    AddNoise,
    Babble,
    BandLimit,
    Clipping,
    FileTalkers,
    Gain,
    InDomain,
    OneOf,
    Recordings,
    Sources,
    Step,
    Transcoding,
    fitted,
    make_augmentations,
    mix_at_snr,
)
from mrl_redimnet.audio.codecs import CODECS
from mrl_redimnet.audio.domains import make_domain
from mrl_redimnet.audio.io import SAMPLING_RATE, AudioError, AudioWarning
from mrl_redimnet.audio.material import MaterialError
from mrl_redimnet.data.crops import CropMaker, Problem

VOXCELEB_RECIPE = """
- kind: one_of
  probability: 0.6
  choices:
    - {kind: reverberation, room_count: 2}
    - kind: one_of
      choices:
        - {kind: noise, snr: [0, 15]}
        - {kind: music, snr: [5, 15]}
        - {kind: babble, snr: [10, 30]}
- {kind: codec, probability: 0.2}
- {kind: band_limit, probability: 0.1}
- {kind: gain, probability: 0.5}
- {kind: clipping, probability: 0.1}
"""


def tone(hertz: float, seconds: float = 1.0) -> np.ndarray:
    return (0.1 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * SAMPLING_RATE)) / SAMPLING_RATE)).astype("f4")


def white(samples: int = SAMPLING_RATE, seed: int = 0) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal(samples, dtype=np.float32)


def loudest(wave: np.ndarray) -> int:
    """The frequency of the highest peak, in Hz."""
    return round(np.abs(np.fft.rfft(wave)).argmax() * SAMPLING_RATE / len(wave))


def power_ratio(signal: np.ndarray, mixed: np.ndarray) -> float:
    return 10 * np.log10(power(signal) / power(mixed.astype(np.float64) - signal))


@pytest.fixture(scope="module")
def noises(tmp_path_factory) -> Path:
    """A folder of noise of no known layout."""
    folder = tmp_path_factory.mktemp("noises")
    for i in range(6):
        write(folder / "xy"[i % 2] / f"{i}.wav", white(4000 + 3000 * i, seed=i))
    return folder


# What a file of MUSAN is can be heard: its pitch tells.
MUSAN = {
    "noise/free-sound/noise-free-sound-0000.wav": 1000,
    "noise/sound-bible/noise-sound-bible-0000.wav": 1100,
    "music/fma/music-fma-0000.wav": 2000,
    "music/hd-classical/music-hd-0000.wav": 2100,
    "speech/librivox/speech-librivox-0000.wav": 3000,
    "speech/us-gov/speech-us-gov-0000.wav": 3100,
}


@pytest.fixture(scope="module")
def musan(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("musan")
    for name, hertz in MUSAN.items():
        write(folder / name, tone(hertz, 3.0))
    (folder / "README").write_text("A corpus of music, speech and noise.")
    return folder


@dataclass
class Tones:
    """Talkers who hum: the n-th drawn at (n + 3) * 100 Hz, each at a level of its own; every call's pitch is kept."""

    calls: int = 0

    def draw(self, rng: np.random.Generator, samples: int) -> np.ndarray:
        self.calls += 1
        return tone(100 * (self.calls + 2), samples / SAMPLING_RATE) * np.float32(10 ** rng.uniform(-3, 1))


@pytest.fixture(scope="module")
def sources(musan) -> Sources:
    talkers = FileTalkers(sorted(str(path) for path in (musan / "speech").rglob("*.wav")))
    return Sources(noise=musan, talkers=talkers)


# ---------------------------------------------------------------- ratios


@given(st.integers(0, 10**6), st.integers(200, 3000), st.floats(-20, 40), st.floats(0.001, 1.0), st.floats(0.001, 1.0))
def test_the_ratio_is_the_one_asked_for(seed, samples, snr, signal_level, noise_level):
    rng = np.random.default_rng(seed)
    signal, noise = rng.standard_normal((2, samples), dtype=np.float32) * np.float32([[signal_level], [noise_level]])
    mixed = mix_at_snr(signal, noise, snr)
    assert mixed.dtype == np.float32
    assert power_ratio(signal, mixed) == pytest.approx(snr, abs=0.02)


@pytest.mark.parametrize("silent", [0, 1])
def test_nothing_is_mixed_with_silence(silent):
    parts = np.random.default_rng(0).standard_normal((2, 100), dtype=np.float32)
    parts[silent] = 0
    assert np.array_equal(mix_at_snr(*parts, 10.0), parts[0])


@given(st.sampled_from(["noise", "music", "babble"]), st.floats(-10, 30), st.integers(300, 9000), st.integers(0, 10**6))
def test_every_kind_that_adds_adds_at_its_ratio(sources, kind, snr, samples, seed):
    signal = white(samples, seed)
    chain = make_augmentations([{"kind": kind, "snr": [snr, snr]}], sources)
    assert power_ratio(signal, chain(signal, np.random.default_rng(seed))) == pytest.approx(snr, abs=0.02)


def test_drawn_ratios_fill_their_range(noises):
    signal = white(5000)
    add = AddNoise(noises, snr=(5.0, 15.0), probability=1.0)
    ratios = [power_ratio(signal, add(signal, np.random.default_rng(i))) for i in range(100)]
    assert 4.99 < min(ratios) < 5.5 and 14.5 < max(ratios) < 15.01


def test_share_of_crops_with_noise(noises):
    signal = np.ones(1000, dtype=np.float32)
    add = AddNoise(noises, probability=0.3)
    rng = np.random.default_rng(0)
    changed = [not np.array_equal(signal, add(signal, rng)) for _ in range(500)]
    assert np.mean(changed) == pytest.approx(0.3, abs=0.06)


# ---------------------------------------------------------------- folders


def pitches(entry: dict, sources: Sources, draws: int = 60) -> set[int]:
    """Of what an entry adds to clicks, over many draws."""
    crop = np.zeros(SAMPLING_RATE, np.float32)
    crop[0] = 0.1
    chain = make_augmentations([{"snr": [-60, -60], **entry}], sources)
    return {loudest(chain(crop, np.random.default_rng(seed))) for seed in range(draws)}


def test_each_kind_has_its_own_part_of_musan(musan, sources):
    assert pitches({"kind": "noise"}, sources) == {1000, 1100}
    assert pitches({"kind": "music"}, sources) == {2000, 2100}
    assert pitches({"kind": "babble", "count": [1, 1], "folder": str(musan)}, Sources()) == {3000, 3100}


def test_without_training_speech_babble_is_of_musans_speech(musan, tmp_path):
    """A stream has none to draw from; where there is some, it is used."""
    entry = {"kind": "babble", "count": [1, 1]}
    assert pitches(entry, Sources(noise=musan)) == {3000, 3100}
    corpus = FileTalkers([str(write(tmp_path / "0.wav", tone(500)))])
    assert pitches(entry, Sources(noise=musan, talkers=corpus), 5) == {500}
    with pytest.raises(ValueError, match="or the setting `noise` the root of MUSAN, which has a folder speech"):
        make_augmentations([entry], Sources(noise=musan / "noise"))


def test_an_entry_may_have_a_folder_of_its_own(musan, sources, tmp_path):
    write(tmp_path / "0.wav", tone(500))
    for kind in ("noise", "music", "babble"):
        assert pitches({"kind": kind, "folder": str(tmp_path)}, sources, 5) == {500}
    assert pitches({"kind": "music", "folder": str(musan)}, Sources(noise=tmp_path)) == {2000, 2100}


def test_any_folder_of_audio_is_noise(noises, tmp_path):
    assert len(AddNoise(noises).files) == 6
    write(tmp_path / "deep" / "er" / "0.wav", tone(700))
    assert pitches({"kind": "noise"}, Sources(noise=tmp_path), 5) == {700}


def test_folders_without_audio_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing is not a folder"):
        AddNoise(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no audio"):
        AddNoise(tmp_path)


# ---------------------------------------------------------------- stretches of files


@given(st.integers(1, 60), st.integers(1, 200), st.integers(0, 1000))
def test_fitted_is_one_stretch_or_the_whole_repeated(length, samples, seed):
    """Of 0, 1, 2 ... each number but the last is followed by the next, and the last by 0."""
    out = fitted(np.arange(length), samples, np.random.default_rng(seed))
    assert len(out) == samples
    expected = out[0] + np.arange(samples)
    if length >= samples:
        assert np.array_equal(out, expected)
    else:
        assert np.array_equal(out, expected % length)


@pytest.mark.parametrize(("length", "starts"), [(9, 5), (5, 1), (3, 3)])
def test_every_start_is_drawn(length, starts):
    drawn = {fitted(np.arange(length), 5, np.random.default_rng(seed))[0] for seed in range(200)}
    assert drawn == set(range(starts))


@pytest.fixture(scope="module", params=[(16000, 12.5), (16000, 3.0), (8000, 12.5), (44100, 11.0)])
def ramp(request, tmp_path_factory) -> tuple[Path, float]:
    """A file that rises from 0 to 1, so that a sample tells its time, and its length in seconds."""
    rate, seconds = request.param
    return write(tmp_path_factory.mktemp("ramp") / "0.wav", np.linspace(0, 1, round(rate * seconds)), rate), seconds


@pytest.mark.parametrize("known", [False, True])
def test_a_stretch_is_one_of_the_file_and_comes_from_all_of_it(ramp, known):
    path, seconds = ramp
    recordings = Recordings([str(path)], [seconds] if known else None)
    samples = 2 * SAMPLING_RATE
    drawn = np.array([recordings.draw(np.random.default_rng(seed), samples)[50:-50] for seed in range(60)])
    assert drawn.dtype == np.float32 and drawn.shape == (60, samples - 100)
    rise = np.arange(samples - 100) / (seconds * SAMPLING_RATE)
    assert np.abs(drawn - rise - (drawn - rise).mean(axis=1, keepdims=True)).max() < 2e-3  # one stretch, at its speed
    last = 1 - 2 / seconds
    assert drawn[:, 0].min() < 0.1 * last + 0.01 and drawn[:, 0].max() > 0.9 * last


def test_a_short_recording_is_repeated_and_one_as_long_is_whole(tmp_path):
    recordings = Recordings([str(write(tmp_path / "0.wav", white(4000)))])
    assert np.array_equal(recordings.draw(np.random.default_rng(0), 4000), white(4000))
    twice = recordings.draw(np.random.default_rng(0), 8000)
    assert np.array_equal(twice[:4000], twice[4000:]) and twice.any()


def test_draws_do_not_depend_on_what_was_drawn_before(ramp):
    fresh, used = (Recordings([str(ramp[0])]) for _ in range(2))
    for seed in range(5):
        used.draw(np.random.default_rng(seed), 8000)
    one, other = (recordings.draw(np.random.default_rng(9), 8000) for recordings in (fresh, used))
    assert np.array_equal(one, other)


def test_recordings_refuse_what_they_cannot_draw_from(tmp_path):
    with pytest.raises(ValueError, match="files: got none"):
        Recordings([])
    with pytest.raises(ValueError, match="seconds: got 1, expected one for each of 2 files"):
        FileTalkers(["a.wav", "b.wav"], [1.0])
    (tmp_path / "0.wav").write_bytes(b"RIFF, once")
    with pytest.raises(AudioError, match="0.wav cannot be read as audio"):
        Recordings([str(tmp_path / "0.wav")]).draw(np.random.default_rng(0), 100)


# ---------------------------------------------------------------- babble


def talkers_in(babble: np.ndarray) -> np.ndarray:
    """Powers of the hums of `Tones` in a second of babble, 100 Hz apart, of those that are there."""
    powers = np.abs(np.fft.rfft(babble))[100::100] ** 2
    return powers[powers > 1e-3 * powers.max()]


@given(st.integers(1, 9), st.integers(0, 1000))
def test_babble_is_so_many_talkers_of_equal_power(count, seed):
    crop = white()
    babble = Babble(Tones(), count=(count, count), snr=(0.0, 0.0))(crop, np.random.default_rng(seed)) - crop
    assert talkers_in(babble) == pytest.approx(np.full(count, talkers_in(babble).mean()), rel=0.01)


def test_the_number_of_talkers_is_drawn_ends_included():
    crop, counts = white(1600), []
    for seed in range(200):
        talkers = Tones()
        Babble(talkers, count=(3, 7))(crop, np.random.default_rng(seed))
        counts.append(talkers.calls)
    assert set(counts) == {3, 4, 5, 6, 7} and min(map(counts.count, range(3, 8))) > 20


def test_a_silent_talker_is_no_talker():
    @dataclass
    class Silence(Tones):
        def draw(self, rng, samples):
            return super().draw(rng, samples) * (self.calls != 2)

    crop = white()
    babble = Babble(Silence(), count=(4, 4), snr=(0.0, 0.0))(crop, np.random.default_rng(0)) - crop
    assert len(talkers_in(babble)) == 3
    assert np.array_equal(Babble(Silence(1), count=(1, 1))(crop, np.random.default_rng(0)), crop)


def test_the_corpus_itself_may_talk():
    crop = white()
    chain = make_augmentations([{"kind": "babble", "count": [5, 5]}], Sources(talkers=Tones()))
    assert len(talkers_in(chain(crop, np.random.default_rng(0)) - crop)) == 5


# ---------------------------------------------------------------- rooms


def test_rooms_come_from_the_setting_or_the_entry_or_are_simulated(tmp_path):
    """A response of one late pulse is an echo at its place."""
    for name, late in (("real_rirs_isotropic_noises/RVB2014_type1_rir_0.wav", 400), ("mine/0.wav", 800)):
        write(tmp_path / name, np.eye(1, 2000)[0] + np.eye(1, 2000, late)[0])
    write(tmp_path / "real_rirs_isotropic_noises/RVB2014_type1_noise_0.wav", np.ones(2000))
    crop = np.eye(1, 8000, 1000, dtype=np.float32)[0]

    def echoes(entry: dict, sources: Sources) -> list[list[int]]:
        chain = make_augmentations([{"kind": "reverberation", **entry}], sources)
        heard = [chain(crop, np.random.default_rng(seed)) for seed in range(10)]
        assert all(power(one) == pytest.approx(power(crop), rel=1e-4) for one in heard)
        return [np.flatnonzero(np.abs(one) > 0.5 * np.abs(one).max()).tolist() for one in heard]

    rirs, mine = tmp_path / "real_rirs_isotropic_noises", tmp_path / "mine"
    assert echoes({}, Sources(rooms=rirs)) == [[1000, 1400]] * 10
    assert echoes({"folder": str(mine)}, Sources(rooms=rirs)) == [[1000, 1800]] * 10
    for entry, sources in (({"room_count": 2}, Sources(rooms=rirs)), ({"room_count": 2}, Sources())):
        simulated = echoes(entry, sources)
        assert [1000, 1400] not in simulated and len({str(one) for one in simulated}) == 2


# ---------------------------------------------------------------- channels


def loss(augment, crops: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies in Hz, and dB of white noise that an augmentation leaves there."""
    hertz, after = welch(
        np.array([augment(white(seed=s), np.random.default_rng(s)) for s in range(crops)]), SAMPLING_RATE
    )
    before = welch(np.array([white(seed=s) for s in range(crops)]), SAMPLING_RATE)[1]
    return hertz, 10 * np.log10(after.mean(axis=0) / before.mean(axis=0))


@given(st.floats(300, 6500))
def test_above_the_cutoff_nothing_is_left_and_below_it_all(cutoff):
    hertz, decibels = loss(BandLimit((cutoff, cutoff)), crops=2)
    assert decibels[hertz > 1.2 * cutoff + 125].max() < -25
    assert np.abs(decibels[(hertz > 0) & (hertz < 0.8 * cutoff - 125)]).max(initial=0) < 1


def test_cutoffs_are_drawn_from_their_range():
    bottoms = []
    for seed in range(40):
        hertz, density = welch(BandLimit((2000, 6000))(white(), np.random.default_rng(seed)), SAMPLING_RATE)
        inside = density[(hertz > 200) & (hertz < 1500)].mean()
        bottoms.append(hertz[hertz < hertz[density > inside / 4].max()].max())
    assert 1800 < min(bottoms) < 2400 and 5600 < max(bottoms) < 6200


def test_only_the_codecs_named_are_used():
    narrow = loss(Transcoding(["mulaw", "gsm"]))
    wide = loss(Transcoding(["mp3", "vorbis"]))
    assert narrow[1][narrow[0] > 4300].max() < -30
    upper = wide[1][(wide[0] > 4300) & (wide[0] < 5500)]
    assert upper.min() > -6


def test_every_codec_is_drawn_unless_some_are_named():
    crop = white(3200)
    assert Transcoding().codecs == tuple(CODECS)
    named = {name: Transcoding([name]) for name in ("mulaw", "alaw", "gsm")}
    each = {name: augment(crop, np.random.default_rng(0)).tobytes() for name, augment in named.items()}
    drawn = [Transcoding(list(named))(crop, np.random.default_rng(seed)).tobytes() for seed in range(90)]
    assert min(drawn.count(one) for one in each.values()) > 15


@given(st.floats(-40, 40), st.integers(0, 1000))
def test_gain_is_in_decibels(decibels, seed):
    crop = white(500, seed)
    out = Gain((decibels, decibels))(crop, np.random.default_rng(seed))
    assert 10 * np.log10(power(out) / power(crop)) == pytest.approx(decibels, abs=1e-4)


def test_gains_fill_their_range():
    one = np.ones(1, np.float32)
    gains = [20 * np.log10(Gain((-6, 12))(one, np.random.default_rng(seed))[0]) for seed in range(200)]
    assert -6 <= min(gains) < -5.5 and 11.5 < max(gains) <= 12.01


@given(st.floats(0.01, 1), st.floats(0.001, 4), st.integers(0, 1000))
def test_clipping_is_at_its_share_of_the_peak_and_leaves_the_rest(level, loudness, seed):
    crop = white(500, seed) * np.float32(loudness)
    out = Clipping((level, level))(crop, np.random.default_rng(seed))
    most = level * np.abs(crop).max()
    assert np.abs(out).max() == pytest.approx(most, rel=1e-5)
    below = np.abs(crop) < 0.999 * most
    assert np.array_equal(out[below], crop[below]) and np.array_equal(np.sign(out), np.sign(crop))


# ---------------------------------------------------------------- one of several


@pytest.mark.parametrize("weights", [None, [1, 1, 2], [0.5, 0.0, 0.5], [0, 0, 3]])
def test_choices_come_by_their_weights(weights):
    one_of = OneOf([Step(lambda crop, rng, i=i: crop + np.float32(i)) for i in range(3)], weights)
    drawn = [int(one_of(np.zeros(1, np.float32), np.random.default_rng([3, n]))[0]) for n in range(2000)]
    expected = np.array(weights or [1, 1, 1]) / sum(weights or [1, 1, 1])
    found = np.bincount(drawn, minlength=3) / len(drawn)
    assert found == pytest.approx(expected, abs=0.04)
    assert not found[expected == 0].any()


def test_choices_of_choices_share_the_share():
    """Half gain +6, half of the rest gain -6, a quarter left alone by its own probability."""
    entries = yaml.safe_load("""
        - kind: one_of
          choices:
            - {kind: gain, gain: [6, 6]}
            - kind: one_of
              choices: [{kind: gain, gain: [-6, -6]}, {kind: gain, gain: [-6, -6], probability: 0}]
    """)
    chain, one = make_augmentations(entries), np.ones(1, np.float32)
    drawn = np.array([chain(one, np.random.default_rng(n))[0] for n in range(2000)])
    shares = [np.mean(drawn > 1.5), np.mean(drawn < 0.7), np.mean(drawn == 1)]
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=0.035)


# ---------------------------------------------------------------- chains


@pytest.fixture(scope="module")
def voxceleb(sources):
    return make_augmentations(yaml.safe_load(VOXCELEB_RECIPE), sources)


@given(st.integers(400, 9000), st.integers(0, 10**6))
def test_a_chain_keeps_length_and_type_and_the_crop_itself(voxceleb, samples, seed):
    crop = white(samples, seed)
    before = crop.copy()
    for step in voxceleb.steps:
        out = step.augment(crop, np.random.default_rng(seed))
        assert out.shape == crop.shape and out.dtype == np.float32 and np.isfinite(out).all()
    out = voxceleb(crop, np.random.default_rng(seed))
    assert out.shape == crop.shape and out.dtype == np.float32
    assert np.array_equal(crop, before)


def test_silence_goes_through_every_kind(voxceleb):
    for step in voxceleb.steps:
        for seed in range(12):
            out = step.augment(np.zeros(3200, np.float32), np.random.default_rng(seed))
            assert np.abs(out).max() < 1e-3 and out.dtype == np.float32


def test_the_same_draws_give_the_same_bytes_in_a_pickled_copy_too(voxceleb):
    copy = pickle.loads(pickle.dumps(voxceleb))
    crops = [white(seed=seed) for seed in range(20)]
    outs = [[chain(crop, np.random.default_rng([1, n])) for n, crop in enumerate(crops)] for chain in (voxceleb, copy)]
    assert all(map(np.array_equal, *outs))
    other = [voxceleb(crop, np.random.default_rng([2, n])) for n, crop in enumerate(crops)]
    assert not all(map(np.array_equal, outs[0], other))


def test_entries_are_applied_in_their_order():
    """Clipped last, the peaks are flat; clipped before a band is cut out, they are not."""
    clip, narrow = {"kind": "clipping", "level": [0.3, 0.3]}, {"kind": "band_limit", "cutoff": [2000, 2000]}
    one, other = (
        make_augmentations(both)(white(), np.random.default_rng(0)) for both in ([narrow, clip], [clip, narrow])
    )
    assert [np.mean(np.abs(out) > 0.999 * np.abs(out).max()) > 0.1 for out in (one, other)] == [True, False]


def test_no_strength_is_no_augmentation(voxceleb):
    crop = white()
    assert all(np.array_equal(voxceleb(crop, np.random.default_rng(n), strength=0.0), crop) for n in range(20))
    assert np.array_equal(make_augmentations([])(crop, np.random.default_rng(0)), crop)


@pytest.mark.parametrize(("probability", "strength"), [(1.0, 1.0), (1.0, 0.5), (0.6, 1.0), (0.6, 0.25), (0.0, 1.0)])
def test_strength_multiplies_the_probability(probability, strength):
    chain = make_augmentations([{"kind": "gain", "gain": [6, 6], "probability": probability}])
    one = np.ones(1, np.float32)
    applied = [chain(one, np.random.default_rng([5, n]), strength)[0] > 1.5 for n in range(2000)]
    expected = probability * strength
    assert np.mean(applied) == pytest.approx(expected, abs=0.04 if 0 < expected < 1 else 0)


def test_strength_leaves_the_choices_inside_alone():
    inner = [{"kind": "gain", "gain": [6, 6], "probability": 0.5}, {"kind": "gain", "gain": [-6, -6]}]
    chain = make_augmentations([{"kind": "one_of", "choices": inner}])
    drawn = np.array([chain(np.ones(1, np.float32), np.random.default_rng(n), strength=0.5)[0] for n in range(2000)])
    assert [np.mean(drawn > 1.5), np.mean(drawn < 0.7)] == pytest.approx([0.125, 0.25], abs=0.03)


def test_what_is_applied_at_a_strength_is_applied_at_every_higher_one():
    """And an entry's draws do not depend on whether those before it were applied."""
    entries = [{"kind": "gain", "gain": [-20, 20], "probability": p} for p in (0.9, 0.5, 0.7)]
    each = [make_augmentations([{**entry, "probability": float(i == j)} for j, entry in enumerate(entries)])
            for i in range(3)]  # fmt: skip
    chain, one = make_augmentations(entries), np.ones(1, np.float32)
    for n in range(100):
        alone = [float(single(one, np.random.default_rng(n))[0]) for single in each]
        applied = []
        for strength in (0.2, 0.6, 1.0):
            out = float(chain(one, np.random.default_rng(n), strength)[0])
            subsets = [[i for i in range(3) if bits >> i & 1] for bits in range(8)]
            (found,) = [s for s in subsets if np.prod([alone[i] for i in s]) == pytest.approx(out, rel=1e-5)]
            applied.append(set(found))
        assert applied[0] <= applied[1] <= applied[2]


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_a_strength_that_is_no_share_is_refused(strength):
    with pytest.raises(ValueError, match="strength: got .*, expected 0 to 1"):
        make_augmentations([])(white(10), np.random.default_rng(0), strength)


# ---------------------------------------------------------------- in a domain


def upside_down(crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return -crop


@pytest.mark.parametrize(("clean_ratio", "low", "high"), [(0, 1, 1), (1, 0, 0), (0.5, 0.46, 0.54), (0.1, 0.87, 0.93)])
def test_a_share_of_crops_stays_out_of_the_domain(clean_ratio, low, high):
    """Of 2000 draws the standard error is 0.011 at most."""
    crop, bring = np.ones(4, dtype=np.float32), InDomain(upside_down, clean_ratio)
    brought = np.array([bring(crop, np.random.default_rng([7, draw])) for draw in range(2000)])
    assert low <= np.mean(brought[:, 0] == -1) <= high
    assert set(np.unique(brought)) <= {1.0, -1.0}


def test_by_default_a_tenth_of_crops_stays_out_of_the_domain():
    assert InDomain(upside_down).clean_ratio == 0.1


def test_what_is_in_the_domain_has_its_length_and_is_drawn(noises):
    signal = white(8000)
    bring = InDomain(make_domain("noisy", noise=noises, room_probability=0.0), clean_ratio=0.0)
    one, again, other = (bring(signal, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert one.shape == signal.shape and one.dtype == np.float32
    assert np.array_equal(one, again) and not np.array_equal(one, other) and not np.array_equal(one, signal)


# ---------------------------------------------------------------- what is refused


def inside(entry: dict) -> dict:
    return {"kind": "one_of", "choices": [{"kind": "gain"}, entry]}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"kind": "noise"}, "augmentations: got {'kind': 'noise'}, expected a list of entries"),
        (["noise"], "augmentations, entry 1: got 'noise', expected a mapping with a kind. Known: noise, music, babble"),
        ([{"snr": [0, 5]}], "augmentations, entry 1: got {'snr': [0, 5]}, expected a mapping with a kind."),
        ([{"kind": "gain"}, {"kind": "nois"}], "augmentations, entry 2: no kind named 'nois'. Did you mean noise?"),
        (
            [{"kind": "tape"}],
            "augmentations, entry 1: no kind named 'tape'. Known: noise, music, babble, reverberation",
        ),
        ([{"kind": "noise", "srn": [0, 5]}], "entry 1 (noise): no option named 'srn'. Did you mean snr?"),
        (
            [{"kind": "gain", "probabilty": 1}],
            "entry 1 (gain): no option named 'probabilty'. Did you mean probability?",
        ),
        ([{"kind": "noise", "sources": 1}], "entry 1 (noise): no option named 'sources'. Known: snr, folder, probabil"),
        ([inside({"kind": "nois"})], "augmentations, entry 1 (one_of): choices, entry 2: no kind named 'nois'."),
        ([inside({"kind": "gain", "gain": [5, 0]})], "entry 1 (one_of): choices, entry 2 (gain): gain: got 5 to 0"),
        ([{"kind": "gain", "probability": 1.5}], "entry 1 (gain): probability: got 1.5, expected 0 to 1."),
        ([{"kind": "gain", "probability": "often"}], "probability: got 'often', expected 0 to 1."),
        ([{"kind": "gain", "gain": 5}], "gain: got 5, expected two numbers, the lowest and the highest."),
        ([{"kind": "gain", "gain": [1, 2, 3]}], "gain: got [1, 2, 3], expected two numbers"),
        ([{"kind": "gain", "gain": ["a", "b"]}], "gain: got ['a', 'b'], expected two numbers"),
        ([{"kind": "gain", "gain": [float("nan"), 1]}], "gain: got nan to 1"),
        ([{"kind": "noise", "snr": [15, 0]}], "entry 1 (noise): snr: got 15 to 0, expected values from -100 to 100"),
        ([{"kind": "music", "snr": [0, 500]}], "entry 1 (music): snr: got 0 to 500"),
        ([{"kind": "babble", "count": [0, 3]}], "count: got 0 to 3, expected values from 1 to 100"),
        ([{"kind": "babble", "count": [1.5, 3]}], "count: got [1.5, 3], expected whole numbers."),
        (
            [{"kind": "band_limit", "cutoff": [2000, 8000]}],
            "cutoff: got 2000 to 8000, expected values from 100 to 7999",
        ),
        ([{"kind": "clipping", "level": [0, 1]}], "level: got 0 to 1, expected values from 0.01 to 1"),
        ([{"kind": "codec", "codecs": ["mp4"]}], "codecs: no codec named 'mp4'. Did you mean mp3?"),
        ([{"kind": "codec", "codecs": "mp3"}], "codecs: got 'mp3', expected a list of some of mulaw, alaw"),
        ([{"kind": "codec", "codecs": []}], "codecs: got [], expected a list of some of mulaw, alaw"),
        ([{"kind": "reverberation", "room_count": 0}], "room_count: got 0, expected a whole number, at least 1."),
        ([{"kind": "reverberation", "room_seed": -1}], "room_seed: got -1, expected a whole number, at least 0."),
        ([{"kind": "reverberation", "room_count": 2, "folder": "x"}], "room_count: counts simulated rooms"),
        ([{"kind": "one_of"}], "entry 1 (one_of): choices: is needed."),
        ([{"kind": "one_of", "choices": []}], "choices: got none, expected at least one entry."),
        (
            [{"kind": "one_of", "choices": [{"kind": "gain"}], "weights": [1, 2]}],
            "weights: got [1, 2], expected one for",
        ),
        (
            [{"kind": "one_of", "choices": [{"kind": "gain"}], "weights": [0]}],
            "weights: got [0], expected one for each",
        ),
        ([{"kind": "one_of", "choices": [{"kind": "gain"}], "weights": [-1]}], "weights: got [-1], expected one for"),
        (
            [{"kind": "one_of", "choices": [{"kind": "gain"}], "weights": 1}],
            "weights: got 1, expected a list of numbers",
        ),
        ([{"kind": "noise"}], "entry 1 (noise): noise: a folder of noise is needed; give the setting `noise`"),
        ([{"kind": "music"}], "entry 1 (music): noise: the root of MUSAN is needed; give the setting `noise`"),
        ([{"kind": "babble"}], "entry 1 (babble): folder: there is no training speech to draw talkers from"),
    ],
)
def test_what_cannot_be_is_refused_by_its_place(entries, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_augmentations(entries)


def test_missing_folders_are_named_with_the_entry(noises, tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"(music): noise: {noises} has no folder music: give the root of")):
        make_augmentations([{"kind": "music"}], Sources(noise=noises))
    for kind, message in (
        ("noise", "noise folder: no audio"),
        ("music", "noise folder: no audio"),
        ("babble", "folder: no audio"),
        ("reverberation", "rooms: no audio"),
    ):
        with pytest.raises(FileNotFoundError, match=re.escape(f"augmentations, entry 1 ({kind}): {message}")):
            make_augmentations([{"kind": kind, "folder": str(tmp_path)}])


def test_every_kind_can_be_made_by_its_name_alone(sources):
    assert set(AUGMENTATIONS) == set("noise music babble reverberation codec band_limit gain clipping one_of".split())
    crop = white(3200)
    for kind in AUGMENTATIONS:
        options = {"choices": [{"kind": "gain"}]} if kind == "one_of" else {}
        out = make_augmentations([{"kind": kind, **options}], sources)(crop, np.random.default_rng(0))
        assert out.shape == crop.shape and out.dtype == np.float32 and not np.array_equal(out, crop)


# ---------------------------------------------------------------- material that cannot be read


def test_noise_that_cannot_be_read_is_told_at_the_start_as_noise(tmp_path):
    write(tmp_path / "noise/good.wav", np.random.default_rng(0).standard_normal(16_000))
    for name in ("bad.wav", "worse.wav"):
        (tmp_path / "noise" / name).write_text("no audio")
    with pytest.warns(AudioWarning, match="noise folder: 2 of 3 files cannot be used: .*bad.wav .*They are left out"):
        noise = AddNoise(tmp_path / "noise", probability=1.0)
    assert noise.files == [str(tmp_path / "noise/good.wav")]
    (tmp_path / "noise/good.wav").unlink()
    with pytest.raises(AudioError, match="noise folder: 2 of 2 files cannot be used"):
        AddNoise(tmp_path / "noise")


def test_noise_with_a_damaged_body_is_never_the_speechs_problem(tmp_path):
    """Its header is good, so that only a draw shows it: another one is drawn, always the same."""
    rng = np.random.default_rng(0)
    for name in ("bad", "good"):
        soundfile.write(tmp_path / f"{name}.flac", 0.1 * rng.standard_normal(64_000), SAMPLING_RATE)
    content = (tmp_path / "bad.flac").read_bytes()
    (tmp_path / "bad.flac").write_bytes(content[: len(content) // 4])
    speech = write(tmp_path / "speech/a.wav", 0.1 * rng.standard_normal(32_000))
    maker = CropMaker(1, augment=lambda crop, rng, strength: AddNoise(tmp_path, probability=1.0)(crop, rng))
    with pytest.warns(AudioWarning, match="noise: .*bad.flac .*Another one is used"):
        crops = [maker.make(str(speech), 2.0, 0, np.random.default_rng(seed), 1.0) for seed in range(8)]
    assert all(isinstance(crop, dict) for crop in crops)
    with pytest.warns(AudioWarning):
        again = [maker.make(str(speech), 2.0, 0, np.random.default_rng(seed), 1.0) for seed in range(8)]
    assert all(np.array_equal(one["input_values"], two["input_values"]) for one, two in zip(crops, again, strict=True))


def test_material_that_cannot_be_read_at_all_ends_the_run_as_what_it_is(tmp_path):
    speech = write(tmp_path / "speech/a.wav", 0.1 * np.ones(32_000))
    talkers = FileTalkers([str(tmp_path / "gone.wav")])
    maker = CropMaker(1, augment=lambda crop, rng, strength: Babble(talkers)(crop, rng))
    with pytest.warns(AudioWarning), pytest.raises(MaterialError, match="speech for babble: 21 draws .*gone.wav"):
        maker.make(str(speech), 2.0, 0, np.random.default_rng(0), 1.0)


def test_a_crop_of_digital_silence_is_a_problem_of_its_file(tmp_path):
    speech = write(tmp_path / "speech/a.wav", np.zeros(32_000))
    problem = CropMaker(1).make(str(speech), 2.0, 0, np.random.default_rng(0), 1.0)
    assert isinstance(problem, Problem) and problem.path == str(speech) and "a.wav is silent" in problem.reason
