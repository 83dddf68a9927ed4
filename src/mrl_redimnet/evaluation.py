"""Embeddings of whole utterances, and verification scores at every Matryoshka dimension from one pass."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather_object
from tqdm import tqdm

from feature_extraction_mrl_redimnet import MRLReDimNetFeatureExtractor
from modeling_mrl_redimnet import MRLReDimNetPreTrainedModel
from mrl_redimnet.audio import audio_info, read_audio
from mrl_redimnet.metrics import bootstrap_interval, eer, min_dcf
from mrl_redimnet.trials import Trials, missing_utterances, speaker_of

BATCH_SECONDS = 60.0


@dataclass(frozen=True)
class VerificationRow:
    """Results of one trial list at one dimension; rates in [0, 1], the interval over speakers or None."""

    dim: int
    eer: float
    min_dcf: float
    eer_low: float | None = None
    eer_high: float | None = None


@torch.inference_mode()
def embed_files(
    model: MRLReDimNetPreTrainedModel,
    files: Sequence[str | Path],
    batch_seconds: float = BATCH_SECONDS,
    progress: str | None = None,
) -> np.ndarray:
    """Whole files, batched by length with exact padding -> embeddings [N, D] float32 in the order of `files`.

    batch_seconds: padded audio in one batch, what bounds memory. Under several processes each embeds a share and all
    get the whole. Raises AudioError for a file that cannot be read. The model's training mode is restored.
    """
    encoder = getattr(model, model.base_model_prefix, model)
    extractor = MRLReDimNetFeatureExtractor(min_samples=encoder.config.min_samples)
    device, training, state = encoder.device, encoder.training, PartialState()
    encoder.eval()
    broadcast(list(encoder.buffers()))  # running statistics differ between processes; the first one's are saved
    seconds = [audio_info(file).seconds for file in files]
    batches = list(_length_batches(seconds, batch_seconds))[state.process_index :: state.num_processes]
    embedded = []
    for rows in tqdm(batches, desc=progress, disable=progress is None or not state.is_main_process, leave=False):
        inputs = extractor([read_audio(files[row]) for row in rows], sampling_rate=extractor.sampling_rate).to(device)
        embedded.append((rows, encoder(**inputs).embeddings.float().cpu().numpy()))
    encoder.train(training)
    result = np.empty((len(files), encoder.config.embedding_size), dtype=np.float32)
    for rows, embeddings in gather_object(embedded):
        result[rows] = embeddings
    return result


def _length_batches(seconds: Sequence[float], batch_seconds: float) -> Iterator[list[int]]:
    """Rows by falling length, as many together as fit `batch_seconds` when padded to the longest."""
    batch: list[int] = []
    for row in sorted(range(len(seconds)), key=lambda i: -seconds[i]):
        if batch and seconds[batch[0]] * (len(batch) + 1) > batch_seconds:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def cosine_scores(embeddings: np.ndarray, enrol: np.ndarray, test: np.ndarray, dim: int) -> np.ndarray:
    """Cosines of the first `dim` numbers of rows enrol [T] and test [T] of embeddings [N, D] -> [T] float64."""
    prefix = embeddings[:, :dim].astype(np.float64)
    prefix /= np.linalg.norm(prefix, axis=1, keepdims=True)
    return np.einsum("td,td->t", prefix[enrol], prefix[test])


def score_trials(
    trials: Trials, utterances: Sequence[str], embeddings: np.ndarray, dims: Sequence[int], resamples: int = 0
) -> list[VerificationRow]:
    """Results at each of `dims` from embeddings [N, D] of `utterances`; resamples: for the interval over speakers."""
    row_of = {path: row for row, path in enumerate(utterances)}
    enrol = np.array([row_of[path] for path in trials.enrol])
    test = np.array([row_of[path] for path in trials.test])
    speakers = [[speaker_of(path) for path in side] for side in (trials.enrol, trials.test)]
    rows = []
    for dim in dims:
        scores = cosine_scores(embeddings, enrol, test, dim)
        low, high = (
            bootstrap_interval(scores, trials.labels, *speakers, resamples=resamples) if resamples else (None, None)
        )
        rows.append(VerificationRow(dim, eer(scores, trials.labels), min_dcf(scores, trials.labels), low, high))
    return rows


def evaluate_trials(
    model: MRLReDimNetPreTrainedModel,
    trials: Trials,
    folder: str | Path,
    dims: Sequence[int] | None = None,
    resamples: int = 0,
    progress: str | None = None,
) -> list[VerificationRow]:
    """Embeds a trial list's utterances below `folder` once, and scores every dimension (default: the model's).

    Raises FileNotFoundError listing utterances that are not there.
    """
    check_present(trials, folder)
    utterances = trials.utterances
    embeddings = embed_files(model, [Path(folder) / path for path in utterances], progress=progress)
    return score_trials(trials, utterances, embeddings, dims or model.config.matryoshka_dims, resamples)


def check_present(trials: Trials, folder: str | Path):
    """Raises FileNotFoundError listing utterances of the trials that are not below `folder`."""
    missing = missing_utterances(trials, folder)
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the trial list's {len(trials.utterances)} utterances are not below {folder}: "
            + ", ".join(missing[:5])
        )


def format_table(tables: dict[str, list[VerificationRow]]) -> str:
    """Named results as text: one line per name, a column per dimension."""
    dims = [row.dim for row in next(iter(tables.values()))]
    width = max(len(name) for name in tables) + 2
    lines = [" " * width + "".join(f"{f'{dim} dims':>22}" for dim in dims)]
    for name, rows in tables.items():
        eers = "".join(f"{_percent(row):>22}" for row in rows)
        lines += [
            f"{name:<{width}}{eers}   EER %",
            " " * width + "".join(f"{row.min_dcf:>22.3f}" for row in rows) + "   minDCF (p 0.01)",
        ]
    return "\n".join(lines)


def _percent(row: VerificationRow) -> str:
    interval = "" if row.eer_low is None else f" [{100 * row.eer_low:.1f}, {100 * row.eer_high:.1f}]"
    return f"{100 * row.eer:.2f}{interval}"


def as_records(rows: list[VerificationRow]) -> list[dict]:
    """Rows as plain dictionaries, for JSON."""
    return [asdict(row) for row in rows]
