"""ReDimNet embeddings in the speaker diarisation of pyannote.audio 4.

    encoder = SpeakerEncoder.from_pretrained("nano")
    pipeline = diarization_pipeline(encoder, "segmentation-3.0/pytorch_model.bin", plda="PLDA")
    output = pipeline({"waveform": waveform, "sample_rate": 16_000, "uri": "meeting"})    # waveform [1, samples]

pyannote.audio reports the length of every file that it diarises to its makers, unless it is told not to. Importing this
module tells it so; `pyannote.audio.telemetry.set_telemetry_metrics(True)` afterwards allows it again.
"""

import copy
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from configuration_mrl_redimnet import SAMPLING_RATE, WINDOW_LENGTH
from masking_mrl_redimnet import stretched
from modeling_mrl_redimnet import MRLReDimNetPreTrainedModel
from mrl_redimnet.diarization.plda import PLDA
from mrl_redimnet.encoder import SpeakerEncoder
from mrl_redimnet.extras import extra

TELEMETRY = "PYANNOTE_METRICS_ENABLED"
# Who set the variable before pyannote was imported has decided; afterwards it is always set, to pyannote's own default.
if TELEMETRY not in os.environ or "pyannote.audio" in sys.modules:
    os.environ[TELEMETRY] = "false"

with extra("pyannote"):
    from pyannote.audio.core.model import Model
    from pyannote.audio.core.task import Problem, Resolution, Specifications
    from pyannote.audio.pipelines import SpeakerDiarization
    from pyannote.audio.pipelines.utils import get_model

CHUNK_SECONDS = 10.0  # what pyannote takes an embedding of, where it is not told
CHUNKS_PER_BATCH = 8

# Parameters of pyannote's clusterings, tuned on nine half minutes of AMI and nano: docs/results/pyannote_plug.md.
AGGLOMERATIVE = {"method": "average", "threshold": 0.3, "min_cluster_size": 1}
VBX = {"threshold": 0.6, "Fa": 0.15, "Fb": 0.8}


