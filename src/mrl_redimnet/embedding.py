"""Embeddings of whole files, batched by length."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather_object
from tqdm import tqdm

from feature_extraction_mrl_redimnet import MRLReDimNetFeatureExtractor
from modeling_mrl_redimnet import MRLReDimNetPreTrainedModel
from mrl_redimnet.audio.io import SAMPLING_RATE, AudioError, AudioWarning, Encoded, audio_info, name_of, read_audio
from mrl_redimnet.audio.levels import read_utterance

BATCH_SECONDS = 60.0
LISTED = 20  # files that a message names


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
    source = Waveforms(files, load, extractor, longest, problems is not None)
    batches = list(length_batches(source.seconds(), batch_seconds))[state.process_index :: state.num_processes]
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
class Waveforms:
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


def length_batches(seconds: dict[int, float], batch_seconds: float) -> Iterator[list[int]]:
    """Rows {row: seconds} by falling length, as many together as fit `batch_seconds` when padded to the longest."""
    batch: list[int] = []
    for row in sorted(seconds, key=lambda row: -seconds[row]):
        if batch and seconds[batch[0]] * (len(batch) + 1) > batch_seconds:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
