"""What a student learns from a teacher (`mrl_redimnet.training.teachers`), at every Matryoshka prefix.

- Similarity: which crops of a batch sound alike, by the cosines between the teacher's embeddings. These have no
  dimension, so that any teacher can teach any student (relational knowledge distillation, arXiv 1904.05068;
  similarity-preserving distillation, Tung and Mori 2019, arXiv 1907.09682).
- Direction: where the teacher's embedding points, after its space was rotated to its principal axes, so that a prefix
  of the student learns a principal subspace of the teacher.

No projection between the two is learnt, none is left over.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from mrl_redimnet.files import replace_file
from mrl_redimnet.rotation import principal_rotation

AXES_FILE = "teacher_axes.safetensors"
TEACHER_LOSSES = ("similarity", "direction")


def similarity_loss(
    embeddings: torch.Tensor,
    teacher: torch.Tensor,
    dims: Sequence[int],
    prefix_weights: Sequence[float] | None = None,
) -> torch.Tensor:
    """Mean squared difference between a prefix's cosines within the batch and the teacher's, averaged over prefixes.

    embeddings [B, D] of the student and teacher [B, E] of the same crops -> loss [], float32 whatever the dtype around
    it. dims: the prefixes, rising; prefix_weights: of each in the average, None = all alike; only ratios matter.
    A crop's cosine with itself is left out. The teacher gets no gradient; neither a rotation nor a scale of it changes
    anything. Under several processes each compares the crops of its own batch.

    Raises ValueError for fewer than 2 crops, for batches of different sizes, and for dims or weights that do not fit.
    """
    weights = _check(embeddings, teacher, dims, prefix_weights)
    with torch.autocast(embeddings.device.type, enabled=False):
        wanted = F.normalize(teacher.detach().float(), dim=1)
        wanted = wanted @ wanted.T
        itself = torch.eye(len(embeddings), dtype=torch.bool, device=embeddings.device)
        pairs = len(embeddings) * (len(embeddings) - 1)
        loss = embeddings.new_zeros((), dtype=torch.float32)
        for cosine, weight in zip(_prefix_cosines(embeddings, dims), weights, strict=True):
            loss = loss + weight * (cosine - wanted).masked_fill(itself, 0.0).square().sum() / pairs
    return loss


def direction_loss(
    embeddings: torch.Tensor,
    targets: torch.Tensor,
    dims: Sequence[int],
    prefix_weights: Sequence[float] | None = None,
) -> torch.Tensor:
    """1 - the cosine between a prefix of the student's embedding and of its target, averaged over crops and prefixes.

    embeddings [B, D] of the student and targets [B, E] of the same crops, rotated to principal axes -> loss [], from 0
    to 2, float32 whatever the dtype around it. dims: the prefixes, rising; prefix_weights: of each in the average, None
    = all alike; only ratios matter. Of prefixes longer than E the first E numbers count; prefixes that are the same
    then count once, with the largest of their weights. Targets get no gradient; no scale of either changes anything.

    Raises ValueError for no crops, for batches of different sizes, and for dims or weights that do not fit.
    """
    weights = _check(embeddings, targets, dims, prefix_weights, least=1)
    of_prefix: dict[int, float] = {}
    for dim, weight in zip(dims, weights, strict=True):
        dim = min(dim, targets.shape[1])
        of_prefix[dim] = max(weight, of_prefix.get(dim, 0.0))
    with torch.autocast(embeddings.device.type, enabled=False):
        student, wanted = embeddings.float(), targets.detach().float()
        cosines = {dim: F.cosine_similarity(student[:, :dim], wanted[:, :dim]) for dim in of_prefix}
        total = sum(of_prefix.values())
        return sum(weight / total * (1 - cosines[dim]).mean() for dim, weight in of_prefix.items())


class PrincipalAxes:
    """The principal axes of a teacher's length-normalised embeddings, the one of most energy first: [E, E].

    They belong to a checkpoint: computed anew, on other speech or another processor, axes may have another sign.
    """

    axes: torch.Tensor  # from `fit` or a checkpoint on

    def fit(self, embeddings: np.ndarray | None) -> None:
        """From embeddings [N, E] of some speech, in the main process; the others give None and get the same axes.

        Raises ValueError for fewer than two embeddings, or ones that are zero or not finite.
        """
        axes = None if embeddings is None else torch.from_numpy(principal_rotation(embeddings)[0]).float()
        (self.axes,) = broadcast_object_list([axes])

    def read(self, file: str | Path, dimensions: int) -> None:
        """From a file that `save` wrote. Raises ValueError, naming the file, for another file or another teacher's."""
        try:
            axes = load_file(file)["axes"]
        except (OSError, KeyError, SafetensorError) as error:
            raise ValueError(f"teacher_axes: {file} holds no axes of a teacher ({error}).") from error
        if axes.shape != (dimensions, dimensions):
            raise ValueError(
                f"teacher_axes: {file} has axes {tuple(axes.shape)}, the teacher's embeddings have {dimensions} "
                "numbers."
            )
        self.axes = axes

    def save(self, folder: str | Path) -> None:
        """Writes `folder`/teacher_axes.safetensors, whole or not at all."""
        replace_file(Path(folder) / AXES_FILE, lambda file: save_file(self.state_dict(), file))

    def rotated(self, embeddings: torch.Tensor) -> torch.Tensor:
        """embeddings [B, E] -> [B, E] of length 1, in the principal axes, float32."""
        self.axes = self.axes.to(embeddings.device)
        with torch.autocast(embeddings.device.type, enabled=False):
            return F.normalize(embeddings.float(), dim=1) @ self.axes

    def state_dict(self) -> dict[str, torch.Tensor]:
        """For a checkpoint."""
        return {"axes": self.axes}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """From a checkpoint."""
        self.axes = state["axes"]


