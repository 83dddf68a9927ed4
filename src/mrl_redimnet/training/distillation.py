"""What a student learns from a larger, trained model: which crops of a batch sound alike.

The teacher says so by the cosines between its embeddings of the batch, which have no dimension: any teacher can teach
every Matryoshka prefix of any student (relational knowledge distillation, arXiv 1904.05068; similarity-preserving
distillation, Tung and Mori 2019, arXiv 1907.09682). No projection between the two is learnt, none is left over.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch.nn import functional as F

from mrl_redimnet.saving import load_model


class Teacher:
    """A trained model's full-dimension embeddings, without gradients.

    model: a saved model's folder or Hub id, with or without a head; device: where it is to work; autocast: makes the
    context its forward pass runs in, `accelerator.autocast` for the precision that the student trains in. Raises
    FileNotFoundError for a folder that is not there, ValueError for another kind of model.
    """

    def __init__(
        self,
        model: str | Path,
        device: torch.device | str = "cpu",
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.encoder = load_model(model).base_model.to(device).eval().requires_grad_(False)
        self.autocast = autocast

    @torch.no_grad()
    def __call__(self, input_values: torch.Tensor) -> torch.Tensor:
        """input_values [B, T] mono at 16 kHz, on any device -> embeddings [B, E] float32, on the teacher's."""
        with self.autocast():
            return self.encoder(input_values.to(self.encoder.device)).embeddings.float()


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
    embeddings: torch.Tensor, teacher: torch.Tensor, dims: Sequence[int], prefix_weights: Sequence[float] | None
) -> list[float]:
    """The prefixes' weights, their sum 1, or ValueError."""
    if embeddings.dim() != 2 or teacher.dim() != 2 or len(embeddings) != len(teacher):
        raise ValueError(
            f"embeddings and teacher: got shapes {tuple(embeddings.shape)} and {tuple(teacher.shape)}, expected [B, D] "
            "and [B, E] of the same crops."
        )
    if len(embeddings) < 2:
        raise ValueError(f"batch_size: got {len(embeddings)} crop, distillation compares at least 2 with each other.")
    rising = all(a < b for a, b in zip([0, *dims], dims, strict=False))
    if not dims or not rising or dims[-1] > embeddings.shape[1]:
        raise ValueError(f"dims: got {list(dims)}, expected rising prefixes of {embeddings.shape[1]} dimensions.")
    weights = [1.0] * len(dims) if prefix_weights is None else [float(weight) for weight in prefix_weights]
    if len(weights) != len(dims) or min(weights) < 0 or not sum(weights) > 0:
        raise ValueError(f"prefix_weights: got {weights}, expected {len(dims)} numbers >= 0, not all 0.")
    return [weight / sum(weights) for weight in weights]
