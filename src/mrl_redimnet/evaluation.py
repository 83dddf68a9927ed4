"""Embeddings of whole utterances, and verification results at every Matryoshka dimension from one pass."""

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import compress
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather_object
from tqdm import tqdm

from feature_extraction_mrl_redimnet import MRLReDimNetFeatureExtractor
from modeling_mrl_redimnet import MRLReDimNetPreTrainedModel
from mrl_redimnet.audio import SAMPLING_RATE, AudioError, AudioWarning, Encoded, audio_info, name_of, read_audio
from mrl_redimnet.levels import read_utterance, warn_of_silence
from mrl_redimnet.metrics import bootstrap_interval, eer, mean_interval, min_dcf
from mrl_redimnet.scan import files_below
from mrl_redimnet.scoring import score
from mrl_redimnet.trials import Trials, fitting_suffix, missing_utterances

BATCH_SECONDS = 60.0
LISTED = 20  # missing files that a message names
SHARES = ("accuracy", "balanced accuracy")
METRICS = (*SHARES, "mean absolute error")  # of attributes


@dataclass(frozen=True)
class VerificationRow:
    """Results of one trial list at one dimension; rates in [0, 1], the interval over speakers or None."""

    dim: int
    eer: float
    min_dcf: float
    eer_low: float | None = None
    eer_high: float | None = None


@dataclass(frozen=True)
class AttributeRow:
    """Result of an attribute on labelled utterances: accuracy in [0, 1] or mean absolute error in the label's unit,
    the interval over speakers or None."""

    metric: str
    value: float
    low: float | None = None
    high: float | None = None

    def __post_init__(self):
        if self.metric not in METRICS:
            raise ValueError(f"metric: got {self.metric!r}, expected one of {', '.join(METRICS)}.")


def attribute_row(
    answers: np.ndarray, targets: np.ndarray, speakers: np.ndarray, classes: bool, resamples: int = 0
) -> AttributeRow:
    """Answers and targets [N] of utterances of `speakers` [N]: class ids, or numbers."""
    values = answers == targets if classes else np.abs(answers - targets)
    interval = mean_interval(values, speakers, resamples) if resamples else (None, None)
    return AttributeRow("accuracy" if classes else "mean absolute error", float(np.mean(values)), *interval)


@torch.inference_mode()
def embed_files(
    model: MRLReDimNetPreTrainedModel,
    files: Sequence[str | Path | Encoded],
    batch_seconds: float = BATCH_SECONDS,
    progress: str | None = None,
    load: Callable[[str | Path], np.ndarray] = read_audio,
    longest: float | None = None,
    problems: dict[int, str] | None = None,
) -> np.ndarray:
    """Whole files, batched by length with exact padding -> embeddings [N, D] float32 in the order of `files`.

    batch_seconds: padded audio in one batch, what bounds memory. load: reads one file as audio [samples], by default as
    it is. longest: seconds of a file beyond which it is cut. Under several processes each embeds a share and all get
    the whole. The model's training mode is restored.

    A file that cannot be read or embedded raises AudioError, which names it; where `problems` is given, it becomes an
    entry {row: message} there and a row of NaN instead.
    """
    encoder = getattr(model, model.base_model_prefix, model)
    extractor = MRLReDimNetFeatureExtractor(min_samples=encoder.config.min_samples)
    device, training, state = encoder.device, encoder.training, PartialState()
    encoder.eval()
    broadcast(list(encoder.buffers()))  # running statistics differ between processes; the first one's are saved
    source = _Waveforms(files, load, extractor, longest, problems is not None)
    batches = list(_length_batches(source.seconds(), batch_seconds))[state.process_index :: state.num_processes]
    embedded = []
    hidden = True if progress is None or not state.is_main_process else None  # None: shown where there is a terminal
    bar = tqdm(total=sum(map(len, batches)), desc=progress, disable=hidden, leave=False, unit=" files")
    try:
        for rows in batches:
            waves = {row: wave for row in rows if (wave := source.wave(row)) is not None}
            if waves:
                inputs = extractor(list(waves.values()), sampling_rate=SAMPLING_RATE).to(device)
                embedded.append((list(waves), encoder(**inputs).embeddings.float().cpu().numpy()))
            bar.update(len(rows))
    finally:
        bar.close()
        encoder.train(training)
    result = np.full((len(files), encoder.config.embedding_size), np.nan, dtype=np.float32)
    for rows, embeddings in gather_object(embedded):
        result[rows] = embeddings
    if problems is not None:
        problems.update(sorted(gather_object([*source.problems.items()])))
    return result


