"""Training crops: lengths, determinism, epochs, groups of a speaker, speeds, unreadable files, who draws what."""

from functools import cache, partial
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from mrl_redimnet.audio.augmentation import Chain, InDomain, Sources, make_augmentations
from mrl_redimnet.audio.domains import make_domain
from mrl_redimnet.audio.io import SAMPLING_RATE, AudioError, Encoded
from mrl_redimnet.data.corpus import SpeakerTable, load_corpus
from mrl_redimnet.data.crops import CorpusTalkers, CropDataset, CropMaker, DrawBatches, Problem, augmented, collate
from mrl_redimnet.data.prepare import prepare
from mrl_redimnet.training.reading import make_recipe
from mrl_redimnet.training.schedules import augmentation_strength

SECONDS = {"a/s0/0": 0.5, "a/s0/1": 1.5, "a/s1/0": 0.75, "b/s0/0": 1.0, "c/s0/0": 0.6, "c/s0/1": 0.6}


def write(folder: Path, waves: dict[str, np.ndarray]) -> Path:
    """Files of 16 bit, whose samples come back exactly."""
    for name, wave in waves.items():
        path = folder / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, wave, SAMPLING_RATE, subtype="PCM_16")
    return folder


@cache
def corpus_of(folder: Path) -> datasets.Dataset:
    return load_corpus(folder, cache_dir=folder.parent / "cache")


def dataset(corpus: Path | datasets.Dataset, seconds=0.5, speeds=(1.0,), augment=None, **options) -> CropDataset:
    """Crops of a folder (or a corpus) of `seconds`, or of (shortest, longest)."""
    corpus = corpus_of(corpus) if isinstance(corpus, Path) else corpus
    speakers = SpeakerTable(sorted(set(corpus["speaker"])))
    limits = seconds if isinstance(seconds, tuple) else (seconds, seconds)
    return CropDataset(corpus, speakers, CropMaker(len(speakers), speeds, augment), limits, **options)


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


def file_of(example: dict) -> int:
    """The place of an example's file in SECONDS, by its level."""
    return round(float(np.median(example["input_values"])) * 64) - 1


def noise_of(noises: Path, probability: float = 0.6) -> Chain:
    return make_augmentations([{"kind": "noise", "probability": probability}], Sources(noise=noises))


# ---------------------------------------------------------------- lengths


def test_a_short_utterance_is_repeated_not_padded(tmp_path):
    wave = np.random.default_rng(0).uniform(0.1, 0.9, 4000).astype(np.float32)  # no zeros
    crops = dataset(write(tmp_path / "speech", {"a/s/0": wave}), 1.1)
    crop = crops[0]["input_values"]
    assert len(crop) == 17600
    assert np.array_equal(crop[4000:], crop[:-4000]) and crop.min() > 0.09


def test_crops_come_from_everywhere_in_an_utterance(tmp_path):
    rising = np.linspace(0, 0.9, 3 * SAMPLING_RATE)
    crops = dataset(write(tmp_path / "speech", {"a/s/0": rising}), 0.5)
    found = np.array([crops[n]["input_values"] for n in range(100)])
    assert np.abs(np.diff(found, axis=1) - 0.9 / len(rising)).max() < 4e-5  # each is one stretch
    assert found[:, 0].min() < 0.05 and found[:, -1].max() > 0.85


LENGTHS = (0.05, 0.3)


def lengths(crops: CropDataset, batches: DrawBatches) -> list[set[int]]:
    """The crops' lengths in each micro-batch."""
    return [{len(crops[draw]["input_values"]) for draw in batch} for batch in batches]


def test_drawn_lengths_fill_their_range_and_are_those_of_a_whole_batch(levels):
    crops = dataset(levels, LENGTHS, batch=6)
    found = lengths(crops, DrawBatches(6, stop=120))
    assert {len(of_batch) for of_batch in found} == {1}
    found = np.array([of_batch.pop() for of_batch in found]) / SAMPLING_RATE
    assert 0.05 <= found.min() < 0.06 and 0.29 < found.max() <= 0.3
    assert np.mean(found) == pytest.approx(0.175, abs=0.025)


