"""Training crops: signal-to-noise ratios, lengths, determinism, epochs, speeds, unreadable files, who draws what."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from mrl_redimnet.audio import SAMPLING_RATE, AudioError
from mrl_redimnet.batches import AddNoise, CropDataset, DrawBatches, InDomain, Problem, collate, fitted, mix_at_snr
from mrl_redimnet.corpus import SpeakerTable, load_corpus
from mrl_redimnet.domains import make_domain

SETTINGS = settings(max_examples=80, deadline=None, derandomize=True, database=None)
SECONDS = {"a/s0/0": 0.5, "a/s0/1": 1.5, "a/s1/0": 0.75, "b/s0/0": 1.0, "c/s0/0": 0.6, "c/s0/1": 0.6}


def write(folder: Path, waves: dict[str, np.ndarray]) -> Path:
    """Files of 16 bit, whose samples come back exactly."""
    for name, wave in waves.items():
        path = folder / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, wave, SAMPLING_RATE, subtype="PCM_16")
    return folder


def dataset(folder: Path, **options) -> CropDataset:
    corpus = load_corpus(folder, cache_dir=folder.parent / "cache")
    return CropDataset(corpus, SpeakerTable(sorted(set(corpus["speaker"]))), **{"crop_seconds": 0.5, **options})


def level(index: int) -> float:
    return (index + 1) / 64


@pytest.fixture(scope="module")
def levels(tmp_path_factory) -> Path:
    """Each file holds one value throughout, `level(i)` for the i-th: a crop tells its file."""
    waves = {name: np.full(round(s * SAMPLING_RATE), level(i)) for i, (name, s) in enumerate(SECONDS.items())}
    return write(tmp_path_factory.mktemp("levels") / "speech", waves)


@pytest.fixture(scope="module")
def noises(tmp_path_factory) -> Path:
    rng = np.random.default_rng(0)
    waves = {f"{kind}/{i}": 0.1 * rng.standard_normal(4000 + 3000 * i) for kind in "xy" for i in range(3)}
    return write(tmp_path_factory.mktemp("noises") / "noise", waves)


def same(one: dict, other: dict) -> bool:
    return one["label"] == other["label"] and np.array_equal(one["input_values"], other["input_values"])


def power_ratio(signal: np.ndarray, mixed: np.ndarray) -> float:
    noise = mixed.astype(np.float64) - signal
    return 10 * np.log10(np.mean(signal.astype(np.float64) ** 2) / np.mean(noise**2))


# ---------------------------------------------------------------- noise


@SETTINGS
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


def test_drawn_ratios_fill_their_range(noises):
    signal = np.random.default_rng(1).standard_normal(5000).astype(np.float32)
    add = AddNoise(noises, snr=(5.0, 15.0), probability=1.0)
    ratios = [power_ratio(signal, add(signal, np.random.default_rng(i))) for i in range(100)]
    assert 4.99 < min(ratios) < 5.5 and 14.5 < max(ratios) < 15.01


def test_share_of_crops_with_noise(noises):
    signal = np.ones(1000, dtype=np.float32)
    add = AddNoise(noises, probability=0.3)
    rng = np.random.default_rng(0)
    changed = [not np.array_equal(signal, add(signal, rng)) for _ in range(500)]
    assert np.mean(changed) == pytest.approx(0.3, abs=0.06)


def test_every_noise_file_is_used_and_none_is_missing(noises, tmp_path):
    assert len(AddNoise(noises).files) == 6
    with pytest.raises(FileNotFoundError, match="nothing is not a folder"):
        AddNoise(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no audio"):
        AddNoise(tmp_path)


# ---------------------------------------------------------------- domains


def upside_down(crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return -crop


@pytest.mark.parametrize(("base_share", "low", "high"), [(0, 1, 1), (1, 0, 0), (0.5, 0.46, 0.54), (0.1, 0.87, 0.93)])
def test_a_share_of_crops_stays_out_of_the_domain(base_share, low, high):
    """Of 2000 draws the standard error is 0.011 at most."""
    crop, bring = np.ones(4, dtype=np.float32), InDomain(upside_down, base_share)
    brought = np.array([bring(crop, np.random.default_rng([7, draw])) for draw in range(2000)])
    assert low <= np.mean(brought[:, 0] == -1) <= high
    assert set(np.unique(brought)) <= {1.0, -1.0}


def test_by_default_a_tenth_of_crops_stays_out_of_the_domain():
    assert InDomain(upside_down).base_share == 0.1


def test_what_is_in_the_domain_has_its_length_and_is_drawn(levels, noises):
    signal = np.random.default_rng(1).standard_normal(8000).astype(np.float32)
    bring = InDomain(make_domain("noisy", noise=noises, room_probability=0.0), base_share=0.0)
    one, again, other = (bring(signal, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert one.shape == signal.shape and one.dtype == np.float32
    assert np.array_equal(one, again) and not np.array_equal(one, other) and not np.array_equal(one, signal)


# ---------------------------------------------------------------- lengths


@SETTINGS
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


def test_a_short_utterance_is_repeated_not_padded(tmp_path):
    wave = np.random.default_rng(0).uniform(0.1, 0.9, 4000).astype(np.float32)  # no zeros
    crops = dataset(write(tmp_path / "speech", {"a/s/0": wave}), crop_seconds=1.1)
    crop = crops[0]["input_values"]
    assert len(crop) == 17600
    assert np.array_equal(crop[4000:], crop[:-4000]) and crop.min() > 0.09


def test_crops_come_from_everywhere_in_an_utterance(tmp_path):
    rising = np.linspace(0, 0.9, 3 * SAMPLING_RATE)
    crops = dataset(write(tmp_path / "speech", {"a/s/0": rising}), crop_seconds=0.5)
    found = np.array([crops[n]["input_values"] for n in range(100)])
    assert np.abs(np.diff(found, axis=1) - 0.9 / len(rising)).max() < 4e-5  # each is one stretch
    assert found[:, 0].min() < 0.05 and found[:, -1].max() > 0.85


# ---------------------------------------------------------------- example n


def test_an_example_does_not_depend_on_those_before(levels, noises):
    options = dict(speeds=(1.0, 0.9), augmentations=[AddNoise(noises)], seed=3)
    one, other = dataset(levels, **options), dataset(levels, **options)
    forwards = [one[n] for n in range(12)]
    backwards = [other[n] for n in reversed(range(12))][::-1]
    assert all(map(same, forwards, backwards))
    assert same(one[5], forwards[5])


def test_an_example_depends_on_the_seed(levels, noises):
    noise = [AddNoise(noises, probability=1.0)]
    zero, one = (dataset(levels, augmentations=noise, seed=seed)[0] for seed in (0, 1))
    assert not np.array_equal(zero["input_values"], one["input_values"])


def test_worker_processes_make_the_same_batches(levels, noises):
    crops = dataset(levels, speeds=(1.0, 1.1), augmentations=[AddNoise(noises)])
    batches = [
        list(DataLoader(crops, batch_sampler=DrawBatches(4, stop=6), collate_fn=collate, num_workers=workers))
        for workers in (0, 2)
    ]
    assert [len(b) for b in batches] == [6, 6]
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one["labels"], other["labels"]) and torch.equal(one["input_values"], other["input_values"])


@pytest.fixture(scope="module")
def voices(tmp_path_factory) -> Path:
    """Noise in VoxCeleb's layout, two files of each of three speakers."""
    rng = np.random.default_rng(3)
    waves = {f"{name}/s/{i}": 0.1 * rng.standard_normal(12_000) for name in "abc" for i in range(2)}
    return write(tmp_path_factory.mktemp("voices") / "speech", waves)


