"""Padding: which frames of a batch belong to an utterance, and statistics and batch norms of these alone.

Everywhere `mask` is [B, frames, 1], true where a frame belongs to the utterance, or None when every frame of the batch
does. The front end, the trunk and the pooling look across frames by the functions below, so that an utterance has the
same embedding alone and padded in a batch.

This file travels beside the weights to the Hub, as `modeling_mrl_redimnet.py` does, which is the network itself.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def sample_mask(lengths: torch.Tensor, num_samples: int) -> torch.Tensor:
    """lengths [B] -> [B, num_samples], true inside each utterance: of samples, or of frames where lengths are."""
    return torch.arange(num_samples, device=lengths.device) < lengths[:, None]


def zero_padding(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Zeroes the frames after each utterance's end in x [B, frames, ...], as a convolution's own padding is zero."""
    if mask is None:
        return x
    return x.masked_fill(~mask.reshape(*mask.shape, *[1] * (x.dim() - 3)), 0.0)  # not a product: padding may be NaN


def masked_mean(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean over frames of x [B, frames, C] -> [B, 1, C]."""
    if mask is None:
        return x.mean(1, keepdim=True)
    return zero_padding(x, mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)


def masked_variance(x: torch.Tensor, mean: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Unbiased variance over frames of x [B, frames, C] around mean [B, 1, C] -> [B, 1, C]."""
    squares = zero_padding((x - mean).square(), mask).sum(1, keepdim=True)
    frames = x.shape[1] if mask is None else mask.sum(1, keepdim=True)
    return squares / (frames - 1)


def moments(
    x: torch.Tensor, mask: torch.Tensor | None, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and unbiased variance over frames of x [B, frames, C] -> twice [B, 1, C].

    weights: of frames, [B, frames, 1], in the place of the mask; only their ratios matter. NaN where all are 0.
    """
    if weights is None:
        mean = masked_mean(x, mask)
        return mean, masked_variance(x, mean, mask)
    shares = weights / weights.sum(1, keepdim=True)
    mean = (shares * x).sum(1, keepdim=True)
    # Where all shares are equal, 1 - 1 / frames: dividing by it makes the variance unbiased.
    freedom = (1 - shares.square().sum(1, keepdim=True)).clamp(min=1e-6)
    return mean, (shares * (x - mean).square()).sum(1, keepdim=True) / freedom


def stretched(weights: torch.Tensor, frames: int) -> torch.Tensor:
    """weights [B, S, n] of n equal parts of the audio -> [B, S, frames]: each frame has the weight of its part."""
    return weights[..., torch.arange(frames, device=weights.device) * weights.shape[-1] // frames]


def whole_frames(
    features: torch.Tensor, mask: torch.Tensor | None, stride: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """features [B, frames, bins] and mask cut to what frames of `stride` features fill: the batch's number of frames,
    and each utterance's own.
    """
    if stride == 1:
        return features, mask
    if mask is not None:  # `stride` frames are whole where the last of them is valid
        mask = mask[:, stride - 1 :: stride].repeat_interleave(stride, dim=1)
    # Not a slice: its layout in memory depends on the number of frames, and an exported graph is one for all numbers.
    kept = torch.arange(features.shape[1] // stride * stride, device=features.device)
    return features.index_select(1, kept), mask


class BatchNorm(nn.BatchNorm1d):
    """Batch norm over the last axis of x [B, C], [B, frames, C] or [B, frames, bins, C]; padded frames do not count.

    It learns only where its weights do: a frozen norm uses its running statistics and leaves them as they are. Freezing
    weights alone would let the statistics of a frozen network move with the data, and an adapter trained on it would
    not be the same when loaded again.
    """

    keeps_statistics = False  # true while gradient checkpointing repeats a forward pass, whose batch has been counted

    @property
    def learns(self) -> bool:
        """Whether this forward pass normalises by the batch, and moves the running statistics towards it."""
        return self.training and self.weight.requires_grad

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., C], normalised; with a mask and x [B, frames, ..., C], padded frames come out as zeros while it
        learns.

        Raises ValueError for a batch with a single value per channel.
        """
        if not self.learns:
            scale, shift = self.scale_and_shift()
            return torch.addcmul(shift.to(self.weight.dtype), x, scale.to(self.weight.dtype)).to(x.dtype)
        self.check_count(x)
        if mask is None:
            rows, momentum = x.reshape(-1, self.num_features), self.next_momentum()
            statistics = self.running_mean, self.running_var
            return F.batch_norm(rows, *statistics, self.weight, self.bias, True, momentum, self.eps).reshape(x.shape)
        mean, variance, count = self.batch_statistics(x, mask)
        self.move_statistics(mean, variance, count)
        scale = self.weight * (variance + self.eps).rsqrt()
        y = torch.addcmul(self.bias - mean * scale, zero_padding(x, mask), scale)
        return zero_padding(y.to(x.dtype), mask)

    def batch_statistics(self, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Over the valid places of x [B, frames, ..., C]: mean [C], biased variance [C], count [1], in float32 at
        least.
        """
        wide, dims = torch.promote_types(x.dtype, torch.float32), tuple(range(x.dim() - 1))
        x = zero_padding(x, mask)  # padding may be NaN
        count = mask.sum(dtype=wide).view(1) * math.prod(x.shape[2:-1])
        mean = x.sum(dims, dtype=wide) / count.clamp(min=1)
        squares = zero_padding((x.to(wide) - mean).square(), mask)
        return mean, squares.sum(dims) / count.clamp(min=1), count

    @torch.no_grad()
    def move_statistics(self, mean: torch.Tensor, variance: torch.Tensor, count: torch.Tensor) -> None:
        """Moves the running statistics towards a batch's, as torch's own norm: by the unbiased variance."""
        momentum = self.next_momentum()
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_((variance * (count / (count - 1).clamp(min=1))).to(self.running_var.dtype), momentum)

    def scale_and_shift(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm while it does not learn is x * scale + shift: both [C], in float32 at least, because numbers on the
        way to them may be larger than float16 holds.
        """
        wide = torch.promote_types(self.running_var.dtype, torch.float32)
        scale = self.weight.to(wide) * (self.running_var.to(wide) + self.eps).rsqrt()
        return scale, self.bias.to(wide) - self.running_mean.to(wide) * scale

    def check_count(self, x: torch.Tensor) -> None:
        """Raises ValueError where there is a single value per channel, which has no variance."""
        if x.numel() < 2 * self.num_features:
            raise ValueError(f"A batch norm learns from at least 2 values per channel, got {tuple(x.shape)}.")

    def next_momentum(self) -> float:
        """Counts a batch, and returns the part by which running statistics move towards it. Without a momentum
        (None) they are the mean over all batches.
        """
        if self.keeps_statistics:
            return 0.0
        if self.num_batches_tracked is None:
            return self.momentum
        self.num_batches_tracked.add_(1)
        return 1.0 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
