"""Speech as a Hugging Face data set: folders that name speakers in their paths, parquet files, and data on the Hub.

The data set of a folder holds paths and lengths, not samples, so that a million files fit in a small cached Arrow
table and training reads just the stretch it needs (`mrl_redimnet.audio.io.read_audio`). Parquet files and Hub data hold
the encoded files themselves, memory-mapped from the cache. Whole columns are read as numpy arrays (`labels_of`,
`seconds_of`), single utterances by `audio_source`; nothing here makes Python objects for every row.
"""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from glob import escape, glob, has_magic
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from huggingface_hub import constants

from mrl_redimnet.audio.io import AudioError, Encoded, audio_info
from mrl_redimnet.audio.scan import AUDIO_SUFFIXES, LeftOut, is_text, printable, walk
from mrl_redimnet.files import replace_text
from mrl_redimnet.settings import near

DEFAULT_LAYOUT = "speaker/session/utterance"
UNLABELLED = "utterance"  # the layout of speech without speakers: files at any depth, each a speaker of its own
# CN-Celeb's files are called GENRE-SESSION-UTTERANCE.flac: singing-01-001.flac is of the session singing-01.
LAYOUTS = {
    "voxceleb1": "speaker/session/utterance",  # wav/id10001/1zcIwhmdeo4/00001.wav
    "voxceleb2": "speaker/session/utterance",  # dev/aac/id00012/21Uxsk56VDQ/00001.m4a
    "cnceleb1": "speaker/session-utterance",  # CN-Celeb_flac/data/id00000/singing-01-001.flac
    "cnceleb2": "speaker/session-utterance",  # CN-Celeb2_flac/data/id10000/singing-01-001.flac
    "voxblink2": "speaker/session/utterance",  # id000000/DwgYRqnQZHM/00000.wav
}
# The folders between a corpus's root and its speakers: VoxCeleb1 unpacks to wav/, VoxCeleb2 to aac/, CN-Celeb to data/.
_INNER_FOLDERS = frozenset({"wav", "aac", "m4a", "flac", "data"})
# What one process scans at a time: enough pieces for any num_proc.
_SCAN_SHARDS = 256
# Files whose headers are worth several processes: one reads them in seconds.
MANY_FILES = 10_000
# Rows of a whole column that are looked at at a time.
_COLUMN_BLOCK = 100_000
_SOME_ROWS = 100  # that tell which corpus it is
# Where the columns of parquet and Hub data are looked for; a `label` counts when it has named classes.
_USUAL_NAMES = {
    "audio": ("audio", "speech", "wav", "flac", "m4a", "mp3"),
    "speaker": ("speaker", "speaker_id", "spk", "spk_id", "speaker_name", "client_id", "label"),
    "session": ("session", "session_id", "video_id", "chapter_id"),
    "path": ("path", "file", "file_name"),
    "seconds": ("seconds",),  # other names may be of other units
}

COLUMN_ROLES = tuple(_USUAL_NAMES)


