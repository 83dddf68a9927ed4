"""A corpus as sharded parquet files: encoded audio as it is on disk, shuffled, complete, and checked to be so.

A folder that `prepare` wrote holds train-00000-of-00300.parquet and so on, `index.json` (`PreparedIndex`),
`speakers.json` (`SpeakerTable`) and, where files could not be used, `problems.tsv`. It is read by `load_corpus`, by
`mrl_redimnet.data.streaming`, by `datasets.load_dataset("parquet", ...)`, and by the Hub's viewer once it is uploaded.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from configuration_mrl_redimnet import MRLReDimNetError
from mrl_redimnet.audio.io import Encoded
from mrl_redimnet.data.corpus import (
    DEFAULT_LAYOUT,
    SpeakerTable,
    audio_source,
    blocks_of,
    check_problems,
    layout_of,
    load_corpus,
    speakers_of,
    split_usable,
    without_evaluation_speakers,
)
from mrl_redimnet.files import refuse_existing, replace_file, replace_text, text_lines
from mrl_redimnet.streams import Stream

ROWS_PER_GROUP = 100  # what a reader holds at a time: some ten megabytes of encoded speech
_TEXT = datasets.Value("string")
FEATURES = datasets.Features(
    {
        "audio": datasets.Audio(decode=False),
        "speaker": _TEXT,
        "session": _TEXT,
        "path": _TEXT,
        "seconds": datasets.Value("float64"),
    }
)


@dataclass(frozen=True)
class Published:
    """How large a corpus is according to its publishers; None where they do not say what lies on the disk."""

    utterances: int
    speakers: int | None
    source: str


# CN-Celeb1 is not here: the 130,109 utterances of its paper count the evaluation part, which is laid out otherwise. Of
# CN-Celeb2's 2,000 speakers it is not clear that all were released, so they are not compared.
EXPECTED = {
    "voxceleb1-dev": Published(148_642, 1_211, "robots.ox.ac.uk/~vgg/data/voxceleb/vox1.html"),
    "voxceleb1-test": Published(4_874, 40, "robots.ox.ac.uk/~vgg/data/voxceleb/vox1.html"),
    "voxceleb2-dev": Published(1_092_009, 5_994, "robots.ox.ac.uk/~vgg/data/voxceleb/vox2.html"),
    "voxceleb2-test": Published(36_237, 118, "robots.ox.ac.uk/~vgg/data/voxceleb/vox2.html"),
    "cnceleb2": Published(529_485, None, "arXiv:2012.12468"),
    "voxblink2": Published(9_904_382, 111_284, "arXiv:2407.11510"),
}
# Trials, and the utterances in them, of published lists, by file name: a list that is cut off is not noticed otherwise.
TRIAL_LISTS = {"veri_test2.txt": (37_611, 4_708)}  # VoxCeleb1-O, cleaned


class IncompleteError(MRLReDimNetError, ValueError):
    """The corpus is not what was expected. The message is the whole report."""


@dataclass(frozen=True)
class PreparedIndex:
    """What a prepared folder holds: `index.json`. shards: {"file", "rows", "bytes"} each; incomplete: what lacks.

    notes: what was left out on purpose, in words.
    """

    rows: int
    seconds: float
    speakers: int
    layout: str
    seed: int
    shards: list[dict]
    incomplete: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    version: int = 1

    def save(self, folder: Path) -> None:
        """Writes `folder`/index.json."""
        (folder / "index.json").write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def parse(cls, text: str, name: str) -> "PreparedIndex":
        """The index in the text of the file `name`. Raises ValueError when it is none."""
        try:
            found = cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name} is not the index of prepared speech ({error}): prepare it again") from error
        if found.version != 1:
            raise ValueError(f"{name} is of version {found.version}, this package reads version 1")
        return found


def prepare(
    root: str | os.PathLike,
    out: str | os.PathLike,
    layout: str = DEFAULT_LAYOUT,
    shard_mb: float = 256,
    seed: int = 0,
    num_proc: int | None = None,
    expect: str | None = None,
    listing: str | os.PathLike | None = None,
    allow_incomplete: bool = False,
    evaluation_speakers: bool = False,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = False,
) -> PreparedIndex:
    """Writes the speech below `root` (as `load_corpus` takes it) to the new folder `out`, as the module says.

    Utterances are shuffled over shards of about `shard_mb` megabytes by `seed`, so that any shard is a fair sample of
    the speakers. `num_proc` processes read headers, as many threads copy, each a hundred files at a time. expect: a
    name in EXPECTED, whose counts are compared; listing: a file that names the utterances there should be
    (`read_listing`). Both are done before anything is written. evaluation_speakers: keep the speakers of CN-Celeb's
    evaluation part, which are otherwise left out (`index.notes` says so).

    `out` appears when all of it is written. A run that was stopped leaves what it had in `.NAME.writing` beside it;
    called again with the same corpus and settings, it keeps the shards that were complete.

    Raises IncompleteError, with the whole report, for utterances that are missing, unless `allow_incomplete`, when
    the report goes into the index; FileExistsError when `out` exists; ValueError and OSError as `load_corpus`.
    """
    out = Path(out)
    refuse_existing(out)
    if shard_mb <= 0:
        raise ValueError(f"shard_mb: got {shard_mb}, expected more than 0")
    if expect is not None and expect not in EXPECTED:
        raise ValueError(f"expect: got {expect!r}, expected one of {', '.join(EXPECTED)}")
    named, layout = layout, layout_of(layout)
    usable, problems = split_usable(load_corpus(root, layout, cache_dir, num_proc), min_seconds=0)
    lacks = what_lacks(usable, expect, listing)
    _refuse_incomplete(root, len(usable), problems, [] if allow_incomplete else lacks)

    left_out = None
    if not evaluation_speakers:
        usable, left_out = without_evaluation_speakers(usable, named, root)
        if not len(usable):
            raise ValueError(f"{left_out} Nothing remains; with evaluation_speakers they are prepared, too.")

    plan = _Plan.make(usable, layout, shard_mb, seed)
    work = out.with_name(f".{out.name}.writing")
    _take_up(work, plan)
    write = partial(_write_shard, usable, work, plan)
    shards = list(tqdm(_side_by_side(write, plan.shards, num_proc or 1), "shards", plan.shards, disable=not progress))
    problems += [tuple(problem) for shard in shards for problem in shard["problems"]]
    speakers = SpeakerTable(speakers_in([work / shard["file"] for shard in shards]))
    index = PreparedIndex(
        rows=sum(shard["rows"] for shard in shards),
        seconds=sum(shard["seconds"] for shard in shards),
        speakers=len(speakers),
        layout=layout,
        seed=seed,
        shards=[{key: shard[key] for key in ("file", "rows", "bytes")} for shard in shards],
        incomplete=lacks,
        notes=[] if left_out is None else [left_out],
    )
    speakers.save(work / "speakers.json")
    if problems:
        check_problems(problems, index.rows + len(problems), 1.0, work / "problems.tsv")
    index.save(work)
    for note in (*work.glob("*.done"), work / "plan.json"):
        note.unlink()
    os.replace(work, out)
    return index


def _refuse_incomplete(root: str | os.PathLike, usable: int, problems: list[tuple[str, str]], lacks: list[str]) -> None:
    """Raises IncompleteError where something lacks, ValueError where no file can be used."""
    if lacks:
        unusable = [check_problems(problems, usable + len(problems), 1.0)] if problems else []
        raise IncompleteError("\n".join([f"{root} is not complete:", *lacks, *unusable]))
    if not usable:
        raise ValueError(f"{root}: none of its {len(problems):,} files can be used, first: {problems[0]}")


@dataclass(frozen=True)
class _Plan:
    """What decides the content of every shard; a run is only taken up where all of it is the same."""

    corpus: str
    layout: str
    shards: int
    seed: int

    @classmethod
    def make(cls, usable: datasets.Dataset, layout: str, shard_mb: float, seed: int) -> "_Plan":
        digest, size = hashlib.sha256(), 0
        files = usable.select_columns(["audio", "path"])
        for row in files:
            data = row["audio"]["bytes"]
            stat = os.stat(row["audio"]["path"]) if data is None else None
            length, stamp = (len(data), 0) if stat is None else (stat.st_size, stat.st_mtime_ns)
            size += length
            digest.update(f"{row['path']}\0{length}\0{stamp}\n".encode())
        shards = min(len(usable), max(1, round(size / (shard_mb * 1e6))))
        return cls(digest.hexdigest(), layout, shards, seed)

    def rows_of(self, shard: int, rows: int) -> np.ndarray:
        """The rows of the corpus that a shard holds, in its order."""
        order = Stream.PREPARED_ORDER.generator(self.seed).permutation(rows)
        return np.array_split(order, self.shards)[shard]

    def name_of(self, shard: int) -> str:
        return f"train-{shard:05d}-of-{self.shards:05d}.parquet"


def _take_up(work: Path, plan: _Plan) -> None:
    """Makes `work` ready: as a stopped run of the same plan left it, else empty."""
    note = work / "plan.json"
    try:
        same = json.loads(note.read_text(encoding="utf-8")) == asdict(plan)
    except (FileNotFoundError, ValueError):
        same = False
    if not same:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        replace_text(note, json.dumps(asdict(plan)))
    for file in work.iterdir():
        if file != note and file.suffix not in (".parquet", ".done"):
            file.unlink()  # what was being written when the run was killed


def _side_by_side(write: Callable[[int], dict], shards: int, threads: int) -> Iterator[dict]:
    """write(0), write(1), ... in order, computed in `threads` threads: copying files is waiting, not computing."""
    if threads < 2:
        yield from map(write, range(shards))
        return
    with ThreadPoolExecutor(threads) as pool:
        try:
            yield from pool.map(write, range(shards))
        except BaseException:
            pool.shutdown(cancel_futures=True)  # else a stopped run would first write all the rest
            raise


def _write_shard(usable: datasets.Dataset, work: Path, plan: _Plan, shard: int) -> dict:
    """One shard's file, unless it is there, and what it holds: file, rows, bytes, seconds, problems."""
    path = work / plan.name_of(shard)
    done = path.with_suffix(".done")
    if path.is_file() and done.is_file():
        return json.loads(done.read_text(encoding="utf-8"))
    rows = plan.rows_of(shard, len(usable))
    facts: dict = {"file": path.name, "rows": 0, "bytes": 0, "seconds": 0.0, "problems": []}

    def write(file: Path) -> None:
        with pq.ParquetWriter(
            file,
            FEATURES.arrow_schema,
            compression="none",  # encoded audio does not get smaller
            use_dictionary=["speaker"],
            write_statistics=["speaker", "seconds"],
        ) as writer:
            for first in range(0, len(rows), ROWS_PER_GROUP):
                group, failed = read_rows(usable, rows[first : first + ROWS_PER_GROUP])
                facts["problems"] += failed
                facts["rows"] += len(group)
                facts["seconds"] += sum(row["seconds"] for row in group)
                writer.write_table(pa.Table.from_pylist(group, FEATURES.arrow_schema), ROWS_PER_GROUP)

    replace_file(path, write)
    facts["bytes"] = path.stat().st_size
    replace_text(done, json.dumps(facts))
    return facts


