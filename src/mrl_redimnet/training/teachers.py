"""Teachers: where the embeddings come from that a student learns from.

`loss.teacher` names one, and what it names says of which kind it is (`SOURCES`, the first that fits):

- table: embeddings of whole utterances by their ids: a folder that `mrl-redimnet embed` wrote, its FILE.npz, or any
  parquet file or folder of them;
- onnx: FILE.onnx, from waveforms [B, T] float32 at 16 kHz to embeddings [B, E];
- function: package.module:name, a function (or torch module) from such waveforms to embeddings;
- model: a saved model of this package, a folder, a Hub id or a published name.
"""

import importlib
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from datasets import Dataset

from mrl_redimnet.data.corpus import blocks_of
from mrl_redimnet.extras import extra
from mrl_redimnet.saving import load_model, resolve_model
from mrl_redimnet.settings import near
from mrl_redimnet.speed import speed_up
from mrl_redimnet.streams import Stream

if TYPE_CHECKING:  # which in turn need to know what kinds of teachers there are
    from mrl_redimnet.training.recipe import Recipe
    from mrl_redimnet.training.run import Run

# What the principal axes of a teacher's space are computed from: crops, how many of them for each utterance at most, or
# rows of a table, which cost less.
AXES_CROPS, AXES_CROPS_EACH, AXES_ROWS = 2000, 10, 20_000
_ID_NAMES = ("id", "utterance_id", "utt_id", "utterance", "utt", "key", "path", "file", "file_name")
_EMBEDDING_NAMES = ("embedding", "embeddings", "emb", "vector", "xvector", "feature", "features")
_ROWS = 10_000  # of a table that are read at a time

Function = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Answer:
    """A teacher's embeddings [n, E] float32 of those crops of a batch whose numbers are in `crops` [n] (on the CPU), of
    all where that is None.
    """

    embeddings: torch.Tensor
    crops: torch.Tensor | None = None


# ----------------------------------------------------------------------------------------------------------------------
# Teachers that hear the crops


class Listener:
    """A teacher that is run beside the training.

    function: from waveforms [B, T] float32 at 16 kHz to embeddings [B, E]; name: what messages call it; hears: which
    entry of a batch it is given, "clean_values" or "input_values".
    """

    def __init__(self, function: Function, name: str, hears: str = "input_values") -> None:
        self.function, self.name, self.hears = function, name, hears

    @torch.no_grad()
    def __call__(self, batch: dict) -> Answer:
        """Raises ValueError for an answer of another shape than [B, E]."""
        waves = batch[self.hears]
        embeddings = torch.as_tensor(self.function(waves)).float()
        if embeddings.dim() != 2 or len(embeddings) != len(waves):
            raise ValueError(
                f"teacher: {self.name} answers {tuple(waves.shape)} samples with {tuple(embeddings.shape)} numbers, "
                f"expected one embedding for each crop, ({len(waves)}, E)."
            )
        return Answer(embeddings)

    def sample(self, run: "Run") -> np.ndarray:
        """Embeddings [N, E] of some 2,000 training crops, none of which is trained on; of fewer where utterances are
        few.
        """
        crops = min(AXES_CROPS, AXES_CROPS_EACH * run.task.utterances)
        batches = run.crops.probe(math.ceil(crops / run.recipe.data.batch_size))
        return np.concatenate([self(run.batch_on_device(batch)).embeddings.cpu().numpy() for batch in batches])


