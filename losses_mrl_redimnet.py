"""The losses of `MatryoshkaMarginClassifier`: what a batch's scaled cosines to all speakers cost.

A loss knows nothing of prefixes, sub-centres or embeddings: the classifier (`modeling_mrl_redimnet.py`) calls it once
per prefix. A new loss is a function here and its entry in `LOSSES`; the configuration's `SPEAKER_LOSSES` lists the
names, because a configuration is read without torch.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import PretrainedConfig

NORM_FLOOR = 1e-6  # of the norm of an embedding or a row


def angular_margin(cosine: torch.Tensor, margin: float) -> torch.Tensor:
    """cos(theta + margin) of a cosine; past theta = pi - margin, where that would rise again, cos(theta) - margin *
    sin(margin), as in the paper's published code. There it falls by a step of cos(margin) + margin * sin(margin) - 1
    (0.02 for a margin of 0.2), and goes on falling.

    The sine's argument stays above zero: its root has an infinite slope there, and a cosine can exceed 1 by rounding.
    """
    if margin == 0:
        return cosine
    moved = cosine * math.cos(margin) - _sine(cosine) * math.sin(margin)
    return torch.where(cosine > -math.cos(margin), moved, cosine - math.sin(margin) * margin)


def angular_gain(cosine: torch.Tensor, margin: float) -> torch.Tensor:
    """cos(theta - margin) of a cosine; below theta = margin, where that would fall again, a line on from its 1."""
    moved = cosine * math.cos(margin) + _sine(cosine) * math.sin(margin)
    return torch.where(cosine < math.cos(margin), moved, 1.0 + cosine - math.cos(margin))


def _sine(cosine: torch.Tensor) -> torch.Tensor:
    return (1.0 - cosine.square()).clamp(min=1e-7).sqrt()


def harder_negatives(
    logits: torch.Tensor, labels: torch.Tensor, count: int, margin: float, scale: float
) -> torch.Tensor:
    """Inter-top-k (Zhao et al. 2022, arXiv 2110.05042): logits [R, N] with `angular_gain` on the `count` largest of
    each row's wrong speakers (all of them, where there are fewer).
    """
    nearest = nearest_wrong(logits.detach(), labels, count)
    if nearest is None or margin == 0:
        return logits
    return logits.scatter(-1, nearest, scale * angular_gain(logits.gather(-1, nearest) / scale, margin))


def nearest_wrong(logits: torch.Tensor, labels: torch.Tensor, count: int) -> torch.Tensor | None:
    """Which wrong speakers have the `count` largest of logits [..., N], labels [...] -> [..., count]; None for none."""
    count = min(count, logits.shape[-1] - 1)
    return None if count == 0 else logits.scatter(-1, labels[..., None], -torch.inf).topk(count, dim=-1).indices


def aam_loss(
    logits: torch.Tensor, labels: torch.Tensor, margin: float, scale: float, bias: None, config: PretrainedConfig
) -> torch.Tensor:
    """Additive angular margin softmax (Deng et al. 2019, arXiv 1801.07698), with label smoothing."""
    own = labels[:, None]
    logits = logits.scatter(1, own, scale * angular_margin(logits.gather(1, own) / scale, margin))
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=config.label_smoothing)


def sphereface2_similarity(cosine: torch.Tensor, exponent: float) -> torch.Tensor:
    """g(z) = 2 ((z + 1) / 2)^t - 1, from -1 to 1 (Wen et al. 2022, arXiv 2108.01513)."""
    return 2.0 * ((cosine + 1.0) / 2.0).clamp(min=0.0).pow(exponent) - 1.0


def sphereface2_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    margin: float,
    scale: float,
    bias: torch.Tensor,
    config: PretrainedConfig,
) -> torch.Tensor:
    """SphereFace2-C: is it this speaker, yes or no, asked of every speaker; summed over these.

    lambda log(1 + exp(-s (g(cos_y) - m) - b)) + (1 - lambda) sum_{i != y} log(1 + exp(s (g(cos_i) + m) + b)): the
    paper's without its 1 / s, as for speakers in Han et al. 2023 (Exploring binary classification loss for speaker
    verification). bias: b, of all rows [] or of each [R, 1].
    """
    own = labels[:, None]
    similarity = sphereface2_similarity(logits / scale, config.sphereface2_exponent)
    positive = F.softplus(-(scale * (similarity.gather(1, own) - margin) + bias))[:, 0]
    negative = F.softplus(scale * (similarity + margin) + bias).scatter(1, own, 0.0).sum(1)
    return config.sphereface2_balance * positive + (1.0 - config.sphereface2_balance) * negative


def sphereface2_start_bias(config: PretrainedConfig) -> float:
    """The bias at which a fresh classifier's loss has no slope in it: all cosines 0, the configured margin.

    With z = lambda / ((1 - lambda) (N - 1)), p = exp(s (g(0) - m) + b), n = exp(s (g(0) + m) + b) that is where
    n (1 + p) = z (1 + n): a quadratic equation in n, since p = n exp(-2 s m).
    """
    odds = config.sphereface2_balance / ((1.0 - config.sphereface2_balance) * max(1, config.num_speakers - 1))
    gap = 2.0 * config.scale * config.margin
    root = math.sqrt((1.0 - odds) ** 2 + 4.0 * odds * math.exp(-gap))
    # Two forms of the positive solution: neither subtracts numbers that are nearly alike.
    log_n = math.log(2.0 * odds / (1.0 - odds + root)) if odds < 1 else math.log((odds - 1.0 + root) / 2.0) + gap
    return log_n - config.scale * (2.0 * 0.5**config.sphereface2_exponent - 1.0 + config.margin)


class SpeakerLoss(NamedTuple):
    """A loss of scaled cosines, and where its learnt bias starts.

    compute: (logits [R, N] = scale * cosines, float32; labels [R]; margin; scale; bias or None; config) -> losses [R].
    start_bias: config -> where each prefix's own learnt bias starts; None for a loss without one.
    """

    compute: Callable[..., torch.Tensor]
    start_bias: Callable[[PretrainedConfig], float] | None = None


# By config.loss; the configuration knows the names.
LOSSES = {
    "aam": SpeakerLoss(aam_loss),
    "sphereface2": SpeakerLoss(sphereface2_loss, sphereface2_start_bias),
}
