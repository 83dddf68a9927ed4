"""ReDimNet and ReDimNet2 speaker encoders (arXiv 2407.18223, 2603.11841) with a Matryoshka head (arXiv 2205.13147).

    waveform [B, T] -> MelFrontEnd [B, frames, bins] -> ReDimNetTrunk [B, frames, channels]
                    -> statistics pooling [B, P] -> MatryoshkaProjection [B, D]

One memory layout serves the whole trunk: [batch, frames, bins, channels], contiguous. The 1-D view [batch, frames,
bins * channels] of a feature map is then the same memory as its 2-D view, a frequency stride is a reshape before a
linear layer, and every norm and 1x1 layer works on the last axis. 3x3 convolutions see it as channels-last images
with frames as height; convolutions over time alone as channels-last images of height one with frames as width.
ReDimNet2's deeper feature maps have fewer frames, and stay so: what mixes maps repeats their frames in passing.

An utterance answers the same alone and padded in a batch: whatever looks across frames is told where each one ends.

This file travels beside the weights to the Hub: torch and transformers are all it needs.
"""

import contextlib
import contextvars
import copy
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput, can_return_tuple, has_file

# As a Hub file this module finds its configuration beside itself; installed, under its own name. The relative import
# comes first, so that Hub code never mixes with an installed version; the checks keep real import errors visible.
try:
    if not __package__:
        raise ImportError("not part of a package")
    from .configuration_mrl_redimnet import (
        ATTENTION_HEADS,
        FFT_SIZE,
        SAMPLING_RATE,
        WINDOW_LENGTH,
        MRLReDimNetConfig,
        MRLReDimNetError,
        conv_groups,
    )
except ImportError:
    if __package__:
        raise
    from configuration_mrl_redimnet import (
        ATTENTION_HEADS,
        FFT_SIZE,
        SAMPLING_RATE,
        WINDOW_LENGTH,
        MRLReDimNetConfig,
        MRLReDimNetError,
        conv_groups,
    )

MEL_LOW_HZ, MEL_HIGH_HZ = 20.0, 7600.0
PREEMPHASIS = 0.97
LOG_FLOOR = 1e-6
NORM_EPS = 1e-6  # of every layer norm, and of the batch norm after an expanded stage
HEAD_SIZES = 8  # fused attention kernels of accelerators take heads of multiples of so many channels


@dataclass
class SpeakerEmbeddingOutput(ModelOutput):
    """`embeddings` [B, D] (or the prefix that was asked for), not normalised: compare by cosine."""

    embeddings: torch.FloatTensor | None = None


@dataclass
class MatryoshkaXVectorOutput(ModelOutput):
    """`loss` [] when labels were given, `logits` [B, speakers] (scaled cosines, no margin), `embeddings` [B, D],
    `prefix_losses` [len(matryoshka_dims)] when labels were given, NaN for a prefix of weight 0."""

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    embeddings: torch.FloatTensor | None = None
    prefix_losses: torch.FloatTensor | None = None


@dataclass
class SpeakerClassifierOutput(ModelOutput):
    """`loss` [] when labels were given, `logits` [B, num_labels], `embeddings` [B, D]."""

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    embeddings: torch.FloatTensor | None = None


# ----------------------------------------------------------------------------------------------------------------------
# Masks: `mask` is [B, frames, 1], true where a frame belongs to the utterance, or None when every frame does.


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


