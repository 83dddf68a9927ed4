"""Embeddings of whole corpora: many processes, stopped and taken up at will, every utterance exactly once.

    encoder = SpeakerEncoder.from_pretrained("me/model", device=Process.launched().device)
    report = embed_corpus(encoder, Inputs.find(["corpus"]), Path("embedded"))
    ids, embeddings = read_embeddings(Path("embedded"))

The inputs are cut into blocks of some hundred utterances (`bulk_inputs`), the same ones whoever cuts them. Each block
becomes one file, written whole or not at all and named after the list of utterances, the shard and the block. So the
files that are there say what is done; processes have nothing to agree upon but which blocks are whose, and two that
embed the same block, one left over from a run that was killed, write the same file. Nothing is ever sent between
processes: one that dies holds up no other, and any number of them may go on.
"""

import contextlib
import hashlib
import json
import os
import re
import socket
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate.utils import parse_flag_from_env
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from configuration_mrl_redimnet import SAMPLING_RATE
from feature_extraction_mrl_redimnet import MRLReDimNetFeatureExtractor
from mrl_redimnet.audio.io import AudioError, Encoded, name_of
from mrl_redimnet.audio.levels import refuse_silence
from mrl_redimnet.audio.scan import is_text, printable
from mrl_redimnet.audio.waveforms import length_batches, read_waveform
from mrl_redimnet.encoder import BATCH_SECONDS, LISTED, SpeakerEncoder, padded
from mrl_redimnet.extraction.inputs import Inputs, Utterance
from mrl_redimnet.files import replace_file
from mrl_redimnet.fingerprints import same_weights
from mrl_redimnet.speed.threads import side_by_side, workers_for

STORAGES = {"float32": np.float32, "float16": np.float16}
PART_SIZE = 512
SMALLEST_PART, PARTS = 16, 64  # a small corpus is cut into so many, that there is something for every process
READ_AHEAD = 4  # batches that each worker holds ready
ABANDONED = 3600.0  # seconds after which a file that is still being written is not any more

Key = tuple[int, int]  # shard, block


# ---------------------------------------------------------------- from utterances to embeddings


@dataclass(frozen=True)
class Problem:
    """An utterance that could not be embedded, and why."""

    id: str
    path: str
    reason: str


@dataclass(frozen=True)
class Task:
    """Utterances of a block that are to be embedded; size: how many it has with those that need not be."""

    key: Key
    utterances: list[Utterance]
    size: int


@dataclass(frozen=True)
class Batch:
    """Utterances of one block or of several: the block and the row in the task of each, ids, paths, and waves [B, T]
    with their lengths [B] in samples.
    """

    places: list[tuple[Key, int]]
    ids: list[str]
    paths: list[str]
    waves: torch.Tensor
    lengths: torch.Tensor

    def rows(self, embeddings: np.ndarray) -> Iterator[tuple]:
        """Place, id, path, seconds and embedding of each utterance, given the embeddings [B, dim]."""
        seconds = (self.lengths / SAMPLING_RATE).tolist()
        yield from zip(self.places, self.ids, self.paths, seconds, embeddings, strict=True)


@dataclass(frozen=True)
class BlockEnd:
    """Everything of a block has been given. size: as of its task; problems: what could not be."""

    key: Key
    size: int
    problems: list[Problem]


def batches_of(
    tasks: Sequence[Task], extractor: MRLReDimNetFeatureExtractor, batch_seconds: float
) -> Iterator[Batch | BlockEnd]:
    """The utterances of some tasks, each read once, batched by length, then the ends of their blocks.

    batch_seconds: as of `SpeakerEncoder.embed`. The audio of as many batches is held as `length_batches` sorts
    together.
    """
    places = [(task.key, row) for task in tasks for row in range(len(task.utterances))]
    utterances = [utterance for task in tasks for utterance in task.utterances]
    names = [name_of(utterance.source) for utterance in utterances]
    paths = [name if is_text(name) else printable(name) for name in names]
    problems: dict[Key, list[Problem]] = {task.key: [] for task in tasks}

    def waveforms() -> Iterator[tuple[int, np.ndarray]]:
        for row, utterance in enumerate(utterances):
            try:
                yield row, _waveform(utterance.source, extractor)
            except (OSError, ValueError) as error:
                reason = str(error) if isinstance(error, AudioError) else f"{printable(names[row])}: {error}"
                problems[places[row][0]].append(Problem(utterance.id, paths[row], reason))

    for batch in length_batches(waveforms(), batch_seconds):
        of_batch = [places[row] for row in batch], [utterances[row].id for row in batch], [paths[row] for row in batch]
        lengths = torch.tensor([len(wave) for wave in batch.values()])
        yield Batch(*of_batch, padded(batch.values()), lengths)
    for task in tasks:
        yield BlockEnd(task.key, task.size, problems[task.key])


