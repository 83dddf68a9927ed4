"""Batch norms: kernels for CPUs, output that can be computed again, statistics of all processes' batches together."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from masking_mrl_redimnet import BatchNorm, zero_padding
from mrl_redimnet.speed.linear import runs_on_cpu
from mrl_redimnet.speed.recompute import recomputed


class FastBatchNorm(BatchNorm):
    """`BatchNorm` whose normalisation can be computed again from its input.

    `synchronised` (see `synchronise_batch_norms`): where it learns in several processes of torch.distributed, the batch
    is that of all of them. torch.nn.SyncBatchNorm does the same, but on GPUs alone, and without masks.
    """

    synchronised = False

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """As `BatchNorm.forward`, over the batch of all processes where `synchronised`."""
        return self.normaliser(x, mask)(x)

    def normaliser(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
        """What normalises x [..., C].

        Where it learns: by x's own statistics, which move the running ones once; to call it again computes the same
        anew. mask, errors: as in `BatchNorm.forward`.
        """
        if not self.learns:
            scale, shift = (part.to(self.weight.dtype) for part in self.scale_and_shift())
            return lambda x: torch.addcmul(shift, x, scale).to(x.dtype)
        joint = self.synchronised and processes() > 1
        if not joint:
            self.check_count(x)
        if runs_on_cpu(x):
            return self._normaliser_on_cpu(x, mask, joint)
        if mask is None and not joint:
            return self._normaliser_by_torch()
        return self.normaliser_by_operators(x, mask, joint)

    def _normaliser_by_torch(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """By torch's own batch norm: one operation forward, one backward."""
        moving = [(self.running_mean, self.running_var, self.next_momentum())]

        def normalise(x: torch.Tensor) -> torch.Tensor:
            mean, variance, momentum = moving.pop() if moving else (None, None, 0.0)
            rows = x.reshape(-1, self.num_features)
            return F.batch_norm(rows, mean, variance, self.weight, self.bias, True, momentum, self.eps).reshape(x.shape)

        return normalise

    def normaliser_by_operators(
        self, x: torch.Tensor, mask: torch.Tensor | None, joint: bool
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """By operators that autograd differentiates: with padding to leave out, or a batch in several processes."""
        mean, variance, count = self.batch_statistics(x, mask)
        if joint:
            rows = mean.new_zeros(processes(), 2 * self.num_features + 1)
            rows[dist.get_rank()] = torch.cat([mean, variance, count])
            mean, variance, count = _pooled(*_SumOverProcesses.apply(rows).split([len(mean), len(mean), 1], dim=1))
        self.move_statistics(mean, variance, count)
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return lambda x: zero_padding(torch.addcmul(shift, zero_padding(x, mask), scale).to(x.dtype), mask)

    def batch_statistics(
        self, x: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Over all valid places of x [B, ..., C]: mean [C], biased variance [C], count [1], in float32 at least.

        The backward pass keeps x alone.
        """
        x = zero_padding(x, mask)
        wide, dims = torch.promote_types(x.dtype, torch.float32), tuple(range(x.dim() - 1))
        places = x.numel() // x.shape[-1]
        count = x.new_full((1,), places, dtype=wide)
        if mask is not None:
            count = mask.sum(dtype=wide).view(1) * (places // max(1, mask.numel()))
        divisor = count.clamp(min=1)  # this process's share of a joint batch may be empty
        mean = x.sum(dims, dtype=wide) / divisor
        centre = functools.partial(_centred, x, mean)
        squares = zero_padding(recomputed(torch.square, centre(), centre), mask)
        return mean, squares.sum(dims) / divisor, count

    def _normaliser_on_cpu(
        self, x: torch.Tensor, mask: torch.Tensor | None, joint: bool
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """By kernels that are faster there and lose fewer digits: torch's own add up hundreds of thousands of rows one
        by one, which costs four digits of the variance, and with them a training step of b0 takes a third longer.
        """

        def valid(x: torch.Tensor) -> torch.Tensor:
            return x if mask is None else x[mask[..., 0]][:, None]

        with torch.no_grad():
            rows = valid(x)
            if not joint:
                self.check_count(rows)
            mean, variance, count = _statistics_on_cpu(rows, self.num_features, joint)
            self.move_statistics(mean, variance, count)
            slope = (variance + self.eps).rsqrt()

        def normalise(x: torch.Tensor) -> torch.Tensor:
            y = _NormaliseByBatch.apply(valid(x), self.weight, self.bias, mean, slope, count, joint)
            if mask is None:
                return y
            return torch.zeros_like(x).masked_scatter(mask.view(*mask.shape[:2], *[1] * (x.dim() - 2)), y)

        return normalise


def _centred(x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    return x.to(mean.dtype) - mean


class _SumOverProcesses(torch.autograd.Function):
    """The sum of all processes' x, of which the gradient is the sum of all processes' gradients.

    Gradients averaged over processes (as by DistributedDataParallel) are then those of one process with the joined
    batch and the mean of the losses.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


def _columns(x: torch.Tensor, channels: int) -> torch.Tensor:
    """x [rows, ..., C] as a table of many columns [rows, ... * C], float32 or wider: torch's kernels add up each column
    row by row, which over the rows of [rows * ..., C] costs digits, and time where C is no multiple of 16.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x.flatten(0, 1).flatten(1) if x.dim() == 4 else x.reshape(-1, channels)


def _statistics_on_cpu(x: torch.Tensor, channels: int, joint: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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
        rows = means.new_zeros(processes(), 2 * channels + 1)
        rows[dist.get_rank()] = torch.cat([mean, variance, count])
        dist.all_reduce(rows)  # a collective that every backend has on every device
        means, variances, counts = rows.split([channels, channels, 1], dim=1)
    mean, variance, count = _pooled(means, variances, counts)
    return mean, variance, count[0]


def _pooled(
    means: torch.Tensor, variances: torch.Tensor, counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        mean: torch.Tensor,
        slope: torch.Tensor,
        count: torch.Tensor,
        joint: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, mean, slope, count)
        ctx.joint = joint
        scale = slope * weight
        return torch.addcmul(bias - mean * scale, x, scale).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
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


def processes() -> int:
    """Of torch.distributed; one where it is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def synchronise_batch_norms(model: nn.Module, on: bool = True) -> None:
    """Lets all batch norms of `model` that learn see the batch of all processes of torch.distributed, or no longer.

    All processes must then call the model equally often. With one process nothing changes. Raises ValueError for a
    model that `mrl_redimnet.speed_up` has not been called on.
    """
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    if not all(isinstance(norm, FastBatchNorm) for norm in norms):
        raise ValueError("synchronise_batch_norms: call mrl_redimnet.speed_up(model) first.")
    for norm in norms:
        norm.synchronised = on