def load_corpus(
    source: str | os.PathLike,
    layout: str = DEFAULT_LAYOUT,
    cache_dir: str | os.PathLike | None = None,
    num_proc: int | None = None,
    columns: dict[str, str] | None = None,
) -> datasets.Dataset:
    """Speech as a data set, one row an utterance.

    `source` is one of

    - a folder of audio files, laid out as `layout` says; rows are sorted by path;
    - parquet files: a folder of them (as `mrl-redimnet prepare` writes it), one file, or a pattern with `*`, also in
      a store that fsspec knows ("s3://..."); rows are in the files' order;
    - a Hub data set "owner/name", or "owner/name:split" where the split is not train.

    Columns: `audio` (datasets.Audio(decode=False), see `audio_source`), `path` (of a folder: relative to the speakers'
    folders, "/" between parts, as in VoxCeleb's trial lists; distinct), `speaker`, `session`, `seconds` (float64, 0.0
    when unknown) and `problem` ("" or why the header could not be read; see `split_usable`).

    Of a folder: `source` holds the speakers' folders, or holds them in one folder named wav, aac, m4a, flac or data.
    `layout` is a name in LAYOUTS, or names the parts of a path from there on: `speaker` and (last) `utterance` must be
    there, `session` may, `*` is any folder. The last part may join names by "-" or "_" ("session-utterance"): the
    file's name is then cut at the last of these. Without a session every utterance is its own. The layout "utterance"
    alone is for speech whose speakers are not known: files at any depth, each its own speaker. Which files are audio,
    and what is done with links and hidden files, is said in `mrl_redimnet.audio.scan`. Every file's header is read
    once, in `num_proc` processes (None: one for each processor core, where there are many files); the result is cached
    in `cache_dir` (None: the Hugging Face cache) under a fingerprint of all paths, sizes and modification times, so a
    changed folder is read anew.

    Of parquet and Hub data: `columns` says which column is the audio, speaker, session, path or seconds ({"speaker":
    "who"}) where the usual names do not find it; audio and speaker must be there. The data is copied to the cache
    (`mrl_redimnet.data.streaming` reads it without). Headers are read where no seconds are given.

    Raises FileNotFoundError when `source` or audio in it is missing, ValueError when it is another file, `layout` is
    malformed, files do not lie as `layout` says, or a column is not found.
    """
    cache = None if cache_dir is None else os.fspath(cache_dir)
    tables = load_tables(source, cache_dir=cache, num_proc=num_proc)
    if tables is not None:
        return _uniform(tables, columns, num_proc, is_remote(source), cache)
    layout = layout_of(layout)
    manifest = _find_utterances(Path(os.path.abspath(source)), layout)
    builder = SpeechFolder(
        cache_dir=cache,
        dataset_name="speech_folder",
        folder=str(manifest.folder),
        layout=layout,
        fingerprint=manifest.fingerprint,
    )
    builder.download_and_prepare(num_proc=processes_for(num_proc, manifest.files))
    return builder.as_dataset(split="train").cast_column("audio", datasets.Audio(decode=False))


def audio_source(dataset: datasets.Dataset, row: int) -> str | Encoded:
    """What `mrl_redimnet.audio.io.read_audio` takes for one row of `load_corpus`: its path, or its bytes."""
    return source_of(dataset[int(row)]["audio"])


def source_of(audio: dict | bytes | str | None, remote: bool = False) -> str | Encoded:
    """One value of an audio column as a data set stores it ({"bytes", "path"}, or either) as a source of audio.

    remote: the data comes from elsewhere, so a path that it names without bytes must be a URL or lie in the caches of
    `datasets` and the Hub. A row without audio, or with such a path, gives a source whose reading raises AudioError.
    """
    if isinstance(audio, dict):
        data, path = audio.get("bytes"), audio.get("path")
    elif isinstance(audio, str):
        data, path = None, audio
    else:
        data, path = audio, None
    if data is not None:
        return Encoded(path or "audio", data)
    if path is None:
        return Encoded("audio", b"", "is missing: the data set's row holds none")
    if remote and "://" not in path and not _is_cached(path):
        return Encoded(path, b"", "is named by the data set, but is no part of it: files of this machine are not read")
    return path


def _is_cached(path: str, cache_dir: str | None = None) -> bool:
    roots = (datasets.config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE, cache_dir)
    real = os.path.realpath(path)
    return any(real.startswith(os.path.realpath(root) + os.sep) for root in roots if root is not None)


def is_remote(source: str | os.PathLike) -> bool:
    """Whether a source of tables is a store or the Hub, not parquet files of this machine."""
    arguments = dataset_arguments(source)
    return "://" in os.fspath(source) or (arguments is not None and arguments["path"] != "parquet")


