"""What a bulk extraction embeds: folders, manifests, tar archives, parquet files and Hub data sets, in numbered blocks.

Blocks are what processes share out, and what a stopped run goes on with. A block has the same utterances whoever reads
it: it is a function of the inputs and of the number of utterances in a block.
"""

import codecs
import csv
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from glob import has_magic
from itertools import chain, islice
from pathlib import Path
from typing import Protocol

import datasets
import fsspec
import pyarrow as pa
import pyarrow.compute as pc

from mrl_redimnet.audio.io import Encoded
from mrl_redimnet.audio.scan import AUDIO_SUFFIXES, LeftOut, is_hidden, is_text, printable, suffix_of, walk
from mrl_redimnet.data.corpus import Columns, dataset_arguments, is_remote, source_of
from mrl_redimnet.data.streaming import open_stream
from mrl_redimnet.files import text_lines

# Lists of files, by their suffix.
TABLES = {".csv": ",", ".tsv": "\t"}  # and what separates their columns
JSON_LINES = (".jsonl", ".json")  # as NeMo writes them
KALDI = ".scp"
MANIFESTS = (*TABLES, ".txt", ".lst", KALDI, *JSON_LINES)
ARCHIVES = (".tar", ".tar.gz", ".tgz")
_ROWS = 100_000  # of a column that are looked at at a time


@dataclass(frozen=True)
class Utterance:
    """id: what it is called in the results; source: what `read_audio` takes, or the URL of such a file."""

    id: str
    source: str | Encoded


class Shard(Protocol):
    """A part of the inputs."""

    @property
    def name(self) -> str:
        """What messages and `Inputs.digest` call it."""

    @property
    def sequential(self) -> bool:
        """Whether reaching a block means reading what is before it."""

    def known_ids(self) -> pa.ChunkedArray | None:
        """The ids of all its utterances, None where only reading the audio would tell."""

    def blocks(self, size: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, list[Utterance]]]:
        """The wanted ones of its blocks of `size` utterances. Of a sequential shard the last has fewer, or none."""


# ---------------------------------------------------------------- files


