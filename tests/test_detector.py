"""The domain detector: facts about signals, unseen speakers, doubt, saved files, the regression."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from scipy.signal import lfilter

from mrl_redimnet.adapters.detector import (
    FEATURES,
    MAX_SAMPLES,
    MIN_SAMPLES,
    SETTINGS_FILE,
    WEIGHTS_FILE,
    DomainDetector,
    features,
)
from mrl_redimnet.audio.domains import make_domain, simulate
from mrl_redimnet.audio.io import SAMPLING_RATE
from mrl_redimnet.data.synthetic import synthesise

DOMAINS = ("clean", "noisy", "telephony")
ROOMS = 2  # a small bank: simulating a room takes up to a second


def speech(speaker: int, seconds: float = 1.5) -> np.ndarray:
    return synthesise(0, speaker, 0, 0, (seconds, seconds)).astype(np.float32)


def white(samples: int = 3 * SAMPLING_RATE, seed: int = 0) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal(samples).astype(np.float32)


def facts(wave: np.ndarray) -> dict[str, float]:
    return dict(zip(FEATURES, features(wave).tolist(), strict=True))


@pytest.fixture(scope="module")
def domains(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("noises")
    for i, colour in enumerate((0.0, 0.9)):
        soundfile.write(folder / f"{i}.wav", lfilter([1], [1, -colour], white(seed=i)), SAMPLING_RATE, subtype="FLOAT")
    return {
        name: make_domain(name, noise=folder, **({"room_count": ROOMS} if name == "noisy" else {})) for name in DOMAINS
    }


@pytest.fixture(scope="module")
def heard(domains):
    """heard(speakers) -> {domain: waveforms}."""

    def of(speakers: range) -> dict[str, list[np.ndarray]]:
        clean = {speaker: speech(speaker) for speaker in speakers}
        return {
            name: [simulate(domain, wave, f"{speaker}.wav") for speaker, wave in clean.items()]
            for name, domain in domains.items()
        }

    return of


@pytest.fixture(scope="module")
def detector(heard) -> DomainDetector:
    return DomainDetector.train(heard(range(1, 17)))


@pytest.fixture(scope="module")
def unseen(heard) -> dict[str, list[np.ndarray]]:
    return heard(range(30, 42))


# ---------------------------------------------------------------- facts about signals


def test_white_noise_has_the_shares_of_its_bandwidths():
    found = facts(white())
    bands = dict(low_share=250 - 78, voice_share=3400 - 250, edge_share=600, high_share=4000)
    for name, hertz in bands.items():
        assert found[name] == pytest.approx(10 * np.log10(hertz / 7922), abs=0.5), name
    assert found["quiet_high"] == pytest.approx(found["high_share"], abs=0.7)
    assert found["rolloff_95"] == pytest.approx(0.95 * 8, abs=0.1)
    assert found["rolloff_99"] == pytest.approx(0.99 * 8, abs=0.1)
    assert found["tilt"] == pytest.approx(0, abs=0.5)
    assert found["quiet_flatness"] > -1
    assert found["spread"] < 1.5


def test_a_telephone_line_leaves_nothing_outside_its_band(domains):
    wave = speech(1)
    before, after = facts(wave), facts(simulate(domains["telephony"], wave, "1.wav"))
    assert after["high_share"] < before["high_share"] - 15
    assert after["low_share"] < before["low_share"] - 5
    assert after["rolloff_99"] < 3.5


def test_tilt_is_the_slope_of_a_filter():
    brown = lfilter([1], [1, -0.999], white())  # falls by 6 dB per octave
    assert facts(brown)["tilt"] == pytest.approx(-6, abs=0.7)


@pytest.mark.parametrize("snr", [10, 20, 40])
def test_snr_is_the_step_from_background_to_foreground(snr):
    on = (np.arange(3 * SAMPLING_RATE) // (SAMPLING_RATE // 2)) % 2
    found = facts(white() * 10 ** (-snr / 20 * (1 - on)))
    for name in ("snr", "snr_voice", "snr_high"):
        assert found[name] == pytest.approx(snr, abs=2.5), name


@pytest.mark.parametrize("rt60", [0.25, 0.5])
def test_decay_is_that_of_a_room(rt60):
    seconds = np.arange(3 * SAMPLING_RATE) / SAMPLING_RATE % 0.5
    found = facts(white() * 10 ** (-3 * seconds / rt60))
    assert found["decay"] == pytest.approx(-60 / rt60, rel=0.2)


def test_memory_tells_slow_changes_from_fast_ones():
    seconds = np.arange(3 * SAMPLING_RATE) / SAMPLING_RATE
    slow, fast = (facts(white() * (1.1 + np.sin(2 * np.pi * hertz * seconds)))["memory"] for hertz in (0.5, 3.125))
    assert slow > 0.7 and fast < -0.5  # 160 ms are half a period of 3.125 Hz


@given(gain=st.floats(1e-25, 1e25), speaker=st.integers(1, 3), quantised=st.booleans())
def test_the_volume_does_not_matter(gain, speaker, quantised):
    wave = speech(speaker, 0.6)
    wave[:3000] = 0  # digital silence has no level of its own
    if quantised:
        wave = np.round(wave * 2**15) / 2**15
    np.testing.assert_allclose(features(gain * wave), features(wave), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    "wave", [speech(1, 0.3), white(MIN_SAMPLES), np.eye(1, MIN_SAMPLES)[0], np.eye(1, 9000, 8999)[0]]
)
def test_short_and_odd_audio_has_finite_facts(wave):
    found = features(wave)
    assert found.shape == (len(FEATURES),) and found.dtype == np.float32
    assert np.isfinite(found).all()


def test_of_long_audio_the_middle_is_listened_to():
    long = np.concatenate([white(70_000), np.tile(speech(1, 3.0), 10), 5 * white(70_000, seed=1)])
    np.testing.assert_array_equal(features(long), features(long[70_000:-70_000]))
    assert len(long) == MAX_SAMPLES + 140_000


@pytest.mark.parametrize("wave", [np.zeros((2, 8000)), np.full(8000, np.nan), np.full(8000, np.inf)])
def test_what_is_no_waveform_is_refused(wave, detector):
    with pytest.raises(ValueError, match="waveform"):
        features(wave)
    with pytest.raises(ValueError, match="waveform"):
        detector.detect(wave)


# ---------------------------------------------------------------- answers


def test_unseen_speakers_are_told_apart(detector, unseen):
    right = {
        name: np.mean([max(p := detector.detect(wave).probabilities, key=p.get) == name for wave in waves])
        for name, waves in unseen.items()
    }
    assert np.mean(list(right.values())) > 0.85, right  # chance: 0.33
    assert right["telephony"] == 1.0


def test_detection_is_an_adapter_or_the_base(detector, unseen):
    assert detector(unseen["telephony"][0]).domain == "telephony"
    clean = [detector.detect(wave) for wave in unseen["clean"]]
    assert sum(found.domain is None for found in clean) > 0.8 * len(clean)
    for found in clean:
        assert sum(found.probabilities.values()) == pytest.approx(1)
        assert tuple(found.probabilities) == DOMAINS


def test_a_quiet_telephone_recording_of_16_bits_is_one_still(detector, unseen):
    for wave in unseen["telephony"]:
        quiet = np.round(wave / np.abs(wave).max() * 0.01 * 2**15) / 2**15  # rounding is noise up to 8 kHz
        assert detector(quiet).domain == "telephony"


def test_choose_knows_the_adapters_of_the_bank(detector, unseen):
    waves = [unseen["telephony"][0], unseen["clean"][0], unseen["telephony"][1]]
    assert detector.choose(waves, ["noisy", "telephony"]) == ["telephony", None, "telephony"]
    assert detector.choose(waves, ["noisy"]) == [None, None, None]
    assert detector.choose(waves, []) == [None, None, None]


def test_clean_is_the_base_even_if_an_adapter_is_called_so(detector, unseen):
    certain = replace(detector, threshold=0.0)
    clean = [w for w in unseen["clean"] if (p := certain(w).probabilities)["clean"] == max(p.values())]
    assert clean and set(certain.choose(clean, list(DOMAINS))) == {None}


def test_below_the_threshold_is_the_base(detector, unseen):
    wave = unseen["noisy"][0]
    probability = max(detector(wave).probabilities.values())
    assert 0.5 < probability < 1
    assert replace(detector, threshold=probability).choose([wave], ["noisy"]) == ["noisy"]
    doubting = replace(detector, threshold=np.nextafter(probability, 1))
    assert doubting.choose([wave], ["noisy"]) == [None]
    assert doubting(wave).probabilities == detector(wave).probabilities


@pytest.mark.parametrize(
    "wave",
    [np.zeros(16000), np.full(16000, 0.3), white(MIN_SAMPLES - 1), np.zeros(0)],
    ids=["silence", "constant", "short", "empty"],
)
def test_nothing_to_hear_is_the_base(detector, wave):
    found = replace(detector, threshold=0.0).detect(wave)
    assert found.domain is None
    assert set(found.probabilities.values()) == {1 / 3}
    with pytest.raises(ValueError, match="0.3 s"):
        features(wave)


# ---------------------------------------------------------------- files


def test_a_saved_detector_answers_the_same(detector, unseen, tmp_path):
    replace(detector, threshold=0.25).save(tmp_path / "runs" / "detector")
    loaded = DomainDetector.load(tmp_path / "runs" / "detector")
    assert loaded.domains == DOMAINS and loaded.threshold == 0.25
    for waves in unseen.values():
        assert loaded.detect(waves[0]) == replace(detector, threshold=0.25).detect(waves[0])
    assert {file.name for file in (tmp_path / "runs" / "detector").iterdir()} == {SETTINGS_FILE, WEIGHTS_FILE}


def test_saving_replaces_a_detector_and_nothing_else(detector, tmp_path):
    detector.save(tmp_path / "mine")
    replace(detector, threshold=0.5).save(tmp_path / "mine")
    assert DomainDetector.load(tmp_path / "mine").threshold == 0.5
    (tmp_path / "mine" / "adapter_model.safetensors").write_text("precious")
    with pytest.raises(FileExistsError, match="adapter_model"):
        detector.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "adapter_model.safetensors").read_text() == "precious"


def test_an_interrupted_save_leaves_the_old_detector(detector, tmp_path, monkeypatch):
    detector.save(tmp_path / "mine")
    monkeypatch.setattr("mrl_redimnet.adapters.detector.json.dumps", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        replace(detector, threshold=0.5).save(tmp_path / "mine")
    assert DomainDetector.load(tmp_path / "mine").threshold == detector.threshold
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def change_settings(**changes):
    def change(folder: Path):
        file = folder / SETTINGS_FILE
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def change_weights(**changes):
    def change(folder: Path):
        file = folder / WEIGHTS_FILE
        arrays = {**load_file(file), **changes}
        save_file({name: array for name, array in arrays.items() if array is not None}, file)

    return change


MALFORMED = {
    "no JSON": (lambda folder: (folder / SETTINGS_FILE).write_text("{"), SETTINGS_FILE),
    "no object": (lambda folder: (folder / SETTINGS_FILE).write_text("[1]"), SETTINGS_FILE),
    "no key": (lambda folder: (folder / SETTINGS_FILE).write_text('{"domains": []}'), SETTINGS_FILE),
    "no UTF-8": (lambda folder: (folder / SETTINGS_FILE).write_bytes(b"\xff"), SETTINGS_FILE),
    "other features": (change_settings(features=list(FEATURES)[::-1]), SETTINGS_FILE),
    "no clean": (change_settings(domains=["noisy", "clean", "telephony"]), SETTINGS_FILE),
    "a domain less": (change_settings(domains=["clean", "noisy"]), SETTINGS_FILE),
    "threshold": (change_settings(threshold=1.5), SETTINGS_FILE),
    "threshold no number": (change_settings(threshold="0.5"), SETTINGS_FILE),
    "no safetensors": (lambda folder: (folder / WEIGHTS_FILE).write_bytes(b"x" * 100), WEIGHTS_FILE),
    "a tensor less": (change_weights(bias=None), WEIGHTS_FILE),
    "shape": (change_weights(mean=np.zeros(3)), WEIGHTS_FILE),
    "type": (change_weights(bias=np.zeros(3, np.float32)), WEIGHTS_FILE),
    "NaN": (change_weights(bias=np.array([0, np.nan, 0])), WEIGHTS_FILE),
    "scale": (change_weights(scale=np.zeros(len(FEATURES))), WEIGHTS_FILE),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_files_are_named(detector, tmp_path, what):
    detector.save(tmp_path / "mine")
    change, file = MALFORMED[what]
    change(tmp_path / "mine")
    with pytest.raises(ValueError, match=file):
        DomainDetector.load(tmp_path / "mine")


@pytest.mark.parametrize("file", [SETTINGS_FILE, WEIGHTS_FILE])
def test_missing_files_are_named(detector, tmp_path, file):
    detector.save(tmp_path / "mine")
    (tmp_path / "mine" / file).unlink()
    with pytest.raises(FileNotFoundError, match=file):
        DomainDetector.load(tmp_path / "mine")


# ---------------------------------------------------------------- the regression


def examples(counts=(40, 30, 20), seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping clouds, features of very different sizes, one of them constant."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(range(len(counts)), counts)
    rows = rng.standard_normal((len(labels), len(FEATURES))) + np.eye(len(counts), len(FEATURES))[labels]
    rows = rows * np.logspace(-3, 3, len(FEATURES)) + 7
    rows[:, 5] = 2
    return rows, labels


def test_the_regression_is_at_its_minimum():
    rows, labels = examples()
    found = DomainDetector.fit(rows, labels, DOMAINS, l2=0.01)
    errors = (found.probabilities(rows) - np.eye(3)[labels]) / (3 * np.bincount(labels)[labels])[:, None]
    standardised = (rows - rows.mean(0)) / np.where(rows.std(0) > 0, rows.std(0), 1)
    np.testing.assert_allclose(errors.T @ standardised + 0.01 * found.weight, 0, atol=1e-6)
    np.testing.assert_allclose(errors.sum(0), 0, atol=1e-6)


def test_training_is_deterministic_and_knows_no_order(heard):
    waves = heard(range(1, 4))
    one, other = DomainDetector.train(waves), DomainDetector.train(dict(reversed(waves.items())))
    assert one.domains == DOMAINS and other.domains == ("clean", "telephony", "noisy")
    wave = speech(50)
    assert DomainDetector.train(waves)(wave) == one(wave)
    for name, probability in one(wave).probabilities.items():
        assert other(wave).probabilities[name] == pytest.approx(probability, abs=1e-5)


def test_domains_count_the_same_whatever_they_have():
    rows, labels = examples()
    few = DomainDetector.fit(rows, labels, DOMAINS)
    more = np.concatenate([np.arange(len(rows)), *[np.flatnonzero(labels == 2)] * 9])
    many = DomainDetector.fit(rows[more], labels[more], DOMAINS)
    assert few.probabilities(rows).mean(0) == pytest.approx(many.probabilities(rows).mean(0), abs=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rows=np.zeros((90, 3))), "features"),
        (dict(rows=np.full((90, len(FEATURES)), np.nan)), "features"),
        (dict(labels=np.zeros(90, int)), "noisy, telephony: no examples"),
        (dict(labels=np.full(90, 3)), "labels"),
        (dict(labels=np.zeros(90)), "labels"),
        (dict(domains=("noisy", "clean", "telephony")), "domains"),
        (dict(domains=("clean", "noisy", "noisy")), "domains"),
        (dict(l2=-1.0), "l2"),
        (dict(threshold=2.0), "threshold"),
    ],
)
def test_bad_training_data_is_refused(changes, message):
    rows, labels = examples()
    with pytest.raises(ValueError, match=message):
        DomainDetector.fit(**{**dict(rows=rows, labels=labels, domains=DOMAINS), **changes})


def test_training_needs_clean_examples():
    with pytest.raises(ValueError, match="clean"):
        DomainDetector.train({"noisy": [white()], "telephony": [white()]})