def _strays(data: datasets.Dataset, column: str, cache_dir: str | None) -> set[int]:
    """Rows of remote data whose audio is only a path that is no part of the data."""
    found, first = set(), 0
    for block in blocks_of(data, column):
        if pa.types.is_struct(block.type):
            bare = pc.and_(pc.is_null(block.field("bytes")), pc.is_valid(block.field("path")))
        else:
            bare = pc.is_valid(block) if pa.types.is_string(block.type) else pa.array([False] * len(block))
        for row in np.flatnonzero(bare.to_numpy(zero_copy_only=False)).tolist():
            value = block[row].as_py()
            path = value["path"] if isinstance(value, dict) else value
            if "://" not in path and not _is_cached(path, cache_dir):
                found.add(first + row)
        first += len(block)
    return found


def labels_of(dataset: datasets.Dataset, speakers: "SpeakerTable") -> np.ndarray:
    """The speakers' labels of all rows, [rows] int32. Raises ValueError for a speaker that the table does not know."""
    blocks = [np.zeros(0, np.int32)]
    known: dict[str, int] = {}
    for names in blocks_of(dataset, "speaker"):
        names = names.dictionary_encode()
        for name in names.dictionary.to_pylist():
            if name not in known:
                known[name] = speakers.id(name)
        labels = np.array([known[name] for name in names.dictionary.to_pylist()], dtype=np.int32)
        blocks.append(labels[names.indices.to_numpy()])
    return np.concatenate(blocks)


def speakers_of(dataset: datasets.Dataset) -> list[str]:
    """The distinct speakers of all rows, sorted."""
    names: set[str] = set()  # `Dataset.unique` would copy all columns of selected rows first
    for block in blocks_of(dataset, "speaker"):
        names.update(block.unique().to_pylist())
    return sorted(names)


def seconds_of(dataset: datasets.Dataset) -> np.ndarray:
    """The lengths of all rows in seconds, [rows] float64."""
    return np.concatenate([np.zeros(0), *(block.to_numpy() for block in blocks_of(dataset, "seconds"))])


def blocks_of(dataset: datasets.Dataset, column: str) -> Iterator[pa.Array]:
    """One column of all rows, piece by piece; no other column is touched."""
    # The public ways gather selected rows one by one: 20 s for a million, against 0.1 s.
    values, selected = dataset.data.column(column), dataset._indices  # noqa: SLF001 -- for this speed
    if selected is not None:
        values = values.take(selected.column(0))
    for first in range(0, len(values), _COLUMN_BLOCK):
        yield values.slice(first, _COLUMN_BLOCK).combine_chunks()


def dataset_arguments(source: str | os.PathLike) -> dict | None:
    """What `datasets.load_dataset` takes for parquet files or a Hub data set, None for a folder of audio files.

    Raises FileNotFoundError for a pattern that no file has.
    """
    text = os.fspath(source)
    if "://" in text:
        pattern = text if text.endswith(".parquet") else f"{text.rstrip('/')}/*.parquet"
        return {"path": "parquet", "data_files": pattern, "split": "train"}
    if has_magic(text) and not os.path.exists(text):
        files = sorted(glob(text, recursive=True))
        if not files:
            raise FileNotFoundError(f"{text}: no file has such a path")
    elif os.path.isdir(text):
        files = sorted(glob(os.path.join(escape(text), "*.parquet")))
    else:
        files = [text] if text.endswith(".parquet") and os.path.isfile(text) else []
    if files:
        return {"path": "parquet", "data_files": [os.path.abspath(file) for file in files], "split": "train"}
    if isinstance(source, str) and not os.path.exists(text) and re.fullmatch(r"\w[\w.-]*/[\w.-]+(:[^/:]+)?", text):
        name, _, split = text.partition(":")
        return {"path": name, "split": split or "train"}
    return None


def load_tables(source: str | os.PathLike, **options: Any) -> datasets.Dataset | datasets.IterableDataset | None:
    """`datasets.load_dataset` of parquet files or a Hub data set, with `options`; None for a folder of audio files.

    Raises FileNotFoundError where there is no such data, or it cannot be reached.
    """
    arguments = dataset_arguments(source)
    if arguments is None:
        return None
    try:
        return datasets.load_dataset(**arguments, **options)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{source} is no folder or file here, and could not be loaded as parquet files or a Hub data set ({error})"
        ) from error


