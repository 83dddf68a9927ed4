"""Where a run's batches come from: speech whose every utterance is at hand, or a stream. Both are used the same way.

for batch in crops.batches(first_step, stop_step): ...
crops.state()                    # of this process, for a checkpoint; `crops.go_on(state)` before `batches`
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mrl_redimnet.audio.io import AudioError, Encoded, audio_info
from mrl_redimnet.data.corpus import SpeakerTable, audio_source
from mrl_redimnet.data.crops import CropDataset, CropMaker, DrawBatches, Problem, collate
from mrl_redimnet.data.streaming import Collated, SpeechStream, StreamState
from mrl_redimnet.streams import Stream

BEYOND = 2**40  # draws that no training comes to


@dataclass(frozen=True)
class Loading:
    """What a process reads: `batch_size` crops a micro-batch, `accumulation` of them a step, by `workers` processes.

    rank, world: of this process and how many there are. pin: into memory that a GPU copies from.
    """

    batch_size: int
    accumulation: int = 1
    rank: int = 0
    world: int = 1
    workers: int = 0
    seed: int = 0
    pin: bool = False

    def loader(self, dataset: Dataset, **options: Any) -> DataLoader:
        """A DataLoader with these workers, which draws nothing from the global generator."""
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(dataset, num_workers=self.workers, generator=generator, pin_memory=self.pin, **options)


class DrawnCrops:
    """Batches by draw numbers, so that a resumed run begins at its step instead of skipping batches.

    Accelerate does not prepare it: each process draws its own share already.
    """

    def __init__(self, dataset: CropDataset, loading: Loading) -> None:
        self.dataset, self.loading = dataset, loading

    def batches(self, first_step: int, stop_step: int) -> Iterator[dict]:
        """Micro-batches (see `collate`) of the steps from the first to before the last."""
        how = self.loading
        first, stop = first_step * how.accumulation, stop_step * how.accumulation
        draws = DrawBatches(how.batch_size, how.rank, how.world, first, stop)
        return iter(how.loader(self.dataset, batch_sampler=draws, collate_fn=collate))

    def probe(self, count: int) -> Iterator[dict]:
        """`count` batches, the same in every process, none of which is trained on."""
        size = self.loading.batch_size
        for i in range(count):
            yield collate([self.dataset[BEYOND + i * size + j] for j in range(size)])

    def sources(self, most: int, seed: int) -> list[str | Encoded]:
        """Up to `most` drawn utterances, for `SpeakerEncoder.embed_all`."""
        rows = Stream.CORPUS_SAMPLE.generator(seed).permutation(len(self.dataset.corpus))[:most]
        return [audio_source(self.dataset.corpus, int(row)) for row in sorted(rows)]

    def state(self) -> None:
        """The step says all there is to say."""

    def go_on(self, state: None) -> None:
        """Nothing to be restored."""


class StreamedCrops:
    """Batches from a `SpeechStream`; every process reads files of its own.

    source, columns: as of `SpeechStream`. Utterances shorter than `min_seconds` are problems, not crops.
    """

    def __init__(
        self,
        source: str,
        columns: dict[str, str],
        maker: CropMaker,
        speakers: SpeakerTable,
        crop_seconds: float,
        min_seconds: float,
        loading: Loading,
    ) -> None:
        self.loading, self._source, self._columns = loading, source, columns
        self._make = partial(_crop, maker, speakers, crop_seconds, min_seconds)
        how = self.loading
        self._stream = SpeechStream(source, self._make, how.seed, how.rank, how.world, how.workers, columns=columns)
        self._state = StreamState(self._stream)

    def batches(self, first_step: int, stop_step: int) -> Iterator[dict]:
        """Micro-batches from where the stream is, as many as the steps take."""
        self._state.load_state_dict(self._state.state_dict())  # what earlier workers read ahead is read again
        loader = self.loading.loader(self._stream, batch_size=self.loading.batch_size, collate_fn=Collated(collate))
        for batch in islice(loader, (stop_step - first_step) * self.loading.accumulation):
            self._state.update(batch)
            yield batch

    def probe(self, count: int) -> Iterator[dict]:
        """`count` batches, the same in every process, in another order than those trained on."""
        examples = (item.example for item in self._other(self._make))
        for _ in range(count):
            yield collate(list(islice(examples, self.loading.batch_size)))

    def sources(self, most: int, seed: int) -> list[str | Encoded]:
        """The first `most` utterances of another order, for `SpeakerEncoder.embed_all`."""
        return [item.example for item in islice(self._other(_source_alone, epochs=1), most)]

    def _other(self, make: Callable, epochs: int | None = None) -> SpeechStream:
        return SpeechStream(self._source, make, self.loading.seed + BEYOND, columns=self._columns, epochs=epochs)

    def state(self) -> dict:
        """The place after the last batch given out."""
        return self._state.state_dict()

    def go_on(self, state: dict) -> None:
        """Lets `batches` begin where the state was taken. Raises ValueError for a stream of other settings."""
        self._state.load_state_dict(state)


def _crop(
    maker: CropMaker,
    speakers: SpeakerTable,
    crop_seconds: float,
    min_seconds: float,
    source: str | Encoded,
    row: dict,
    rng: np.random.Generator,
) -> dict | Problem:
    if row["problem"]:
        return Problem(row["path"], row["problem"])
    try:
        seconds = row["seconds"] or audio_info(source).seconds
    except AudioError as error:
        return Problem(row["path"], str(error))
    if seconds < min_seconds:
        return Problem(row["path"], f"{seconds:.3f} s long, shorter than {min_seconds:g} s")
    return maker.make(source, seconds, speakers.id(row["speaker"]), rng, crop_seconds)


def _source_alone(source: str | Encoded, row: dict, rng: np.random.Generator) -> str | Encoded:
    return source