def whole_frames(features: torch.Tensor, mask: torch.Tensor | None, stride: int):
    """features [B, frames, bins] and mask cut to what frames of `stride` features fill: the batch's number of frames,
    and each utterance's own."""
    if stride == 1:
        return features, mask
    if mask is not None:  # so many frames are whole where the last of them is valid
        mask = mask[:, stride - 1 :: stride].repeat_interleave(stride, dim=1)
    # A slice would depend on the number of frames for its layout in memory, which exported graphs could not.
    kept = torch.arange(features.shape[1] // stride * stride, device=features.device)
    return features.index_select(1, kept), mask


# ----------------------------------------------------------------------------------------------------------------------
# Front end


def _mel_filters(config) -> torch.Tensor:
    """Triangular HTK-mel filters without area norm, [FFT_SIZE // 2 + 1, bins] float32."""

    def to_mel(hz):
        return 2595.0 * torch.log10(1.0 + hz / 700.0)

    edges_mel = torch.linspace(
        *to_mel(torch.tensor([MEL_LOW_HZ, MEL_HIGH_HZ], dtype=torch.float64)).tolist(),
        config.num_mel_bins + 2,
        dtype=torch.float64,
    )
    if config.front_end == "tf_mel":
        # Slopes on the mel axis, 256 bin centres spread over 0 .. 8000 Hz, bin 0 empty, no Nyquist bin.
        centres = to_mel(torch.linspace(0, SAMPLING_RATE / 2, FFT_SIZE // 2, dtype=torch.float64))
        edges = edges_mel
    else:
        centres = torch.linspace(0, SAMPLING_RATE / 2, FFT_SIZE // 2 + 1, dtype=torch.float64)
        edges = 700.0 * (10.0 ** (edges_mel / 2595.0) - 1.0)
    rising = (centres[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - centres[:, None]) / (edges[2:] - edges[1:-1])
    filters = torch.minimum(rising, falling).clamp(min=0.0)
    if config.front_end == "tf_mel":
        filters[0] = 0.0
        filters = F.pad(filters, (0, 0, 0, 1))  # the dropped Nyquist bin
    return filters.float()


def _analysis_window(config) -> torch.Tensor:
    """Hamming window of 400 samples in an FFT frame of 512, [512] float32: periodic and centred for "mel",
    symmetric and at the frame's start for "tf_mel"."""
    tf_style = config.front_end == "tf_mel"
    window = torch.hamming_window(WINDOW_LENGTH, periodic=not tf_style, dtype=torch.float64)
    left = 0 if tf_style else (FFT_SIZE - WINDOW_LENGTH) // 2
    return F.pad(window, (left, FFT_SIZE - WINDOW_LENGTH - left)).float()


class MelFrontEnd(nn.Module):
    """Waveform [B, T] at 16 kHz to log-mel features [B, frames, bins], in float32 whatever the model's dtype."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        # Constants. Built on the CPU even where the model is built on the meta device; `_init_weights` refills them
        # after loading, because from_pretrained leaves buffers that are not in the file uninitialised.
        for name, value in self.constants().items():
            self.register_buffer(name, value, persistent=False)
        self.norm = ChannelBatchNorm(config.num_mel_bins) if config.feature_norm == "batch" else None

    def constants(self) -> dict[str, torch.Tensor]:
        """The window [512] and the mel filters [257, bins], computed anew."""
        with torch.device("cpu"):
            return {"window": _analysis_window(self.config), "mel_filters": _mel_filters(self.config)}

    def num_frames(self, num_samples):
        """Frames of a waveform of `num_samples` (an int or an integer tensor)."""
        hop = self.config.hop_length
        if self.config.front_end == "tf_mel":
            return (num_samples + 2 * (hop // 2) - WINDOW_LENGTH) // hop + 1
        return 1 + num_samples // hop

    def forward(self, waveform: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """waveform [B, T], lengths [B] in samples or None -> features [B, frames, bins] float32."""
        with torch.no_grad(), torch.autocast(waveform.device.type, enabled=False):
            x = self._pad(self._condition(waveform.float(), lengths), lengths)
            features = self._log_mel(self.power_spectrum(x))
            mask = frame_mask(lengths, features.shape[1], self)
            if self.config.feature_norm in ("mean", "mean_variance"):
                mean = masked_mean(features, mask)
                if self.config.feature_norm == "mean_variance":
                    deviation = masked_variance(features, mean, mask).sqrt() + 1e-8
                    features = (features - mean) / deviation
                else:
                    features = features - mean
        if self.norm is not None:
            features = self.norm(features.to(self.norm.weight.dtype), mask).float()
        if self.training and self.config.spec_augment:
            for _ in range(self.config.spec_augment_repeats):
                features = self._spec_augment(features)
        return features

    def _condition(self, x: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        """Optional signal normalisation and pre-emphasis of x [B, T]."""
        if self.config.normalize_signal:
            mask = None if lengths is None else sample_mask(lengths, x.shape[1])[..., None]
            mean = masked_mean(x[..., None], mask)
            variance = masked_mean((x[..., None] - mean).square(), mask)
            eps = self.config.front_end_eps if self.config.front_end == "tf_mel" else 1e-6
            x = (x - mean[..., 0]) / (variance[..., 0].sqrt() + eps)
        if self.config.preemphasis:
            x = x - PREEMPHASIS * torch.cat([x[:, 1:2], x[:, :-1]], dim=1)  # x[-1] reflects to x[1]
        return x

    def _pad(self, x: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        """Room for the first and last frames: reflection at each utterance's own ends ("mel") or zeros ("tf_mel")."""
        if self.config.front_end == "tf_mel":
            half_hop = self.config.hop_length // 2
            if lengths is not None:
                x = x.masked_fill(~sample_mask(lengths, x.shape[1]), 0.0)
            return F.pad(x, (half_hop, half_hop + FFT_SIZE - WINDOW_LENGTH))
        half = FFT_SIZE // 2
        if lengths is None:
            return F.pad(x[:, None], (half, half), mode="reflect")[:, 0]
        # Position n + k behind an utterance of n samples holds sample n - 2 - k:  a b c d | c b a
        position = torch.arange(x.shape[1] + half, device=x.device)
        end = lengths[:, None]
        source = torch.where(position < end, position, 2 * (end - 1) - position).clamp(min=0)
        return torch.cat([x[:, 1 : half + 1].flip(1), x.gather(1, source)], dim=1)

    def power_spectrum(self, x: torch.Tensor) -> torch.Tensor:
        """Conditioned and padded signal [B, T] float32 -> power spectrum [B, frames, 257]."""
        spectrum = torch.stft(
            x, FFT_SIZE, self.config.hop_length, window=self.window.float(), center=False, return_complex=True
        )
        return torch.view_as_real(spectrum).square().sum(-1).transpose(1, 2)

    def _log_mel(self, power: torch.Tensor) -> torch.Tensor:
        """Power spectrum [B, frames, 257] -> log-mel [B, frames, bins]."""
        filters = self.mel_filters.float()
        if self.config.front_end == "tf_mel":
            eps = self.config.front_end_eps
            return ((power.clamp(eps, 1 / eps) @ filters).clamp(eps, 1 / eps) + eps).log()
        return (power @ filters + LOG_FLOOR).log()

    def _spec_augment(self, x: torch.Tensor) -> torch.Tensor:
        """One masked stretch of frames and one of bins per utterance (arXiv 1904.08779), x [B, frames, bins]."""
        for dim, widths, first in (
            (1, self.config.time_mask_width, 0),
            (2, self.config.freq_mask_width, self.config.freq_mask_start),
        ):
            size = x.shape[dim]
            width = torch.randint(widths[0], widths[1], (x.shape[0], 1), device=x.device)
            start = first + (torch.rand(width.shape, device=x.device) * (size - first - width).clamp(min=1)).long()
            position = torch.arange(size, device=x.device)
            hidden = (position >= start) & (position < start + width)  # [B, size]
            x = x.masked_fill(hidden[:, :, None] if dim == 1 else hidden[:, None, :], 0.0)
        return x


def sample_mask(lengths: torch.Tensor, num_samples: int) -> torch.Tensor:
    """[B] lengths -> [B, num_samples], true inside each utterance."""
    return torch.arange(num_samples, device=lengths.device) < lengths[:, None]


def frame_mask(lengths: torch.Tensor | None, num_frames: int, front_end: MelFrontEnd) -> torch.Tensor | None:
    """[B] lengths in samples -> [B, frames, 1], true inside each utterance; None stays None."""
    if lengths is None:
        return None
    return sample_mask(front_end.num_frames(lengths), num_frames)[..., None]


# ----------------------------------------------------------------------------------------------------------------------
# Trunk


class BatchNorm(nn.BatchNorm1d):
    """Batch norm of [B, C] that can be frozen: without weights to train it uses and keeps its running statistics.

    Freezing weights alone would let the statistics of a frozen network move with the data, and an adapter trained on
    it would not be the same when loaded again.

    `synchronised` (see `synchronise_batch_norms`): where it learns in several processes of torch.distributed, the batch
    is that of all of them. torch.nn.SyncBatchNorm does the same, but on GPUs alone.
    """

    synchronised = False

    @property
    def learns(self) -> bool:
        """Whether this forward normalises by the batch, and moves the running statistics towards it."""
        return self.training and self.weight.requires_grad

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.normaliser(x)(x)

    def normaliser(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
        """What normalises x [..., C]. Where it learns: by x's own statistics, which move the running ones once; to call
        it again computes the same anew.

        mask: as for x [B, frames, ..., C]; where the norm learns, padded frames count for nothing and come out as
        zeros. Raises ValueError for a single value per channel (on accelerators the mask is not looked at for that).
        """
        if not self.learns:
            scale, shift = (part.to(self.weight.dtype) for part in self.scale_and_shift())
            return lambda x: torch.addcmul(shift, x, scale).to(x.dtype)
        joint = self.synchronised and _processes() > 1
        if not joint:
            self._check_count(x)
        if _cpu_kernels(x):
            return self._normaliser_on_cpu(x, mask, joint)
        if mask is None and not joint:
            return self._fused_normaliser()
        return self._composed_normaliser(x, mask, joint)

    def scale_and_shift(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What it does while it does not learn: x * scale [C] + shift [C], both in float32 at least, because float16
        could not hold what lies between."""
        wide = torch.promote_types(self.running_var.dtype, torch.float32)
        scale = self.weight.to(wide) * (self.running_var.to(wide) + self.eps).rsqrt()
        return scale, self.bias.to(wide) - self.running_mean.to(wide) * scale

    def _fused_normaliser(self):
        """By torch's own batch norm: one operation forward, one backward."""
        moving = [(self.running_mean, self.running_var, self._share_of_batch())]

        def normalise(x):
            mean, variance, share = moving.pop() if moving else (None, None, 0.0)
            rows = x.reshape(-1, self.num_features)
            return F.batch_norm(rows, mean, variance, self.weight, self.bias, True, share, self.eps).reshape(x.shape)

        return normalise

    def _composed_normaliser(self, x, mask, joint: bool):
        """By operators that autograd differentiates: with padding to leave out, or a batch in several processes."""
        mean, variance, count = _statistics(zero_padding(x, mask), mask)  # zeros first: padding may be NaN
        if joint:
            rows = mean.new_zeros(_processes(), 2 * self.num_features + 1)
            rows[dist.get_rank()] = torch.cat([mean, variance, count])
            mean, variance, count = _pooled(*_SumOverProcesses.apply(rows).split([len(mean), len(mean), 1], dim=1))
        with torch.no_grad():
            self._move_statistics(mean, variance, count)
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return lambda x: zero_padding(torch.addcmul(shift, zero_padding(x, mask), scale).to(x.dtype), mask)

    def _normaliser_on_cpu(self, x, mask, joint: bool):
        """By kernels that are faster and lose fewer digits there."""

        def valid(x):
            return x if mask is None else x[mask[..., 0]][:, None]

        with torch.no_grad():
            rows = valid(x)
            if not joint:
                self._check_count(rows)
            mean, variance, count = _statistics_on_cpu(rows, self.num_features, joint)
            self._move_statistics(mean, variance, count)
            slope = (variance + self.eps).rsqrt()

        def normalise(x):
            y = _NormaliseByBatch.apply(valid(x), self.weight, self.bias, mean, slope, count, joint)
            if mask is None:
                return y
            return torch.zeros_like(x).masked_scatter(mask.view(*mask.shape[:2], *[1] * (x.dim() - 2)), y)

        return normalise

    def _check_count(self, x: torch.Tensor):
        if x.numel() < 2 * self.num_features:
            raise ValueError(f"A batch norm learns from at least 2 values per channel, got {tuple(x.shape)}.")

    def _share_of_batch(self) -> float:
        """By how much the running statistics move towards this batch's, which is counted; as torch's own."""
        if not torch.compiler.is_compiling() and not _tracking.get():
            return 0.0  # not by other arguments to torch: checkpointing counts the tensors that each layer saves
        if self.num_batches_tracked is None:
            return self.momentum
        self.num_batches_tracked.add_(1)
        return 1.0 / self.num_batches_tracked.item() if self.momentum is None else self.momentum

    def _move_statistics(self, mean: torch.Tensor, variance: torch.Tensor, count: torch.Tensor):
        """As torch's own: by the unbiased variance; a plain mean over all batches without momentum."""
        share = self._share_of_batch()
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_((variance * (count / (count - 1).clamp(min=1))).to(self.running_var.dtype), share)


def _cpu_kernels(x: torch.Tensor) -> bool:
    """Whether x takes the paths that were written for CPUs, with gradients by hand. All else (accelerators, compiled
    graphs) has torch's public operators and autograd."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _statistics(x: torch.Tensor, mask: torch.Tensor | None):
    """Over all valid places of x [B, ..., C], zero elsewhere: mean [C], biased variance [C], count [1], in float32 at
    least."""
    wide, dims = torch.promote_types(x.dtype, torch.float32), tuple(range(x.dim() - 1))
    places = math.prod(x.shape[:-1])
    if mask is None:
        count = x.new_full((1,), places, dtype=wide)
    else:
        count = mask.sum(dtype=wide).view(1) * (places // max(1, mask.numel()))
    divisor = count.clamp(min=1)  # this process's share of a joint batch may be empty
    mean = x.sum(dims, dtype=wide) / divisor
    centre = functools.partial(_centred, x, mean)
    return mean, zero_padding(lean(torch.square, centre(), centre), mask).sum(dims) / divisor, count


def _centred(x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    return x.to(mean.dtype) - mean


class _SumOverProcesses(torch.autograd.Function):
    """The sum of all processes' x, of which the gradient is the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


def _columns(x: torch.Tensor, channels: int) -> torch.Tensor:
    """x [rows, ..., C] as a table of many columns [rows, ... * C], float32 or wider: torch's kernels add up each column
    row by row, which over the rows of [rows * ..., C] costs digits, and time where C is no multiple of 16."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x.flatten(0, 1).flatten(1) if x.dim() == 4 else x.reshape(-1, channels)


def _statistics_on_cpu(x: torch.Tensor, channels: int, joint: bool):
    """Over all but the last axis of x: mean [C], biased variance [C], count []; `joint`: of all processes."""
    table = _columns(x, channels)
    if len(table) == 0:  # this process's share of a joint batch
        means = variances = table.new_zeros(channels)
    else:
        means, variances = torch.batch_norm_update_stats(table, None, None, 0.0)
    counts = means.new_full((means.numel() // channels, 1), len(table))
    means, variances = means.view(-1, channels), variances.view(-1, channels)
    if joint:
        # Each process's mean and squares around it rather than sums of squares, whose differences lose digits.
        mean, variance, count = _pooled(means, variances, counts)
        rows = means.new_zeros(_processes(), 2 * channels + 1)
        rows[dist.get_rank()] = torch.cat([mean, variance, count])
        dist.all_reduce(rows)  # a collective that every backend has on every device
        means, variances, counts = rows.split([channels, channels, 1], dim=1)
    mean, variance, count = _pooled(means, variances, counts)
    return mean, variance, count[0]


def _pooled(means: torch.Tensor, variances: torch.Tensor, counts: torch.Tensor):
    """Mean [C], biased variance [C] and count [1] of parts' [parts, C], [parts, C], [parts, 1] together."""
    count = counts.sum(0)
    mean = (means * counts).sum(0) / count.clamp(min=1)
    return mean, ((variances + (means - mean).square()) * counts).sum(0) / count.clamp(min=1), count


class _NormaliseByBatch(torch.autograd.Function):
    """On CPUs, (x - mean) * slope * weight + bias for the mean and slope of x itself, or of all processes' x where
    `joint`.

    The backward pass is that of the sum of all processes' losses, so that gradients averaged over processes (as by
    DistributedDataParallel) are those of one process with the joined batch and the mean of the losses.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, mean, slope, count, joint):
        ctx.save_for_backward(x, weight, mean, slope, count)
        ctx.joint = joint
        scale = slope * weight
        return torch.addcmul(bias - mean * scale, x, scale).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        x, weight, mean, slope, count = ctx.saved_tensors
        channels = len(weight)
        table, rows = _columns(x, channels), _columns(grad, channels)
        repeats = table.shape[1] // channels
        # Only on CPUs does this give the last two without a weight; CUDA's gives empty ones.
        _, own_weight, own_bias = torch.ops.aten.native_batch_norm_backward(
            rows, table, None, None, None, mean.repeat(repeats), slope.repeat(repeats), True, 0.0, [False, True, True]
        )
        own = torch.stack([own_bias, own_weight]).view(2, -1, channels).sum(1)
        sums = own.clone()
        if ctx.joint:
            dist.all_reduce(sums)
        # scale * (grad - (sums[0] + normal * sums[1]) / count), normal = (x - mean) * slope, in two passes
        scale = slope * weight
        along_x = -scale * slope * sums[1] / count
        grad_x = torch.addcmul(-scale * sums[0] / count - along_x * mean, x, along_x).addcmul_(grad, scale)
        return grad_x.to(x.dtype), own[1].to(weight.dtype), own[0].to(weight.dtype), None, None, None, None


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def synchronise_batch_norms(model: nn.Module, on: bool = True):
    """Lets all batch norms of `model` that learn see the batch of all processes of torch.distributed, or no longer.

    All processes must then call the model equally often. With one process nothing changes.
    """
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.synchronised = on


class ChannelBatchNorm(BatchNorm):
    """`BatchNorm` over the last axis of [B, frames, C] or [B, frames, bins, C]; padded frames count for nothing."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.normaliser(x, mask)(x)


# ----------------------------------------------------------------------------------------------------------------------
# Memory of the backward pass


_recomputing = contextvars.ContextVar("recomputing", default=True)  # whether `lean` does
_tracking = contextvars.ContextVar("tracking", default=True)  # whether batch norms move their running statistics


@contextlib.contextmanager
def _keeping_all():
    """`lean` keeps everything: gradient checkpointing frees it, which it could not do with what a recipe holds."""
    token = _recomputing.set(False)
    try:
        yield
    finally:
        _recomputing.reset(token)


@contextlib.contextmanager
def _again():
    """The second forward pass of gradient checkpointing: batch norms compute as always, but keep their statistics."""
    token = _tracking.set(False)
    try:
        with _keeping_all():
            yield
    finally:
        _tracking.reset(token)


def _checkpointing_contexts():
    """Of the first and of the second forward pass, as torch's checkpointing asks for them."""
    return _keeping_all(), _again()


def lean(function: Callable, x: torch.Tensor, recipe: Callable[[], torch.Tensor]) -> torch.Tensor:
    """function(x), for whose backward pass `recipe` computes x anew instead of x being kept.

    For an x that is cheap to compute from what is kept anyway. The recipe must give x again, memory layout included.
    """
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and _recomputing.get()):
        return function(x)
    storage = x.untyped_storage().data_ptr()
    device = x.device.type
    autocast = dict(dtype=torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device))

    def pack(kept):
        if kept.untyped_storage().data_ptr() != storage:
            return kept
        return kept.size(), kept.stride(), kept.storage_offset()

    def unpack(kept):
        if isinstance(kept, torch.Tensor):
            return kept
        with torch.no_grad(), torch.autocast(device, **autocast):  # the backward pass may come when autocast is over
            return recipe().as_strided(*kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return function(x)


ONEDNN_FLOOR = 20480  # numbers in an input; torch keeps smaller convolutions from oneDNN (2.11, use_mkldnn)


class Pointwise(nn.Linear):
    """A linear layer over the last axis of x [B, frames, ..., C], which on CPUs runs as a 1x1 convolution.

    The arithmetic is the same, the library is not: torch gives float32 products to BLAS and convolutions to oneDNN,
    which was up to twice as fast where it was tried (AVX-512).
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return pointwise(x, self.weight, self.bias)


def pointwise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """What `Pointwise` does."""
    if not _cpu_kernels(x) or x.numel() <= ONEDNN_FLOOR:
        return F.linear(x, weight, bias)
    if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return _convolve_rows(x, weight, bias)
    return _PointwiseByConvolution.apply(x, weight, bias)


class _PointwiseByConvolution(torch.autograd.Function):
    """A linear layer of x [B, ..., C] by convolutions; backwards, too, where the gradient of x is one by the transpose,
    which oneDNN computes up to four times as fast as the backward pass of the convolution it is."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        y = _convolve_rows(x, weight, bias)
        # Not as a view of the image: what calls this (PEFT's AdaLoRA) may write into it, as it may with nn.Linear's.
        return y.new_empty(0).set_(y.untyped_storage(), 0, y.shape, y.stride())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        needs_x, *needs = ctx.needs_input_grad
        _, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            _as_image(grad), _as_image(x), weight[..., None, None], [len(weight)], [1, 1], [0, 0], NO_DILATION, False,
            [0, 0], 1, [False, *needs],
        )  # fmt: skip
        grad_weight = grad_weight if grad_weight is None else grad_weight[..., 0, 0]
        return _convolve_rows(grad, weight.T, None) if needs_x else None, grad_weight, grad_bias


# A 1x1 kernel cannot be dilated, but then torch (2.11, use_mkldnn) hands oneDNN small batches on one thread, too.
NO_DILATION = [2, 2]


def _convolve_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y = F.conv2d(_as_image(x), weight[..., None, None], bias, dilation=NO_DILATION)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def _as_image(x: torch.Tensor) -> torch.Tensor:
    """x [B, ..., C] as an image of height one, [B, C, 1, rows], channels last."""
    return x.reshape(len(x), 1, -1, x.shape[-1]).permute(0, 3, 1, 2)


def conv_image(conv: nn.Conv2d, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """3x3 convolution of x [B, frames, bins, C] over frames and bins, as a channels-last image."""
    return conv(zero_padding(x, mask).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def conv_time(conv: nn.Conv2d, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Depthwise convolution of x [B, frames, C] over frames, as a channels-last image of height one."""
    image = zero_padding(x, mask).transpose(1, 2)[:, :, None]
    # So few, channels last in bfloat16: on AVX-512 oneDNN (torch 2.11) never returns.
    if x.shape[-1] < 20 and x.device.type == "cpu":
        image = image.contiguous()
    return conv(image)[:, :, 0].transpose(1, 2)


def convolve_each_then_normalise(convolve: Callable, convs: list[nn.Module], norm: ChannelBatchNorm, x, mask):
    """`convolve_then_normalise` of several convolutions of x, their channels side by side."""
    if len(convs) == 1:
        return convolve_then_normalise(convolve, convs[0], norm, x, mask)
    y = torch.cat([convolve(conv, x, mask) for conv in convs], dim=-1)
    return y, norm.normaliser(y, mask)


def along_channels(layer: Callable, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """layer(x) of a layer that looks at no other frame."""
    return layer(x)


def convolve_then_normalise(convolve: Callable, conv: nn.Module, norm: ChannelBatchNorm, x, mask):
    """convolve(conv, x, mask) -> y, and what makes y the normalised one: `norm`'s normaliser of y; or nothing more,
    where `norm` does not learn and is folded into the kernel, which saves a pass over memory.

    Anything but a plain convolution or 1x1 layer (an adapter's) has more to it than a kernel, and is called as it is.
    """
    if norm.learns or not isinstance(conv, (nn.Conv2d, Pointwise)):
        y = convolve(conv, x, mask)
        return y, norm.normaliser(y, mask)
    scale, shift = norm.scale_and_shift()
    kernel = (conv.weight * scale.view(-1, *[1] * (conv.weight.dim() - 1))).to(conv.weight.dtype)
    bias = (shift if conv.bias is None else torch.addcmul(shift, conv.bias, scale)).to(conv.weight.dtype)

    def folded(x):
        if isinstance(conv, Pointwise):
            return pointwise(x, kernel, bias)
        return F.conv2d(x, kernel, bias, padding=conv.padding, groups=conv.groups)

    return convolve(folded, x, mask), lambda y: y


def activated_pointwise(pointwise: Callable, act: Callable, y: torch.Tensor, normalise: Callable) -> torch.Tensor:
    """pointwise(act(normalise(y))), of which the backward pass keeps y alone."""
    normal = normalise(y)
    activated = act(normal) if normal is y else lean(act, normal, lambda: normalise(y))
    return lean(pointwise, activated, lambda: act(normalise(y)))


def residual(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x + y for a y that nothing else needs: in its memory, unless a backward pass will come or the sum is of a wider
    type than y (autocast on CUDA gives norms in float32)."""
    return x + y if y.requires_grad or torch.promote_types(x.dtype, y.dtype) != y.dtype else y.add_(x)


class GroupedConv(nn.Conv2d):
    """A convolution in groups; with 1x1 kernels it runs as a full one with zeros, as grouped ones are slow in torch."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """image [B, channels, height, width], channels last in memory."""
        if self.kernel_size != (1, 1):
            return super().forward(image)
        blocks = self.weight.view(self.groups, -1, self.in_channels // self.groups)
        places = torch.eye(self.groups, dtype=blocks.dtype, device=blocks.device)
        full = torch.einsum("goi,gh->gohi", blocks, places).reshape(self.out_channels, self.in_channels)
        return pointwise(image.permute(0, 2, 3, 1), full, self.bias).permute(0, 3, 1, 2)


def rectified(y: torch.Tensor) -> torch.Tensor:
    """relu(y) for a y that nothing else needs: in its memory, unless a backward pass will come."""
    return F.relu(y) if y.requires_grad else y.relu_()


def image_conv(
    channels_in: int, channels_out: int, group_divisor: int | None, bias: bool = True, kernel: tuple[int, int] = (3, 3)
) -> nn.Conv2d:
    """A convolution of a kernel over (bins, frames) for `conv_image`, grouped over its output channels."""
    groups = conv_groups(channels_out, group_divisor)
    return nn.Conv2d(channels_in, channels_out, (kernel[1], kernel[0]), padding="same", groups=groups, bias=bias)


def depthwise_time_conv(channels: int, kernel: int) -> nn.Conv2d:
    """A depthwise convolution over frames for `conv_time`."""
    return nn.Conv2d(channels, channels, (1, kernel), padding="same", groups=channels)


class ConvNeXtBlock2d(nn.Module):
    """x + pointwise(act(norm(conv3x3(x)))), x [B, frames, bins, C] ("convnext_like", "convnext_like_relu").

    kernels over (bins, frames): others than 3x3, or convolutions of several of them side by side.
    """

    def __init__(self, config, channels: int, bins: int, kernels: list[tuple[int, int]] = ((3, 3),)):
        super().__init__()
        self.conv, *others = (image_conv(channels, channels, config.group_divisor, kernel=k) for k in kernels)
        self.other_convs = nn.ModuleList(others)
        self.norm = ChannelBatchNorm(channels * len(kernels))
        self.act = nn.ReLU() if config.block_2d == "convnext_like_relu" else nn.GELU()
        self.pointwise = Pointwise(channels * len(kernels), channels)

    def forward(self, x, mask):
        convs = [self.conv, *self.other_convs]
        y, normalise = convolve_each_then_normalise(conv_image, convs, self.norm, x, mask)
        return residual(x, activated_pointwise(self.pointwise, self.act, y, normalise))


class BinSqueezeExcitation(nn.Module):
    """Scales each frequency bin of x [B, frames, bins, C] by a gate seen from all bins' means ("_fwse")."""

    def __init__(self, bins: int, hidden: int):
        super().__init__()
        self.squeeze = Pointwise(bins, hidden)
        self.excite = Pointwise(hidden, bins)

    def forward(self, x, mask):
        mean = masked_mean(x.mean(-1), mask)  # [B, 1, bins]
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(mean))))
        return x * gate[..., None]


class ResNetBlock2d(nn.Module):
    """Residual block of two 3x3 convolutions, x [B, frames, bins, C] ("basic_resnet", "basic_resnet_fwse").

    The published networks put ReLU before the first norm. Ungrouped blocks have no pointwise layers.
    """

    def __init__(self, config, channels: int, bins: int):
        super().__init__()
        grouped = config.group_divisor is not None
        self.conv1 = image_conv(channels, channels, config.group_divisor, bias=False)
        self.pointwise1 = Pointwise(channels, channels) if grouped else nn.Identity()
        self.norm1 = ChannelBatchNorm(channels)
        self.conv2 = image_conv(channels, channels, config.group_divisor, bias=False)
        self.pointwise2 = Pointwise(channels, channels) if grouped else nn.Identity()
        self.norm2 = ChannelBatchNorm(channels)
        squeeze = config.block_2d == "basic_resnet_fwse"
        self.bin_gate = BinSqueezeExcitation(bins, min(64, max(channels, 32))) if squeeze else None

    def forward(self, x, mask):
        y = conv_image(self.conv1, x, mask)
        y = rectified(lean(self.pointwise1, y, lambda: conv_image(self.conv1, x, mask)))
        normalise = self.norm1.normaliser(y, mask)
        recipe = functools.partial(normalise, y)
        y = lean(lambda normal: conv_image(self.conv2, normal, mask), recipe(), recipe)
        y, normalise = convolve_then_normalise(along_channels, self.pointwise2, self.norm2, y, mask)
        y = normalise(y)
        if self.bin_gate is not None:
            y = self.bin_gate(y, mask)
        return rectified(residual(x, y))


BLOCKS_2D = {
    "convnext_like": ConvNeXtBlock2d,
    "convnext_like_relu": ConvNeXtBlock2d,
    "basic_resnet": ResNetBlock2d,
    "basic_resnet_fwse": ResNetBlock2d,
}


class Squeeze2d(nn.Module):
    """Back from an expanded stage's channels to the width of the 1-D view, x [B, frames, bins, C] ("redimnet")."""

    def __init__(self, config, channels_in: int, channels_out: int):
        super().__init__()
        self.conv = image_conv(channels_in, channels_out, config.group_divisor)
        self.norm = ChannelBatchNorm(channels_out, eps=NORM_EPS)
        self.pointwise = Pointwise(channels_out, channels_out)

    def forward(self, x, mask):
        y, normalise = convolve_then_normalise(conv_image, self.conv, self.norm, x, mask)
        return activated_pointwise(self.pointwise, F.gelu, y, normalise)


class LinearSqueeze2d(nn.Module):
    """The same without context or curve ("redimnet2")."""

    def __init__(self, config, channels_in: int, channels_out: int):
        super().__init__()
        self.pointwise = Pointwise(channels_in, channels_out)
        self.norm = ChannelBatchNorm(channels_out, eps=NORM_EPS)

    def forward(self, x, mask):
        y, normalise = convolve_then_normalise(along_channels, self.pointwise, self.norm, x, mask)
        return normalise(y)


SQUEEZES = {"redimnet": Squeeze2d, "redimnet2": LinearSqueeze2d}


class ConvNeXtBlock1d(nn.Module):
    """x + pointwise(gelu(norm(depthwise convolutions of x, side by side))), x [B, frames, C]."""

    def __init__(self, channels: int, kernels: tuple[int, ...]):
        super().__init__()
        self.convs = nn.ModuleList(depthwise_time_conv(channels, kernel) for kernel in kernels)
        self.norm = ChannelBatchNorm(channels * len(kernels))
        self.pointwise = Pointwise(channels * len(kernels), channels)

    def forward(self, x, mask):
        y, normalise = convolve_each_then_normalise(conv_time, self.convs, self.norm, x, mask)
        return residual(x, activated_pointwise(self.pointwise, F.gelu, y, normalise))


class ConvPosition(nn.Module):
    """x + norm(depthwise convolution over 59 frames), x [B, frames, C]: what attention has for positions."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = depthwise_time_conv(channels, 59)
        self.norm = nn.LayerNorm(channels, eps=NORM_EPS)

    def forward(self, x, mask):
        return residual(x, self.norm(conv_time(self.conv, x, mask)))


def attention(q, k, v, keys: torch.Tensor | None, multiple: int | None = None) -> torch.Tensor:
    """Softmax attention of q, k, v [B, heads, frames, size]; keys [B, 1, 1, frames] true where a key counts, or None.

    Heads are widened by zeros to a multiple of so many channels, which changes no product. By default they are on
    accelerators: fused kernels refuse other sizes there (ours go from 5 to 27), and without them a layer holds a number
    for every pair of frames.
    """
    size = q.shape[-1]
    missing = -size % ((1 if q.device.type == "cpu" else HEAD_SIZES) if multiple is None else multiple)
    if not missing:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keys)
    q, k, v = (F.pad(part, (0, missing)) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keys, scale=size**-0.5)[..., :size]


class TransformerLayer(nn.Module):
    """Post-norm transformer layer of 4 heads, x [B, frames, C]; padded frames are no keys."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.q_proj = Pointwise(channels, channels)
        self.k_proj = Pointwise(channels, channels)
        self.v_proj = Pointwise(channels, channels)
        self.out_proj = Pointwise(channels, channels)
        self.attention_norm = nn.LayerNorm(channels, eps=NORM_EPS)
        self.ffn_in = Pointwise(channels, hidden)
        self.ffn_out = Pointwise(hidden, channels)
        self.ffn_norm = nn.LayerNorm(channels, eps=NORM_EPS)

    def forward(self, x, mask):
        # [B, frames, C] -> [B, heads, frames, C / heads]
        q, k, v = (
            proj(x).unflatten(-1, (ATTENTION_HEADS, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        keys = None if mask is None else mask[:, None, None, :, 0]
        attended = attention(q, k, v, keys).transpose(1, 2).flatten(2)
        x = self.attention_norm(residual(x, self.out_proj(attended)))
        return self.ffn_norm(residual(x, self.ffn_out(F.gelu(self.ffn_in(x), approximate="tanh"))))


class FeedForward1d(nn.Module):
    """Frame by frame: linear to twice the width, norm, GELU, linear back, x [B, frames, C] ("fc")."""

    def __init__(self, channels: int):
        super().__init__()
        self.widen = Pointwise(channels, 2 * channels)
        self.norm = nn.LayerNorm(2 * channels, eps=NORM_EPS)
        self.narrow = Pointwise(2 * channels, channels)

    def forward(self, x, mask):
        return self.narrow(F.gelu(self.norm(self.widen(x))))


# What a 1-D block does at its reduced width h.
BLOCKS_1D = {
    "fc": lambda h: [FeedForward1d(h)],
    "conv": lambda h: [ConvNeXtBlock1d(h, (7, 15, 31)) for _ in range(4)],
    "att": lambda h: [ConvPosition(h), TransformerLayer(h, 2 * h)],
    "conv+att": lambda h: [*(ConvNeXtBlock1d(h, (kernel,)) for kernel in (7, 19, 31, 59)), TransformerLayer(h, h)],
}


class TimeContext(nn.Module):
    """The 1-D block: reduce the width, look along time, expand, add; x [B, frames, width]."""

    def __init__(self, config, reduction: int):
        super().__init__()
        hidden = config.trunk_width // reduction
        self.reduce = Pointwise(config.trunk_width, hidden)
        self.norm = nn.LayerNorm(hidden, eps=NORM_EPS)
        self.layers = nn.ModuleList(BLOCKS_1D[config.block_1d](hidden))
        self.expand = Pointwise(hidden, config.trunk_width)

    def forward(self, x, mask):
        y = self.norm(self.reduce(x))
        for layer in self.layers:
            y = layer(y, mask)
        return residual(x, self.expand(y))


class FeatureMap(NamedTuple):
    """One of the trunk's maps: values * scale + shift, each of its frames as often as its stride says.

    values [B, frames / stride, width]; scale, shift [B, 1, width] of its norm, None of a map without one.
    """

    values: torch.Tensor
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None

    def whole(self) -> torch.Tensor:
        """The normalised values."""
        if self.scale is None:
            return self.values
        return torch.addcmul(self.shift, self.values, self.scale).to(self.values.dtype)


class MapNorm(nn.GroupNorm):
    """Group norm of a feature map, over frames and within groups of neighbouring channels.

    Repeated frames have the statistics of single ones, and what mixes maps multiplies them by weights anyway: the norm
    is one reading pass over the shortest form of a map.
    """

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> FeatureMap:
        """x [B, frames, width] -> the map that it is, normalised."""
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = masked_mean(values, mask)
        centre = functools.partial(torch.sub, values, mean)
        variance = masked_mean(lean(torch.square, centre(), centre), mask)
        mean, variance = (part.unflatten(-1, (self.num_groups, -1)) for part in (mean, variance))
        middle = mean.mean(-1, keepdim=True)
        slope = ((variance + (mean - middle).square()).mean(-1, keepdim=True) + self.eps).rsqrt()
        scale = self.weight * slope.expand_as(mean).flatten(2)
        return FeatureMap(x, scale, self.bias - middle.expand_as(mean).flatten(2) * scale)


class PlainMap(nn.Module):
    """In the place of `MapNorm` where maps have none."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> FeatureMap:
        return FeatureMap(x)


def map_norm(config) -> nn.Module:
    """What makes x [B, frames, width] a map: its own norm, if maps have norms."""
    groups = config.map_norm_groups
    return PlainMap() if groups is None else MapNorm(groups, config.trunk_width)


class MapMix(nn.Module):
    """Softmax-weighted sum of earlier feature maps, a weight per map and channel: [B, frames, width].

    strides: frames that a frame of each map stands for, each a multiple of the one before.
    """

    def __init__(self, strides: list[int], width: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(len(strides), width))
        # How many frames of each map one of the next covers.
        self.repeats = [later // earlier for earlier, later in itertools.pairwise(strides)] + [1]

    def forward(self, maps: list[FeatureMap]) -> torch.Tensor:
        weights = self.logits.softmax(0)
        shifts = [weight * part.shift for part, weight in zip(maps, weights, strict=True) if part.shift is not None]
        mixed, split = None, ()
        # From the fewest frames to the most, so that coarse sums are repeated, not coarse maps one by one.
        for part, weight, repeat in reversed(list(zip(maps, weights, self.repeats, strict=True))):
            split = (*split, repeat) if repeat > 1 else split
            x = part.values.unflatten(1, (-1, *split)) if split else part.values
            if part.scale is not None:
                weight = (weight * part.scale).unflatten(1, [1] * (1 + len(split)))
            weight = weight.to(x.dtype)
            if mixed is None:
                mixed = x * weight if not shifts else torch.addcmul(sum(shifts).to(x.dtype), x, weight)
            elif repeat > 1:
                mixed = torch.addcmul(mixed.unsqueeze(-2), x, weight)
            else:
                mixed.addcmul_(x, weight)  # in place: nothing needs the partial sums again
        return mixed.flatten(1, -2)


class Stage(GradientCheckpointingLayer):
    """Mixes all earlier maps, strides over frequency and time, 2-D blocks, then the 1-D block: the next map, or two.

    The answer is not added to the input: later mixing does that.
    """

    def __init__(self, config, index: int):
        super().__init__()
        stage = config.stages[index]
        self.channels_in, _, channels, self.bins = config.stage_shapes()[index]
        width = int(channels * stage["expansion"])
        self.time_stride = config.time_strides()[index]
        strides = config.map_strides(index)
        self.mix = MapMix(strides, config.trunk_width) if index > 0 else None  # one map needs no weights
        kernel = (self.time_stride, stage["frequency_stride"])
        groups = config.stride_groups(index)
        self.grouped = groups > 1
        if self.grouped:
            self.stride = GroupedConv(self.channels_in, width, kernel, stride=kernel, groups=groups)
        else:  # a convolution that strides by its kernel is a linear layer on neighbouring places side by side
            self.stride = Pointwise(math.prod(kernel) * self.channels_in, width)
        block = functools.partial(BLOCKS_2D[config.block_2d], config, width, self.bins)
        if "kernels" in stage:
            block = functools.partial(block, kernels=stage["kernels"])
        self.blocks = nn.ModuleList(block() for _ in range(stage["blocks"]))
        squeeze = SQUEEZES[config.network]
        self.squeeze = squeeze(config, width, channels) if stage["expansion"] != 1 else None
        self.context = TimeContext(config, stage["reduction"]) if stage["reduction"] is not None else None
        self.keeps_both = config.dual_maps and self.context is not None
        self.dropout = nn.Dropout(config.map_dropout)
        self.norms = nn.ModuleList(map_norm(config) for _ in range(1 + self.keeps_both))

    def forward(self, maps: list[FeatureMap], mask: torch.Tensor | None) -> list[FeatureMap]:
        """mask: of the stem's map, cut as by `whole_frames`."""
        mask = None if mask is None else mask[:, :: self.time_stride]
        x = self._strided(maps[0].whole() if self.mix is None else self.mix(maps))
        for block in self.blocks:
            x = block(x, mask)
        if self.squeeze is not None:
            x = self.squeeze(x, mask)
        x = x.flatten(2)
        made = [x] if self.context is None or self.keeps_both else []
        if self.context is not None:
            made.append(self.context(x, mask))
        return [norm(self.dropout(x), mask) for x, norm in zip(made, self.norms, strict=True)]

    def _strided(self, x: torch.Tensor) -> torch.Tensor:
        """[B, frames, width] -> [B, frames / time stride, bins, 2-D width]."""
        if self.grouped:
            return conv_image(self.stride, x.unflatten(-1, (-1, self.channels_in)), None)
        x = x.unflatten(-1, (self.bins, -1))
        if self.time_stride > 1:
            x = x.unflatten(1, (-1, self.time_stride)).transpose(2, 3).flatten(3)
        return self.stride(x)


class Stem(nn.Module):
    """Features [B, frames, bins] to map 0 [B, frames, width]."""

    def __init__(self, config):
        super().__init__()
        self.conv = nn.Conv2d(1, config.base_channels, 3, padding="same")
        self.norm = nn.LayerNorm(config.base_channels, eps=NORM_EPS)
        self.map_norm = map_norm(config)

    def forward(self, features, mask) -> FeatureMap:
        x = features.to(self.conv.weight.dtype)[..., None]
        return self.map_norm(self.norm(conv_image(self.conv, x, mask)).flatten(2), mask)


class ReDimNetTrunk(nn.Module):
    """Features [B, frames, bins] to frame-level speaker features [B, frames, channels].

    Takes as many frames as `whole_frames` leaves for config.time_strides().
    """

    def __init__(self, config):
        super().__init__()
        self.stem = Stem(config)
        self.stages = nn.ModuleList(Stage(config, i) for i in range(len(config.stages)))
        self.mix = MapMix(config.map_strides(), config.trunk_width)
        self.bins = config.stage_shapes()[-1][-1] if config.aggregation_per_bin else 1
        wide = config.aggregation_channels
        normed = wide is not None and config.network == "redimnet"
        self.aggregate = None if wide is None else Pointwise(config.trunk_width // self.bins, wide)
        self.aggregate_norm = ChannelBatchNorm(wide) if normed else None
        self.dropout = nn.Dropout(config.aggregation_dropout)

    def forward(self, features: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        maps = [self.stem(features, mask)]
        for stage in self.stages:
            maps = [*maps, *stage(maps, mask)]  # not longer in place: checkpointing may call the stage again
        x = self.mix(maps)
        if self.aggregate is not None:
            x = self.aggregate(x.unflatten(-1, (self.bins, -1))).flatten(2)
        if self.aggregate_norm is not None:
            x = self.aggregate_norm(x, mask)
        return self.dropout(x)


# ----------------------------------------------------------------------------------------------------------------------
# Pooling and projection


class StatisticsPooling(nn.Module):
    """Mean ("TAP"), deviation ("TSDP") or both ("TSTP") over time: [B, frames, C] -> [B, P] float32."""

    def __init__(self, config):
        super().__init__()
        self.kind = config.pooling

    def forward(self, x, mask):
        x = x.float()  # sums over thousands of frames
        mean = masked_mean(x, mask)
        if self.kind == "TAP":
            return mean[:, 0]
        deviation = (masked_variance(x, mean, mask) + 1e-7).sqrt()
        return (deviation if self.kind == "TSDP" else torch.cat([mean, deviation], dim=-1))[:, 0]


class AttentiveStatisticsPooling(nn.Module):
    """Attention-weighted mean and deviation per channel (arXiv 1803.10963): [B, frames, C] -> [B, 2 C] float32."""

    def __init__(self, config):
        super().__init__()
        channels = config.pooling_input
        self.attention_in = Pointwise(channels, config.pooling_bottleneck)
        # The utterance's mean and deviation are the same for all frames: their share is computed once, not per frame.
        self.context_in = (
            Pointwise(2 * channels, config.pooling_bottleneck, bias=False) if config.pooling_context else None
        )
        self.attention_out = Pointwise(config.pooling_bottleneck, channels)

    def forward(self, x, mask):
        hidden = self.attention_in(x)
        stats_x = x.float()  # sums over thousands of frames, differences of squares
        if self.context_in is not None:
            mean = masked_mean(stats_x, mask)
            deviation = (masked_variance(stats_x, mean, mask) + 1e-7).sqrt()
            hidden = hidden + self.context_in(torch.cat([mean, deviation], dim=-1).to(x.dtype))
        logits = self.attention_out(torch.tanh(hidden)).float()
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf)
        attention = logits.softmax(1)
        weighted = attention * stats_x
        mean = weighted.sum(1)
        variance = (weighted * stats_x).sum(1) - mean.square()
        return torch.cat([mean, variance.clamp(min=1e-7).sqrt()], dim=-1)


class MatryoshkaProjection(nn.Module):
    """Pooled vector [B, P] -> embedding [B, D], one linear layer per Matryoshka segment.

    dims (2, 4): segments give [a b] and [c d]; the prefixes are [a b] and [a b c d]. A short prefix computes only its
    own segments, and an adapter can give each segment its own rank.
    """

    def __init__(self, config):
        super().__init__()
        self.dims = config.matryoshka_dims
        starts = [0, *self.dims[:-1]]
        self.norm = BatchNorm(config.pooled_size)
        self.dropout = nn.Dropout(config.projection_dropout)
        self.segments = nn.ModuleList(
            nn.Linear(config.pooled_size, end - start) for start, end in zip(starts, self.dims, strict=True)
        )
        self.embedding_norm = BatchNorm(config.embedding_size) if config.embedding_norm else None

    def forward(self, pooled: torch.Tensor, truncate_dim: int | None = None) -> torch.Tensor:
        pooled = self.dropout(self.norm(pooled.to(self.norm.weight.dtype)))
        # A batch norm behind the projection knows only the whole embedding; then the prefix is cut at the end.
        wanted = self.dims[-1] if truncate_dim is None or self.embedding_norm is not None else truncate_dim
        used = [segment for segment, start in zip(self.segments, [0, *self.dims], strict=False) if start < wanted]
        embedding = torch.cat([segment(pooled) for segment in used], dim=-1)
        if self.embedding_norm is not None:
            embedding = self.embedding_norm(embedding)
        return embedding if truncate_dim is None else embedding[:, :truncate_dim]


# ----------------------------------------------------------------------------------------------------------------------
# Speaker losses


NORM_FLOOR = 1e-12  # of a squared norm
CACHED_NUMBERS = 2**20  # of float32, a block of a matrix; half or twice as many take about as long


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


def _with_slope(curve: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """curve(*inputs), and the gradient of its sum by each input; nothing of it in any graph around."""
    with torch.enable_grad():
        inputs = [value.detach().requires_grad_() for value in inputs]
        output = curve(*inputs)
        return output.detach(), *torch.autograd.grad(output.sum(), inputs)


def harder_negatives(logits, labels, count: int, margin: float, scale: float) -> torch.Tensor:
    """Inter-top-k (Zhao et al. 2022, arXiv 2110.05042): logits with `angular_gain` on the `count` largest of each row's
    wrong speakers (all of them, where there are fewer)."""
    nearest = _nearest_wrong(logits.detach(), labels, count)
    if nearest is None or margin == 0:
        return logits
    moved = scale * angular_gain(logits.gather(2, nearest) / scale, margin)
    return logits.scatter(2, nearest, moved)


def harder_negatives_with_slopes(loss: Callable, logits, labels, count: int, margin: float, scale: float):
    """What loss(logits) gives, of the logits as `harder_negatives` changes them; the slopes are by those given."""
    nearest = _nearest_wrong(logits, labels, count)
    if nearest is None or margin == 0:
        return loss(logits)
    moved, rise = _with_slope(lambda x: scale * angular_gain(x / scale, margin), logits.gather(2, nearest))
    losses, slopes, bias_slopes = loss(logits.scatter(2, nearest, moved))
    return losses, slopes.scatter_(2, nearest, slopes.gather(2, nearest) * rise), bias_slopes


def _nearest_wrong(logits, labels, count: int) -> torch.Tensor | None:
    """Which wrong speakers have each row's `count` largest logits, [R, K, count]; None for no speaker."""
    count = min(count, logits.shape[2] - 1)
    return None if count == 0 else logits.scatter(2, _own(labels, logits), -torch.inf).topk(count, dim=2).indices


def _own(labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """labels [R] as indices [R, K, 1] into logits [R, K, N]."""
    return labels[:, None, None].expand(-1, logits.shape[1], -1)


def aam_loss(logits, labels, margin: float, scale: float, bias: None, config) -> torch.Tensor:
    """Additive angular margin softmax (Deng et al. 2019, arXiv 1801.07698), with label smoothing."""
    own = _own(labels, logits)
    target = scale * angular_margin(logits.gather(2, own) / scale, margin)
    logits = logits.scatter(2, own, target).flatten(0, 1)
    losses = F.cross_entropy(logits, own.flatten(), reduction="none", label_smoothing=config.label_smoothing)
    return losses.view(own.shape[:2])


def aam_slopes(logits, labels, margin: float, scale: float, bias: None, config):
    """`aam_loss` with its slopes, by one exponential per logit; none is kept."""
    own, smoothing = _own(labels, logits), config.label_smoothing
    plain = logits.gather(2, own)
    target, rise = _with_slope(lambda x: scale * angular_margin(x / scale, margin), plain)
    logits.scatter_(2, own, target)  # for a while: a copy would cost as much as the exponentials
    slopes = logits.softmax(2)
    # The largest probability is exp(largest logit - log sum); unlike the target's it never vanishes.
    log_sum = logits.amax(2) - slopes.amax(2).log_()
    losses = log_sum - (1.0 - smoothing) * target[:, :, 0]
    if smoothing:
        losses -= smoothing * logits.mean(2)
        slopes -= smoothing / logits.shape[2]
    logits.scatter_(2, own, plain)
    return losses, slopes.scatter_(2, own, (slopes.gather(2, own) - (1.0 - smoothing)) * rise), None


def sphereface2_similarity(cosine: torch.Tensor, exponent: float) -> torch.Tensor:
    """g(z) = 2 ((z + 1) / 2)^t - 1, from -1 to 1 (Wen et al. 2022, arXiv 2108.01513)."""
    return 2.0 * ((cosine + 1.0) / 2.0).clamp(min=0.0).pow(exponent) - 1.0


def sphereface2_loss(logits, labels, margin: float, scale: float, bias: torch.Tensor, config) -> torch.Tensor:
    """SphereFace2-C: is it this speaker, yes or no, asked of every speaker; summed over these.

    lambda log(1 + exp(-s (g(cos_y) - m) - b)) + (1 - lambda) sum_{i != y} log(1 + exp(s (g(cos_i) + m) + b)): the
    paper's without its 1 / s, as for speakers in Han et al. 2023 (Exploring binary classification loss for speaker
    verification). bias: b of each prefix [K].
    """
    own = _own(labels, logits)
    similarity = sphereface2_similarity(logits / scale, config.sphereface2_exponent)
    positive = F.softplus(-(scale * (similarity.gather(2, own) - margin) + bias[:, None]))[:, :, 0]
    negative = F.softplus(scale * (similarity + margin) + bias[:, None]).scatter(2, own, 0.0).sum(2)
    return config.sphereface2_balance * positive + (1.0 - config.sphereface2_balance) * negative


def sphereface2_start_bias(config) -> float:
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


@dataclass(frozen=True)
class SpeakerLoss:
    """compute: (logits [R, K, N] of K prefixes: scale * cosines, float32; labels [R]; margin; scale; bias [K] or None;
    config) -> losses [R, K], for autograd.

    start_bias: config -> where each prefix's own learnt bias starts, None for a loss without one.

    fast_slopes: of the same as `compute`, for training on a CPU, what `with_slopes` gives; None: as autograd finds it.
    It leaves the logits as they were.
    """

    compute: Callable[..., torch.Tensor]
    start_bias: Callable[[MRLReDimNetConfig], float] | None = None
    fast_slopes: Callable[..., tuple] | None = None

    def with_slopes(self, logits, labels, margin: float, scale: float, bias: torch.Tensor | None, config):
        """Losses [R, K]; their slopes by the logits [R, K, N], a new tensor; the sums of their slopes by each bias [K],
        or None."""
        if self.fast_slopes is not None:
            return self.fast_slopes(logits, labels, margin, scale, bias, config)
        if bias is None:
            return *_with_slope(lambda x: self.compute(x, labels, margin, scale, None, config), logits), None
        return _with_slope(lambda x, bias: self.compute(x, labels, margin, scale, bias, config), logits, bias)


# By config.loss; the configuration knows the names.
LOSSES = {
    "aam": SpeakerLoss(aam_loss, fast_slopes=aam_slopes),
    "sphereface2": SpeakerLoss(sphereface2_loss, sphereface2_start_bias),
}


class PrefixLosses(torch.autograd.Function):
    """A loss of every prefix's scaled cosines, averaged over the batch, with all its gradients; for CPUs.

    For prefix k of embedding e and row w, x_k = a_k <e[:d_k], w[:d_k]> with a_k = s / |e[:d_k]| |w[:d_k]|. Let g_k be
    the loss's slope by x_k. Then segment j of the gradients (numbers d_(j-1) to d_j) is

        d e_j = sum over w of h_j w_j  -  e_j sum over w, k >= j of g_k x_k / |e[:d_k]|^2
        h_j = sum over k >= j of a_k g_k

    and d w_j alike, so all prefixes together cost the three matrix products of one full-width loss. Between the passes
    one tensor [B, K, rows] is kept: x in the forward pass, then, in its place, a g but for the rows' norms. Whatever
    else is of that kind exists for a block at a time that a processor's cache holds.
    """

    @staticmethod
    def forward(ctx, embeddings, weight, bias, loss: Callable, dims, shares, scale: float, centers: int):
        """embeddings [B, D], weight [rows, D], both float32, bias [K] or None; dims [K]; shares [K] of the prefixes;

        loss: (logits [R, K, N], which rows of the batch as a slice, bias) -> what `SpeakerLoss.with_slopes` gives.
        Gives loss [], prefix losses [K], and the longest prefix's logits [B, N]; only the first has gradients.
        """
        x, e_norms, w_norms = scaled_cosines(embeddings, weight, dims, scale)
        batch, count, rows = x.shape
        logits = x.new_empty(batch, rows // centers)
        losses, e_pull = x.new_empty(batch, count), x.new_empty(batch, count)
        w_pull, bias_slopes = x.new_zeros(count, rows), x.new_zeros(count)
        for block in _blocks(batch, count * rows):
            part = x[block]
            nearest, center = (part, None) if centers == 1 else part.unflatten(2, (-1, centers)).max(3)
            logits[block] = nearest[:, -1]
            losses[block], slopes, bias_slope = loss(nearest, block, bias)
            if centers > 1:
                spread = slopes.new_zeros(*slopes.shape, centers)
                slopes = spread.scatter_(3, center[..., None], slopes[..., None]).flatten(2)
            if bias is not None:
                bias_slopes += bias_slope
            part.mul_(slopes)
            e_pull[block] = part.sum(2)
            w_pull += part.sum(0)
            torch.mul(slopes, e_norms[block, :, None], out=part)
        shares = x.new_tensor(shares) / batch
        e_pull = _sums_from_here(e_pull * shares * (e_norms / scale).square(), 1)
        w_pull = _sums_from_here(w_pull * shares[:, None] * w_norms.square(), 0)
        ctx.dims = dims
        ctx.set_materialize_grads(False)  # the logits' would be as large as they are
        ctx.save_for_backward(embeddings, weight, x, w_norms * shares[:, None], e_pull, w_pull, bias_slopes * shares)
        prefix_losses = losses.mean(0)
        ctx.mark_non_differentiable(prefix_losses, logits)
        return (losses @ shares).sum(), prefix_losses, logits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient, *_):
        embeddings, weight, slopes, w_norms, e_pull, w_pull, bias_slopes = ctx.saved_tensors
        needs_e, needs_w, needs_bias = ctx.needs_input_grad[:3]
        d_e, d_w = torch.zeros_like(embeddings), torch.empty_like(weight) if needs_w else None
        if needs_w:
            d_w[:, ctx.dims[-1] :] = 0.0
        scaled, w_pull = embeddings * gradient, w_pull * -gradient
        for block in _blocks(*weight.shape):
            h = weight.new_zeros(len(embeddings), len(weight[block]))
            for k, part in reversed(_segments(ctx.dims)):
                h.addcmul_(slopes[:, k, block], w_norms[k, block])
                if needs_w:
                    start = torch.mul(weight[block, part], w_pull[k, block, None], out=d_w[block, part])
                    start.addmm_(h.T, scaled[:, part])
                if needs_e:
                    d_e[:, part].addmm_(h, weight[block, part])
        for k, part in _segments(ctx.dims):
            d_e[:, part].addcmul_(embeddings[:, part], e_pull[:, k, None], value=-1.0)
        return d_e * gradient if needs_e else None, d_w, bias_slopes * gradient if needs_bias else None, *[None] * 5


def scaled_cosines(embeddings: torch.Tensor, weight: torch.Tensor, dims: list[int], scale: float):
    """embeddings [B, D], weight [rows, D] -> scale * cosines of every prefix [B, K, rows], and what makes these of dot
    products: scale / the embeddings' norms [B, K], 1 / the rows' norms [K, rows].

    A prefix's dot products and squared norms are those of the one before plus one segment's.
    """
    e_norms = torch.stack([_squares(embeddings[:, part]) for _, part in _segments(dims)], 1)
    e_norms = e_norms.cumsum(1).add_(NORM_FLOOR).rsqrt_().mul_(scale)
    x, w_norms = weight.new_empty(*e_norms.shape, len(weight)), weight.new_empty(len(dims), len(weight))
    for block in _blocks(*weight.shape):
        dots, squares = weight.new_zeros(len(embeddings), len(weight[block])), 0.0
        for k, part in _segments(dims):
            dots.addmm_(embeddings[:, part], weight[block, part].T)
            squares = squares + _squares(weight[block, part])
            torch.rsqrt(squares + NORM_FLOOR, out=w_norms[k, block])
            torch.mul(dots, e_norms[:, k, None], out=x[:, k, block]).mul_(w_norms[k, block])
    return x, e_norms, w_norms


def _segments(dims: list[int]) -> list[tuple[int, slice]]:
    """Which numbers of an embedding each prefix adds to the one before."""
    return list(enumerate(map(slice, [0, *dims[:-1]], dims)))


def _unit(side: torch.Tensor) -> torch.Tensor:
    """Rows of length one, or of zeros."""
    return side * (side.square().sum(1, keepdim=True) + NORM_FLOOR).rsqrt()


def _squares(side: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(side, dim=1).square()  # no tensor of the side's size in between


def _sums_from_here(terms: torch.Tensor, dim: int) -> torch.Tensor:
    return terms.flip(dim).cumsum(dim).flip(dim)


def _blocks(count: int, width: int) -> list[slice]:
    """`count` rows of `width` numbers in slices that fit a CPU's cache."""
    size = max(1, CACHED_NUMBERS // width)
    return [slice(start, start + size) for start in range(0, count, size)]


class MatryoshkaMarginClassifier(nn.Module):
    """One of `LOSSES` over every Matryoshka prefix, one weight matrix for all.

    Embedding e and row w are cut to each prefix and normalised there: cos_d = <e[:d], w[:d]> / |e[:d]| |w[:d]|. A
    speaker with several rows (sub-centers, side by side in `weight` [speakers * sub_centers, D]) has the largest of
    their cosines, at each prefix anew. Computed in float32 whatever the dtype around it.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.dims = config.matryoshka_dims
        self.scale, self.margin = config.scale, config.margin
        self.prefix_weights = self._shares(config.prefix_weights or [1.0] * len(self.dims))
        self.weight = nn.Parameter(torch.empty(config.num_speakers * config.sub_centers, config.embedding_size))
        nn.init.normal_(self.weight, std=config.embedding_size**-0.5)
        start = self.start_bias()
        self.bias = None if start is None else nn.Parameter(torch.full((len(self.dims),), start))

    @property
    def num_speakers(self) -> int:
        """Speakers that labels may name; fewer than the configuration's while a sample of the rows is in use."""
        return self.weight.shape[0] // self.config.sub_centers

    def start_bias(self) -> float | None:
        """Where `bias` [len(dims)] starts; None when the loss has none."""
        start = LOSSES[self.config.loss].start_bias
        return None if start is None else start(self.config)

    def forward(
        self,
        embeddings: torch.Tensor,
        labels: torch.Tensor,
        margin: float | None = None,
        prefix_weights: list[float] | None = None,
    ):
        """embeddings [B, D], labels [B] -> loss [], prefix losses [len(dims)], full-width logits [B, speakers].

        margin: replaces the configured one (a schedule's value at this step), in its unit; the one of hard negatives
        rises in proportion. prefix_weights: replace the configured ones; only ratios matter. A prefix of weight 0 is
        left out, its prefix loss is NaN.

        Raises ValueError for weights that do not fit.
        """
        margin = self.margin if margin is None else margin
        shares = self.prefix_weights if prefix_weights is None else self._shares(prefix_weights)
        used = [k for k, share in enumerate(shares) if share > 0]
        # One by one: a list as an index would travel to the device and wait for it.
        bias = None if self.bias is None else torch.stack([self.bias[k] for k in used]).float()
        slopes_wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (embeddings, *self.parameters()))
        compute = self._with_all_slopes if slopes_wanted and _cpu_kernels(embeddings) else self._by_autograd
        with torch.autocast(embeddings.device.type, enabled=False):
            loss, losses, logits = compute(
                embeddings.float(), labels, margin, bias, [self.dims[k] for k in used], [shares[k] for k in used]
            )
        if shares[-1] == 0:
            logits = self.logits(embeddings).detach()
        if len(used) < len(shares):
            left_out = losses.new_full((), torch.nan)
            losses = torch.stack([losses[used.index(k)] if k in used else left_out for k in range(len(shares))])
        return loss, losses, logits

    def _by_autograd(self, embeddings, labels, margin: float, bias, dims: list[int], shares: list[float]):
        """Of prefixes `dims`: loss [], prefix losses [K], the longest one's logits [B, speakers]."""
        config, sides = self.config, (embeddings, self.weight.float())
        cosines = [torch.matmul(e, w.T) for e, w in zip(*([_unit(x[:, :d]) for d in dims] for x in sides), strict=True)]
        logits = self.scale * torch.stack(cosines, 1)
        if config.sub_centers > 1:
            logits = logits.unflatten(2, (-1, config.sub_centers)).max(3).values
        longest = logits[:, -1].detach()
        logits = harder_negatives(logits, labels, config.hard_negatives, self._gain(margin), self.scale)
        losses = LOSSES[config.loss].compute(logits, labels, margin, self.scale, bias, config).mean(0)
        return sum(loss * share for loss, share in zip(losses, shares, strict=True)), losses.detach(), longest

    def _with_all_slopes(self, embeddings, labels, margin: float, bias, dims: list[int], shares: list[float]):
        """The same by `PrefixLosses`."""

        def loss(logits, block: slice, bias):
            config, own = self.config, labels[block]

            def of_harder(logits):
                return LOSSES[config.loss].with_slopes(logits, own, margin, self.scale, bias, config)

            gain = self._gain(margin)
            return harder_negatives_with_slopes(of_harder, logits, own, config.hard_negatives, gain, self.scale)

        return PrefixLosses.apply(
            embeddings, self.weight.float(), bias, loss, dims, shares, self.scale, self.config.sub_centers
        )

    def _gain(self, margin: float) -> float:
        """The margin of hard negatives at a step's margin."""
        return self.config.hard_negative_margin * (margin / self.margin if self.margin else 1.0)

    def _shares(self, weights: list[float]) -> list[float]:
        if len(weights) != len(self.dims) or not min(weights) >= 0 or not sum(weights) > 0:
            raise ValueError(f"prefix_weights: got {weights}, expected {len(self.dims)} numbers >= 0, not all 0.")
        return [weight / sum(weights) for weight in weights]

    def logits(self, embeddings: torch.Tensor) -> torch.Tensor:
        """embeddings [B, D] -> scaled cosines at full width [B, speakers], without margin."""
        with torch.autocast(embeddings.device.type, enabled=False):
            e, w = embeddings.float(), self.weight.float()
            e_norms, w_norms = ((_squares(side) + NORM_FLOOR).rsqrt() for side in (e, w))
            logits = e @ w.T * (self.scale * e_norms[:, None]) * w_norms
        centers = self.config.sub_centers
        return logits if centers == 1 else logits.unflatten(1, (-1, centers)).max(-1).values

    def extra_repr(self) -> str:
        return (
            f"speakers={self.num_speakers}, dims={self.dims}, loss={self.config.loss}, margin={self.margin}, "
            f"scale={self.scale}"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Models


class WeightsError(MRLReDimNetError, ValueError, RuntimeError):
    """Weights that are not those of the model they are loaded into, or saved from; the message names the tensors.

    A RuntimeError, too, because that is what transformers raises for a wrong shape.
    """


def refuse_wrapped(model: PreTrainedModel, names: Iterable[str] | None = None):
    """Raises WeightsError where the tensors' names are not those of a plain model: no class could load such a file.

    names: of the tensors to be saved, by default the model's own. Adapters (PEFT) and torch.compile wrap layers, and
    DistributedDataParallel the whole model.
    """
    names, plain = set(model.state_dict() if names is None else names), _plain_names(model)
    if names != plain:
        problems, cause = _name_problems(plain - names, names - plain)
        raise WeightsError(
            f"This {type(model).__name__} cannot be saved, because nothing could load it again: {problems}. {cause}"
        )


def _plain_names(model: PreTrainedModel) -> set[str]:
    """The names of the tensors of a model of this configuration, with nothing around its layers."""
    with torch.device("meta"):
        return set(type(model)(copy.deepcopy(model.config)).state_dict())


def _name_problems(missing: set[str], unknown: set[str]) -> tuple[str, str]:
    """What is wrong with the names of some tensors, and a sentence on where that comes from and what to do."""
    problems = []
    if missing:
        problems.append(f"{_counted(missing)} missing ({_some(missing)})")
    if unknown:
        problems.append(f"{_counted(unknown)} unknown to it ({_some(unknown)})")
    parts = {part for name in unknown for part in name.split(".")}
    wrapper = next((part for part in WRAPPERS if part in parts), None)
    if ADAPTER_NAMES & parts:
        cause = (
            "Layers of adapters (PEFT) are in it. Save the plain model before adapters are put on it, or a copy with "
            "the adapter folded in (AdapterBank.merged, PEFT's merge_and_unload); adapters are saved by themselves "
            "(AdapterBank.save, PEFT's save_pretrained)."
        )
    elif wrapper is not None:
        cause = (
            f"{WRAPPERS[wrapper]} puts {wrapper + '.'!r} into names: save the model that it wraps. A file is repaired "
            f"by from_pretrained(..., key_mapping={{'{wrapper}[.]': ''}}), then save_pretrained(...)."
        )
    elif prefix := _common_prefix(missing, unknown):
        cause = f"All names begin with {prefix!r}: take that away."
    else:
        cause = "The weights are not whole, or were renamed, or are another network's: save them, or get them, again."
    return " and ".join(problems), cause


def _common_prefix(missing: set[str], unknown: set[str]) -> str:
    """What stands before every missing name in an unknown one, "" where that is not one and the same."""
    if not missing:
        return ""
    some = min(missing)
    found = {name.removesuffix(some) for name in unknown if name.endswith(f".{some}")}
    return next((prefix for prefix in sorted(found) if {prefix + name for name in missing} <= unknown), "")


def _misshapen(info: dict) -> dict[str, tuple]:
    """Of transformers' loading info, {name: (shape in the file, shape in the model)}."""
    return {name: (tuple(found), tuple(wanted)) for name, found, wanted in info["mismatched_keys"]}


def _counted(names: Collection[str]) -> str:
    return "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"


def _some(names: Iterable[str]) -> str:
    first, *more = sorted(names)
    return ", ".join([first, *more[:2]]) + (", ..." if len(more) > 2 else "")


# The parts that PEFT, and what wraps a model or a part of it, put into the names of tensors.
ADAPTER_NAMES = frozenset({"base_model", "base_layer", "modules_to_save", "original_module", "lora_A", "lora_B"})
WRAPPERS = {
    "module": "DistributedDataParallel",
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FullyShardedDataParallel",
}


class MRLReDimNetPreTrainedModel(PreTrainedModel):
    """Weights, initialisation and loading shared by the models below."""

    config_class = MRLReDimNetConfig
    base_model_prefix = "redimnet"
    main_input_name = "input_values"
    input_modalities = ("audio",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module):
        """PyTorch's own initialisation (as the published networks were trained from), and the front end's constants."""
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = module.weight[0].numel() ** -0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d)):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            if isinstance(module, nn.BatchNorm1d):
                init.zeros_(module.running_mean)
                init.ones_(module.running_var)
                init.zeros_(module.num_batches_tracked)
        elif isinstance(module, MapMix):
            init.zeros_(module.logits)
        elif isinstance(module, MatryoshkaMarginClassifier):
            init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
            if module.bias is not None:
                init.constant_(module.bias, module.start_bias())
        elif isinstance(module, MelFrontEnd):
            for name, value in module.constants().items():
                init.copy_(getattr(module, name), value)

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=checkpoint, **kwargs):
        """As in transformers; the second forward pass leaves the batch norms' running statistics alone.

        Overridden here because all of transformers' public ways to switch it on and off end here.
        """
        options = dict(getattr(gradient_checkpointing_func, "keywords", {}))
        if enable and options.get("use_reentrant"):
            warnings.warn(
                "use_reentrant=True: reentrant checkpointing would leave most weights without a gradient and count the "
                "batch norms' statistics twice, so this model is checkpointed with use_reentrant=False. Gradients are "
                "the same as without checkpointing.",
                stacklevel=2,
            )
        options["use_reentrant"] = False
        options.setdefault("context_fn", _checkpointing_contexts)
        super()._set_gradient_checkpointing(enable, functools.partial(gradient_checkpointing_func, **options), **kwargs)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """As in transformers, which from 5.24 on warns whoever reads it: PEFT does, for every model."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """As in transformers, but every tensor must be what was saved: nothing is drawn at random without being asked.

        A new head is allowed on a model that was saved without one, and with ignore_mismatched_sizes=True in the place
        of any other; it replaces the head alone. Weights are read from safetensors unless use_safetensors=False.

        Raises WeightsError, which names the tensors, for weights that lack some, have others or other shapes, and for
        a damaged file; OSError as transformers does, and for weights that exist as pickle only.
        """
        source, with_info = pretrained_model_name_or_path, kwargs.pop("output_loading_info", False)
        new_head = kwargs.get("ignore_mismatched_sizes", False)
        options = {"use_safetensors": True, **kwargs, "ignore_mismatched_sizes": True, "output_loading_info": True}
        try:
            model, info = super().from_pretrained(source, *model_args, **options)
            base, of_base, adapter = source or "state_dict", info, hasattr(model, "peft_config")
            if adapter:  # then info tells of that alone
                base, plain = model.name_or_path, {"config": model.config, "adapter_kwargs": {}}
                _, of_base = super().from_pretrained(base, *model_args, **options | plain)
        except SafetensorError as error:
            raise WeightsError(
                f"{source}: the weights cannot be read ({error}): the file is damaged, not whole, or only a pointer of "
                "Git LFS. Get or save it again."
            ) from error
        except OSError as error:
            if options["use_safetensors"] and _has_pickle(source, kwargs):
                raise OSError(
                    f"{source} has its weights as pickle only (pytorch_model.bin), which may run code when it is read. "
                    "Ask its owner for safetensors, or, if you trust it, convert it: "
                    "from_pretrained(..., use_safetensors=False), then save_pretrained(...)."
                ) from error
            raise
        cls._check_loaded(base, model, of_base, new_head, "loss" in kwargs)
        if adapter and (lost := {*info["missing_keys"], *info["unexpected_keys"], *_misshapen(info)}):
            raise WeightsError(
                f"The adapter {'' if source == base else f'in {source} '}does not fit its base {base}: "
                f"{_counted(lost)} in one of the two alone, or of another shape ({_some(lost)})."
            )
        return (model, info) if with_info else model

    @classmethod
    def _check_loaded(cls, source, model: "MRLReDimNetPreTrainedModel", info: dict, new_head: bool, new_loss: bool):
        """Raises WeightsError unless all of the model came from the file; info: transformers' loading info."""
        shapes = _misshapen(info)
        missing, unknown = set(info["missing_keys"]) - shapes.keys(), set(info["unexpected_keys"])
        names = set() if model.base_model is model else _plain_names(model)
        head = {name for name in names if not name.startswith(f"{cls.base_model_prefix}.")}
        if new_head or (head <= missing and cls.__name__ not in (model.config.architectures or ())):
            missing, shapes = missing - head, {name: both for name, both in shapes.items() if name not in head}
            unknown = {name for name in unknown if not name.startswith("classifier.")}
        if new_loss:  # asked for: what it learns beside the rows starts at its own value, not at random
            missing -= {"classifier.bias"}
        if not (missing or unknown or shapes):
            return
        problems, cause = _name_problems(missing, unknown)
        if shapes:
            told = [f"{name} {found}, expected {wanted}" for name, (found, wanted) in shapes.items()]
            problems = " and ".join(filter(None, [problems, f"{_counted(shapes)} of another shape ({_some(told)})"]))
        if head and head >= missing | shapes.keys():
            cause = "It is the head alone: ignore_mismatched_sizes=True puts a new one in its place."
        raise WeightsError(f"{source} does not hold the weights of {cls.__name__}: {problems}. {cause}")

    def save_pretrained(self, save_directory, **kwargs):
        """As in transformers; the saved configuration names all the auto classes that can load it.

        Raises WeightsError, before anything is written, for a model whose layers are wrapped, as by PEFT. (Adapters of
        transformers' own add_adapter and load_adapter are saved as adapters, as transformers does.)
        """
        if kwargs.get("is_main_process", True) and not self._has_own_adapters():
            refuse_wrapped(self, kwargs.get("state_dict"))
        self.config.auto_map = {
            "AutoConfig": "configuration_mrl_redimnet.MRLReDimNetConfig",
            "AutoModel": "modeling_mrl_redimnet.MRLReDimNetModel",
            "AutoModelForAudioXVector": "modeling_mrl_redimnet.MRLReDimNetForXVector",
            "AutoModelForAudioClassification": "modeling_mrl_redimnet.MRLReDimNetForSequenceClassification",
        }
        super().save_pretrained(save_directory, **kwargs)

    def _has_own_adapters(self) -> bool:
        """Whether adapters were put on by transformers' own methods."""
        try:
            return bool(self.active_adapters())
        except ValueError:  # there are none
            return False

    @staticmethod
    def _refuse_extras(kwargs: dict):
        """Callers such as PEFT pass unused arguments as None or False; one with a value is refused, not ignored."""
        ignorable = ("return_dict", "output_attentions", "output_hidden_states")
        given = [n for n, value in kwargs.items() if not (value is None or value is False or n in ignorable)]
        if given:
            raise TypeError(
                f"forward() got arguments this model has no use for: {', '.join(given)}. truncate_dim "
                "belongs to MRLReDimNetModel (heads take the whole embedding), adapter_names to a PeftModel."
            )


def _has_pickle(source, options: dict) -> bool:
    """Whether a folder or Hub repository has weights in PyTorch's own format."""
    where = {name: options[name] for name in ("revision", "token", "cache_dir", "local_files_only") if name in options}
    try:
        return any(has_file(source, name, **where) for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"))
    except OSError:  # no such repository, or no connection: what was raised before says so
        return False


def _share_of_items(loss: torch.Tensor, labels: torch.Tensor, num_items: torch.Tensor | int | None) -> torch.Tensor:
    """A batch's mean loss as its share in the mean over `num_items` utterances of several batches (transformers'
    Trainer, accumulating gradients); as it is for None."""
    return loss if num_items is None else loss * (len(labels) / num_items)


class MRLReDimNetModel(MRLReDimNetPreTrainedModel):
    """Speaker embeddings from waveforms: front end, trunk, pooling, Matryoshka projection."""

    _keys_to_ignore_on_load_unexpected = [r"^classifier\."]  # of a model saved with its head

    def __init__(self, config):
        super().__init__(config)
        self.front_end = MelFrontEnd(config)
        self.trunk = ReDimNetTrunk(config)
        attentive = config.pooling == "ASTP"
        self.pooling = AttentiveStatisticsPooling(config) if attentive else StatisticsPooling(config)
        self.projection = MatryoshkaProjection(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        truncate_dim: int | None = None,
        **kwargs,
    ) -> SpeakerEmbeddingOutput:
        """input_values [B, T] mono at 16 kHz, attention_mask [B, T] 1 = audio, 0 = padding behind it.

        truncate_dim: one of config.matryoshka_dims; only that prefix is computed and returned.
        Utterances longer than config.window_seconds are cut into equal windows whose embeddings are averaged.

        Raises ValueError for a wrong shape, a prefix the model was not built for, too short an utterance, or padding
        in front of audio; TypeError for arguments it has no use for.
        """
        self._refuse_extras(kwargs)
        self._check_input(input_values, truncate_dim)
        lengths = self._lengths(input_values, attention_mask)
        window = int(self.config.window_seconds * SAMPLING_RATE)
        if input_values.shape[1] > window:
            embeddings = self._embed_windows(input_values, lengths, window, truncate_dim)
        else:
            embeddings = self._embed(input_values, lengths, truncate_dim)
        return SpeakerEmbeddingOutput(embeddings=embeddings)

    def pooled(self, input_values: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """input_values [B, T], lengths [B] in samples or None -> pooled statistics [B, P] float32."""
        features = self.front_end(input_values, lengths)
        mask = frame_mask(lengths, features.shape[1], self.front_end)
        features, mask = whole_frames(features, mask, self.config.time_strides()[-1])
        return self.pooling(self.trunk(features, mask), mask)

    def _embed(self, input_values, lengths, truncate_dim):
        return self.projection(self.pooled(input_values, lengths), truncate_dim)

    def _embed_windows(self, input_values, lengths, window, truncate_dim):
        """One window at a time, so that memory is bounded by a window whatever the utterance's length."""
        ends = [input_values.shape[1]] * len(input_values) if lengths is None else lengths.tolist()
        embeddings = []
        for row, end in zip(input_values, ends, strict=True):
            count = math.ceil(end / window)
            starts = [i * end // count for i in range(count + 1)]
            parts = [
                self._embed(row[None, start:stop], None, truncate_dim)
                for start, stop in zip(starts[:-1], starts[1:], strict=True)
            ]
            embeddings.append(torch.cat(parts).mean(0))
        return torch.stack(embeddings)

    def _check_input(self, input_values, truncate_dim):
        if input_values.dim() != 2 or not input_values.is_floating_point():
            raise ValueError(
                f"input_values: expected floating point [batch, samples], got {input_values.dtype} of shape "
                f"{tuple(input_values.shape)}. MRLReDimNetFeatureExtractor makes such a batch from arrays."
            )
        if input_values.shape[1] < self.config.min_samples:
            raise ValueError(
                f"input_values: {input_values.shape[1]} samples, the model needs at least {self.config.min_samples}."
            )
        if truncate_dim is not None and truncate_dim not in self.config.matryoshka_dims:
            raise ValueError(f"truncate_dim: got {truncate_dim}, the model has {self.config.matryoshka_dims}.")

    def _lengths(self, input_values, attention_mask) -> torch.Tensor | None:
        """Samples per utterance [B], or None when nothing is padded (the fast path)."""
        if attention_mask is None:
            return None
        if attention_mask.shape != input_values.shape:
            raise ValueError(
                f"attention_mask: shape {tuple(attention_mask.shape)} differs from input_values' "
                f"{tuple(input_values.shape)}."
            )
        lengths = attention_mask.to(torch.long).sum(1)
        if torch.compiler.is_compiling():
            return lengths  # looking at values would break the graph; the mask is then always used
        in_order = (attention_mask.bool() == sample_mask(lengths, input_values.shape[1])).all()
        *ends, in_order = torch.cat([lengths, in_order[None]]).tolist()  # the one time that a GPU is waited for
        if min(ends, default=input_values.shape[1]) == input_values.shape[1]:
            return None
        if not in_order:
            raise ValueError("attention_mask: padding must follow the audio (ones, then zeros, in every row).")
        if min(ends) < self.config.min_samples:
            raise ValueError(
                f"attention_mask: utterance {ends.index(min(ends))} has {min(ends)} samples, the model needs "
                f"{self.config.min_samples}."
            )
        return lengths


class MRLReDimNetForXVector(MRLReDimNetPreTrainedModel):
    """The speaker encoder with its margin classifier: what training from speaker labels needs."""

    def __init__(self, config):
        super().__init__(config)
        self.redimnet = MRLReDimNetModel(config)
        self.classifier = MatryoshkaMarginClassifier(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        margin: float | None = None,
        prefix_weights: list[float] | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> MatryoshkaXVectorOutput:
        """input_values [B, T], attention_mask [B, T], labels [B] speaker ids; margin, prefix_weights as in the
        classifier's forward.

        num_items_in_batch: the loss is then the sum over this batch divided by it, as transformers' Trainer asks for
        when it accumulates gradients over several batches.
        """
        self._refuse_extras(kwargs)
        embeddings = self.redimnet(input_values, attention_mask).embeddings
        if labels is None:
            return MatryoshkaXVectorOutput(logits=self.classifier.logits(embeddings), embeddings=embeddings)
        loss, prefix_losses, logits = self.classifier(embeddings, labels, margin, prefix_weights)
        loss = _share_of_items(loss, labels, num_items_in_batch)
        return MatryoshkaXVectorOutput(loss=loss, logits=logits, embeddings=embeddings, prefix_losses=prefix_losses)


class MRLReDimNetForSequenceClassification(MRLReDimNetPreTrainedModel):
    """A classifier (gender, language) or, with one label, a regressor (age) on the embedding."""

    def __init__(self, config):
        super().__init__(config)
        self.redimnet = MRLReDimNetModel(config)
        self.classifier = nn.Linear(config.embedding_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> SpeakerClassifierOutput:
        """input_values [B, T], attention_mask [B, T], labels [B]: class ids, or numbers when num_labels is 1;
        num_items_in_batch: as in MRLReDimNetForXVector."""
        self._refuse_extras(kwargs)
        embeddings = self.redimnet(input_values, attention_mask).embeddings
        logits = self.classifier(embeddings)
        loss = None
        if labels is not None and self.config.num_labels == 1:
            loss = F.mse_loss(logits[:, 0].float(), labels.float())
        elif labels is not None:
            loss = F.cross_entropy(logits.float(), labels)
        if loss is not None:
            loss = _share_of_items(loss, labels, num_items_in_batch)
        return SpeakerClassifierOutput(loss=loss, logits=logits, embeddings=embeddings)


MRLReDimNetModel.register_for_auto_class("AutoModel")
MRLReDimNetForXVector.register_for_auto_class("AutoModelForAudioXVector")
MRLReDimNetForSequenceClassification.register_for_auto_class("AutoModelForAudioClassification")

__all__ = [
    "MRLReDimNetForSequenceClassification",
    "MRLReDimNetForXVector",
    "MRLReDimNetModel",
    "MRLReDimNetPreTrainedModel",
]