@dataclass(frozen=True)
class Columns:
    """Which columns of a data set hold what; None where there is none."""

    audio: str
    speaker: str
    session: str | None
    path: str | None
    seconds: str | None

    @classmethod
    def find(cls, features: datasets.Features, given: dict[str, str] | None = None) -> "Columns":
        """Columns as `given` ({"speaker": "who"}), else by their usual names, audio also by its type.

        Raises ValueError, with all the columns there are, where `given` names others or no audio or speaker is found.
        """
        given = dict(given or {})
        there = ", ".join(f"{name} ({_type_name(feature)})" for name, feature in features.items())
        unknown = sorted(given.keys() - _USUAL_NAMES.keys())
        if unknown:
            raise ValueError(f"columns: got {', '.join(unknown)}, expected some of {', '.join(_USUAL_NAMES)}")
        absent = sorted(name for name in given.values() if name not in features)
        if absent:
            raise ValueError(f"columns: there is no column {', '.join(absent)}; there are {there}")
        found: dict = {role: given.get(role) or _usual(features, role) for role in _USUAL_NAMES}
        for role in ("audio", "speaker"):
            if found[role] is None:
                raise ValueError(
                    f"columns: no column is named as the {role} usually is ({', '.join(_USUAL_NAMES[role])}); there "
                    f"are {there}: say which is the {role}, columns={{{role!r}: NAME}}"
                )
        return cls(**found)


def _usual(features: datasets.Features, role: str) -> str | None:
    for name in _USUAL_NAMES[role]:
        if name in features and (name != "label" or isinstance(features[name], datasets.ClassLabel)):
            return name
    if role == "audio":
        return next((name for name, feature in features.items() if isinstance(feature, datasets.Audio)), None)
    return None


def _type_name(feature: object) -> str:
    return feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__


def speaker_names(feature: object) -> list[str] | None:
    """The classes of a speaker column that holds their numbers, None for one that holds names."""
    return feature.names if isinstance(feature, datasets.ClassLabel) else None


def row_facts(row: dict, columns: Columns, names: list[str] | None, number: int, stray: bool = False) -> dict:
    """`path`, `speaker`, `session`, `seconds` and `problem` of one row of foreign data, as `load_corpus` gives them.

    number: of the row, for a path where there is none; such a path begins with the speaker, as trial lists want it.
    stray: its audio is a file that is no part of the data, see `source_of`.
    """
    speaker = row[columns.speaker]
    problem = "" if speaker is not None else f"no {columns.speaker} is given"
    if stray:
        problem = "the data set names a file of this machine as its audio, which is not read"
    if names is not None and speaker is not None:
        speaker = names[speaker]
    speaker = "" if speaker is None else str(speaker)
    path = row[columns.path] if columns.path is not None else None
    if path is None:
        audio = row[columns.audio]
        file = (audio.get("path") or "") if isinstance(audio, dict) else ""
        path = f"{number:08d}" + (f"-{os.path.basename(file)}" if file else "")
    if "/" not in path:
        path = f"{speaker}/{path}"
    seconds = row[columns.seconds] if columns.seconds is not None else None
    if seconds is None and stray:
        seconds = 0.0
    elif seconds is None:
        seconds = 0.0
        try:
            seconds = audio_info(source_of(row[columns.audio])).seconds
        except AudioError as error:
            problem = problem or str(error)
    session = path if columns.session is None else str(row[columns.session])
    return {"path": path, "speaker": speaker, "session": session, "seconds": float(seconds), "problem": problem}