@dataclass(frozen=True)
class Listing:
    """Files by their names, held as two Arrow columns: some hundred bytes a file, however many there are."""

    ids: pa.ChunkedArray
    paths: pa.ChunkedArray
    name: str = "files"
    sequential: bool = False

    @classmethod
    def of(cls, pairs: Iterable[tuple[str, str]]) -> "Listing":
        """From (id, path)."""
        pairs, ids, paths = iter(pairs), [], []
        while some := list(islice(pairs, _ROWS)):
            ids.append(pa.array([_id(name) for name, _ in some], pa.large_string()))
            paths.append(pa.array([os.fsencode(path) for _, path in some], pa.large_binary()))
        return cls(pa.chunked_array(ids, pa.large_string()), pa.chunked_array(paths, pa.large_binary()))

    def known_ids(self) -> pa.ChunkedArray:
        """The ids of all files."""
        return self.ids

    def blocks(self, size: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, list[Utterance]]]:
        """The wanted blocks, each reached at once. The last has what is left over, never nothing."""
        for block in filter(wanted, range(-(-len(self.ids) // size))):
            ids, paths = (column.slice(block * size, size).to_pylist() for column in (self.ids, self.paths))
            yield block, [Utterance(name, os.fsdecode(path)) for name, path in zip(ids, paths, strict=True)]


def _id(name: str) -> str:
    """A name as a table can hold it."""
    return name if is_text(name) else printable(name)


def _files_below(folder: str) -> Iterator[tuple[str, str]]:
    """(path relative to the folder, path) of its audio, sorted. FileNotFoundError where there is nothing to embed."""
    left_out, archives = LeftOut(), _archives(folder)
    found = ((path, f"{folder.rstrip('/')}/{path}") for path in walk(folder, left_out=left_out))
    first = next(found, None)
    if first is None and not archives:
        raise FileNotFoundError(f"0 audio files ({', '.join(AUDIO_SUFFIXES)}), no *.parquet and no *.tar in {folder}.")
    yield from chain([] if first is None else [first], found)
    left_out.suffixes.subtract(map(suffix_of, archives))
    left_out.suffixes = +left_out.suffixes
    left_out.warn(folder)


def read_manifest(file: str | os.PathLike, folder: str | None = None) -> Iterator[tuple[str, str]]:
    """(id, path) of every line of a manifest.

    .csv and .tsv have a header with `path` and, if wanted, `id`; .jsonl and .json, as NeMo's manifests, on each line a
    mapping with `audio_filepath` or `path` and, if wanted, `id`; .scp, as Kaldi's wav.scp, on each line an id and a
    path; .txt and .lst hold a path on each line. An id is the path as it is written where none is given. Paths are
    relative to `folder` (None: the manifest's own), or absolute, or URLs that fsspec knows. Raises ValueError, with the
    line, for a missing column, path or id, and for parts of files and commands, which are not read.
    """
    folder = os.path.dirname(os.fspath(file)) if folder is None else folder
    suffix, lines = Path(file).suffix.lower(), text_lines(file)
    if suffix in TABLES:
        table = csv.DictReader(lines, delimiter=TABLES[suffix])
        if "path" not in (table.fieldnames or ()):
            there = ", ".join(table.fieldnames or ())
            raise ValueError(f"{file}: no column is called path; the first line has {there or 'nothing'}")
        rows = ((table.line_num, row) for row in table)
    else:
        row_of = _kaldi_row if suffix == KALDI else _json_row if suffix in JSON_LINES else _path_row
        numbered = ((number, line.strip()) for number, line in enumerate(lines, 1) if line.strip())
        rows = ((number, row_of(line, f"{file}, line {number}")) for number, line in numbered)
    try:
        for number, row in rows:
            path, name = row["path"], row.get("id", row["path"])
            if not path or not name:
                raise ValueError(f"{file}, line {number}: the {'path' if not path else 'id'} is empty")
            yield name, path if "://" in path else os.path.join(folder, path)
    except csv.Error as error:
        raise ValueError(f"{file}, line {table.line_num}: {error}: a quotation mark without its end?") from error


def _path_row(line: str, where: str) -> dict:
    return {"path": line}


def _kaldi_row(line: str, where: str) -> dict:
    """A line of Kaldi's wav.scp: an id, and a path that may have spaces."""
    name, _, path = line.partition(" ") if "\t" not in line else line.partition("\t")
    path = path.strip()
    if path.endswith("|"):
        raise ValueError(f"{where}: {name} is a command, which is not run: write its audio to a file, and list that")
    if re.search(r"\.ark:\d+$", path):
        raise ValueError(f"{where}: {name} lies in a Kaldi archive, which is not read: list files of audio")
    return {"id": name, "path": path}


def _json_row(line: str, where: str) -> dict:
    """A line of a NeMo manifest, or of one with `path` and `id`."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error}); expected a mapping with audio_filepath on each line") from error
    path = row.get("audio_filepath", row.get("path")) if isinstance(row, dict) else None
    if not isinstance(path, str):
        raise ValueError(f"{where}: expected a mapping with audio_filepath, the path of a file")
    if row.get("offset"):
        raise ValueError(f"{where}: a part of {path} (offset {row['offset']}), only whole files are read: cut it out")
    return {"path": path, "id": str(row.get("id", path))}


def _refuse_text(file: str) -> None:
    """ValueError for a text file, which a list of files may be under any name; it is no audio."""
    if file.lower().endswith(AUDIO_SUFFIXES):
        return
    with open(file, "rb") as opened:
        beginning = opened.read(4096)  # NIST SPHERE files begin with 1,024 bytes of text
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(beginning)
    except UnicodeDecodeError:
        return
    if text and all(char.isprintable() or char in "\t\r\n" for char in text):
        raise ValueError(
            f"{file} is a text file, no audio. If it is a list of files, its name must end as lists of its kind do: "
            f"{', '.join(MANIFESTS)}"
        )


# ---------------------------------------------------------------- archives


@dataclass(frozen=True)
class Archive:
    """The audio in a tar file, also in a store. An utterance is called after the archive and its path in it."""

    url: str
    sequential: bool = True

    @property
    def name(self) -> str:
        """The path or URL of the archive."""
        return self.url

    def known_ids(self) -> None:
        """The names are between the audio."""

    def blocks(self, size: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, list[Utterance]]]:
        """The wanted blocks, with the audio of their utterances as `Encoded`; an AudioWarning counts other entries.

        Raises ValueError for an archive that cannot be read, or that holds a name twice.
        """
        stem, seen, left_out = self.url.rsplit("/", 1)[-1], set(), LeftOut()

        def audio(archive: tarfile.TarFile) -> Iterator[tuple[str, tarfile.TarInfo]]:
            for entry in archive:
                if entry.isdir():
                    continue
                if is_hidden(entry.name):
                    left_out.hidden += 1
                elif not entry.name.lower().endswith(AUDIO_SUFFIXES):
                    left_out.suffixes[suffix_of(entry.name)] += 1
                elif not entry.isfile():
                    left_out.others.append(f"{printable(entry.name)}: a link, a pipe or a device")
                else:
                    name = _id(f"{stem}/{entry.name.removeprefix('./')}")
                    if name in seen:
                        raise ValueError(f"{self.url} holds {entry.name} twice: make it again, with each file once")
                    seen.add(name)
                    yield name, entry
            left_out.warn(self.url)

        try:
            with fsspec.open(self.url, "rb") as file, tarfile.open(fileobj=file, mode="r|*") as archive:

                def extracted(named: tuple[str, tarfile.TarInfo]) -> Utterance:
                    name, entry = named
                    content = archive.extractfile(entry)
                    return Utterance(name, Encoded(entry.name, content.read()))  # type: ignore[union-attr]  # of a file

                yield from in_blocks(audio(archive), extracted, size, wanted)
        except (tarfile.TarError, EOFError) as error:  # EOFError: of a compressed one that was cut off
            raise ValueError(f"{self.url} cannot be read as a tar archive ({error}): copy or make it again") from error


def in_blocks(rows: Iterable, make: Callable, size: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, list]]:
    """Blocks of what `make(row)` makes of the rows of wanted blocks; the last is short, or empty."""
    rows, block, count = iter(rows), 0, size
    while count == size:
        if wanted(block):
            made = [make(row) for row in islice(rows, size)]
            count = len(made)
            yield block, made
        else:
            count = sum(1 for _ in islice(rows, size))
        block += 1


# ---------------------------------------------------------------- tables


@dataclass(frozen=True)
class Table:
    """One file of parquet data or of a data set, `number` of `count`, read as it comes.

    An utterance is called by its path column; where there is none, by the source, the file's number and the row's.
    """

    source: str
    data: datasets.IterableDataset
    audio: str
    path: str | None
    number: int
    count: int
    ids: pa.ChunkedArray | None = None
    remote: bool = False
    sequential: bool = True

    @property
    def name(self) -> str:
        """The source, and the file's number from 1 on."""
        return f"{self.source}, file {self.number + 1} of {self.count}"

    def known_ids(self) -> pa.ChunkedArray | None:
        """The column of paths where there is one that can be read without the audio."""
        return self.ids

    def blocks(self, size: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, list[Utterance]]]:
        """The wanted blocks of the file's rows; the rows of other blocks are read, and dropped."""
        # `iter` reads all of the one file also in a DataLoader's worker, where `__iter__` would share it out again.
        block, rows = -1, size
        for block, table in enumerate(self.data.shard(self.count, self.number).iter(size)):
            rows = len(table)
            if wanted(block):
                audio, ids = table.column(self.audio), self._ids(table, block * size)
                sources = (source_of(value, self.remote) for value in audio.to_pylist())
                yield block, [Utterance(name, source) for name, source in zip(ids, sources, strict=True)]
        if rows == size and wanted(block + 1):
            yield block + 1, []

    def _ids(self, table: pa.Table, first: int) -> list[str]:
        given = [None] * len(table) if self.path is None else table.column(self.path).to_pylist()
        stem = self.source.rstrip("/")
        return [
            f"{stem}/{self.number:05d}-{row:08d}" if name is None else str(name)
            for row, name in enumerate(given, first)
        ]


def _tables(source: str, split: str | None, columns: dict[str, str] | None) -> list[Table]:
    """The files of parquet data, of a Hub data set, or of one saved by `Dataset.save_to_disk`."""
    saved = _saved(source, split) if _is_saved(source) else None
    if saved is None and split is not None and (dataset_arguments(source) or {}).get("path") == source:
        source = f"{source}:{split}"
    data = open_stream(source) if saved is None else saved
    # Speakers play no part here, but `find` wants a column for them: any.
    used = Columns.find(data.features, {"speaker": next(iter(data.features)), **(columns or {})})
    needed = [used.audio] if used.path is None else [used.audio, used.path]
    count = data.num_shards
    ids: list = [None] * count
    if used.path is not None:
        paths = open_stream(source, [used.path]) if saved is None else saved.select_columns([used.path])
        if list(paths.features) == [used.path]:  # else reading them would mean reading the audio
            ids = [_column_of(paths.shard(count, number)) for number in range(count)]
    data = data.select_columns(needed).with_format("arrow")
    remote = saved is None and is_remote(source)
    return [Table(source, data, used.audio, used.path, number, count, ids[number], remote) for number in range(count)]


def _is_saved(folder: str) -> bool:
    """Whether `save_to_disk` wrote a data set, or one with splits, to a folder."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json"))


def _saved(folder: str, split: str | None) -> datasets.IterableDataset:
    data = datasets.load_from_disk(folder)
    if isinstance(data, datasets.DatasetDict):
        if (split or "train") not in data:
            raise ValueError(f"{folder} has no split {split or 'train'}, it has {', '.join(data)}: give --split")
        data = data[split or "train"]
    return data.to_iterable_dataset(num_shards=max(1, len(data.cache_files)))


def _column_of(data: datasets.IterableDataset) -> pa.ChunkedArray:
    """The only column of a table, as text."""
    pieces = [pc.cast(table.column(0), pa.large_string()) for table in data.with_format("arrow").iter(_ROWS)]
    return pa.chunked_array([chunk for piece in pieces for chunk in piece.chunks], pa.large_string())


# ---------------------------------------------------------------- all of them


@dataclass(frozen=True)
class Inputs:
    """Everything that is to be embedded, in the order it was given."""

    shards: list[Shard]

    @classmethod
    def find(
        cls,
        sources: Sequence[str | os.PathLike],
        folder: str | None = None,
        split: str | None = None,
        columns: dict[str, str] | None = None,
    ) -> "Inputs":
        """What there is to embed in `sources`, in their order.

        Each source is one of

        - a file, a folder of audio at any depth, or a manifest (`read_manifest`, paths relative to `folder`);
        - a tar archive, a folder of them, or a pattern with `*`, also in a store that fsspec knows ("s3://...");
        - parquet files or a Hub data set as `mrl_redimnet.data.streaming` takes them, or a folder that `save_to_disk`
          wrote; `split` of it [train]; `columns` says which are the audio and the path ({"path": "utterance_id"}).

        Raises FileNotFoundError for what is not there or holds no audio; ValueError for an id that comes twice, a
        manifest or a column that is wrong.
        """
        files: list[Iterable[tuple[str, str]]] = []
        shards: list[Shard] = []
        paths = [os.fspath(source) for source in sources]
        if missing := [path for path in paths if not _may_be_there(path)]:
            raise FileNotFoundError(f"{len(missing)} of {len(paths)} paths are not there: {', '.join(missing[:5])}")
        for source in paths:
            archives = _archives(source)
            shards += [Archive(url) for url in archives]
            if archives and not os.path.isdir(source):
                continue
            if os.path.isfile(source) and Path(source).suffix.lower() in MANIFESTS:
                files.append(read_manifest(source, folder))
            elif os.path.isfile(source) and not source.endswith(".parquet"):
                _refuse_text(source)
                files.append([(source, source)])
            elif _is_saved(source) or dataset_arguments(source) is not None:
                shards += _tables(source, split, columns)
            else:
                files.append(_files_below(source))
        listed = [Listing.of(chain(*files))] if files else []
        inputs = cls([*listed, *shards])
        inputs._refuse_double_names()
        return inputs

    @cached_property
    def rows(self) -> int | None:
        """Utterances, where all are known."""
        rows = 0
        for shard in self.shards:
            ids = shard.known_ids()
            if ids is None:
                return None
            rows += len(ids)
        return rows

    @cached_property
    def digest(self) -> str:
        """Changes with any name of a shard and any id that is known."""
        digest = hashlib.sha256()
        for shard in self.shards:
            ids = shard.known_ids()
            digest.update(f"{shard.name}\0{None if ids is None else len(ids)}\n".encode())
            for chunk in [] if ids is None else ids.chunks:
                digest.update("".join(f"{name}\0" for name in chunk.to_pylist()).encode())
        return digest.hexdigest()

    def _refuse_double_names(self) -> None:
        """ValueError for an id, or an archive's name, that two utterances would have."""
        known = [shard.known_ids() for shard in self.shards]
        # An archive's name begins its ids, without its folder; a table without paths is called by its own.
        unread = [shard.name for shard, ids in zip(self.shards, known, strict=True) if ids is None]
        unread = [name.rsplit("/", 1)[-1] if name.endswith(ARCHIVES) else name for name in unread]
        chunks = [chunk.drop_null() for ids in known if ids is not None for chunk in ids.chunks]
        for names in (pa.array(unread, pa.large_string()), pa.chunked_array(chunks, pa.large_string())):
            counts = pc.value_counts(names)
            twice = pc.filter(counts.field("values"), pc.greater(counts.field("counts"), 1))
            if len(twice):
                raise ValueError(
                    f"{len(twice)} ids come twice, first {twice[0]}: give each utterance once, one folder that holds "
                    "all, or a manifest with an id for each"
                )


def _may_be_there(source: str) -> bool:
    """Whether a source is there, or is of a kind that is looked for elsewhere."""
    if os.path.exists(source) or "://" in source or has_magic(source):
        return True
    is_file = source.lower().endswith((*AUDIO_SUFFIXES, *ARCHIVES, *MANIFESTS, ".parquet"))
    return not is_file and dataset_arguments(source) is not None


def _archives(source: str) -> list[str]:
    """The tar files that a source is: itself, those a pattern means, or those in a folder that holds them."""
    if source.endswith(ARCHIVES):
        if not has_magic(source):
            return [source]
        system, pattern = fsspec.core.url_to_fs(source)
        found = sorted(map(system.unstrip_protocol, system.glob(pattern)))
        if not found:
            raise FileNotFoundError(f"{source}: no file has such a path")
        return found if "://" in source else [url.removeprefix("file://") for url in found]
    if not os.path.isdir(source):
        return []
    inside = (name for name in os.listdir(source) if name.endswith(ARCHIVES) and not is_hidden(name))
    return sorted(os.path.join(source, name) for name in inside)