def _waveform(source: str | Encoded, extractor: MRLReDimNetFeatureExtractor) -> np.ndarray:
    """[samples] float32 of a file, `Encoded`, or a URL that fsspec knows. Raises AudioError, also where nobody can be
    heard; OSError or ValueError for what is not there.
    """
    name = name_of(source)
    if not is_text(name):
        raise ValueError("its name is not UTF-8 text: rename it")
    return read_waveform(source, name, extractor, refuse_silence)


class Embedder:
    """A model as a function from batches to embeddings, and what turns those into rows of a table.

    dim: how many numbers of each embedding are kept (None: all); storage: how, one of STORAGES.
    """

    def __init__(self, encoder: SpeakerEncoder, dim: int | None = None, storage: str = "float32") -> None:
        if storage not in STORAGES:
            raise ValueError(f"storage: got {storage!r}, expected one of {', '.join(STORAGES)}.")
        self.encoder, self.dim, self.storage = encoder, encoder.dim(dim), storage
        self.extractor = encoder.extractor()

    def __call__(self, batch: Batch) -> np.ndarray:
        """Embeddings [B, dim], as they are stored."""
        embeddings = self.encoder.embed_padded(batch.waves, batch.lengths)[:, : self.dim]
        with np.errstate(over="ignore"):  # what float16 cannot hold becomes a problem
            return embeddings.astype(STORAGES[self.storage])

    def table(
        self, utterances: Sequence[Utterance], batch_seconds: float = BATCH_SECONDS
    ) -> tuple[pa.Table, list[Problem]]:
        """Rows (id, path, seconds, embedding) of utterances in their order, and the `Problem`s of those without."""
        block = Block()
        unread: list[Problem] = []
        for item in batches_of([Task((0, 0), list(utterances), len(utterances))], self.extractor, batch_seconds):
            if isinstance(item, Batch):
                for (_, row), *facts in item.rows(self(item)):
                    block.add(row, *facts)
            else:
                unread = item.problems
        return block.table(self), [*block.problems, *unread]


@dataclass
class Block:
    """What is embedded of one block so far."""

    rows: list[tuple[int, str, str, float, np.ndarray]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def add(self, row: int, id: str, path: str, seconds: float, embedding: np.ndarray) -> None:
        """An embedding [dim]; one with numbers that are not finite is a problem."""
        if np.isfinite(embedding).all():
            self.rows.append((row, id, path, seconds, embedding))
        else:
            self.problems.append(Problem(id, path, "its embedding is not finite as it is stored"))

    def table(self, embedder: Embedder) -> pa.Table:
        """id, path, seconds, embedding (a fixed-size list), by the utterances' rows."""
        rows = sorted(self.rows, key=lambda row: row[0])
        vectors = np.array([row[4] for row in rows], dtype=STORAGES[embedder.storage]).reshape(-1)
        columns = {
            "id": pa.array([row[1] for row in rows], pa.string()),
            "path": pa.array([row[2] for row in rows], pa.string()),
            "seconds": pa.array([row[3] for row in rows], pa.float32()),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors), embedder.dim),
        }
        return pa.table(columns)


# ---------------------------------------------------------------- whose is what