def test_lengths_are_set_by_the_seed(levels):
    found = [lengths(dataset(levels, LENGTHS, batch=4, seed=seed), DrawBatches(4, stop=6)) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


@given(
    worlds=st.sampled_from([(1, 4), (2, 2), (4, 1)]),
    group=st.sampled_from([1, 2]),
    limits=st.sampled_from([(0.1, 0.1), (0.05, 0.3)]),
    sampler=st.sampled_from(["speaker", "utterance"]),
    seed=st.integers(0, 1000),
    first=st.integers(0, 50),
)
def test_any_number_of_processes_sees_the_same_crops(levels, worlds, group, limits, sampler, seed, first):
    """One with batches of 8, two of 4 or four of 2; all crops of a step have one length."""
    world, size = worlds[0], 2 * worlds[1]
    options = dict(seconds=limits, speeds=(1.0, 0.9), sampler=sampler, seed=seed, batch=8)
    options |= dict(utterances_per_speaker=group) if sampler == "speaker" else {}
    alone = dataset(levels, **options)
    several = [dataset(levels, **options) for _ in range(world)]
    shares = [DrawBatches(size, rank, world, first, first + 3) for rank in range(world)]
    for whole, *parts in zip(DrawBatches(8, first=first, stop=first + 3), *shares, strict=True):
        expected = [alone[draw] for draw in whole]
        found = [crops[draw] for crops, part in zip(several, parts, strict=True) for draw in part]
        assert all(same(one, other) for one, other in zip(expected, found, strict=True))
        assert len({len(example["input_values"]) for example in found}) == 1


# ---------------------------------------------------------------- example n


def test_an_example_does_not_depend_on_those_before(levels, noises):
    options = dict(speeds=(1.0, 0.9), augment=noise_of(noises), seed=3)
    one, other = dataset(levels, **options), dataset(levels, **options)
    forwards = [one[n] for n in range(12)]
    backwards = [other[n] for n in reversed(range(12))][::-1]
    assert all(map(same, forwards, backwards))
    assert same(one[5], forwards[5])


def test_an_example_depends_on_the_seed(levels, noises):
    zero, one = (dataset(levels, augment=noise_of(noises, 1.0), seed=seed)[0] for seed in (0, 1))
    assert not np.array_equal(zero["input_values"], one["input_values"])


def test_worker_processes_make_the_same_batches(levels, noises):
    crops = dataset(levels, LENGTHS, speeds=(1.0, 1.1), augment=noise_of(noises), batch=4)
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


TELEPHONE = InDomain(make_domain("telephony", codecs=["mulaw"], loss=(0.0, 0.5)), clean_ratio=0.5)


def test_in_a_domain_a_resumed_run_sees_the_same_batches(voices):
    """From another step, in another process: the same crops in and out of the domain."""
    crops, plain = dataset(voices, augment=partial(augmented, Chain(), TELEPHONE), seed=2), dataset(voices, seed=2)
    whole = [collate([crops[n] for n in batch]) for batch in DrawBatches(3, stop=4)]
    rest = DataLoader(crops, batch_sampler=DrawBatches(3, first=2, stop=4), collate_fn=collate, num_workers=1)
    for one, other in zip(whole[2:], rest, strict=True):
        assert torch.equal(one["input_values"], other["input_values"]) and torch.equal(one["labels"], other["labels"])
    changed = [not same(crops[n], plain[n]) for n in range(12)]
    assert True in changed and False in changed


def all_at_once(voices: Path, noises: Path) -> CropDataset:
    """Crops with everything that is drawn: groups, lengths, speeds, babble of the corpus, rising noise, a domain."""
    entries = [{"kind": "noise", "probability": 0.7}, {"kind": "babble", "probability": 0.5, "snr": [0, 5]}]
    chain = make_augmentations(entries, Sources(noise=noises, talkers=CorpusTalkers(corpus_of(voices))))
    recipe = make_recipe(steps=8, batch_size=4, augmentation_schedule=[0.0, 1.0])
    return dataset(
        voices,
        (0.1, 0.4),
        (1.0, 0.9, 1.1),
        partial(augmented, chain, TELEPHONE),
        batch=4,
        utterances_per_speaker=2,
        strength=partial(augmentation_strength, crops=4, recipe=recipe, steps=recipe.schedule.steps),
        seed=5,
    )


@pytest.mark.parametrize("first", [1, 5])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(voices, noises, first):
    whole = [
        collate([crops[n] for n in batch])
        for crops in [all_at_once(voices, noises)]
        for batch in DrawBatches(4, stop=8)
    ]
    loader = partial(DataLoader, all_at_once(voices, noises), collate_fn=collate, num_workers=1)
    rest = list(loader(batch_sampler=DrawBatches(4, first=first, stop=8)))
    assert len(rest) == 8 - first and len({batch["input_values"].shape for batch in whole}) == 8
    for one, other in zip(whole[first:], rest, strict=True):
        assert torch.equal(one["input_values"], other["input_values"]) and torch.equal(one["labels"], other["labels"])


# ---------------------------------------------------------------- what is done to crops


def told_strength(crop: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    return np.full_like(crop, strength)


def test_the_strength_of_a_draw_reaches_the_augmentation(levels):
    crops = dataset(levels, augment=told_strength, strength=lambda draw: draw / 64)
    assert [set(crops[draw]["input_values"].tolist()) for draw in (0, 1, 48, 64)] == [{0.0}, {1 / 64}, {0.75}, {1.0}]


def test_without_one_augmentations_have_their_full_strength(levels):
    assert set(dataset(levels, augment=told_strength)[3]["input_values"].tolist()) == {1.0}


def test_augmentation_rises_over_the_shares_of_a_run(levels, noises):
    recipe = make_recipe(steps=100, batch_size=4, augmentation_schedule=[0.2, 0.6])
    strength = partial(augmentation_strength, crops=4, recipe=recipe, steps=recipe.schedule.steps)
    crops = dataset(levels, 0.1, augment=noise_of(noises, 1.0), strength=strength)
    plain = dataset(levels, 0.1)
    changed = np.array([not same(crops[draw], plain[draw]) for draw in range(400)])
    assert not changed[:80].any() and changed[240:].all()
    assert np.mean(changed[120:200]) == pytest.approx(0.5, abs=0.15)
    assert changed[80:160].sum() < changed[160:240].sum()


def doubled(crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return 2 * crop


def shifted(crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return crop + 1


def test_crops_are_augmented_first_and_then_brought_into_the_domain():
    crop, chain = np.full(8, 0.25, dtype=np.float32), Chain([partial(apply_always, shifted)])
    rng = np.random.default_rng
    assert augmented(chain, None, crop, rng(0), 1.0).tolist() == [1.25] * 8
    assert augmented(chain, InDomain(doubled, 0.0), crop, rng(0), 1.0).tolist() == [2.5] * 8
    assert augmented(Chain(), InDomain(doubled, 0.0), crop, rng(0), 0.0).tolist() == [0.5] * 8  # whatever the strength


def apply_always(augment, crop: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    return augment(crop, rng)


def test_a_maker_makes_crops_at_the_speed_it_is_told(levels):
    """Or at a drawn one: each comes."""
    maker, source = CropMaker(7, (1.0, 0.9, 1.1)), str(levels / "a/s0/1.wav")
    for speed in range(3):
        example = maker.make(source, 1.5, 4, np.random.default_rng(0), 0.5, speed=speed)
        assert example["label"] == 4 + 7 * speed and example["input_values"].shape == (8000,)
        assert example["input_values"].dtype == np.float32
    drawn = [maker.make(source, 1.5, 4, np.random.default_rng(seed), 0.1)["label"] for seed in range(300)]
    assert np.bincount(drawn, minlength=21)[[4, 11, 18]] == pytest.approx([100] * 3, abs=30)


def test_a_batch_says_how_long_it_took_to_make(levels):
    examples = [dataset(levels)[n] for n in range(4)]
    assert all(example["made_in"] > 0 for example in examples)
    assert collate(examples)["made_in"] == pytest.approx(sum(example["made_in"] for example in examples))


# ---------------------------------------------------------------- babble of the corpus itself


@pytest.mark.parametrize("seconds", [0.3, 2.0])
def test_talkers_are_stretches_of_every_utterance(levels, seconds):
    talkers, samples = CorpusTalkers(corpus_of(levels)), round(seconds * SAMPLING_RATE)
    drawn = [talkers.draw(np.random.default_rng(seed), samples) for seed in range(60)]
    assert {(voice.shape, voice.dtype) for voice in drawn} == {((samples,), np.dtype(np.float32))}
    assert {round(float(voice[0]) * 64) - 1 for voice in drawn} == set(range(len(SECONDS)))
    assert all(np.ptp(voice) == 0 for voice in drawn)  # a short one is repeated, not padded
    assert np.array_equal(talkers.draw(np.random.default_rng(7), samples), drawn[7])


def test_talkers_are_drawn_from_anywhere_in_an_utterance(tmp_path):
    rising = np.linspace(0, 0.9, 3 * SAMPLING_RATE)
    talkers = CorpusTalkers(corpus_of(write(tmp_path / "speech", {"a/s/0": rising})))
    starts = [talkers.draw(np.random.default_rng(seed), 8000)[0] for seed in range(100)]
    assert min(starts) < 0.05 and 0.7 < max(starts) < 0.76


# ---------------------------------------------------------------- parquet files


@pytest.fixture(scope="module")
def prepared(voices, tmp_path_factory) -> datasets.Dataset:
    """The rows of `voices` from parquet files, in the folder's order."""
    folder = tmp_path_factory.mktemp("prepared")
    prepare(voices, folder / "shards", cache_dir=folder / "cache")
    corpus = load_corpus(folder / "shards", cache_dir=folder / "cache")
    return corpus.select(np.argsort(corpus["path"]))


def test_crops_of_parquet_files_are_those_of_the_files_in_them(voices, prepared, noises):
    assert prepared["path"] == corpus_of(voices)["path"] and prepared[0]["audio"]["bytes"] is not None
    options = dict(seconds=0.3, speeds=(1.0, 0.9), utterances_per_speaker=2)
    made = []
    for corpus in (corpus_of(voices), prepared):
        talkers = CorpusTalkers(corpus)
        chain = make_augmentations([{"kind": "babble", "count": [1, 2]}], Sources(talkers=talkers))
        crops = dataset(corpus, augment=chain, **options)
        made.append([crops[n] for n in range(8)])
    assert all(map(same, *made))


def test_damaged_audio_in_parquet_files_is_a_problem_with_a_name():
    broken = Encoded("a/s/0.wav", b"RIFF, once")
    problem = CropMaker(1).make(broken, 1.0, 0, np.random.default_rng(0), 0.5)
    assert isinstance(problem, Problem) and problem.path == "a/s/0.wav" and "cannot be read" in problem.reason


# ---------------------------------------------------------------- targets


def test_targets_replace_speakers_and_speeds_leave_them(levels):
    """What is learnt belongs to the row: neither the sampler nor the speed changes it."""
    targets = np.array([5, 3, 3, 0, 7, 7])
    for sampler in ("speaker", "utterance"):
        one, fast = (
            dataset(levels, 0.3, speeds=speeds, targets=targets, sampler=sampler)
            for speeds in ((1.0,), (1.0, 0.9, 1.1))
        )
        for crops in (one, fast):
            examples = [crops[n] for n in range(24)]
            files = [file_of(example) for example in examples]
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
    files = [file_of(crops[n]) for n in range(18)]
    assert crops.epoch_length == 6
    epochs = [files[:6], files[6:12], files[12:]]
    assert [sorted(epoch) for epoch in epochs] == [list(range(6))] * 3
    assert epochs[0] != epochs[1]


def test_a_speaker_epoch_has_every_speaker_once(levels):
    crops = dataset(levels, sampler="speaker")
    labels = [crops[n]["label"] for n in range(30)]
    assert crops.epoch_length == 3
    assert [sorted(labels[i : i + 3]) for i in range(0, 30, 3)] == [[0, 1, 2]] * 10
    assert len({tuple(labels[i : i + 3]) for i in range(0, 30, 3)}) > 1


def test_longer_utterances_of_a_speaker_come_more_often(levels):
    crops = dataset(levels, 0.1, sampler="speaker")
    values = [crops[n]["input_values"][0] for n in range(1500) if crops[n]["label"] == 0]
    shares = [np.mean(np.isclose(values, level(i))) for i in range(3)]
    assert shares == pytest.approx([0.5 / 2.75, 1.5 / 2.75, 0.75 / 2.75], abs=0.06)


def test_labels_are_those_of_the_table(levels):
    names = SpeakerTable(["gone", "c", "b", "a"])
    crops = CropDataset(corpus_of(levels), names, CropMaker(4), (0.5, 0.5), sampler="utterance")
    assert {file_of(crops[n]): crops[n]["label"] for n in range(6)} == {0: 3, 1: 3, 2: 3, 3: 2, 4: 1, 5: 1}


def test_an_unknown_sampler_is_refused(levels):
    with pytest.raises(ValueError, match="sampler: got 'random', expected one of speaker, utterance"):
        dataset(levels, sampler="random")


# ---------------------------------------------------------------- groups of one speaker

MOST = {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "f": 1}  # utterances of each speaker


@pytest.fixture(scope="module")
def groups(tmp_path_factory) -> datasets.Dataset:
    """Files of 0.2 s and more, each with a level of its own: the n-th row's is level(n)."""
    names = [f"{name}/s/{i}" for name, count in MOST.items() for i in range(count)]
    waves = {name: np.full(3200 + 800 * i, level(i)) for i, name in enumerate(names)}
    return corpus_of(write(tmp_path_factory.mktemp("groups") / "speech", waves))


@given(
    kept=st.lists(st.booleans(), min_size=16, max_size=16).filter(any),
    size=st.integers(1, 5),
    speeds=st.sampled_from([(1.0,), (1.0, 0.9, 1.1)]),
    seed=st.integers(0, 10**6),
    epoch=st.integers(0, 3),
)
def test_an_epoch_has_every_speaker_once_with_different_utterances(groups, kept, size, speeds, seed, epoch):
    """K draws in a row are of one speaker and one speed: of one class. Utterances come again only where too few."""
    corpus = groups.select(np.flatnonzero(kept))
    files = np.flatnonzero(kept)
    crops = dataset(corpus, 0.1, speeds, utterances_per_speaker=size, seed=seed)
    speakers = len(crops.speakers)
    assert crops.epoch_length == speakers * size
    examples = [crops[epoch * crops.epoch_length + n] for n in range(crops.epoch_length)]
    seen = []
    for start in range(0, len(examples), size):
        group = examples[start : start + size]
        (label,) = {example["label"] for example in group}
        assert 0 <= label < speakers * len(speeds)
        seen.append(label % speakers)
        name = crops.speakers.names[seen[-1]]
        own = [file for file, row in zip(files, corpus, strict=True) if row["speaker"] == name]
        drawn = [file_of(example) for example in group]
        assert set(drawn) <= set(own)
        counts = [drawn.count(file) for file in own]
        assert max(counts) - min(counts) <= 1 if size >= len(own) else max(counts) == 1
    assert sorted(seen) == list(range(speakers))


def test_groups_have_every_speed_and_others_each_time(groups):
    crops = dataset(groups, 0.1, (1.0, 0.9, 1.1), utterances_per_speaker=2)
    labels = np.array([crops[n]["label"] for n in range(0, 600, 2)])
    assert np.bincount(labels // len(MOST)) == pytest.approx([100] * 3, abs=30)
    drawn = {
        frozenset((file_of(crops[n]), file_of(crops[n + 1]))) for n in range(0, 600, 2) if crops[n]["label"] % 6 == 4
    }
    assert len(drawn) == 10  # all pairs of five


def test_in_groups_longer_utterances_come_more_often(tmp_path):
    waves = {
        f"a/s/{i}": np.full(1600 * (1 + 4 * (i == 0)), level(i)) for i in range(4)
    }  # 5/8 of the speech is the first
    crops = dataset(write(tmp_path / "speech", waves), 0.05, utterances_per_speaker=2)
    first = [file_of(crops[n]) == 0 for n in range(0, 800, 2)]
    assert np.mean(first) == pytest.approx(5 / 8, abs=0.07)


def test_a_group_is_the_same_wherever_it_is_begun(groups):
    """Its second draw, made alone in another process, belongs to the first."""
    options = dict(seconds=0.1, speeds=(1.0, 0.9), utterances_per_speaker=4, seed=9)
    crops = dataset(groups, **options)
    forwards = [crops[n] for n in range(48)]
    for n in (47, 5, 6, 30, 29):
        assert same(dataset(groups, **options)[n], forwards[n])


# ---------------------------------------------------------------- speeds


@pytest.mark.parametrize("group", [1, 2])
def test_each_speed_moves_the_pitch_and_is_a_speaker_of_its_own(tmp_path, group):
    times = np.arange(2 * SAMPLING_RATE) / SAMPLING_RATE
    tones = {f"{name}/s/{i}": hz for name, hz in (("a", 1000.0), ("b", 2000.0)) for i in range(2)}
    waves = {name: 0.5 * np.sin(2 * np.pi * hz * times) for name, hz in tones.items()}
    crops = dataset(write(tmp_path / "speech", waves), 1.0, (1.0, 0.9, 1.1), utterances_per_speaker=group)
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
    crops = dataset(write(tmp_path / "speech", {"a/s/0": wave}), 0.5, speeds=(1.0, speed))
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


@given(COUNTS, COUNTS, st.integers(0, 6), st.integers(0, 6))
def test_processes_share_all_draws(batch_size, world, first, more):
    batches = [DrawBatches(batch_size, rank, world, first, first + more) for rank in range(world)]
    drawn = [draw for one in batches for batch in one for draw in batch]
    assert sorted(drawn) == list(range(first * batch_size * world, (first + more) * batch_size * world))
    assert all(len(one) == len(list(one)) == more for one in batches)


@given(COUNTS, COUNTS, st.integers(0, 6), st.integers(0, 6))
def test_a_later_start_gives_the_rest(batch_size, world, first, more):
    for rank in range(world):
        everything = list(DrawBatches(batch_size, rank, world, 0, first + more))
        assert list(DrawBatches(batch_size, rank, world, first, first + more)) == everything[first:]