def _uniform(
    data: datasets.Dataset,
    given: dict[str, str] | None,
    num_proc: int | None,
    remote: bool,
    cache_dir: str | None,
) -> datasets.Dataset:
    """Parquet or Hub data with the columns of `load_corpus`; the audio stays where it is, the rest is written anew."""
    columns = Columns.find(data.features, given)
    names = speaker_names(data.features[columns.speaker])
    audio = data.select_columns([columns.audio])
    if columns.audio != "audio":
        audio = audio.rename_column(columns.audio, "audio")
    audio = audio.cast_column("audio", datasets.Audio(decode=False))
    needed = [columns.speaker, columns.session, columns.path, columns.seconds]
    if columns.seconds is None or columns.path is None:
        data = data.cast_column(columns.audio, datasets.Audio(decode=False))
        needed.append(columns.audio)
    needed = list(dict.fromkeys(name for name in needed if name is not None))
    strays = _strays(audio, "audio", cache_dir) if remote else set()
    facts = data.select_columns(needed).map(
        _facts_of_batch,
        with_indices=True,
        batched=True,
        batch_size=100,
        remove_columns=needed,
        features=_FACTS,
        fn_kwargs={"columns": columns, "names": names, "strays": strays},
        num_proc=processes_for(num_proc, len(data)) if columns.seconds is None else num_proc,
        desc="Reading headers" if columns.seconds is None else "Reading columns",
    )
    return datasets.concatenate_datasets([audio, facts], axis=1)


def _facts_of_batch(
    batch: dict[str, list], numbers: list[int], columns: Columns, names: list[str] | None, strays: set[int]
) -> dict:
    rows = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
    facts = [row_facts(row, columns, names, n, n in strays) for row, n in zip(rows, numbers, strict=True)]
    return {key: [fact[key] for fact in facts] for key in _FACTS}


_TEXT = datasets.Value("string")
_FACTS = datasets.Features(
    {"path": _TEXT, "speaker": _TEXT, "session": _TEXT, "seconds": datasets.Value("float64"), "problem": _TEXT}
)


@dataclass
class SpeechFolderConfig(datasets.BuilderConfig):
    """What identifies one state of one folder; datasets hashes these fields into the name of the cache."""

    folder: str = ""
    layout: str = DEFAULT_LAYOUT
    fingerprint: str = ""


class SpeechFolder(datasets.GeneratorBasedBuilder):
    """Builder behind `load_corpus`. Its only split is called train, whatever the folder is used for."""

    VERSION = datasets.Version("1.1.0")  # to be raised when the rows change, else old caches stay in use
    BUILDER_CONFIG_CLASS = SpeechFolderConfig

    def _info(self) -> datasets.DatasetInfo:
        # Stored as what Audio stores, not as Audio: its encoder wants torchcodec installed even for a path.
        audio = {"bytes": datasets.Value("binary"), "path": _TEXT}
        return datasets.DatasetInfo(features=datasets.Features({"audio": audio, **_FACTS}))

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        manifest = _find_utterances(Path(self.config.folder), self.config.layout)
        if manifest.fingerprint != self.config.fingerprint:
            raise RuntimeError(f"{self.config.folder} changed while it was being read: run again when it is complete")
        edges = np.linspace(0, len(manifest.tops), min(_SCAN_SHARDS, len(manifest.tops)) + 1).astype(int)
        shards = [manifest.tops[first:last] for first, last in pairwise(edges)]
        return [datasets.SplitGenerator(name=datasets.Split.TRAIN, gen_kwargs={"shards": shards})]

    def _generate_examples(self, shards: list[list[str]]) -> Iterator[tuple[str, dict]]:
        parse = path_parser(self.config.layout)
        for path in (path for shard in shards for top in shard for path in walk(self.config.folder, top)):
            absolute = os.path.join(self.config.folder, path)
            seconds, problem = 0.0, ""
            if not is_text(path):  # no table can hold it
                path, absolute = printable(path), printable(absolute)
                problem = f"{absolute}: its name is not UTF-8 text: rename it"
            else:
                try:
                    seconds = audio_info(absolute).seconds
                except AudioError as error:
                    problem = str(error)
            found = parse(path)
            if found is None:
                raise ValueError(f"{absolute} came while the folder was being read: load it again")
            speaker, session = found
            facts = {"path": path, "speaker": speaker, "session": session, "seconds": seconds, "problem": problem}
            yield path, {"audio": {"path": absolute, "bytes": None}, **facts}


