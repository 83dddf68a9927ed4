"""Training examples straight from parquet files or a Hub data set as they come, for corpora that are not copied.

    stream = SpeechStream("owner/corpus", make, seed=0, rank=rank, world=world, workers=2)
    state = StreamState(stream)
    state.load_state_dict(saved)                     # to go on where another run stopped
    for batch in DataLoader(stream, batch_size=48, num_workers=2, collate_fn=Collated(collate)):
        ...                                          # train
        state.update(batch)                          # state.state_dict() now says: after this batch

Everything is a function of the seed and a place, so that a run that is stopped and taken up, anywhere, sees the same
examples as one that was not. A stream is what one worker of one rank reads: every n-th file of the epoch's
permutation, each in blocks of `window` rows, each block in an order of its own. There is no other shuffling: files
must be fair samples of the speakers, as `mrl-redimnet prepare` writes them.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import datasets
import fsspec
import fsspec.asyn
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.utils.data import get_worker_info

from mrl_redimnet.audio.io import Encoded
from mrl_redimnet.data.corpus import (
    Columns,
    SpeakerTable,
    dataset_arguments,
    is_remote,
    load_tables,
    row_facts,
    source_of,
    speaker_names,
)
from mrl_redimnet.data.prepare import PreparedIndex
from mrl_redimnet.streams import Stream


@dataclass(frozen=True)
class Place:
    """Where a stream goes on: the next row is `position` of the block's order.

    file: how many of the stream's files of this epoch are behind it; block: of that file; count: rows of this epoch
    that are behind it.
    """

    stream: int
    epoch: int = 0
    file: int = 0
    block: int = 0
    position: int = 0
    count: int = 0


@dataclass(frozen=True)
class Streamed:
    """One example and the place after it. draw: (seed, epoch, stream, count), no other example has the same."""

    example: Any
    draw: tuple[int, int, int, int]
    place: Place


Make = Callable[[str | Encoded, dict, np.random.Generator], Any]


class SpeechStream(torch.utils.data.IterableDataset):
    """An endless stream of training examples (`Streamed`) for one rank's DataLoader.

    source: as of `load_corpus`, but no folder of audio files. make(source, row, rng) -> example: source is what
    `read_audio` takes; row has path, speaker, session, seconds; rng is seeded by the draw. keep(row): rows to leave
    out (held-out speakers) are those for which it is false. columns: as of `load_corpus`. window: rows of a block;
    a worker holds one block of encoded audio. epochs: after so many it ends (None: never). rank, world: of this
    process and how many there are; workers: the DataLoader's num_workers, with 0 for none.

    In each epoch the streams of all ranks and workers together give every row once. Streams come to the end of an
    epoch independently of each other.

    Raises FileNotFoundError when there is no such data; ValueError for a folder of audio files, missing columns or
    fewer files than streams.
    """

    def __init__(
        self,
        source: str,
        make: Make,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        window: int = 512,
        epochs: int | None = None,
        columns: dict[str, str] | None = None,
        keep: Callable[[dict], bool] | None = None,
    ) -> None:
        super().__init__()
        if window < 1 or not 0 <= rank < world:
            raise ValueError(f"window: got {window}, expected 1 or more; rank: got {rank}, expected 0 to {world - 1}")
        self.make, self.keep, self.seed, self.window, self.epochs = make, keep, seed, window, epochs
        self.rank, self.world, self.workers = rank, world, workers
        self.source, self._remote = source, is_remote(source)
        self._data = open_stream(source)
        self._columns = Columns.find(self._data.features, columns)
        self._names = speaker_names(self._data.features[self._columns.speaker])
        needed = [name for name in asdict(self._columns).values() if name is not None]
        self._data = self._data.select_columns(needed).with_format("arrow")
        self.files = self._data.num_shards
        if self.files < self.streams:
            raise ValueError(
                f"{source} has {self.files} files for {self.streams} streams ({world} processes of {max(workers, 1)} "
                f"workers): use at most {self.files // world} workers per process, or prepare it with smaller shards"
            )
        self.first_worker = 0
        self.places = {stream: Place(stream) for stream in self.own_streams}

    @property
    def streams(self) -> int:
        """Streams of all processes."""
        return self.world * max(self.workers, 1)

    @property
    def own_streams(self) -> range:
        """The streams of this process, in the order of its workers."""
        first = self.rank * max(self.workers, 1)
        return range(first, first + max(self.workers, 1))

    def __iter__(self) -> Iterator[Streamed]:
        worker = get_worker_info()
        number, workers = (0, 0) if worker is None else (worker.id, worker.num_workers)
        if worker is not None:
            fsspec.asyn.reset_lock()  # of stores: a forked worker would wait for one that was held
        if workers != self.workers:
            raise ValueError(f"the stream is made for {self.workers} workers, its DataLoader has {workers}")
        # The loader takes batches from its workers in turn, and begins with the first again when it is made anew.
        turn = (number + self.first_worker) % max(workers, 1)
        return self.examples_from(self.places[self.own_streams[turn]])

    def examples_from(self, place: Place) -> Iterator[Streamed]:
        """All examples of one stream from a place on."""
        while self.epochs is None or place.epoch < self.epochs:
            files = self._files_of(place.stream, place.epoch)
            whole, given = place == Place(place.stream, place.epoch), 0
            while place.file < len(files):
                for block in self._blocks(files[place.file], place.block):
                    order = self._order(place, files[place.file], len(block))
                    while place.position < len(order):
                        draw = (self.seed, place.epoch, place.stream, place.count)
                        facts, source = self._row(block, place.block, int(order[place.position]))
                        place = replace(place, position=place.position + 1, count=place.count + 1)
                        if self.keep is None or self.keep(facts):
                            given += 1
                            yield Streamed(self.make(source, facts, np.random.default_rng(draw)), draw, place)
                    place = replace(place, block=place.block + 1, position=0)
                place = replace(place, file=place.file + 1, block=0)
            if whole and not given:
                raise ValueError(f"{self.source}: no row of stream {place.stream}'s {len(files)} files is to be kept")
            place = Place(place.stream, place.epoch + 1)

    def _files_of(self, stream: int, epoch: int) -> list[int]:
        order = Stream.STREAM_FILES.generator(self.seed, epoch).permutation(self.files)
        return order[stream :: self.streams].tolist()

    def _order(self, place: Place, file: int, rows: int) -> np.ndarray:
        return Stream.STREAM_ROWS.generator(self.seed, place.epoch, file, place.block).permutation(rows)

    def _blocks(self, file: int, first: int) -> Iterator[pa.Table]:
        """Arrow tables of `window` rows of one file, from block `first` on."""
        # `iter` reads all of the one file also in a DataLoader's worker, where `__iter__` would share it out again.
        return islice(self._data.shard(self.files, file).iter(self.window), first, None)

    def _row(self, table: pa.Table, block: int, number: int) -> tuple[dict, str | Encoded]:
        """A row's facts, and its audio."""
        row = {name: table.column(name)[number].as_py() for name in table.column_names}
        audio = source_of(row[self._columns.audio], self._remote)
        stray = isinstance(audio, Encoded) and bool(audio.problem)
        return row_facts(row, self._columns, self._names, block * self.window + number, stray), audio