class ReDimNetEmbedding(Model):
    """A speaker encoder as pyannote.audio takes one: `SpeakerDiarization(embedding=ReDimNetEmbedding(encoder), ...)`.

    pyannote asks for an embedding of each local speaker of a chunk in a row of its own, in which the waveform is the
    same. Here the network goes over equal neighbours once, also where a batch ends between them, and not at all over
    chunks in which nobody speaks; only pooling and projection are done for each speaker.

    It holds a copy of the encoder's model as it is, with the adapter that is in use, in evaluation mode: what becomes
    of the encoder later does not matter, and neither do several threads.

    Attributes:
        redimnet: the copy, a `MRLReDimNetModel` whose weights are taken to be constant.
    """

    def __init__(self, encoder: SpeakerEncoder | MRLReDimNetPreTrainedModel, dim: int | None = None) -> None:
        """Args:
        encoder: or its model, which then gets the faster forms of its modules, as `SpeakerEncoder` says.
        dim: how many numbers of each embedding [all]. ValueError for more than there are.
        """
        super().__init__(sample_rate=SAMPLING_RATE, num_channels=1)
        encoder = encoder if isinstance(encoder, SpeakerEncoder) else SpeakerEncoder(encoder)
        self._dim = encoder.dim(dim)
        self._kept: tuple[torch.Tensor, torch.Tensor] | None = None  # the last waveform [T], and its frames [1, F, C]
        self.redimnet = copy.deepcopy(encoder.model.base_model).eval().requires_grad_(False)
        self.specifications = Specifications(
            problem=Problem.REPRESENTATION, resolution=Resolution.CHUNK, duration=CHUNK_SECONDS
        )

    @property
    def dimension(self) -> int:
        """How many numbers an embedding has."""
        return self._dim

    def num_frames(self, num_samples: int) -> int:
        """Frames that are pooled of a waveform of `num_samples`."""
        stride = self.redimnet.config.time_strides()[-1]
        return int(self.redimnet.front_end.num_frames(num_samples)) // stride * stride

    def receptive_field_size(self, num_frames: int = 1) -> int:
        """Samples that the front end takes for `num_frames`; the network behind it sees the whole chunk."""
        return WINDOW_LENGTH + (num_frames - 1) * self.redimnet.config.hop_length

    def receptive_field_center(self, frame: int = 0) -> int:
        """The sample at the middle of a frame."""
        return frame * self.redimnet.config.hop_length

    def forward(self, waveforms: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """waveforms [B, 1, samples] at 16 kHz, weights [B, parts] or [B, speakers, parts] or None -> [B, D] or
        [B, speakers, D].

        weights: of as many equal parts of a chunk as there are, not negative; only their ratios matter. Where all are 0
        the embedding is NaN, which pyannote leaves out. D is `dimension`, the embeddings are float32.

        Raises ValueError for other shapes, weights that are negative or not finite, and too few samples.
        """
        if waveforms.dim() != 3 or waveforms.shape[1] != 1:
            raise ValueError(f"waveforms: expected [batch, 1, samples], got shape {tuple(waveforms.shape)}.")
        waves = waveforms[:, 0]
        window = self.redimnet.config.window_seconds * SAMPLING_RATE
        if weights is None or waves.shape[1] > window:  # the model cuts what is longer, once for all speakers
            return self.redimnet(waves, frame_weights=weights).embeddings[..., : self._dim].float()
        self.redimnet.check_waveforms(waves)
        self.redimnet.check_weights(weights, waves)
        flat = weights.reshape(-1, weights.shape[-1]).float()  # [rows, parts]
        spoken = flat.any(1).nonzero()[:, 0]
        embeddings = flat.new_full((len(flat), self._dim), torch.nan)
        if len(spoken):
            frames, numbers = self._frames(waves, spoken // (len(flat) // len(waves)))
            shares = stretched(flat[spoken, None], frames.shape[1]).transpose(1, 2)  # [spoken, F, 1]
            pooled = self.redimnet.pooling(frames[numbers], None, shares)
            embeddings[spoken] = self.redimnet.projection(pooled)[:, : self._dim].float()
        return embeddings.unflatten(0, tuple(weights.shape[:-1]))

    def _frames(self, waves: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Frames [n, F, C] of the n different ones among waves[rows], neighbours compared; which each row has, [rows].

        waves [B, T], rows sorted.
        """
        waves = waves[rows]
        new = torch.ones_like(rows, dtype=torch.bool)
        new[1:] = (waves[1:] != waves[:-1]).any(1)
        different, numbers = waves[new], new.cumsum(0) - 1
        kept = self._kept
        if kept is not None and kept[0].device == waves.device and torch.equal(kept[0], different[0]):
            frames = kept[1]
            if len(different) > 1:
                frames = torch.cat([frames, self.redimnet.frames(different[1:])[0]])
        else:
            frames = self.redimnet.frames(different)[0]
        self._kept = None if frames.requires_grad else (different[-1].clone(), frames[-1:].clone())
        return frames, numbers

    def __getstate__(self) -> dict:
        """Without the last waveform, which is nobody else's business."""
        return {**super().__getstate__(), "_kept": None}


def diarization_pipeline(
    encoder: SpeakerEncoder,
    segmentation: Model | str | Path,
    plda: str | Path | None = None,
    dim: int | None = None,
    *,
    batch_size: int = CHUNKS_PER_BATCH,
) -> SpeakerDiarization:
    """pyannote.audio's pipeline with embeddings of `encoder`, ready to be called, on the CPU.

    It is called with audio in memory, {"waveform": [1, samples], "sample_rate": Hz, "uri": name}, and gives pyannote's
    `DiarizeOutput`. `instantiate` of it takes other thresholds than the ones that were tuned here, `to` a torch.device.

    Args:
        encoder: makes the embeddings.
        segmentation: pyannote's model of who speaks in a chunk, or its file (`pytorch_model.bin`).
        plda: a folder of `mrl-redimnet plda`, for VBx; None: agglomerative clustering by cosine.
        dim: how many numbers of each embedding [all].
        batch_size: chunks that the networks are given at a time.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a PLDA of other embeddings, a dimension that the model has not.
    """
    dim = encoder.dim(dim)
    if isinstance(segmentation, str | Path):
        if not Path(segmentation).is_file():  # pyannote would take it for a Hub id
            raise FileNotFoundError(f"segmentation: no file {segmentation}.")
        segmentation = str(segmentation)
    if plda is not None:
        _check_plda(PLDA.load(plda), encoder, dim, plda)
    network = get_model(segmentation)
    with tempfile.TemporaryDirectory() as unused:
        if plda is None:  # pyannote wants one with every clustering, and would look for its own on the Hub
            _unit_plda(dim).save(Path(unused) / "plda")
        pipeline = SpeakerDiarization(
            segmentation=network,
            embedding=ReDimNetEmbedding(encoder, dim),
            embedding_exclude_overlap=True,  # as in pyannote's own pipelines
            plda=str(Path(unused) / "plda" if plda is None else plda),
            clustering="AgglomerativeClustering" if plda is None else "VBxClustering",
            segmentation_batch_size=batch_size,
            embedding_batch_size=batch_size * len(network.specifications.classes),  # all speakers of a chunk
        )
    threshold = {} if network.specifications.powerset else {"threshold": 0.5}
    return pipeline.instantiate(
        {
            "segmentation": {"min_duration_off": 0.0, **threshold},
            "clustering": AGGLOMERATIVE if plda is None else VBX,
        }
    )


def _unit_plda(dim: int) -> PLDA:
    return PLDA(np.zeros(dim), np.eye(dim), np.zeros(dim), np.zeros(dim), np.eye(dim), np.ones(dim))


def _check_plda(plda: PLDA, encoder: SpeakerEncoder, dim: int, folder: str | Path) -> None:
    if plda.lda.shape[0] != dim:
        raise ValueError(
            f"{folder}: a PLDA of embeddings of {plda.lda.shape[0]} numbers, not of {dim}: give dim="
            f"{plda.lda.shape[0]}, or make one with `mrl-redimnet plda --dim {dim}`."
        )
    if plda.fingerprint and plda.fingerprint != encoder.fingerprint:
        raise ValueError(
            f"{folder}: a PLDA of embeddings of other weights than {encoder.name} has, or of another adapter: make one "
            "with `mrl-redimnet plda`."
        )