@dataclass(frozen=True)
class _Manifest:
    """The utterances of one folder: its entries that hold some, sorted, how many files, and a hash that changes with
    any of them.
    """

    folder: Path
    tops: list[str]
    files: int
    fingerprint: str


def _find_utterances(root: Path, layout: str) -> _Manifest:
    """All audio files below `root` (or its one inner folder, such as wav), checked against `layout`."""
    parse = path_parser(layout)
    if not root.exists():
        raise FileNotFoundError(f"{root} is not there: give the folder that holds the speakers' folders")
    if not root.is_dir():
        raise ValueError(f"{root} is a file: give the folder that holds the speakers' folders, or parquet files")
    tops: list[str] = []
    first: list[str] = []
    total = wrong = 0
    digest, left_out = hashlib.sha256(), LeftOut()
    for path in walk(root, left_out=left_out):
        total += 1
        if parse(path) is None:
            wrong += 1
            first = [*first, printable(path)][:3]
        if not tops or tops[-1] != path.split("/")[0]:
            tops.append(path.split("/")[0])
        stat = _stat(root / path)
        digest.update(os.fsencode(path) + b"\0%d\0%d\n" % (stat.st_size, stat.st_mtime_ns))
    if not total:
        raise FileNotFoundError(f"no audio ({', '.join(AUDIO_SUFFIXES)}) laid out as {layout} below {root}")
    inner = [top for top in tops if top in _INNER_FOLDERS]
    if wrong == total and len(inner) == 1:
        return _find_utterances(root / inner[0], layout)
    if wrong:
        raise ValueError(_misplaced_message(root, layout, f"{wrong:,} of {total:,}", first))
    left_out.warn(root)
    return _Manifest(root, tops, total, digest.hexdigest())


def processes_for(given: int | None, files: int) -> int | None:
    """How many processes read the headers of so many files."""
    if given is not None or files < MANY_FILES:
        return given
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS has no former


def _misplaced_message(root: Path, layout: str, share: str, first: list[str]) -> str:
    depth, found = layout.count("/") + 1, first[0].count("/") + 1
    fitting = "/".join(["*"] * (found - 3) + DEFAULT_LAYOUT.split("/")) if found > 2 else "speaker/utterance"
    advice = f"layout={fitting!r} would fit the first" if found > 1 else "move it into a speaker's folder"
    where = f"lie at the depth of layout {layout!r} ({depth} parts)"
    if depth == found:
        where = f"have names that fit layout {layout!r}"
    return (
        f"{share} audio files below {root} do not {where}, first {', '.join(first)}: {advice}, "
        "or give the folder that holds the speakers' folders"
    )


def layout_of(name: str) -> str:
    """The path layout with a name in LAYOUTS, or a layout as it is. Raises ValueError unless it is well formed."""
    layout = LAYOUTS.get(name, name)
    path_parser(layout)
    return layout


def path_parser(layout: str) -> Callable[[str], tuple[str, str] | None]:
    """A function from a relative path to (speaker, session), or to None where the path is not laid out so."""
    if layout == UNLABELLED:
        return lambda path: (path, path)
    *folders, last = layout.split("/")
    file = re.split(r"([-_])", last)
    names = [name for name in (*folders, *file[::2]) if name != "*"]
    known = set(names) <= {"speaker", "session", "utterance"} and len(set(names)) == len(names)
    joins = set(file[1::2])
    if not known or "speaker" not in names or file[-1] != "utterance" or len(joins) > 1 or "*" in file:
        raise ValueError(
            f"layout {layout!r} must be one of {', '.join(LAYOUTS)}, or be made of 'speaker', optionally 'session', "
            "and any number of '*', separated by '/', each name once, with 'utterance' last (a file's name may join "
            f"them: 'session-utterance'), for instance {DEFAULT_LAYOUT!r}; or be {UNLABELLED!r} alone, where speakers "
            f"are not known.{near(layout, LAYOUTS)}"
        )
    parts = ["[^/]+" if name == "*" else f"(?P<{name}>[^/]+)" for name in folders]
    # Of a file's name the first part takes what the others leave: the session of live-01-003 is live-01.
    rest = "".join(f"{join}(?P<{name}>[^/{join}]+)" for join, name in zip(file[1::2], file[2::2], strict=True))
    matching = re.compile("/".join([*parts, f"(?P<{file[0]}>[^/]+){rest}"]))

    def parse(path: str) -> tuple[str, str] | None:
        stem, suffix = os.path.splitext(path)
        match = matching.fullmatch(stem if joins else path)
        if match is None:
            return None
        found = match.groupdict()
        return found["speaker"], found.get("session") or os.path.splitext(found["utterance"])[0]

    return parse