@dataclass(frozen=True)
class Collated:
    """The collate_fn of a stream's DataLoader: `collate` (examples to a dict), with the place after the batch in it."""

    collate: Callable[[list], dict]

    def __call__(self, items: list[Streamed]) -> dict:
        """What `collate` makes of the examples, and "place": the place after the last."""
        return {**self.collate([item.example for item in items]), "place": items[-1].place}


class StreamState:
    """How far the batches of one rank's stream are used, kept by the process that uses them.

    What workers have read ahead is not in it: a new DataLoader over the stream, made after `load_state_dict`, begins
    with the batch that follows the last `update`. Every rank has its own; all of them must be saved.
    """

    def __init__(self, stream: SpeechStream) -> None:
        self._stream = stream
        self._places = dict(stream.places)
        self._last: int | None = None

    @property
    def epoch(self) -> int:
        """The epoch of the stream that is furthest behind."""
        return min(place.epoch for place in self._places.values())

    def update(self, batch: dict) -> None:
        """Notes that a batch (of `Collated`) was used. Batches must come in the DataLoader's order."""
        place: Place = batch["place"]
        self._places[place.stream] = place
        self._last = place.stream

    def state_dict(self) -> dict:
        """Plain numbers that `load_state_dict` takes, and the settings that must be the same then."""
        places = [list(asdict(place).values()) for place in self._places.values()]
        return {"settings": self._settings(), "places": places, "last": self._last}

    def load_state_dict(self, state: dict) -> None:
        """Lets the stream go on where the state was taken. Raises ValueError for a stream of other settings."""
        for name, here in self._settings().items():
            if state["settings"][name] != here:
                raise ValueError(
                    f"{name}: the stream was stopped with {state['settings'][name]}, this one has {here}; it can only "
                    "go on with the same"
                )
        self._places = {place.stream: place for place in (Place(*values) for values in state["places"])}
        self._last = state["last"]
        own = self._stream.own_streams
        self._stream.places = dict(self._places)
        self._stream.first_worker = 0 if self._last is None else (own.index(self._last) + 1) % len(own)

    def _settings(self) -> dict:
        stream = self._stream
        names = ("seed", "rank", "world", "workers", "window", "files")
        return {name: getattr(stream, name) for name in names}


