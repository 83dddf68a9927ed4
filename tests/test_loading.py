"""Where batches come from: the same use of speech at hand and of a stream, steps, phases, probes, unusable rows."""

from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from mrl_redimnet.audio.io import SAMPLING_RATE, read_audio
from mrl_redimnet.data.corpus import SpeakerTable, load_corpus, speakers_of
from mrl_redimnet.data.crops import CropDataset, CropMaker, augmented
from mrl_redimnet.data.loaders import DrawnCrops, Loading, StreamedCrops
from mrl_redimnet.data.prepare import prepare


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Five utterances of each of four speakers, one of them too short for a crop's minimum."""
    root = tmp_path_factory.mktemp("loading") / "speech"
    rng = np.random.default_rng(0)
    for speaker in "abcd":
        for number in range(5):
            seconds = 0.1 if (speaker, number) == ("d", 4) else rng.uniform(0.6, 1.2)
            path = root / speaker / "s" / f"{number}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, 0.1 * rng.standard_normal(round(seconds * SAMPLING_RATE)), SAMPLING_RATE)
    return root


@pytest.fixture(scope="module")
def parquet(folder) -> Path:
    out = folder.parent / "parquet"
    prepare(folder, out, shard_mb=0.15)
    return out


def drawn(folder: Path, **options) -> DrawnCrops:
    corpus = load_corpus(folder, cache_dir=folder.parent / "cache")
    speakers = SpeakerTable(speakers_of(corpus))
    dataset = CropDataset(corpus, speakers, CropMaker(4), crop_seconds=(0.5, 0.5), sampler="utterance")
    return DrawnCrops(dataset, Loading(**{"batch_size": 3, "accumulation": 2, **options}))


def streamed(parquet: Path, **options) -> StreamedCrops:
    loading = Loading(**{"batch_size": 3, "accumulation": 2, **options})
    return StreamedCrops(str(parquet), {}, CropMaker(4), SpeakerTable(list("abcd")), 0.5, 0.3, loading)


@pytest.fixture(params=["drawn", "streamed"])
def make(request, folder, parquet):
    return partial(drawn, folder) if request.param == "drawn" else partial(streamed, parquet)


def same(one: list[dict], other: list[dict]) -> bool:
    keys = ("input_values", "labels")
    return len(one) == len(other) and all(
        torch.equal(a[key], b[key]) for a, b in zip(one, other, strict=True) for key in keys
    )


def test_steps_take_as_many_batches_as_they_accumulate(make):
    batches = list(make().batches(0, 4))
    assert len(batches) == 8
    assert all(batch["input_values"].shape[1] == 8000 and batch["made_in"] > 0 for batch in batches)


def test_phases_follow_each_other_as_if_there_were_one(make):
    whole, crops = list(make().batches(0, 5)), make()
    assert same(whole, [*crops.batches(0, 2), *crops.batches(2, 5)])


def test_what_was_stopped_goes_on_with_the_next_batch(make):
    whole, stopped = list(make().batches(0, 5)), make()
    first = list(islice(stopped.batches(0, 5), 4))  # two steps of five
    resumed = make()
    resumed.go_on(stopped.state())
    assert same(whole, [*first, *resumed.batches(2, 5)])


def test_processes_see_different_crops(make):
    one, other = (list(make(rank=rank, world=2, accumulation=1).batches(0, 2)) for rank in range(2))
    found = [batch["input_values"] for batch in (*one, *other)]
    assert not any(torch.equal(a, b) for i, crops in enumerate(found) for a in crops for c in found[i + 1 :] for b in c)


def test_a_probe_is_the_same_in_every_process_and_not_trained_on(make):
    one, other = (list(make(rank=rank, world=2).probe(2)) for rank in range(2))
    assert same(one, other) and len(one) == 2
    assert not same(one, list(make().batches(0, 1)))


def test_sources_are_utterances_to_be_read(make):
    sources = make().sources(6, seed=1)
    assert len(sources) == 6 and all(len(read_audio(source)) > 1000 for source in sources)
    assert len(make().sources(100, seed=1)) == 20


def test_a_streamed_utterance_that_is_too_short_is_a_problem(parquet):
    batches = list(streamed(parquet).batches(0, 4))  # 24 examples, more than an epoch
    problems = {problem for batch in batches for problem in batch["problems"]}
    assert problems == {("d/s/4.wav", "0.100 s long, shorter than 0.3 s")}


def test_augmentations_reach_the_stream(parquet):
    upside_down = partial(augmented, lambda crop, rng, strength: -crop, None)
    turned = StreamedCrops(
        str(parquet), {}, CropMaker(4, augment=upside_down), SpeakerTable(list("abcd")), 0.5, 0.3, Loading(3)
    )
    one, other = next(iter(streamed(parquet).batches(0, 1))), next(iter(turned.batches(0, 1)))
    assert torch.equal(one["input_values"], -other["input_values"])