def test_in_a_domain_a_resumed_run_sees_the_same_batches(voices):
    """From another step, in another process: the same crops in and out of the domain."""
    telephone = InDomain(make_domain("telephony", codecs=["mulaw"], loss=(0.0, 0.5)), base_share=0.5)
    crops, plain = dataset(voices, augmentations=[telephone], seed=2), dataset(voices, seed=2)
    whole = [collate([crops[n] for n in batch]) for batch in DrawBatches(3, stop=4)]
    rest = DataLoader(crops, batch_sampler=DrawBatches(3, first=2, stop=4), collate_fn=collate, num_workers=1)
    for one, other in zip(whole[2:], rest, strict=True):
        assert torch.equal(one["input_values"], other["input_values"]) and torch.equal(one["labels"], other["labels"])
    changed = [not same(crops[n], plain[n]) for n in range(12)]
    assert True in changed and False in changed


# ---------------------------------------------------------------- targets


def test_targets_replace_speakers_and_speeds_leave_them(levels):
    """What is learnt belongs to the row: neither the sampler nor the speed changes it."""
    targets = np.array([5, 3, 3, 0, 7, 7])
    for sampler in ("speaker", "utterance"):
        one, fast = (
            dataset(levels, targets=targets, sampler=sampler, speeds=speeds, crop_seconds=0.3)
            for speeds in ((1.0,), (1.0, 0.9, 1.1))
        )
        for crops in (one, fast):
            examples = [crops[n] for n in range(24)]
            files = [round(float(np.median(example["input_values"])) * 64) - 1 for example in examples]
            assert [example["label"] for example in examples] == targets[files].tolist()
            assert len(set(files)) > 3
    batch = collate([fast[n] for n in range(4)])
    assert batch["labels"].dtype == torch.int64