@dataclass(frozen=True)
class StreamContents:
    """What a source holds: its speakers, how many rows, and their length in seconds (None where it is not said)."""

    speakers: SpeakerTable
    rows: int
    seconds: float | None


def stream_contents(source: str, columns: dict[str, str] | None = None) -> StreamContents:
    """What there is to stream: from index.json and speakers.json of prepared speech, else in one pass.

    That pass reads the speaker column, and seconds where there are some, not the audio (of parquet data). Raises as
    `SpeechStream`.
    """
    index = _text_beside(source, "index.json")
    if index is not None:
        found = PreparedIndex.parse(index, f"{source}/index.json")
        names = _text_beside(source, "speakers.json") or "[]"
        speakers = SpeakerTable(json.loads(names))
        if len(speakers) != found.speakers:
            raise ValueError(f"{source}/speakers.json has {len(speakers)} speakers, index.json {found.speakers}")
        return StreamContents(speakers, found.rows, found.seconds)
    features = open_stream(source).features
    used = Columns.find(features, columns)
    needed = [name for name in (used.speaker, used.seconds) if name is not None]
    found_names: set = set()  # of text, or of numbers of a ClassLabel
    rows, seconds = 0, 0.0
    for table in open_stream(source, needed).select_columns(needed).with_format("arrow").iter(_ROWS_AT_A_TIME):
        rows += len(table)
        found_names.update(table.column(used.speaker).unique().to_pylist())
        seconds += pc.sum(table.column(used.seconds)).as_py() or 0.0 if used.seconds is not None else 0.0
    classes = speaker_names(features[used.speaker])
    named = {str(name if classes is None else classes[name]) for name in found_names if name is not None}
    return StreamContents(SpeakerTable(sorted(named)), rows, None if used.seconds is None else seconds)


_ROWS_AT_A_TIME = 10_000


def open_stream(source: str, columns: list[str] | None = None) -> datasets.IterableDataset:
    """The source as a stream; of parquet data only `columns` are read (None: all)."""
    options = {}
    if columns is not None:
        arguments = dataset_arguments(source) or {}
        arguments.pop("split", None)
        if hasattr(datasets.load_dataset_builder(**arguments).config, "columns"):
            options["columns"] = columns
    data = load_tables(source, streaming=True, **options)
    if data is None:
        if not os.path.exists(source):
            raise FileNotFoundError(f"{source} is not there: give parquet files or a Hub data set")
        raise ValueError(f"{source} is a folder of audio files, which cannot be streamed: `mrl-redimnet prepare` it")
    if data.features is None:
        raise ValueError(f"{source} does not say what columns it has, so it cannot be streamed: load and prepare it")
    return data


def _text_beside(source: str, name: str) -> str | None:
    """The text of a file in the folder, store or Hub data set that `source` is; None where there is none."""
    folder = str(source)
    if "://" not in folder and not os.path.isdir(folder):
        arguments = dataset_arguments(source)
        if arguments is None or arguments["path"] == "parquet":
            return None
        folder = f"hf://datasets/{arguments['path']}"
    try:
        with fsspec.open(f"{folder.rstrip('/')}/{name}", encoding="utf-8", mode="r") as file:
            return file.read()
    except FileNotFoundError:
        return None