def read_rows(usable: datasets.Dataset, rows: np.ndarray) -> tuple[list[dict], list[tuple[str, str]]]:
    """Rows with their files' bytes, and (path, reason) of those whose file can no longer be read."""
    group, problems = [], []
    for number in rows.tolist():
        row = usable[number]
        source = audio_source(usable, number)
        try:
            data = source.data if isinstance(source, Encoded) else Path(source).read_bytes()
        except OSError as error:
            problems.append((row["path"], f"could be listed, but not read: {error}"))
            continue
        facts = {key: row[key] for key in ("speaker", "session", "path", "seconds")}
        group.append({"audio": {"bytes": data, "path": row["path"]}, **facts})
    return group, problems


def speakers_in(files: list[Path]) -> list[str]:
    """The distinct speakers of parquet files as `prepare` writes them, sorted; only that column is read."""
    names: set[str] = set()
    for file in files:
        names.update(pq.read_table(file, columns=["speaker"]).column("speaker").unique().to_pylist())
    return sorted(names)


def what_lacks(
    usable: datasets.Dataset, expect: str | None = None, listing: str | os.PathLike | None = None
) -> list[str]:
    """What the usable rows of a corpus lack of a published size (a name in EXPECTED) and of a list; [] if nothing."""
    lacks = []
    if expect is not None:
        published, speakers = EXPECTED[expect], len(speakers_of(usable))
        for what, there, wanted in (
            ("utterances", len(usable), published.utterances),
            ("speakers", speakers, published.speakers),
        ):
            if wanted is not None and there != wanted:
                difference = f"{wanted - there:,} are missing" if there < wanted else f"{there - wanted:,} too many"
                lacks.append(f"{expect}: {there:,} usable {what}, published are {wanted:,} ({difference})")
        if lacks:
            lacks[-1] += f"; the counts are those of {published.source}"
    if listing is not None:
        lacks += _missing_of_list(usable, Path(listing))
    return lacks