def test_numbers_to_estimate_stay_numbers(levels):
    targets = np.array([20.5, 31.25, 40, 50, 60, 70.75], dtype=np.float32)
    crops = dataset(levels, targets=targets, sampler="utterance", speeds=(1.0, 1.1))
    examples = [crops[n] for n in range(6)]
    assert {type(example["label"]) for example in examples} == {float}
    assert sorted(example["label"] for example in examples) == targets.tolist()
    assert collate(examples)["labels"].dtype == torch.float32


# ---------------------------------------------------------------- epochs


def test_an_utterance_epoch_has_every_utterance_once(levels):
    crops = dataset(levels, sampler="utterance")
    files = [round(float(crops[n]["input_values"][0]) * 64) - 1 for n in range(18)]
    epochs = [files[:6], files[6:12], files[12:]]
    assert [sorted(epoch) for epoch in epochs] == [list(range(6))] * 3
    assert epochs[0] != epochs[1]


def test_a_speaker_epoch_has_every_speaker_once(levels):
    crops = dataset(levels, sampler="speaker")
    labels = [crops[n]["label"] for n in range(30)]
    assert [sorted(labels[i : i + 3]) for i in range(0, 30, 3)] == [[0, 1, 2]] * 10
    assert len({tuple(labels[i : i + 3]) for i in range(0, 30, 3)}) > 1


def test_longer_utterances_of_a_speaker_come_more_often(levels):
    crops = dataset(levels, sampler="speaker", crop_seconds=0.1)
    values = [crops[n]["input_values"][0] for n in range(1500) if crops[n]["label"] == 0]
    shares = [np.mean(np.isclose(values, level(i))) for i in range(3)]
    assert shares == pytest.approx([0.5 / 2.75, 1.5 / 2.75, 0.75 / 2.75], abs=0.06)


def test_labels_are_those_of_the_table(levels):
    corpus = load_corpus(levels, cache_dir=levels.parent / "cache")
    crops = CropDataset(corpus, SpeakerTable(["gone", "c", "b", "a"]), crop_seconds=0.5, sampler="utterance")
    label_of = {round(float(crops[n]["input_values"][0]) * 64) - 1: crops[n]["label"] for n in range(6)}
    assert label_of == {0: 3, 1: 3, 2: 3, 3: 2, 4: 1, 5: 1}
    assert crops.num_labels == 4


def test_an_unknown_sampler_is_refused(levels):
    with pytest.raises(ValueError, match="sampler: got 'random', expected one of speaker, utterance"):
        dataset(levels, sampler="random")


# ---------------------------------------------------------------- speeds