@dataclass(frozen=True)
class Process:
    """One of `count` processes that embed the same inputs; local: its number on this machine, which picks the GPU."""

    number: int = 0
    count: int = 1
    local: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.count or self.local < 0:
            raise ValueError(
                f"process {self.number} of {self.count} (RANK, WORLD_SIZE): expected 0 to {self.count - 1}"
            )

    @classmethod
    def launched(cls) -> "Process":
        """As `accelerate launch` and torchrun, or a scheduler's script, say in RANK, WORLD_SIZE and LOCAL_RANK."""
        number, count, local = (os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        return cls(int(number or 0), int(count or 1), int(local or 0))

    @property
    def device(self) -> torch.device:
        """The accelerator that is this process's by its number on the machine; the CPU where there is none, or where
        `accelerate launch --cpu` says so.

        Found without accelerate's process group: the processes never speak to each other, and must not be stopped by
        the end of one.
        """
        found = torch.accelerator.current_accelerator(check_available=True)
        if found is None or parse_flag_from_env("ACCELERATE_USE_CPU"):
            return torch.device("cpu")
        return torch.device(found.type, self.local % torch.accelerator.device_count())


Turns = dict[int, tuple[int, int]]  # of a shard: the first block, and the step to the next


def whole(inputs: Inputs) -> Turns:
    """All blocks of all shards."""
    return dict.fromkeys(range(len(inputs.shards)), (0, 1))


def share(turns: Turns, sequential: Sequence[bool], taker: int, takers: int) -> Turns:
    """What one of several takers takes of `turns`; together they take each block once.

    Blocks of a shard that can be reached at once are dealt out. Sequential shards are taken whole where there are
    enough of them; else several takers read the same shard, and each keeps blocks of its own.
    """
    taken, streams = {}, [shard for shard in turns if sequential[shard]]
    for shard, (first, step) in turns.items():
        if not sequential[shard]:
            taken[shard] = (first + taker * step, takers * step)
            continue
        place = streams.index(shard)
        readers = [place % takers] if len(streams) >= takers else [*range(place, takers, len(streams))]
        if taker in readers:
            taken[shard] = (first + readers.index(taker) * step, len(readers) * step)
    return taken


def holds(turns: Turns, key: Key) -> bool:
    """Whether a block is among `turns`."""
    shard, block = key
    if shard not in turns:
        return False
    first, step = turns[shard]
    return block >= first and (block - first) % step == 0


def part_size(rows: int | None, most: int) -> int:
    """Utterances of a block: `most`, or fewer where the inputs' `rows` are known to be few."""
    return most if rows is None else min(most, max(SMALLEST_PART, -(-rows // PARTS)))


# ---------------------------------------------------------------- what is done


@dataclass(frozen=True)
class Made:
    """What embeddings were made with: all that are in one folder were made with the same."""

    model: str
    adapter: str
    weights: str
    dim: str
    storage: str

    @classmethod
    def by(cls, embedder: Embedder) -> "Made":
        """What an embedder makes embeddings with."""
        encoder = embedder.encoder
        return cls(encoder.name, encoder.adapter or "", encoder.fingerprint, str(embedder.dim), embedder.storage)

    def refuse_others(self, file: Path, metadata: dict[str, str]) -> None:
        """Raises ValueError, naming what differs, where a file was made with something else."""
        for name in ("adapter", "weights", "dim", "storage"):
            there, here = metadata.get(name), getattr(self, name)
            same = same_weights(there or "", here) if name == "weights" else there == here
            if not same:
                was = f"{metadata.get('model')} ({there})" if name == "weights" else there or "none"
                now = f"{self.model} ({here})" if name == "weights" else here or "none"
                raise ValueError(
                    f"{file} was made with {name} {was}, this run has {now}: go on with the same, or give another --out"
                )


_PART = re.compile(r"part-[0-9a-f]{8}-\d{5,}-\d{6,}\.parquet")


@dataclass
class Parts:
    """The files of a folder. plan: of the inputs and the block size, what this run's files are named after.

    done: {key: utterances} of blocks that are finished; taken: ids that are in files of other plans, which were made
    of other lists of utterances.
    """

    folder: Path
    made: Made
    plan: str
    done: dict[Key, int] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)

    @classmethod
    def open(cls, folder: Path, made: Made, plan: str) -> "Parts":
        """What is in `folder`, which is made if it is not there. Raises ValueError where something else made it."""
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(f"{folder} is a file: give a folder for the parts.")
        folder.mkdir(parents=True, exist_ok=True)
        parts = cls(folder, made, plan)
        for file in part_files(folder):
            found_plan, shard, block = file.stem.split("-")[1:]
            metadata = _metadata(file)
            made.refuse_others(file, metadata)
            if found_plan == plan:
                parts.done[int(shard), int(block)] = int(metadata["utterances"])
            else:
                parts.taken.update(pq.read_table(file, columns=["id"]).column("id").to_pylist())
        for leftover in (*folder.glob(".*-part-*"), *folder.glob(".*-problems-*")):
            with contextlib.suppress(FileNotFoundError):  # another process was first
                if time.time() - leftover.stat().st_mtime > ABANDONED:
                    leftover.unlink()
        return parts

    def finished(self, shard: int, size: int) -> bool:
        """Whether the last block of a sequential shard and all before it are there."""
        blocks = sorted(block for number, block in self.done if number == shard)
        return bool(blocks) and self.done[shard, blocks[-1]] < size and blocks == list(range(len(blocks)))

    def file(self, key: Key) -> Path:
        """The file of a block, whether or not it is there."""
        return self.folder / f"part-{self.plan}-{key[0]:05d}-{key[1]:06d}.parquet"

    def problems(self, turns: Turns) -> dict[Key, list[Problem]]:
        """Those of the finished blocks among `turns` that have some."""
        found = {}
        for file in sorted(self.folder.glob(f"problems-{self.plan}-*.jsonl")):
            shard, block = file.stem.split("-")[2:]
            key = int(shard), int(block)
            if holds(turns, key) and self.file(key).is_file():  # else it will be done again
                embedded = set(pq.read_table(self.file(key), columns=["id"])["id"].to_pylist())  # by a stopped retry
                problems = [Problem(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
                found[key] = [problem for problem in problems if problem.id not in embedded]
        return found

    def write(self, key: Key, table: pa.Table, utterances: int, problems: list[Problem]) -> None:
        """A block's file, after that of its problems: when the first is there, so is the second."""
        self.write_problems(key, problems)
        metadata = {**asdict(self.made), "utterances": str(utterances)}
        self.put(self.file(key), lambda file: pq.write_table(table.replace_schema_metadata(metadata), file))

    def add(self, key: Key, table: pa.Table, problems: list[Problem]) -> None:
        """To a finished block what had problems in it once, and the problems that remain."""
        there = pq.read_table(self.file(key))
        old = there.filter(pa.array([name not in set(table["id"].to_pylist()) for name in there["id"].to_pylist()]))
        metadata = there.schema.metadata
        joined = pa.concat_tables([old.replace_schema_metadata(), table]).replace_schema_metadata(metadata)
        self.put(self.file(key), lambda file: pq.write_table(joined, file))
        self.write_problems(key, problems)

    def _problems_file(self, key: Key) -> Path:
        return self.folder / self.file(key).name.replace("part-", "problems-").replace(".parquet", ".jsonl")

    def write_problems(self, key: Key, problems: list[Problem]) -> None:
        """The file of a block's problems; none where there are no problems."""
        file = self._problems_file(key)
        if not problems:
            file.unlink(missing_ok=True)
            return
        text = "".join(json.dumps(asdict(problem), ensure_ascii=False) + "\n" for problem in problems)
        self.put(file, lambda target: target.write_text(text, encoding="utf-8"))

    def put(self, target: Path, write: Callable[[Path], object]) -> None:
        """Writes a file, under a name of this process first: a killed run may have left another that writes it, too."""
        own = target.with_name(f".{socket.gethostname()}-{os.getpid()}-{target.name}")
        replace_file(own, write)
        os.replace(own, target)


def part_files(folder: Path) -> list[Path]:
    """The parts in a folder, in their order."""
    return sorted(file for file in folder.iterdir() if _PART.fullmatch(file.name))


def _metadata(file: Path) -> dict[str, str]:
    try:
        return {key.decode(): value.decode() for key, value in (pq.read_schema(file).metadata or {}).items()}
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{file} is no parquet file ({error}): remove it, its utterances are embedded again"
        ) from error


def read_embeddings(folder: str | os.PathLike) -> tuple[list[str], np.ndarray]:
    """The ids [N] and embeddings [N, dim] of all parts in a folder, in the order of the inputs.

    Raises FileNotFoundError where there are no parts.
    """
    files = part_files(Path(folder))
    if not files:
        raise FileNotFoundError(f"no parts (part-*.parquet) in {folder}: `mrl-redimnet embed` writes them")
    table = pa.concat_tables([pq.read_table(file, columns=["id", "embedding"]) for file in files])
    vectors = table["embedding"].combine_chunks()
    width = table.schema.field("embedding").type.list_size
    return table["id"].to_pylist(), vectors.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)


# ---------------------------------------------------------------- the run


@dataclass(frozen=True)
class Extraction:
    """How a corpus is embedded. dim, storage: as of `Embedder`.

    batch_seconds: padded audio that is in the network at once. part_size: utterances of a part at most, and about how
    many are sorted by length together, which a process that is killed may have to do again. workers: processes that
    decode, for each that embeds; 0: none.
    retry: try again what had problems.
    """

    dim: int | None = None
    storage: str = "float32"
    batch_seconds: float = BATCH_SECONDS
    part_size: int = PART_SIZE
    workers: int = 1
    retry: bool = False

    def __post_init__(self) -> None:
        for name, least in (("batch_seconds", 0.02), ("part_size", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected {least} or more")


@dataclass(frozen=True)
class Report:
    """Of one process: utterances it embedded, those of its blocks that were finished before, and what has problems,
    now or since an earlier run.
    """

    embedded: int
    before: int
    problems: list[Problem]


@dataclass
class Work(IterableDataset):
    """Batches and ends of the blocks that a process has to embed, shared out among its DataLoader's workers.

    retries: ids of finished blocks that are to be tried again. An error that ends the run comes as the last item: as
    an exception, the loader would bury its message in a worker's traceback.
    """

    inputs: Inputs
    turns: Turns
    parts: Parts
    size: int
    retries: dict[Key, set[str]]
    extractor: MRLReDimNetFeatureExtractor
    how: Extraction

    def __iter__(self) -> Iterator[Batch | BlockEnd | Exception]:
        worker = get_worker_info()
        turns = self.turns
        if worker is not None:
            sequential = [shard.sequential for shard in self.inputs.shards]
            turns = share(turns, sequential, worker.id, worker.num_workers)
        try:
            for tasks in self.together(turns):
                yield from batches_of(tasks, self.extractor, self.how.batch_seconds)
        except (OSError, ValueError) as error:
            yield error

    def together(self, turns: Turns) -> Iterator[list[Task]]:
        """Blocks that are sorted by length together: one large one, or as many small ones as make one."""
        tasks: list[Task] = []
        for key, utterances in self.blocks(turns):
            tasks.append(Task(key, self._left(key, utterances), len(utterances)))
            if sum(len(task.utterances) for task in tasks) >= self.how.part_size:
                yield tasks
                tasks = []
        if tasks:
            yield tasks

    def blocks(self, turns: Turns) -> Iterator[tuple[Key, list[Utterance]]]:
        """The blocks of these shards that are still to be done, or to be tried again."""
        for number in turns:
            shard, again = self.inputs.shards[number], any(key[0] == number for key in self.retries)
            if shard.sequential and self.parts.finished(number, self.size) and not again:
                continue

            def wanted(block: int, number: int = number) -> bool:
                key = number, block
                return holds(turns, key) and (key not in self.parts.done or key in self.retries)

            for block, utterances in shard.blocks(self.size, wanted):
                yield (number, block), utterances

    def _left(self, key: Key, utterances: list[Utterance]) -> list[Utterance]:
        """Without what other plans embedded; of a finished block, what is to be tried again."""
        again = self.retries.get(key)
        if again is not None:
            return [utterance for utterance in utterances if utterance.id in again]
        return [utterance for utterance in utterances if utterance.id not in self.parts.taken]


def embed_corpus(
    encoder: SpeakerEncoder,
    inputs: Inputs,
    out: str | os.PathLike,
    how: Extraction | None = None,
    process: Process | None = None,
    progress: str | None = None,
) -> Report:
    """Embeds this process's share of `inputs` into parts in the folder `out`, but for what is there already.

    Parts are parquet files with id, path, seconds and embedding (a list of `dim` numbers); their metadata says by
    which model, weights, adapter, dim and storage. What cannot be read is in problems-*.jsonl beside them, and is not
    tried again unless `how.retry`. Utterances that are new in the inputs are embedded, those that are gone stay.

    process: None for the one that the launcher says this is. Every process is given the same inputs and settings; how
    many there are may change when a run is taken up. Do not change the inputs while processes of a run still live.

    Raises ValueError where `out` was made by another model, adapter, dim or storage; OSError and ValueError as reading
    the inputs does. Everything embedded until then is kept.
    """
    how, process = how or Extraction(), process or Process.launched()
    embedder = Embedder(encoder, how.dim, how.storage)
    size = part_size(inputs.rows, how.part_size)
    plan = hashlib.sha256(f"{inputs.digest} {size}".encode()).hexdigest()[:8]
    parts = Parts.open(Path(out), Made.by(embedder), plan)
    sequential = [shard.sequential for shard in inputs.shards]
    turns = share(whole(inputs), sequential, process.number, process.count)
    before = sum(count for key, count in parts.done.items() if holds(turns, key))
    again = parts.problems(turns) if how.retry else {}
    retries = {key: {problem.id for problem in problems} for key, problems in again.items()}
    at_once = workers_for(encoder.device)
    of_each = replace(how, batch_seconds=how.batch_seconds / at_once)
    work = Work(inputs, turns, parts, size, retries, embedder.extractor, of_each)
    with tqdm(desc=progress, disable=True if progress is None else None, leave=False, unit=" utterances") as bar:
        embedded = _embed(embedder, work, at_once, bar)
    problems = [problem for found in parts.problems(turns).values() for problem in found]
    return Report(embedded, before, problems)


def embed_to_file(
    encoder: SpeakerEncoder, inputs: Inputs, out: Path, how: Extraction | None = None, progress: str | None = None
) -> Report:
    """As `embed_corpus`, by this process alone, into one file `out` (.npz) with ids, embeddings and the weights' name.

    The file is written whole or not at all. Raises ValueError also where no utterance could be embedded.
    """
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        report = embed_corpus(encoder, inputs, folder, how, Process(), progress)
        if not report.embedded:
            raise ValueError(
                f"none of {len(report.problems)} utterances could be embedded, {out} is not written: "
                f"{'; '.join(problem.reason for problem in report.problems[:LISTED])}"
            )
        ids, embeddings = read_embeddings(folder)

    def write(file: Path):
        with file.open("wb") as opened:  # given a path, numpy would append a suffix
            np.savez(opened, ids=np.array(ids), embeddings=embeddings, weights=np.array(encoder.fingerprint))

    replace_file(out, write)
    return report


def _embed(embedder: Embedder, work: Work, at_once: int, bar: tqdm) -> int:
    """Writes a part for every block of the work, with so many batches at once; how many utterances were embedded."""
    model, embedded = embedder.encoder.model, 0
    blocks: defaultdict[Key, Block] = defaultdict(Block)
    training = model.training

    def with_embeddings(item: Batch | BlockEnd | Exception) -> tuple[Batch | BlockEnd | Exception, np.ndarray]:
        return item, embedder(item) if isinstance(item, Batch) else np.empty(0)

    model.eval()
    try:
        for item, embeddings in side_by_side(with_embeddings, _loaded(work), at_once):
            if isinstance(item, Exception):
                raise item
            if isinstance(item, Batch):
                for (key, row), *facts in item.rows(embeddings):
                    blocks[key].add(row, *facts)
                bar.update(len(item.ids))
                continue
            block = blocks.pop(item.key, Block())
            table, problems = block.table(embedder), [*item.problems, *block.problems]
            embedded += len(table)
            if item.key in work.retries:
                work.parts.add(item.key, table, problems)
            else:
                work.parts.write(item.key, table, item.size, problems)
    finally:
        model.train(training)
    return embedded


def _loaded(work: Work) -> Iterator[Batch | BlockEnd | Exception]:
    """What the work gives, made ahead by processes if there are to be some."""
    workers = work.how.workers
    ahead = dict(prefetch_factor=READ_AHEAD, in_order=False) if workers else {}
    loader = DataLoader(work, batch_size=None, num_workers=workers, generator=torch.Generator(), **ahead)
    others = set(active_children())
    batches = iter(loader)
    processes = set(active_children()) - others
    try:
        yield from batches
    except RuntimeError as error:
        if not any(process.exitcode for process in processes):  # an error of the work itself
            raise
        raise ChildProcessError(
            f"a process that decodes audio died ({error}): killed for want of memory, perhaps. Run the command again, "
            "with fewer --workers or a smaller --part-size; what is embedded is kept"
        ) from error
