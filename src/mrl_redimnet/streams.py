"""The random streams of the package: what is drawn from one seed without one draw changing another.

    Stream.CROP.generator(seed, draw)  # numpy's generator of [seed, 1, draw]

The numbers belong to the results: with another number the same seed gives other crops, other development speakers,
another order of a prepared corpus. So a number never changes, and a new stream takes the next free one.

NumPy takes a missing word of a seed for a zero: [seed, 6] and [seed, 6, 0] are one stream. Two pairs of streams have
the same number for historical reasons; each pair is used for draws of different kinds, so neither tells anything about
the other. Without a number of a stream are: the speakers that a sampled classifier draws ([seed, step]), the examples
of a streamed corpus ([seed, epoch, stream, count]), simulated rooms ([room seed, index]) and utterances in a domain
([seed, hash of the path]).
"""

from enum import IntEnum

import numpy as np


class _Streams(IntEnum):
    def generator(self, seed: int, *where: int) -> np.random.Generator:
        """The generator of this stream at a place: a draw, a step, an epoch ..."""
        return np.random.default_rng([seed, self, *where])


class Stream(_Streams):
    """What is drawn with the seed of a run or of a prepared corpus; in brackets, what follows the number."""

    CORPUS_ORDER = 0  # the utterances, or the speakers, in the order of an epoch [epoch]
    CROP = 1  # one crop: utterance of a speaker, place, augmentation [draw]
    DEVELOPMENT_SPEAKERS = 2  # speakers held out of training
    CORPUS_SAMPLE = 3  # utterances that the principal basis of the embeddings is fitted on
    SPEAKER_GROUP = 4  # the utterances, and the speed, of one speaker's crops in a batch [group]
    CROP_SECONDS = 5  # the length of a batch's crops [batch]
    PREFIXES = 6  # the prefixes that a step trains [step]
    STREAM_FILES = 7  # the files of a streamed corpus in the order of an epoch [epoch]
    STREAM_ROWS = 8  # the rows of a window of a streamed file [epoch, file, window]

    # Second uses of a number, see above.
    PREPARED_ORDER = 6  # the rows of a prepared corpus in the order of its shards
    TRAINING_SPEAKERS = 7  # training speakers whose results are compared with the development speakers'


class SyntheticStream(_Streams):
    """What is drawn with the seed of a synthetic corpus, which has numbers of its own."""

    SPEAKER = 0  # [speaker]
    SESSION = 1  # [speaker, session]
    UTTERANCE = 2  # [speaker, session, utterance]
    TRIALS = 3