def test_each_speed_moves_the_pitch_and_is_a_speaker_of_its_own(tmp_path):
    tones = {"a": 1000.0, "b": 2000.0}
    times = np.arange(2 * SAMPLING_RATE) / SAMPLING_RATE
    folder = write(
        tmp_path / "speech", {f"{name}/s/0": 0.5 * np.sin(2 * np.pi * hz * times) for name, hz in tones.items()}
    )
    crops = dataset(folder, crop_seconds=1.0, speeds=(1.0, 0.9, 1.1))
    assert crops.num_labels == 6
    pitch_of = {}
    for n in range(40):
        example = crops[n]
        assert len(example["input_values"]) == SAMPLING_RATE and example["input_values"].dtype == np.float32
        peak = np.abs(np.fft.rfft(example["input_values"] * np.hanning(SAMPLING_RATE))).argmax()  # in Hz: one second
        assert pitch_of.setdefault(example["label"], peak) == peak
    assert pitch_of == {0: 1000, 1: 2000, 2: 900, 3: 1800, 4: 1100, 5: 2200}


@pytest.mark.parametrize("speed", [0.9, 1.1, 0.95, 1.03])
@pytest.mark.parametrize("seconds", [0.4, 0.5, 0.55, 1.0])
def test_a_crop_has_its_length_at_every_speed(tmp_path, speed, seconds):
    wave = np.full(round(seconds * SAMPLING_RATE), 0.3)
    crops = dataset(write(tmp_path / "speech", {"a/s/0": wave}), crop_seconds=0.5, speeds=(1.0, speed))
    for n in range(10):
        crop = crops[n]["input_values"]
        assert len(crop) == 8000
        assert crop.reshape(-1, 40).mean(1).min() > 0.2  # no silence; resampling fades a few samples at the ends


# ---------------------------------------------------------------- unreadable files


@pytest.fixture
def damaged(tmp_path) -> CropDataset:
    """Speaker b's file went bad after the folder was scanned."""
    folder = write(tmp_path / "speech", {f"{name}/s/0": np.full(16000, 0.5) for name in "abc"})
    crops = dataset(folder, sampler="utterance")
    (folder / "b/s/0.wav").write_bytes(b"RIFF, once")
    return crops


def test_an_unreadable_file_is_a_problem_not_an_error(damaged):
    examples = [damaged[n] for n in range(3)]
    (problem,) = (example for example in examples if isinstance(example, Problem))
    assert problem.path.endswith("b/s/0.wav") and "cannot be read as audio" in problem.reason


def test_collate_leaves_out_what_could_not_be_read_and_lists_it(damaged):
    batch = collate([damaged[n] for n in range(6)])
    assert batch["input_values"].shape == (4, 8000) and batch["input_values"].dtype == torch.float32
    assert sorted(batch["labels"].tolist()) == [0, 0, 2, 2]
    assert [path.rsplit("speech/")[1] for path, _ in batch["problems"]] == ["b/s/0.wav"] * 2


def test_a_batch_with_nothing_to_read_is_an_error(damaged):
    bad = next(example for example in map(damaged.__getitem__, range(3)) if isinstance(example, Problem))
    with pytest.raises(AudioError, match="No example of a whole batch of 2 .*b/s/0.wav"):
        collate([bad, bad])


# ---------------------------------------------------------------- who draws what

COUNTS = st.integers(1, 5)


@SETTINGS
@given(COUNTS, COUNTS, st.integers(0, 6), st.integers(0, 6))
def test_processes_share_all_draws(batch_size, world, first, more):
    batches = [DrawBatches(batch_size, rank, world, first, first + more) for rank in range(world)]
    drawn = [draw for one in batches for batch in one for draw in batch]
    assert sorted(drawn) == list(range(first * batch_size * world, (first + more) * batch_size * world))
    assert all(len(one) == len(list(one)) == more for one in batches)


@SETTINGS
@given(COUNTS, COUNTS, st.integers(0, 6), st.integers(0, 6))
def test_a_later_start_gives_the_rest(batch_size, world, first, more):
    for rank in range(world):
        everything = list(DrawBatches(batch_size, rank, world, 0, first + more))
        assert list(DrawBatches(batch_size, rank, world, first, first + more)) == everything[first:]