def _missing_of_list(usable: datasets.Dataset, listing: Path) -> list[str]:
    listed, trials = read_listing(listing)
    lacks = []
    if listing.name in TRIAL_LISTS and trials and (trials, len(listed)) != TRIAL_LISTS[listing.name]:
        published = "{:,} of {:,}".format(*TRIAL_LISTS[listing.name])
        lacks.append(
            f"{listing}: {trials:,} trials of {len(listed):,} utterances, published are {published}: it is not whole"
        )
    missing = set(listed)
    for paths in blocks_of(usable, "path"):
        missing.difference_update(os.path.splitext(path)[0] for path in paths.to_pylist())
    if not missing:
        return lacks
    wanted, lost = _counts_of_speakers(listed), _counts_of_speakers(missing)
    worst = sorted(lost, key=lambda speaker: (-lost[speaker], speaker))[:10]
    speakers = ", ".join(f"{speaker} ({lost[speaker]} of {wanted[speaker]})" for speaker in worst)
    more = f" and {len(lost) - 10:,} more" if len(lost) > 10 else ""
    first = ", ".join(sorted(missing)[:5])
    lacks.append(
        f"{listing}: {len(missing):,} of {len(listed):,} listed utterances are missing or unusable, first {first}; "
        f"of {len(lost):,} speakers: {speakers}{more}"
    )
    return lacks


def _counts_of_speakers(paths: set[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for path in paths:
        speaker = path.split("/")[0]
        counts[speaker] = counts.get(speaker, 0) + 1
    return counts


def read_listing(path: str | os.PathLike) -> tuple[set[str], int]:
    """The distinct utterances that a text file names, without suffixes, and how many of its lines are trials.

    Every field with a "/" is an utterance: lines may be paths, "speaker path" (VoxCeleb's lists of utterances) or
    trials "1 path path". Suffixes do not count, because lists say .wav where files are .m4a. Raises ValueError for a
    line without one.
    """
    found, trials = set(), 0
    for number, line in enumerate(text_lines(path), start=1):
        fields = line.split()
        paths = [os.path.splitext(text)[0] for text in fields if "/" in text]
        if fields and not paths:
            raise ValueError(f"{path}, line {number}: {line.strip()!r} names no utterance (a path with '/')")
        found.update(paths)
        trials += len(paths) == 2
    return found, trials