def embed_usable(
    model: MRLReDimNetPreTrainedModel,
    files: Sequence[str | Path | Encoded],
    what: str,
    load: Callable[[str | Path], np.ndarray] = read_utterance,
    progress: str | None = None,
    longest: float | None = None,
) -> np.ndarray:
    """As `embed_files`, without the files that cannot be used -> [n, D]; an AudioWarning names them as `what` they are.

    For speech of which some is enough: cohorts, what a basis is rotated on. Raises AudioError where none can be used.
    """
    problems: dict[int, str] = {}
    embeddings = embed_files(model, files, progress=progress, load=load, longest=longest, problems=problems)
    if problems:
        told = f"{what}: {problems_told(problems, len(files))}"
        if len(problems) == len(files):
            raise AudioError(told)
        warnings.warn(f"{told}. The others are used", AudioWarning, stacklevel=2)
    return np.delete(embeddings, list(problems), axis=0)


def problems_told(problems: dict[int, str], count: int) -> str:
    """{row: message} of `count` files in one line."""
    more = f"; and {len(problems) - LISTED:,} more" if len(problems) > LISTED else ""
    return f"{len(problems):,} of {count:,} files cannot be used: {'; '.join([*problems.values()][:LISTED])}{more}"


@dataclass
class _Waveforms:
    """Files as waveforms that the model takes. What is none raises AudioError, or is kept in `problems` {row: why}."""

    files: Sequence[str | Path | Encoded]
    load: Callable[[str | Path], np.ndarray]
    extractor: MRLReDimNetFeatureExtractor
    longest: float | None
    keep_problems: bool
    problems: dict[int, str] = field(default_factory=dict)

    def seconds(self) -> dict[int, float]:
        """{row: seconds} by the files' headers."""
        lengths = {row: self._attempt(row, lambda file: audio_info(file).seconds) for row in range(len(self.files))}
        longest = self.longest or math.inf
        return {row: min(longest, seconds) for row, seconds in lengths.items() if seconds is not None}

    def wave(self, row: int) -> np.ndarray | None:
        """[samples] float32, None for a problem that was kept."""
        return self._attempt(row, self._checked)

    def _checked(self, file) -> np.ndarray:
        most = None if self.longest is None else round(self.longest * SAMPLING_RATE)
        audio = self.load(file)[:most]
        try:  # alone, so that the message is about this file
            return self.extractor(audio, sampling_rate=SAMPLING_RATE, return_tensors="np").input_values[0]
        except ValueError as error:
            raise AudioError(f"{name_of(file)}: {str(error).removeprefix('raw_speech[0]: ')}") from error

    def _attempt(self, row: int, step: Callable):
        try:
            return step(self.files[row])
        except AudioError as error:
            if not self.keep_problems:
                raise
            self.problems[row] = str(error)
            return None


def _length_batches(seconds: dict[int, float], batch_seconds: float) -> Iterator[list[int]]:
    """Rows {row: seconds} by falling length, as many together as fit `batch_seconds` when padded to the longest."""
    batch: list[int] = []
    for row in sorted(seconds, key=lambda row: -seconds[row]):
        if batch and seconds[batch[0]] * (len(batch) + 1) > batch_seconds:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def score_trials(
    trials: Trials, utterances: Sequence[str], embeddings: np.ndarray, dims: Sequence[int], resamples: int = 0
) -> list[VerificationRow]:
    """Results by cosine at each of `dims` from embeddings [N, D] of `utterances`.

    resamples: for the interval over speakers, 0 for none. Raises ValueError as `mrl_redimnet.scoring.score` does.
    """
    rows = []
    for dim in dims:
        scores, low, high = score(trials, utterances, embeddings, dim), None, None
        if resamples:
            low, high = bootstrap_interval(scores, trials.labels, *trials.speakers, resamples=resamples)
        rows.append(VerificationRow(dim, eer(scores, trials.labels), min_dcf(scores, trials.labels), low, high))
    return rows


def evaluate_trials(
    model: MRLReDimNetPreTrainedModel,
    trials: Trials,
    folder: str | Path,
    dims: Sequence[int] | None = None,
    resamples: int = 0,
    progress: str | None = None,
    domain: Callable | None = None,
    problems: dict[str, str] | None = None,
) -> list[VerificationRow]:
    """Embeds a trial list's utterances below `folder` once, and scores every dimension (default: the model's).

    domain: from `mrl_redimnet.domains`, what the audio is made to sound like, each utterance always the same way.
    problems: where it is given, an utterance that cannot be read becomes an entry {path: message} there, and its trials
    are left out (`without`). Raises FileNotFoundError listing utterances that are not there; AudioError for one that
    cannot be read.
    """
    embeddings = embed_trials(model, trials, folder, progress, domain, problems)
    read = [row for row, path in enumerate(trials.utterances) if path not in (problems or ())]
    utterances, trials = [trials.utterances[row] for row in read], without(trials, problems or ())
    return score_trials(trials, utterances, embeddings[read], dims or model.config.matryoshka_dims, resamples)


