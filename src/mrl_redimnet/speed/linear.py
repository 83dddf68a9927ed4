"""1x1 layers on CPUs as convolutions. torch gives float32 products to BLAS and convolutions to oneDNN, which was up to
twice as fast where it was tried (AVX-512).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

ONEDNN_FLOOR = 20480  # numbers in an input; torch keeps smaller convolutions from oneDNN (2.15, use_mkldnn)
# A 1x1 kernel cannot be dilated, but then torch (2.15, use_mkldnn) hands oneDNN small batches on one thread, too.
NO_DILATION = (2, 2)


def runs_on_cpu(x: torch.Tensor) -> bool:
    """Whether x takes the paths that were written for CPUs. Accelerators and compiled graphs have the definition's."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


class FastLinear(nn.Linear):
    """A linear layer over the last axis of x [B, frames, ..., C], which on CPUs runs as a 1x1 convolution."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, frames, ..., C] -> [B, frames, ..., outputs], by `linear`."""
        return linear(x, self.weight, self.bias)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """F.linear(x, weight, bias), on CPUs by a convolution where that is faster."""
    if not runs_on_cpu(x) or x.dim() < 3 or x.numel() <= ONEDNN_FLOOR:
        return F.linear(x, weight, bias)
    if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return _convolve_rows(x, weight, bias)
    return _LinearByConvolution.apply(x, weight, bias)


class _LinearByConvolution(torch.autograd.Function):
    """A linear layer of x [B, ..., C] by convolutions; the gradient of x is one by the transpose, which oneDNN computes
    up to four times as fast as the backward pass of the convolution that it is.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        y = _convolve_rows(x, weight, bias)
        # Not as a view of the image: what calls this (PEFT's AdaLoRA) may write into it, as it may with nn.Linear's.
        return y.new_empty(0).set_(y.untyped_storage(), 0, y.shape, y.stride())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_weight = None
        if needs_weight:
            shape = (*weight.shape, 1, 1)
            grad_weight = torch.nn.grad.conv2d_weight(_as_image(x), shape, _as_image(grad), dilation=NO_DILATION)
            grad_weight = grad_weight[..., 0, 0]
        grad_bias = grad.flatten(0, -2).sum(0) if needs_bias else None
        return _convolve_rows(grad, weight.T, None) if needs_x else None, grad_weight, grad_bias


def _convolve_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y = F.conv2d(_as_image(x), weight[..., None, None], bias, dilation=NO_DILATION)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def _as_image(x: torch.Tensor) -> torch.Tensor:
    """x [B, ..., C] as an image of height one, [B, C, 1, rows], channels last."""
    return x.reshape(len(x), 1, -1, x.shape[-1]).permute(0, 3, 1, 2)