def model_function(
    model: str | Path,
    device: torch.device | str = "cpu",
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Function:
    """A saved model's full embeddings.

    model: its folder or Hub id, with or without a head; autocast: makes the context its forward pass runs in,
    `accelerator.autocast` for the precision that the student trains in. Raises FileNotFoundError for a folder that is
    not there, ValueError for another kind of model.
    """
    encoder = speed_up(load_model(model).base_model).to(device).eval().requires_grad_(False)

    def embed(waves: torch.Tensor) -> torch.Tensor:
        with autocast():
            return encoder(waves.to(device)).embeddings

    return embed


def onnx_function(file: str | Path, device: torch.device | str = "cpu") -> Function:
    """The embeddings of an ONNX file, by onnxruntime; on a GPU where both it and the training have one.

    Raises FileNotFoundError where there is none, ValueError for a file with other inputs than one of waveforms, with
    free sizes.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"teacher: {file} is not a file.")
    with extra("export"):
        from onnxruntime import InferenceSession, SessionOptions, get_available_providers

    options = SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # those of the training, which waits meanwhile
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # nor do they keep it from its cores
    options.log_severity_level = 3
    on_gpu = torch.device(device).type == "cuda" and "CUDAExecutionProvider" in get_available_providers()
    providers = ["CUDAExecutionProvider"] if on_gpu else []
    session = InferenceSession(str(file), options, providers=[*providers, "CPUExecutionProvider"])
    inputs = session.get_inputs()
    shape = inputs[0].shape
    free = len(shape) == 2 and not any(isinstance(size, int) for size in shape)
    if len(inputs) != 1 or inputs[0].type != "tensor(float)" or not free:
        shapes = ", ".join(f"{each.name} {each.type} {each.shape}" for each in inputs)
        raise ValueError(
            f"teacher: {file} has the inputs {shapes}; expected one, tensor(float) of waveforms [B, T] whose sizes are "
            "free: export it with dynamic axes."
        )
    name, output = inputs[0].name, session.get_outputs()[0].name

    def embed(waves: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run([output], {name: waves.float().cpu().numpy()})[0]).to(device)

    return embed


def imported_function(path: str, device: torch.device | str = "cpu") -> Function:
    """What `package.module:name` is. It is given tensors on the device, and may answer with an array.

    Raises ValueError for a module that cannot be imported, or a name in it that is no function.
    """
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"teacher: {path} cannot be imported ({error}); the folder of its module must be on PYTHONPATH."
        ) from error
    if not callable(function):
        raise ValueError(f"teacher: {path} is a {type(function).__name__}, expected a function.")
    if isinstance(function, torch.nn.Module):
        function = function.to(device).eval().requires_grad_(False)
    return lambda waves: torch.as_tensor(function(waves)).to(device)


# ----------------------------------------------------------------------------------------------------------------------
# Tables


class Table:
    """Embeddings of whole utterances, by the rows of the training speech.

    values: [utterances, E] float32; known: [utterances] bool, whether a row has one.
    """

    def __init__(self, values: np.ndarray, known: np.ndarray) -> None:
        self.values, self.known = torch.from_numpy(values), torch.from_numpy(known)

    def __call__(self, batch: dict) -> Answer:
        """Crops at another speed than 1.0 have no answer, nor have those of utterances that the table lacks."""
        rows = batch["utterances"]
        known = (rows >= 0) & self.known[rows]  # row -1, of another speed, is looked up like any other and then left
        embeddings = self.values[rows[known]].to(batch["input_values"].device)
        return Answer(embeddings, None if known.all() else known.nonzero()[:, 0])

    def sample(self, run: "Run") -> np.ndarray:
        """Embeddings [N, E] of drawn utterances, of all where there are at most 20,000."""
        rows = Stream.CORPUS_SAMPLE.generator(run.recipe.run.seed).permutation(np.flatnonzero(self.known.numpy()))
        return self.values[np.sort(rows[:AXES_ROWS])].numpy()


def read_table(
    file: str | Path, corpus: Dataset, train: str, most_missing: float, tell: Callable[[str], object] = print
) -> Table:
    """A table's embeddings of the utterances of a corpus.

    file: a folder of parquet files or one of them, with columns for id and embedding, or an .npz of `mrl-redimnet
    embed`. An id is the utterance's path, as the corpus has it or below `train`, the folder (or data set) it was loaded
    from. most_missing: the largest share of utterances without an embedding; what is missing is told by `tell`.

    Raises ValueError where more are missing, an id comes twice, columns are not found, or sizes differ.
    """
    row_of = rows_by_id(corpus, train)
    values, known = np.zeros((len(corpus), 0), dtype=np.float32), np.zeros(len(corpus), dtype=bool)
    some_ids: list[str] = []
    for ids, embeddings in _read(Path(file)):
        if not some_ids:
            values = np.zeros((len(corpus), embeddings.shape[1]), dtype=np.float32)
        if embeddings.shape[1] != values.shape[1]:
            raise ValueError(
                f"teacher: {file} has embeddings of {values.shape[1]} and of {embeddings.shape[1]} numbers."
            )
        some_ids = some_ids or ids[:2]
        found = [(row_of[name], k) for k, name in enumerate(ids) if name in row_of]
        if not found:
            continue
        rows, places = np.array(found).T
        usable = np.isfinite(embeddings[places]).all(1) & (embeddings[places] != 0).any(1)
        rows, places = rows[usable], places[usable]
        if known[rows].any() or len(np.unique(rows)) < len(rows):
            raise ValueError(f"teacher: {file} has several embeddings of one utterance; give each id once.")
        values[rows], known[rows] = embeddings[places], True
    missing = np.flatnonzero(~known)
    if len(missing):
        first = ", ".join(corpus[int(row)]["path"] for row in missing[:3])
        message = (
            f"teacher: {file} has no embedding of {len(missing):,} of the {len(corpus):,} training utterances "
            f"({len(missing) / len(corpus):.2%}), such as {first}"
        )
        if len(missing) > most_missing * len(corpus) or not known.any():
            raise ValueError(
                f"{message}. At most {most_missing:.2%} may be missing (max_unusable_ratio). Ids are paths below "
                f"{train}; the table has {' and '.join(some_ids) or 'no rows'}."
            )
        tell(f"Note: {message}. The teacher says nothing about their crops.")
    return Table(values, known)


def rows_by_id(corpus: Dataset, train: str) -> dict[str, int]:
    """{id: row} for every id that an utterance may have in a table: its path in the corpus; below a `train` that holds
    the speakers in an inner folder such as wav, also with that; and of tables, whose paths get the speaker in front
    where they have no folder, also without.
    """
    paths = [path for block in blocks_of(corpus, "path") for path in block.to_pylist()]
    if not paths:
        return {}
    audio, row_of = corpus[0]["audio"], {}
    if audio["bytes"] is None and audio["path"] and Path(train).is_dir() and audio["path"].endswith(paths[0]):
        inner = Path(os.path.relpath(audio["path"].removesuffix(paths[0]), train)).as_posix()
        if inner != ".":
            row_of = {f"{inner}/{path}": row for row, path in enumerate(paths)}
    else:
        row_of = {path.partition("/")[2]: row for row, path in enumerate(paths) if path.count("/") == 1}
    return row_of | {path: row for row, path in enumerate(paths)}


def _read(file: Path) -> Iterator[tuple[list[str], np.ndarray]]:
    """Ids [n] and embeddings [n, E], piece by piece."""
    if file.suffix == ".npz":
        yield _read_npz(file)
        return
    for part in _parquet_files(file):
        id_name, embedding_name = _columns_of(part)
        with pq.ParquetFile(part) as opened:
            for batch in opened.iter_batches(_ROWS, columns=[id_name, embedding_name]):
                there = batch.filter(pc.and_(batch[id_name].is_valid(), batch[embedding_name].is_valid()))
                if len(there):
                    yield [str(name) for name in there[id_name].to_pylist()], _matrix(there[embedding_name], part)


def _read_npz(file: Path) -> tuple[list[str], np.ndarray]:
    """Ids [N] and embeddings [N, E], as `mrl-redimnet embed` writes them."""
    try:
        with np.load(file) as found:
            ids, embeddings = found["ids"].tolist(), found["embeddings"]
        if np.shape(embeddings) != (len(ids), embeddings.shape[-1]):
            raise ValueError(f"{len(ids)} ids and embeddings {np.shape(embeddings)}")
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"teacher: {file} is no table of ids [N] and embeddings [N, E], as `mrl-redimnet embed` writes ({error})."
        ) from error
    return ids, embeddings


def _matrix(column: pa.Array, file: Path) -> np.ndarray:
    """A column of lists of numbers as [n, E]."""
    numbers = column.flatten().to_numpy(zero_copy_only=False)
    sizes = pc.list_value_length(column)
    if len(pc.unique(sizes)) != 1 or not len(numbers):
        raise ValueError(f"teacher: {file} has embeddings of different sizes: {pc.unique(sizes).to_pylist()[:5]}.")
    return numbers.reshape(len(column), -1)


def _parquet_files(file: Path) -> list[Path]:
    return sorted(file.glob("*.parquet")) if file.is_dir() else [file]


def _columns_of(file: Path) -> tuple[str, str]:
    """The columns of id and embedding. Raises ValueError where there is none or its type is another."""
    try:
        schema = pq.read_schema(file)
    except pa.ArrowInvalid as error:
        raise ValueError(f"teacher: {file} is no parquet file ({error}).") from error
    found = []
    for what, names in (("id", _ID_NAMES), ("embedding", _EMBEDDING_NAMES)):
        name = next((name for name in names if name in schema.names), None)
        if name is None:
            raise ValueError(
                f"teacher: {file} has the columns {', '.join(schema.names)}; none is called as the {what} usually is: "
                f"{', '.join(names)}.{near(what, schema.names)}"
            )
        found.append(name)
    kind = schema.field(found[1]).type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not lists or not (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)):
        raise ValueError(f"teacher: {file}: the column {found[1]} holds {kind}, expected lists of numbers.")
    return found[0], found[1]


def check_table(file: str) -> None:
    """Raises FileNotFoundError or ValueError for a table that is not there, or not as it should be."""
    if not Path(file).exists():
        raise FileNotFoundError(f"teacher: {file} is not there.")
    if Path(file).suffix == ".npz":
        _read_npz(Path(file))
        return
    for part in _parquet_files(Path(file)):
        _columns_of(part)


# ----------------------------------------------------------------------------------------------------------------------
# What names them


@dataclass(frozen=True)
class Source:
    """A kind of teacher.

    is_meant: whether a name is of this kind; check: raises, before any speech is read, for one that cannot be used;
    function: makes what is run beside the training, None for a table.
    """

    is_meant: Callable[[str], bool]
    check: Callable[[str], object]
    function: Callable[[str, "Run"], Function] | None = None


def _is_table(name: str) -> bool:
    folder = Path(name)
    is_folder = folder.is_dir() and not (folder / "config.json").is_file() and any(folder.glob("*.parquet"))
    return is_folder or folder.suffix in (".parquet", ".npz")


SOURCES = {
    "table": Source(_is_table, check_table),
    "onnx": Source(
        lambda name: name.endswith(".onnx"),
        onnx_function,
        lambda name, run: onnx_function(name, run.accelerator.device),
    ),
    "function": Source(
        lambda name: re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name) is not None,
        imported_function,
        lambda name, run: imported_function(name, run.accelerator.device),
    ),
    "model": Source(
        lambda name: True,
        resolve_model,
        lambda name, run: model_function(name, run.accelerator.device, run.accelerator.autocast),
    ),
}


def source_of(name: str) -> str:
    """The kind of teacher, of `SOURCES`, that a name means."""
    return next(kind for kind, source in SOURCES.items() if source.is_meant(name))


def load_teacher(run: "Run") -> Listener | Table:
    """The teacher of a run. Raises as its kind does."""
    recipe = run.recipe
    name = recipe.loss.teacher
    source = SOURCES[source_of(name)]
    if source.function is None:
        train, most = recipe.data.train, recipe.data.max_unusable_ratio
        return read_table(name, run.task.corpus, train, most, run.accelerator.print)
    return Listener(source.function(name, run), name, "clean_values" if hears_clean(recipe) else "input_values")


def hears_clean(recipe: "Recipe") -> bool:
    """Whether the loader has to hand over clean crops for a recipe's teacher: not where they are the augmented ones."""
    loss, kind = recipe.loss, recipe.augmentation
    changed = bool(kind.augmentations) or kind.domain != "clean"
    listens = loss.teacher is not None and SOURCES[source_of(loss.teacher)].function is not None
    return listens and changed and loss.teacher_hears == "clean"