def _prefix_cosines(embeddings: torch.Tensor, dims: Sequence[int]) -> Iterator[torch.Tensor]:
    """embeddings [B, D] -> for each prefix in turn, the cosines between the crops, [B, B] float32.

    As in the classifier, a prefix's products are those of the one before plus one segment's: all of them cost one
    full-width product.
    """
    dots, start = 0.0, 0
    for end in dims:
        segment = embeddings[:, start:end].float()
        dots = dots + segment @ segment.T
        scale = (dots.diagonal() + 1e-12).rsqrt()
        yield dots * scale[:, None] * scale
        start = end


def _check(
    embeddings: torch.Tensor,
    teacher: torch.Tensor,
    dims: Sequence[int],
    prefix_weights: Sequence[float] | None,
    least: int = 2,
) -> list[float]:
    """The prefixes' weights, their sum 1, or ValueError. least: crops that a loss needs."""
    if embeddings.dim() != 2 or teacher.dim() != 2 or len(embeddings) != len(teacher):
        raise ValueError(
            f"embeddings and teacher: got shapes {tuple(embeddings.shape)} and {tuple(teacher.shape)}, expected [B, D] "
            "and [B, E] of the same crops."
        )
    if len(embeddings) < least:
        compared = "compares at least 2 with each other" if least == 2 else "needs at least 1"
        raise ValueError(f"batch_size: got {len(embeddings)} crop, distillation {compared}.")
    rising = all(a < b for a, b in zip([0, *dims], dims, strict=False))
    if not dims or not rising or dims[-1] > embeddings.shape[1]:
        raise ValueError(f"dims: got {list(dims)}, expected rising prefixes of {embeddings.shape[1]} dimensions.")
    weights = [1.0] * len(dims) if prefix_weights is None else [float(weight) for weight in prefix_weights]
    if len(weights) != len(dims) or min(weights) < 0 or not sum(weights) > 0:
        raise ValueError(f"prefix_weights: got {weights}, expected {len(dims)} numbers >= 0, not all 0.")
    return [weight / sum(weights) for weight in weights]
