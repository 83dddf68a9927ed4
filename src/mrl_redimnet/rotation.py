"""The rotation that turns every prefix of an embedding into a principal subspace, at no cost to the whole.

Cosine does not change under an orthogonal map. With R the eigenvectors of the second moment of length-normalised
embeddings, largest eigenvalue first, the rotated embedding R^T e scores exactly as e does at full width, while its
first d numbers keep as much of the embeddings' energy as any d numbers can (principal components without centring).
R is folded into the projection, so the rotated model is an ordinary one.
"""

from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list

from modeling_mrl_redimnet import MatryoshkaProjection, MRLReDimNetPreTrainedModel
from mrl_redimnet.audio.levels import refuse_silence
from mrl_redimnet.audio.scan import AUDIO_SUFFIXES, drawn, files_below
from mrl_redimnet.encoder import SpeakerEncoder

ROTATION_UTTERANCES = 2000  # as many as are drawn from a larger corpus: enough for a 256 x 256 second moment


def principal_rotation(embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """embeddings [N, D] of some speech -> R [D, D] orthogonal and eigenvalues [D], both by falling eigenvalue.

    Raises ValueError for fewer than two embeddings, or ones that are zero or not finite.
    """
    embeddings = np.asarray(embeddings, dtype=np.float64)
    if embeddings.ndim != 2 or len(embeddings) < 2:
        raise ValueError(f"A rotation needs at least two embeddings [N, D], got shape {embeddings.shape}.")
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    if not np.isfinite(norms).all() or (norms == 0).any():
        raise ValueError("A rotation needs finite embeddings that are not zero.")
    unit = embeddings / norms
    values, vectors = np.linalg.eigh(unit.T @ unit / len(unit))
    return vectors[:, ::-1].copy(), values[::-1].clip(min=0)


@torch.no_grad()
def rotate(model: MRLReDimNetPreTrainedModel, embeddings: np.ndarray) -> np.ndarray:
    """Folds the principal rotation of `embeddings` [N, D] (full width, from this model) into the model, in place.

    Returns the share of these embeddings' energy that the first 1, 2, ... D numbers now hold, [D].

    Cosines at full width stay as they are, and so do the full-width logits of a classifier, whose rows turn with the
    embedding. A batch norm behind the projection is folded in first. Under several processes all of them call this, and
    the first one's rotation is everybody's: on other processors the same embeddings may give other signs.
    """
    encoder = model.base_model
    projection = encoder.projection
    width = sum(segment.out_features for segment in projection.segments)
    if np.shape(embeddings)[1:] != (width,):
        raise ValueError(f"Expected embeddings of the full width {width}, got shape {np.shape(embeddings)}.")
    turn, energies = broadcast_object_list([*principal_rotation(embeddings)])
    rotation = torch.from_numpy(turn)
    weight, bias = _affine(projection)
    _store(projection, rotation.T @ weight, rotation.T @ bias)
    projection.embedding_norm = None
    model.config.embedding_norm = False
    if model is not encoder:
        model.classifier.weight.copy_(model.classifier.weight.cpu().double() @ rotation)
    return np.cumsum(energies) / energies.sum()


def rotate_on_speech(
    model: MRLReDimNetPreTrainedModel, folder: str | Path, progress: str | None = None
) -> tuple[int, np.ndarray]:
    """Rotates the model, in place, on up to `ROTATION_UTTERANCES` files drawn from below `folder`.

    Returns how many utterances that were, and the share of their energy in each prefix [D], as `rotate` does. An
    AudioWarning lists files that cannot be used.

    Raises FileNotFoundError for fewer than two audio files, AudioError where none of them can be used.
    """
    files = files_below(folder)
    if len(files) < 2:
        raise FileNotFoundError(f"1 audio file ({', '.join(AUDIO_SUFFIXES)}) below {folder}: too few.")
    found = SpeakerEncoder(model).embed_all(
        drawn(files, ROTATION_UTTERANCES), progress=progress, prepare=refuse_silence
    )
    embeddings = found.usable("speech to rotate on")
    return len(embeddings), rotate(model, embeddings)


def _affine(projection: MatryoshkaProjection) -> tuple[torch.Tensor, torch.Tensor]:
    """The projection (and the norm behind it, as it is in eval mode) as weight [D, P] and bias [D], float64."""
    weight = torch.cat([segment.weight for segment in projection.segments]).cpu().double()
    bias = torch.cat([segment.bias for segment in projection.segments]).cpu().double()
    norm = projection.embedding_norm
    if norm is None:
        return weight, bias
    scale = norm.weight.cpu().double() / (norm.running_var.cpu().double() + norm.eps).sqrt()
    shift = norm.bias.cpu().double() - norm.running_mean.cpu().double() * scale
    return weight * scale[:, None], bias * scale + shift


def _store(projection: MatryoshkaProjection, weight: torch.Tensor, bias: torch.Tensor) -> None:
    start = 0
    for segment in projection.segments:
        end = start + segment.out_features
        segment.weight.copy_(weight[start:end])
        segment.bias.copy_(bias[start:end])
        start = end
