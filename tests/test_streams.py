"""The numbers of the random streams are part of all results."""

import numpy as np

from mrl_redimnet.streams import Stream, SyntheticStream


def test_the_numbers_of_the_streams_stay():
    assert {name: stream.value for name, stream in Stream.__members__.items()} == {
        "CORPUS_ORDER": 0,
        "CROP": 1,
        "DEVELOPMENT_SPEAKERS": 2,
        "CORPUS_SAMPLE": 3,
        "SPEAKER_GROUP": 4,
        "CROP_SECONDS": 5,
        "PREFIXES": 6,
        "STREAM_FILES": 7,
        "STREAM_ROWS": 8,
        "PREPARED_ORDER": 6,
        "TRAINING_SPEAKERS": 7,
    }
    assert [stream.name for stream in SyntheticStream] == ["SPEAKER", "SESSION", "UTTERANCE", "TRIALS"]
    assert [stream.value for stream in SyntheticStream] == [0, 1, 2, 3]


def test_a_stream_is_numpys_generator_of_seed_number_and_place():
    ours, numpys = Stream.STREAM_ROWS.generator(5, 1, 2, 3), np.random.default_rng([5, 8, 1, 2, 3])
    assert np.array_equal(ours.integers(2**62, size=8), numpys.integers(2**62, size=8))