def embed_trials(
    model: MRLReDimNetPreTrainedModel,
    trials: Trials,
    folder: str | Path,
    progress: str | None = None,
    domain: Callable | None = None,
    problems: dict[str, str] | None = None,
) -> np.ndarray:
    """Embeddings [N, D] of `trials.utterances`, for `score_trials`; arguments and errors as in `evaluate_trials`, the
    row of one that cannot be read is NaN."""
    check_present(trials, folder)
    utterances, lost = trials.utterances, None if problems is None else {}
    files = [Path(folder) / path for path in utterances]
    embeddings = embed_files(model, files, progress=progress, load=reader(folder, domain), problems=lost)
    if problems is not None:
        problems.update({utterances[row]: reason for row, reason in lost.items()})
    return embeddings


def without(trials: Trials, lost: Collection[str]) -> Trials:
    """The trials that need no utterance of `lost`; an enrolment of several goes on with those that are left.

    Raises AudioError where no target trial or no impostor trial is left.
    """
    if not lost:
        return trials
    models = trials.models
    if models is not None:
        models = {name: [path for path in paths if path not in lost] for name, paths in models.items()}
        models = {name: paths for name, paths in models.items() if paths}
    sides = zip(trials.enrol, trials.test, strict=True)
    kept = [b not in lost and (a not in lost if models is None else a in models) for a, b in sides]
    labels = trials.labels[kept]
    if len(set(labels.tolist())) < len(set(trials.labels.tolist())):
        raise AudioError(
            f"without {len(lost):,} utterances that cannot be read (first {sorted(lost)[0]}) there are no target "
            "trials, or no impostor trials, left: copy or encode the files again"
        )
    enrol, test = ([*compress(side, kept)] for side in (trials.enrol, trials.test))
    if models is not None:
        models = {name: models[name] for name in dict.fromkeys(enrol)}
    return replace(trials, labels=labels, enrol=enrol, test=test, models=models)


def reader(folder: str | Path, domain: Callable | None = None) -> Callable[[str | Path], np.ndarray]:
    """What reads files below `folder` into a domain; paths relative to it fix each file's draws.

    A file without a signal in it is warned of and given as it is.
    """

    def load(file):
        audio = warn_of_silence(file, read_audio(file))
        if domain is None:
            return audio
        from mrl_redimnet.domains import simulate  # a domain was made, so this is imported already

        return simulate(domain, audio, Path(file).relative_to(folder).as_posix())

    return load


def audio_below(folder: Path) -> list[Path]:
    """The audio files below a folder at any depth, sorted; FileNotFoundError where there are none."""
    return files_below(folder)


def drawn(files: Sequence[Path], most: int) -> list[Path]:
    """All of the files, or `most` of them, drawn always the same way and in their order."""
    chosen = np.random.default_rng(0).permutation(len(files))[:most]
    return [files[i] for i in sorted(chosen)]


def check_present(trials: Trials, folder: str | Path):
    """Raises FileNotFoundError listing utterances of the trials that are not below `folder`."""
    missing = missing_utterances(trials, folder)
    if missing:
        rest = f" and {len(missing) - LISTED} more" if len(missing) > LISTED else ""
        suffix = fitting_suffix(missing, folder)
        hint = (
            f". With the suffix {suffix} they are there: give --suffix {suffix} (in a recipe's test `suffix: {suffix}`)"
        )
        raise FileNotFoundError(
            f"{len(missing)} of the trial list's {len(trials.utterances)} utterances are not below {folder}: "
            + ", ".join(missing[:LISTED])
            + rest
            + (hint if suffix else "")
        )


def format_table(tables: dict[str, list[VerificationRow] | list[AttributeRow]]) -> str:
    """Named results as text: one line per name; of verification, a column per dimension."""
    width = max(len(name) for name in tables) + 2
    first = next(iter(tables.values()))
    if isinstance(first[0], AttributeRow):
        return "\n".join(f"{name:<{width}}{_attribute(row)}" for name, rows in tables.items() for row in rows)
    lines = [" " * width + "".join(f"{f'{row.dim} dims':>22}" for row in first)]
    for name, rows in tables.items():
        eers = "".join(f"{_percent(row.eer, row.eer_low, row.eer_high):>22}" for row in rows)
        lines += [
            f"{name:<{width}}{eers}   EER %",
            " " * width + "".join(f"{row.min_dcf:>22.3f}" for row in rows) + "   minDCF (p 0.01)",
        ]
    return "\n".join(lines)


def _percent(value: float, low: float | None, high: float | None) -> str:
    interval = "" if low is None else f" [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{100 * value:.2f}{interval}"


def _attribute(row: AttributeRow) -> str:
    if row.metric in SHARES:
        return f"{_percent(row.value, row.low, row.high)}   {row.metric} %"
    interval = "" if row.low is None else f" [{row.low:.2f}, {row.high:.2f}]"
    return f"{row.value:.2f}{interval}   {row.metric}"


def as_records(rows: list[VerificationRow] | list[AttributeRow]) -> list[dict]:
    """Rows as plain dictionaries, for JSON."""
    return [asdict(row) for row in rows]