def _stat(path: Path) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError:  # a broken link: a file with a problem, not a reason to stop
        return os.lstat(path)


# CN-Celeb1's speakers; of its thousand those of the evaluation part are the last two hundred. (VoxCeleb2 has speakers
# of such names, too.) Files are called GENRE-SESSION-UTTERANCE.
_CNCELEB1 = re.compile(r"id00\d{3}")
_CNCELEB1_EVALUATION = re.compile(r"id00[89]\d{2}")
_CNCELEB_FILE = re.compile(r"(id\d{5}-)?[a-z_]+-\d{2}-\d{3}\.\w+")


def evaluation_speakers(
    names: Iterable[str], layout: str, source: str | os.PathLike, paths: Iterable[str] = ()
) -> list[str]:
    """Those of the speakers `names`, sorted, who belong to CN-Celeb's evaluation part, which lies among its data.

    They are the ones that dev/dev.lst beside CN-Celeb1's speakers does not list or, where there is no such file,
    id00800 to id00999. Speech is CN-Celeb's where `layout` (a name in LAYOUTS) says so, that file is there, or all
    `paths`, of some utterances of speakers with these numbers, are called as its files are; else there are none.
    """
    names, folder = sorted(set(names)), Path(os.path.abspath(source))
    ours = [name for name in names if _CNCELEB1.fullmatch(name)]
    for lists in (folder, folder.parent):
        file = lists / "dev" / "dev.lst"
        if file.is_file():
            listed = set(file.read_text(encoding="utf-8-sig").split())
            if listed & set(ours):
                return [name for name in ours if name not in listed]
    paths = list(paths)
    called_so = bool(paths) and all(_CNCELEB_FILE.fullmatch(path.rsplit("/", 1)[-1]) for path in paths)
    if layout.startswith("cnceleb") or called_so:
        return [name for name in ours if _CNCELEB1_EVALUATION.fullmatch(name)]
    return []


def without_evaluation_speakers(
    dataset: datasets.Dataset, layout: str, source: str | os.PathLike
) -> tuple[datasets.Dataset, str | None]:
    """The rows without those of `evaluation_speakers`, and a sentence that says how many are left out (None: none)."""
    table = SpeakerTable(speakers_of(dataset))
    labels = labels_of(dataset, table)

    def rows_of(names: Iterable[str]) -> np.ndarray:
        return np.flatnonzero(np.isin(labels, [table.id(name) for name in names]))

    suspects = rows_of(filter(_CNCELEB1_EVALUATION.fullmatch, table.names))[:_SOME_ROWS]
    left = evaluation_speakers(table.names, layout, source, dataset.select(suspects)["path"])
    if not left:
        return dataset, None
    rows = rows_of(left)
    return dataset.select(np.setdiff1d(np.arange(len(dataset)), rows)), (
        f"{source}: {len(left)} of {len(table):,} speakers ({len(rows):,} utterances) are those of CN-Celeb's "
        f"evaluation part ({left[0]} ... {left[-1]}) and left out."
    )


