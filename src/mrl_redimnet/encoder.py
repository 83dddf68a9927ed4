"""`SpeakerEncoder`: a model, with an adapter or without, as embeddings, scores, decisions and names.

encoder = SpeakerEncoder.from_pretrained("me/redimnet-mrl-b2")
embeddings = encoder.embed(["a.wav", "b.flac"])                      # [2, 256]
encoder.similarity(embeddings, embeddings, dim=64)                   # [2, 2]
(decision,) = encoder.verify(["enrolled.wav"], ["unknown.wav"])      # by the thresholds beside the model
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather_object
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm
from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from configuration_mrl_redimnet import MRLReDimNetConfig
from feature_extraction_mrl_redimnet import MRLReDimNetFeatureExtractor
from masking_mrl_redimnet import sample_mask
from modeling_mrl_redimnet import MRLReDimNetForSequenceClassification, MRLReDimNetModel, MRLReDimNetPreTrainedModel
from mrl_redimnet.adapters.facts import AdapterFacts, adapter_digest, labelled
from mrl_redimnet.adapters.hub import local_folder
from mrl_redimnet.audio.io import SAMPLING_RATE, AudioError, AudioWarning
from mrl_redimnet.audio.levels import refuse_silence, speech_seconds, warn_of_silence
from mrl_redimnet.audio.scan import drawn, files_below
from mrl_redimnet.audio.waveforms import Prepare, length_batches, read_waveform
from mrl_redimnet.audio.windows import consecutive, stretch_reader, window_starts
from mrl_redimnet.data.utterances import Input, as_inputs, distinct
from mrl_redimnet.fingerprints import fingerprint
from mrl_redimnet.saving import load_model, resolve_model
from mrl_redimnet.scoring.calibration import THRESHOLDS_FILE, Thresholds
from mrl_redimnet.scoring.decisions import (
    ENROL_SECONDS,
    TEST_SECONDS,
    Candidate,
    Decision,
    DecisionRule,
    Identification,
    short_speech,
)
from mrl_redimnet.scoring.scorers import SCORERS, TOP, Scorer, enrolment_units, make_scorer
from mrl_redimnet.speed import speed_up
from mrl_redimnet.speed.threads import side_by_side, workers_for

if TYPE_CHECKING:  # PEFT takes a second to import, and most uses do without
    from mrl_redimnet.adapters.bank import AdapterBank

BATCH_SECONDS = 60.0
STRETCH = 60.0  # seconds of a recording that are embedded at a time in windows
SHARED_STRETCH = 12.0  # the same for windows out of shared frames: attention over more frames costs more than it saves
COHORT_UTTERANCES = 2000  # as many as are drawn from a larger folder
LISTED = 20  # files that a message names


@dataclass(frozen=True)
class Embedded:
    """Embeddings of utterances some of which may be unusable.

    Attributes:
        embeddings: [N, D] float32, a row of NaN where there is a problem.
        seconds: [N] of the audio that was embedded, NaN where there is a problem.
        speech: [N] seconds of it that hold speech, as their level tells (`audio.levels.speech_seconds`); NaN likewise.
        problems: {row: why it has no embedding}.
    """

    embeddings: NDArray
    seconds: NDArray
    speech: NDArray
    problems: dict[int, str]

    def usable(self, what: str) -> NDArray:
        """Embeddings [n, D] without the problems, which an AudioWarning lists. what: the speech is, for the message.

        For speech of which some is enough: cohorts, and what a basis is rotated on. Raises AudioError where none of it
        has an embedding.
        """
        if self.problems:
            message = f"{what}: {problems_text(self.problems, len(self.embeddings))}"
            if len(self.problems) == len(self.embeddings):
                raise AudioError(message)
            warnings.warn(f"{message}. The others are used", AudioWarning, stacklevel=2)
        return np.delete(self.embeddings, list(self.problems), axis=0)


def problems_text(problems: Mapping[int, str], count: int) -> str:
    """{row: why} of `count` utterances in one line."""
    more = f"; and {len(problems) - LISTED:,} more" if len(problems) > LISTED else ""
    return f"{len(problems):,} of {count:,} files cannot be used: {'; '.join([*problems.values()][:LISTED])}{more}"


class SpeakerEncoder:
    """A ReDimNet-MRL model that embeds, compares, verifies and identifies speakers.

    Speech ("inputs" below) is a list, and each utterance in it one of

    - the path of an audio file of any common format, a URL of one that fsspec opens, its bytes (`Encoded` names them),
      or an open binary file;
    - a mono array or tensor [samples] at 16 kHz, or a pair (array, sampling rate in Hz), which is resampled;
    - a row of an audio column of `datasets`: a dict with `array` and `sampling_rate`, or with `bytes` or `path`, or a
      decoder of torchcodec;

    or a data set of `datasets` with one audio column, or such a column of it.

    Attributes:
        model: the model in memory, with any head. It may go on training: embedding leaves it as it is.
        name: what files and messages call it.
    """

    def __init__(
        self,
        model: MRLReDimNetPreTrainedModel,
        name: str | None = None,
        *,
        adapter: str | None = None,
        fingerprint: str | None = None,
        source: str | Path | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> None:
        """Args:
        model: stays on its device and in its mode; its modules get their faster forms (`mrl_redimnet.speed_up`).
        name: by default what the model's configuration says.
        adapter, fingerprint: of a model with an adapter merged into its weights, the adapter's name and what names the
            weights of both, as `from_pretrained` finds them.
        source, revision, token: path or Hub id where saved thresholds lie; without one there are none.
        """
        model = model.get_base_model() if hasattr(model, "get_base_model") else model  # a PeftModel's
        self.model = speed_up(model)
        self.name = name or model.config.name_or_path or "a model in memory"
        self._encoder: MRLReDimNetModel = model.base_model
        self._merged, self._fingerprint = adapter, fingerprint
        self._source, self._revision, self._token = source, revision, token
        self._bank: AdapterBank | None = None

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        adapter: str | Path | None = None,
        device: torch.device | str | None = None,
        *,
        depth: int | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> "SpeakerEncoder":
        """A saved model, with an adapter merged into its weights where one is given.

        Args:
            model: a folder, the Hub id of a model, the name of one that comes with the package ("nano"), or that of a
                published checkpoint such as "IDRnD/b2-vox2-ft_lm", which is fetched and converted once: see
                `mrl_redimnet.saving.resolve_model`.
            adapter: path or Hub id. (For several adapters, load the model alone and use `adapters`.)
            device: by default an accelerator where there is one.
            depth: the stages after which the network ends, one of config.exits; None: the whole. It costs less, and is
                another model with embeddings and thresholds of its own.
            revision: of a model on the Hub, a branch, tag or commit. token: for the Hub, where not logged in.

        Raises:
            FileNotFoundError: what is not there.
            OSError: what cannot be read from the Hub, or fetched.
            WeightsError: weights that are not wholly the model's.
            WrongBaseError: an adapter of another base.
            ValueError: an adapter that does not fit, a depth that the model does not have.
        """
        name = Path(model).resolve().name if Path(model).is_dir() else str(model)
        source = resolve_model(model)
        loaded, merged, weights = load_model(source, revision, token), None, None
        ended = loaded
        if depth is not None:
            name, ended = f"{name} at depth {depth}", loaded.base_model.at_depth(depth)
        if adapter is not None:
            from mrl_redimnet.adapters.bank import AdapterBank  # PEFT takes a second to import

            folder = local_folder(adapter, None, token)
            # Before the two are merged: on another machine merging may round otherwise.
            weights = f"{fingerprint(ended)}+{adapter_digest(folder)}"
            facts = AdapterFacts.load(folder)
            merged = facts.domain if facts else Path(adapter).name
            ended = AdapterBank.load(loaded, {"adapter": adapter}, token=token).merged("adapter")
            ended = ended if depth is None else ended.at_depth(depth)
        ended = ended.to(PartialState().device if device is None else device)
        return cls(ended, name, adapter=merged, fingerprint=weights, source=source, revision=revision, token=token)

    # ------------------------------------------------------------ what it is

    @property
    def config(self) -> MRLReDimNetConfig:
        """The model's configuration."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._encoder.device

    @property
    def adapters(self) -> "AdapterBank":
        """Adapters that are swapped on this model in memory, an `AdapterBank`: add and choose them here, and all
        methods use the chosen one.

            encoder.adapters.add("telephony", "me/redimnet-mrl-b2-telephony")
            encoder.adapters.set_adapter("telephony")

        The first use puts the model into evaluation mode, freezes its weights and wraps layers of it. Raises ValueError
        for a model with an adapter merged into its weights.
        """
        if self._bank is None:
            if self._merged is not None:
                raise ValueError(
                    f"{self.name} has the adapter {self._merged} merged into its weights: load it without, then add "
                    "adapters"
                )
            from mrl_redimnet.adapters.bank import AdapterBank

            self._bank = AdapterBank(self._encoder, self.name, self._revision, self._token)
        return self._bank

    @property
    def adapter(self) -> str | None:
        """The adapter that is in use, by its domain where its folder says it; None: the model itself."""
        if self._bank is None or self._bank.active is None:
            return self._merged
        facts = self._bank.facts(self._bank.active)
        return facts.domain if facts else self._bank.active

    @property
    def fingerprint(self) -> str:
        """Names the weights that embed, for thresholds and files of embeddings: a hash of the model's weights and
        configuration and, with an adapter, one of its tensors.
        """
        return self.weights(None if self._bank is None else self._bank.active)

    def weights(self, adapter: str | None) -> str:
        """As `fingerprint`, of the adapter of this name in `adapters`, or with None of the model itself, whatever is in
        use. Raises ValueError for a name that is not there.
        """
        if adapter is not None:
            return self.adapters.fingerprint(adapter)
        if self._bank is not None:
            return self._bank.fingerprint(None)
        return self._fingerprint or fingerprint(self._encoder)

    @property
    def commit(self) -> str | None:
        """The commit of a model from the Hub; None for others."""
        if self._source is None:
            return None
        return extract_commit_hash(self._cached(CONFIG_NAME), None)

    def dims(self, asked: Sequence[int] | None = None) -> list[int]:
        """The dimensions asked for, sorted, by default those that the model was trained at. ValueError for ones it
        cannot have.
        """
        size = self.config.embedding_size
        if wrong := [dim for dim in asked or [] if not 1 <= dim <= size]:
            raise ValueError(f"{wrong} are not between 1 and the embedding's {size} dimensions.")
        return sorted(set(asked or self.config.matryoshka_dims))

    def dim(self, asked: int | None = None) -> int:
        """The dimension asked for, by default the whole embedding. Raises as `dims`."""
        return self.dims([self.config.embedding_size if asked is None else asked])[0]

    # ------------------------------------------------------------ embeddings

    def embed(
        self,
        inputs: Sequence,
        dim: int | None = None,
        *,
        batch_seconds: float = BATCH_SECONDS,
        progress: str | None = None,
        prepare: Prepare | None = None,
        longest: float | None = None,
    ) -> NDArray:
        """Embeddings of whole utterances, batched by length with exact padding.

        Args:
            inputs: N utterances, see the class. A path that comes several times is read once.
            dim: how many numbers of each embedding [all].
            batch_seconds: padded audio in the network at once, which bounds memory.
            progress: title of a progress bar on a terminal; None: no bar.
            prepare: changes or checks the audio of each utterance as it was read, see `mrl_redimnet.audio.waveforms`.
            longest: seconds beyond which an utterance is cut.

        Returns:
            [N, dim] float32 in the order of the inputs. Under several processes each embeds a share, and all get the
            whole.

        Raises:
            AudioError: an utterance that cannot be read or embedded; names the file or the row.
            ValueError: a dimension that the model cannot have, inputs that are no list.
        """
        return self._embedded(as_inputs(inputs), dim, batch_seconds, progress, prepare, longest).embeddings

    def embed_all(
        self,
        inputs: Sequence,
        dim: int | None = None,
        *,
        batch_seconds: float = BATCH_SECONDS,
        progress: str | None = None,
        prepare: Prepare | None = None,
        longest: float | None = None,
        strict: bool = False,
    ) -> Embedded:
        """As `embed`, with durations, and with problems in place of AudioErrors. strict: a problem is an AudioError."""
        items = as_inputs(inputs)
        return self._embedded(items, dim, batch_seconds, progress, prepare, longest, keep_problems=not strict)

    def embed_batch(self, batch: Mapping[str, Sequence], column: str = "audio", dim: int | None = None) -> dict:
        """Rows of a data set -> {"embedding": [N, dim]}: for `dataset.map(encoder.embed_batch, batched=True)`.

        batch: {column: N values}, of which `column` holds audio, decoded or not. dim, errors: as of `embed`; ValueError
        without that column.
        """
        if column not in batch:
            raise ValueError(f"batch: no column {column}; there are: {', '.join(batch)}.")
        return {"embedding": self.embed(list(batch[column]), dim)}

    def embed_windows(
        self,
        utterance: object,
        window: float = 1.5,
        step: float = 0.75,
        dim: int | None = None,
        *,
        shared: bool = False,
        progress: str | None = None,
    ) -> tuple[NDArray, NDArray]:
        """Embeddings of windows that slide over a recording, as diarisation needs them.

        Memory does not grow with the length of a file: it is read and embedded in stretches of at most a minute.

        Args:
            utterance: a recording of any length, in any form that the class takes.
            window, step: length of a window, and from one to the next, in seconds. The last window ends with the
                recording; a recording that is shorter than a window is one.
            dim: how many numbers of each embedding [all].
            shared: run the network once over stretches of some seconds, and pool the windows out of its frames. Saves
                time where windows overlap much, and a window then knows a little of what is around it:
                docs/results/windows.md says how much of both.
            progress: title of a progress bar on a terminal.

        Returns:
            Where windows start, in seconds [N], and their embeddings [N, dim] float32.

        Raises:
            AudioError: the recording cannot be read or is too short for the model.
            ValueError: a window or step that the model cannot have; shared, and several adapters are loaded.
        """
        dim, extractor = self.dim(dim), self.extractor()
        size, hop = round(window * SAMPLING_RATE), round(step * SAMPLING_RATE)
        if size < self.config.min_samples or hop < 1 or size > STRETCH * SAMPLING_RATE:
            raise ValueError(
                f"window: got {window} s with a step of {step} s, expected windows of "
                f"{self.config.min_samples / SAMPLING_RATE:.3f} to {STRETCH:g} s and a step above 0."
            )
        if shared and self._bank is not None:
            raise ValueError("shared: not with `adapters`; SpeakerEncoder.from_pretrained(model, adapter) merges one.")
        (item,) = as_inputs([utterance])
        read = stretch_reader(item.load(), item.name, extractor)
        starts = window_starts(read.samples, size, hop)
        stretches = consecutive(starts, size, round((SHARED_STRETCH if shared else STRETCH) * SAMPLING_RATE))
        hidden = True if progress is None else None
        bar = tqdm(stretches, desc=progress, disable=hidden, leave=False, unit=" min")

        def waves() -> Iterator[tuple[torch.Tensor, list[int]]]:
            """Of each stretch its samples, and where its windows begin in them."""
            for rows in bar:
                first = starts[rows[0]]
                wave = torch.from_numpy(read(first, starts[rows[-1]] + length))
                yield wave, [start - first for start in starts[rows]]

        def embedded(stretch: tuple[torch.Tensor, list[int]]) -> NDArray:
            pooled = self._shared if shared else self._separate
            wave, offsets = stretch
            return pooled(wave, offsets, length)[:, :dim]

        length, training = min(size, read.samples), self._encoder.training
        self._encoder.eval()
        try:
            # Windows by themselves are many passes within a stretch, which share the cores.
            workers = workers_for(self.device) if shared else 1
            embeddings = [*side_by_side(embedded, waves(), workers)]
        finally:
            self._encoder.train(training)
        return starts / SAMPLING_RATE, np.concatenate(embeddings)

    def _separate(self, wave: torch.Tensor, offsets: list[int], length: int) -> NDArray:
        """wave [samples] -> embeddings [N, D] of the windows of `length` samples at `offsets`, each by itself."""
        workers = workers_for(self.device)
        count = max(1, int(BATCH_SECONDS / workers * SAMPLING_RATE) // length)
        batches = [offsets[row : row + count] for row in range(0, len(offsets), count)]

        def embedded(batch: list[int]) -> NDArray:
            waves = torch.stack([wave[offset : offset + length] for offset in batch])
            return self.embed_padded(waves, torch.full((len(batch),), length))

        return np.concatenate([*side_by_side(embedded, batches, workers)])

    @torch.inference_mode()
    def _shared(self, wave: torch.Tensor, offsets: list[int], length: int) -> NDArray:
        """As `_separate`, out of the frames of one pass over all of them."""
        frame, stride = self.config.hop_length, self.config.time_strides()[-1]
        count = int(self._encoder.front_end.num_frames(length)) // stride * stride
        frames = self._encoder.frames(wave[None].to(self.device))[0][0]
        at = torch.tensor([min(round(offset / frame), len(frames) - count) for offset in offsets], device=self.device)
        windows = frames[at[:, None] + torch.arange(count, device=self.device)]  # [N, count, C]
        return self._encoder.projection(self._encoder.pooling(windows, None)).float().cpu().numpy()

    @torch.inference_mode()
    def embed_padded(
        self, waveforms: torch.Tensor, lengths: torch.Tensor, adapters: Sequence[str | None] | None = None
    ) -> NDArray:
        """Waveforms [B, T] at 16 kHz, padded with anything behind their lengths [B] in samples -> [B, D] float32.

        For callers that read and batch speech themselves. The model should be in evaluation mode.

        adapters: for each row the name of an adapter in `adapters`, or None for the model itself; by default all rows
            go through the adapter that is in use. Raises ValueError for names that are not there.
        """
        padding = bool((lengths != waveforms.shape[1]).any())
        waveforms = waveforms.to(self.device)
        mask = sample_mask(lengths.to(self.device), waveforms.shape[1]) if padding else None
        if adapters is not None and (self._bank is not None or any(adapters)):
            embeddings = self.adapters.embed(waveforms, mask, list(adapters))
        elif self._bank is not None:
            embeddings = self._bank.embed(waveforms, mask)
        else:
            embeddings = self._encoder(waveforms, attention_mask=mask).embeddings
        return embeddings.float().cpu().numpy()

    @torch.inference_mode()
    def classify(self, embeddings: ArrayLike, adapter: str | None = None) -> list[dict[str, float]] | NDArray:
        """Whole embeddings [N, D] -> for each the probability of every class by its label, in the order of the classes.

        The classifier is that of an adapter in `adapters` by its name, or the model's own, and the embeddings must be
        of the same. One that has a single output is a regression and gives values [N] in the unit of its training.
        Raises ValueError where there is no classifier.
        """
        embedded = torch.as_tensor(np.asarray(embeddings, dtype=np.float32), device=self.device)
        if adapter is not None:
            found = self.adapters.classify_embeddings(embedded, adapter)
        elif isinstance(self.model, MRLReDimNetForSequenceClassification):
            names = [self.config.id2label[number] for number in sorted(self.config.id2label)]
            found = labelled(self.model.classifier(embedded), names)
        else:
            raise ValueError(
                f"{self.name} has no classifier: it is for embeddings. Give a model or an adapter with one."
            )
        if isinstance(found, torch.Tensor):
            return found.cpu().numpy()
        columns = {label: values.tolist() for label, values in found.items()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def extractor(self) -> MRLReDimNetFeatureExtractor:
        """What checks waveforms for this model."""
        return MRLReDimNetFeatureExtractor(min_samples=self.config.min_samples)

    @torch.inference_mode()
    def _embedded(
        self,
        items: list[Input],
        dim: int | None = None,
        batch_seconds: float = BATCH_SECONDS,
        progress: str | None = None,
        prepare: Prepare | None = None,
        longest: float | None = None,
        keep_problems: bool = False,
    ) -> Embedded:
        dim, extractor, problems = self.dim(dim), self.extractor(), {}
        spoken: dict[int, float] = {}
        first: dict[object, int] = {}  # of each file, the row that is read
        source = [first.setdefault(item.key, row) if item.key else row for row, item in enumerate(items)]
        state, training = PartialState(), self._encoder.training
        own = sorted(set(source))[state.process_index :: state.num_processes]

        def waveforms() -> Iterator[tuple[int, NDArray]]:
            for row in own:
                try:
                    wave = read_waveform(items[row].load(), items[row].name, extractor, prepare, longest)
                except AudioError as error:
                    if not keep_problems:
                        raise
                    problems[row] = str(error)
                    bar.update()
                else:
                    spoken[row] = speech_seconds(wave)
                    yield row, wave

        def vectors(batch: dict[int, NDArray]) -> tuple[list[int], NDArray, NDArray]:
            lengths = torch.tensor([len(wave) for wave in batch.values()])
            return [*batch], self.embed_padded(padded(batch.values()), lengths)[:, :dim], lengths.numpy()

        embedded, workers = [], workers_for(self.device)
        broadcast(list(self._encoder.buffers()))  # running statistics differ between processes; the first's are saved
        self._encoder.eval()
        hidden = True if progress is None or not state.is_main_process else None  # None: shown where it is a terminal
        with tqdm(total=len(own), desc=progress, disable=hidden, leave=False, unit=" files") as bar:
            try:
                batches = length_batches(waveforms(), batch_seconds / workers)  # so that memory is bounded as asked
                for rows, found, lengths in side_by_side(vectors, batches, workers):
                    embedded.append((rows, found, lengths, [spoken[row] for row in rows]))
                    bar.update(len(rows))
            finally:
                self._encoder.train(training)
        result = np.full((len(items), dim), np.nan, dtype=np.float32)
        seconds, speech = np.full((2, len(items)), np.nan)
        for rows, embeddings, lengths, held in gather_object(embedded):
            result[rows], seconds[rows], speech[rows] = embeddings, lengths / SAMPLING_RATE, held
        reasons = dict(gather_object([*problems.items()]))
        without = {row: reasons[origin] for row, origin in enumerate(source) if origin in reasons}
        return Embedded(result[source], seconds[source], speech[source], without)

    # ------------------------------------------------------------ scores

    def similarity(self, a: ArrayLike, b: ArrayLike, dim: int | None = None) -> NDArray:
        """Cosines of embeddings a [N, D] and b [M, D], of their first `dim` numbers [all] -> [N, M] float64 in -1 .. 1.

        Raises ValueError for other shapes, a dimension out of range, and embeddings that are zero or not finite.
        """
        a, b = np.asarray(a), np.asarray(b)
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
            raise ValueError(f"expected embeddings [N, D] and [M, D], got shapes {a.shape} and {b.shape}")
        if dim is not None and not 1 <= dim <= a.shape[1]:
            raise ValueError(f"dim must be from 1 to the embeddings' {a.shape[1]} numbers, got {dim}")
        cosine, dim = make_scorer("cosine"), dim or a.shape[1]
        return cosine.units(a, dim) @ cosine.units(b, dim).T

    def scorer(
        self,
        name: str = "cosine",
        cohort: str | Path | None = None,
        top: int = TOP,
        prepare: Prepare = warn_of_silence,
        progress: str | None = None,
    ) -> Scorer:
        """A way to score, one of `SCORERS`, with the embeddings of a cohort where it takes one.

        cohort: folder with speech of other speakers, of which up to `COHORT_UTTERANCES` files are drawn. prepare: as of
        `embed`, such as the domain of the trials. top: as of `make_scorer`. Raises as that, FileNotFoundError for a
        folder without audio, AudioError where none of it can be used; an AudioWarning lists files that cannot.
        """
        if name not in SCORERS or cohort is None or not SCORERS[name].needs_cohort:
            return make_scorer(name, top=top)
        files = drawn(files_below(cohort), COHORT_UTTERANCES)
        return make_scorer(name, self.embed_all(files, prepare=prepare, progress=progress).usable("cohort"), top)

    # ------------------------------------------------------------ decisions

    def thresholds(self, folder: str | Path | None = None) -> Thresholds | None:
        """The thresholds saved in `folder`, by default beside the model; None where there are none beside it.

        Raises FileNotFoundError for a folder without them, ValueError for a file that holds none.
        """
        if folder is None:
            file = None if self._source is None else self._cached(THRESHOLDS_FILE)
            if file is None:
                return None
            folder = Path(file).parent
        return Thresholds.load(folder)

    def decision_rule(
        self,
        enrolments: Iterable[int] = (1,),
        dim: int | None = None,
        *,
        threshold: float | None = None,
        thresholds: str | Path | None = None,
        scorer: Scorer | None = None,
        speakers: int = 1,
    ) -> DecisionRule:
        """How `verify` and `identify` decide.

        Args:
            enrolments: how many utterances are averaged for each enrolment.
            dim: of the embeddings that are compared [all].
            threshold: accept scores from this one on; None: by saved thresholds.
            thresholds: folder with them [the model's].
            scorer: how is scored [cosine].
            speakers: how many enrolled speakers are searched.

        Raises:
            ValueError: thresholds are saved, but none for this dimension, adapter, scorer and weights.
        """
        saved = self.thresholds(thresholds)
        weights = self.fingerprint if saved else ""
        return DecisionRule.of(
            saved,
            self.dim(dim),
            self.adapter,
            make_scorer("cosine") if scorer is None else scorer,
            weights,
            enrolments,
            given=threshold,
            speakers=speakers,
        )

    def verify(
        self,
        enrol: Sequence,
        test: Sequence,
        dim: int | None = None,
        *,
        threshold: float | DecisionRule | None = None,
        scorer: Scorer | None = None,
        progress: str | None = None,
    ) -> list[Decision]:
        """Whether each of `test` is the speaker of `enrol`.

        Args:
            enrol: utterances of one speaker, averaged; a file that comes twice counts once. test: utterances.
            dim: how many numbers of the embeddings are compared [all].
            threshold: accept scores from this one on, or a `decision_rule`; None: the rule of the saved thresholds.
            scorer: from the method `scorer` [cosine].
            progress: title of a progress bar on a terminal.

        Returns:
            A `Decision` on each utterance of `test`.
            An AudioWarning names sides with less speech than `ENROL_SECONDS` and `TEST_SECONDS` of `scoring.decisions`.

        Raises:
            AudioError: an utterance that cannot be read, or in which nobody can be heard.
            ValueError: nobody is enrolled, or as `decision_rule`.
        """
        enrolled, tested = distinct(as_inputs(enrol, "enrolled utterance")), as_inputs(test, "test utterance")
        if not enrolled:
            raise ValueError("enrol: got no utterance, expected at least one.")
        dim, count = self.dim(dim), len(enrolled)
        scorer = make_scorer("cosine") if scorer is None else scorer
        if isinstance(threshold, DecisionRule):
            rule = threshold
        else:
            rule = self.decision_rule([count], dim, threshold=threshold, scorer=scorer)
        found = self._embedded([*enrolled, *tested], progress=progress, prepare=refuse_silence)
        _warn_of_short({"the enrolment": found.speech[:count]}, tested, found.speech[count:])
        units = scorer.units(found.embeddings, dim, [item.name for item in (*enrolled, *tested)])
        enrolment = enrolment_units(units[:count], {"the enrolment": range(count)})
        scores = scorer.compare(enrolment, units[count:], (np.zeros(len(tested), int), np.arange(len(tested))))
        seconds = np.column_stack([np.full(len(tested), found.seconds[:count].sum()), found.seconds[count:]])
        return rule.decide(scores, [count] * len(tested), seconds)

    def identify(
        self,
        enrolled: Mapping[str, Sequence],
        test: Sequence,
        dim: int | None = None,
        *,
        top: int = 3,
        threshold: float | DecisionRule | None = None,
        progress: str | None = None,
    ) -> list[Identification]:
        """Which of the enrolled speakers each of `test` is, by cosine.

        Args:
            enrolled: {speaker: utterances of this speaker, averaged}. test: utterances.
            dim: how many numbers of the embeddings are compared [all].
            top: how many speakers to name for each.
            threshold: as of `verify`; saved thresholds are for the search among all of the speakers.
            progress: title of a progress bar on a terminal.

        Returns:
            An `Identification` of each utterance of `test`.
            An AudioWarning names speech that is too short, as in `verify`.

        Raises:
            AudioError: utterances that cannot be read, or in which nobody can be heard; it lists them all.
            ValueError: nobody is enrolled, a speaker without an utterance, or as `decision_rule`.
        """
        if top < 1:
            raise ValueError(f"top: got {top}, expected at least 1.")
        speech = {name: distinct(as_inputs(enrolled[name], f"{name}, utterance")) for name in sorted(enrolled)}
        if not speech or not all(speech.values()):
            raise ValueError("enrolled: expected at least one speaker, and at least one utterance of each.")
        dim, counts = self.dim(dim), {name: len(items) for name, items in speech.items()}
        if isinstance(threshold, DecisionRule):
            rule = threshold
        else:
            rule = self.decision_rule(counts.values(), dim, threshold=threshold, speakers=len(counts))
        items: list[Input] = []
        rows: dict[str, range] = {}
        for name, utterances in speech.items():
            rows[name] = range(len(items), len(items) + len(utterances))
            items += utterances
        first = len(items)
        items += as_inputs(test, "test utterance")
        found = self._embedded(items, progress=progress, prepare=refuse_silence, keep_problems=True)
        if found.problems:
            raise AudioError(problems_text(found.problems, len(items)))
        _warn_of_short({name: found.speech[rows[name]] for name in rows}, items[first:], found.speech[first:])
        cosine, names = make_scorer("cosine"), list(speech)
        units = cosine.units(found.embeddings, dim, [item.name for item in items])
        similarities = units[first:] @ enrolment_units(units, rows).T  # [tests, speakers]
        order = np.argsort(-similarities, axis=1, kind="stable")[:, :top]
        spoken = {name: found.seconds[rows[name]].sum() for name in names}
        result = []
        for row, best in enumerate(order):
            ranked = [names[column] for column in best]
            seconds = np.array([[spoken[name], found.seconds[first + row]] for name in ranked])
            decisions = rule.decide(similarities[row, best], [counts[name] for name in ranked], seconds)
            pairs = zip(ranked, decisions, strict=True)
            result.append(Identification(tuple(Candidate(**asdict(each), speaker=name) for name, each in pairs)))
        return result

    def _cached(self, file: str) -> str | None:
        """A file of the saved model, None where there is none."""
        return cached_file(
            self._source,
            file,
            revision=self._revision,
            token=self._token,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )


def _warn_of_short(enrolled: Mapping[str, NDArray], tested: Sequence[Input], speech: NDArray) -> None:
    """An AudioWarning each on enrolments and on test utterances with too little speech.

    enrolled: {name: seconds of speech of its utterances}. speech: [N] seconds of the tested ones.
    """
    sums = [(name, float(seconds.sum())) for name, seconds in enrolled.items()]
    tests = [(item.name, float(seconds)) for item, seconds in zip(tested, speech, strict=True)]
    told = short_speech("enrolments", sums, ENROL_SECONDS) + short_speech("test utterances", tests, TEST_SECONDS)
    for sentence in told:
        warnings.warn(sentence, AudioWarning, stacklevel=3)


def padded(waveforms: Iterable[NDArray]) -> torch.Tensor:
    """Waveforms [samples] of some lengths -> [B, T] float32, with zeros behind the shorter ones."""
    return torch.nn.utils.rnn.pad_sequence([torch.from_numpy(wave) for wave in waveforms], batch_first=True)