class SpeakerTable:
    """Which integer label stands for which speaker; label i is `names[i]`."""

    def __init__(self, names: list[str]) -> None:
        """Labels 0, 1, ... in the order of `names`. Raises ValueError unless they are distinct strings."""
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("a speaker table needs a list of names, all of them strings")
        self.names = tuple(names)
        self._ids = {name: label for label, name in enumerate(names)}
        if len(self._ids) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"a speaker table needs distinct names, these occur twice: {', '.join(twice[:5])}")

    def __len__(self) -> int:
        return len(self.names)

    def id(self, name: str) -> int:
        """The label of the speaker `name`. Raises ValueError, with the most similar names, when it is unknown."""
        if name not in self._ids:
            similar = difflib.get_close_matches(name, self.names) or self.names[:3]
            raise ValueError(
                f"speaker {name!r} is not among the {len(self):,} of this table (nearest: {', '.join(similar)}): "
                "add it with extended()"
            )
        return self._ids[name]

    def name(self, id: int) -> str:
        """The speaker with the label `id`. Raises ValueError when there is no such label."""
        if not 0 <= id < len(self):
            raise ValueError(f"label {id} is outside this table of {len(self):,} speakers")
        return self.names[id]

    def extended(self, names: Iterable[str]) -> "SpeakerTable":
        """A table that also knows `names`: known speakers keep their labels, new ones follow in sorted order."""
        return SpeakerTable([*self.names, *sorted(set(names) - self._ids.keys())])

    def save(self, path: str | os.PathLike) -> None:
        """Write the names as a JSON list; `path` holds either its old content or all of the new one."""
        replace_text(Path(path), json.dumps(self.names, ensure_ascii=False, indent=0) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "SpeakerTable":
        """The table that `save` wrote. Raises ValueError, naming the file, when it is not a list of distinct names."""
        try:
            return cls(json.loads(Path(path).read_text(encoding="utf-8")))
        except ValueError as error:  # JSON's and the table's own
            raise ValueError(f"{path} is not a speaker table (a JSON list of names): {error}") from error


def split_usable(dataset: datasets.Dataset, min_seconds: float) -> tuple[datasets.Dataset, list[tuple[str, str]]]:
    """The rows of `load_corpus` that have no problem and last at least `min_seconds`; the others as (path, reason)."""
    short = seconds_of(dataset) < min_seconds
    flags = (pc.not_equal(block, "").to_numpy(zero_copy_only=False) for block in blocks_of(dataset, "problem"))
    wrong = np.concatenate([np.zeros(0, bool), *flags])
    unusable = np.flatnonzero(short | wrong)
    if not len(unusable):
        return dataset, []  # without a table of indices, which would make every access slower
    facts = dataset.select_columns(["path", "seconds", "problem"])
    problems = []
    for row in facts.select(unusable):
        too_short = f"{row['seconds']:.3f} s long, shorter than {min_seconds:g} s"
        problems.append((row["path"], row["problem"] or too_short))
    return dataset.select(np.flatnonzero(~(short | wrong))), problems


def check_problems(
    problems: list[tuple[str, str]], total: int, max_share: float, report_path: str | os.PathLike | None = None
) -> str:
    """A printable summary of `problems`, (path, reason) pairs, among `total` files; all of them go to `report_path`.

    The report (tab-separated, with a header) is written only when there are problems. Raises ValueError with the
    summary when more than `max_share` (0 to 1) of the files have one.
    """
    if not problems:
        return f"all {total:,} files can be used"
    share = len(problems) / max(total, 1)
    first = "; ".join(f"{path} ({reason})" for path, reason in problems[:5])
    summary = f"{len(problems):,} of {total:,} files cannot be used ({100 * share:.2f} %): {first}"
    if len(problems) > 5:
        summary += f"; and {len(problems) - 5:,} more"
    if report_path is not None:
        lines = ["path\treason", *(f"{printable(path)}\t{' '.join(reason.split())}" for path, reason in problems)]
        replace_text(Path(report_path), "\n".join(lines) + "\n")
        summary += f" (all in {report_path})"
    if share > max_share:
        raise ValueError(f"{summary}. At most {100 * max_share:g} % may be unusable")
    return summary
