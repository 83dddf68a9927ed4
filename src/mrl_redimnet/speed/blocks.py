"""The trunk's blocks: norms folded into the convolution before them, sums in place, activations computed again."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from masking_mrl_redimnet import BatchNorm
from modeling_mrl_redimnet import (
    ConvNeXtBlock1d,
    ConvNeXtBlock2d,
    ConvPosition,
    LinearSqueeze2d,
    ResNetBlock2d,
    Squeeze2d,
    Stage,
    TimeContext,
    TransformerLayer,
    conv_image,
    conv_time,
)
from mrl_redimnet.speed.linear import linear
from mrl_redimnet.speed.recompute import recomputed, recomputing

HEAD_SIZES = 8  # fused attention kernels of accelerators take heads of multiples of so many channels


def along_channels(layer: Callable, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """layer(x) of a layer that looks at no other frame."""
    return layer(x)


def convolve_then_normalise(
    convolve: Callable, convs: list[nn.Module], norm: BatchNorm, x: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """convolve(conv, x, mask) of each conv, side by side -> y, and what makes y the normalised one.

    That is `norm`'s normaliser of y; or a function that changes nothing, where `norm` does not learn and is folded into
    the kernel, which saves a pass over memory.

    Anything but a plain convolution or linear layer (an adapter's) has more to it than a kernel, and is called as it
    is.
    """
    (conv, *others), foldable = convs, isinstance(convs[0], (nn.Conv2d, nn.Linear))
    if others or norm.learns or not foldable:
        y = convolve(conv, x, mask)
        if others:
            y = torch.cat([y, *(convolve(other, x, mask) for other in others)], dim=-1)
        return y, norm.normaliser(y, mask)
    scale, shift = norm.scale_and_shift()
    kernel = (conv.weight * scale.view(-1, *[1] * (conv.weight.dim() - 1))).to(conv.weight.dtype)
    bias = (shift if conv.bias is None else torch.addcmul(shift, conv.bias, scale)).to(conv.weight.dtype)

    def folded(x: torch.Tensor) -> torch.Tensor:
        if isinstance(conv, nn.Linear):
            return linear(x, kernel, bias)
        return F.conv2d(x, kernel, bias, padding=conv.padding, groups=conv.groups)

    return convolve(folded, x, mask), lambda y: y


def conv_norm_act_linear(
    convolve: Callable,
    convs: list[nn.Module],
    norm: BatchNorm,
    act: Callable,
    layer: Callable,
    x: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """layer(act(norm(conv(x)))), of which a backward pass keeps the output of the convolutions alone.

    Where none will come, each step's memory is free after the next.
    """
    y, normalise = convolve_then_normalise(convolve, convs, norm, x, mask)
    if not torch.is_grad_enabled():
        y = normalise(y)
        y = act(y)
        return layer(y)
    normal = normalise(y)
    activated = act(normal) if normal is y else recomputed(act, normal, lambda: normalise(y))
    return recomputed(layer, activated, lambda: act(normalise(y)))


def residual(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x + y for a y that nothing else needs: in its memory, unless a backward pass will come or the sum is of a wider
    type than y (autocast on CUDA gives norms in float32).
    """
    return x + y if y.requires_grad or torch.promote_types(x.dtype, y.dtype) != y.dtype else y.add_(x)


def rectified(y: torch.Tensor) -> torch.Tensor:
    """relu(y) for a y that nothing else needs: in its memory, unless a backward pass will come."""
    return F.relu(y) if y.requires_grad else y.relu_()


class FastConvNeXtBlock2d(ConvNeXtBlock2d):
    """The norm is folded into the convolution, or computed again in the backward pass."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """As `ConvNeXtBlock2d.forward`, by `conv_norm_act_linear`."""
        convs = [self.conv, *self.other_convs]
        return residual(x, conv_norm_act_linear(conv_image, convs, self.norm, self.act, self.pointwise, x, mask))


class FastResNetBlock2d(ResNetBlock2d):
    """What the convolutions see is computed again in the backward pass; the second norm is folded."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """As `ResNetBlock2d.forward`; sums and rectifiers are in place where no backward pass will come."""
        y = conv_image(self.conv1, x, mask)
        y = rectified(recomputed(self.pointwise1, y, lambda: conv_image(self.conv1, x, mask)))
        normalise = self.norm1.normaliser(y, mask)
        again = functools.partial(normalise, y)
        y = recomputed(lambda normal: conv_image(self.conv2, normal, mask), again(), again)
        y, normalise = convolve_then_normalise(along_channels, [self.pointwise2], self.norm2, y, mask)
        y = normalise(y)
        if self.bin_gate is not None:
            y = self.bin_gate(y, mask)
        return rectified(residual(x, y))


class FastSqueeze2d(Squeeze2d):
    """As `FastConvNeXtBlock2d`."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """As `Squeeze2d.forward`, by `conv_norm_act_linear`."""
        return conv_norm_act_linear(conv_image, [self.conv], self.norm, F.gelu, self.pointwise, x, mask)


class FastLinearSqueeze2d(LinearSqueeze2d):
    """The norm is folded into the layer."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """As `LinearSqueeze2d.forward`, in one pass over memory where the norm does not learn."""
        y, normalise = convolve_then_normalise(along_channels, [self.pointwise], self.norm, x, mask)
        return normalise(y)


class FastConvNeXtBlock1d(ConvNeXtBlock1d):
    """As `FastConvNeXtBlock2d`."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """As `ConvNeXtBlock1d.forward`, by `conv_norm_act_linear`."""
        convs = list(self.convs)
        return residual(x, conv_norm_act_linear(conv_time, convs, self.norm, F.gelu, self.pointwise, x, mask))


class FastConvPosition(ConvPosition):
    """The sum is in place."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """As `ConvPosition.forward`; the sum takes no memory of its own where no backward pass will come."""
        return residual(x, self.norm(conv_time(self.conv, x, mask)))


class FastTransformerLayer(TransformerLayer):
    """Heads have sizes that fused kernels take."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor | None) -> torch.Tensor:
        """As `TransformerLayer.attend`, by `attention`."""
        return attention(q, k, v, keys)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor | None, multiple: int | None = None
) -> torch.Tensor:
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


class FastTimeContext(TimeContext):
    """The sum is in place."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """As `TimeContext.forward`; the sum takes no memory of its own where no backward pass will come."""
        y = self.norm(self.reduce(x))
        for layer in self.layers:
            y = layer(y, mask)
        return residual(x, self.expand(y))


class FastStage(Stage):
    """Nothing is computed again where gradient checkpointing does so already."""

    def forward(self, maps: list[torch.Tensor], mask: torch.Tensor | None) -> list[torch.Tensor]:
        """As `Stage.forward`; gradient checkpointing turns `recomputing` off."""
        with recomputing(not (self.gradient_checkpointing and self.training)):
            return super().forward(maps, mask)


FAST = {
    ConvNeXtBlock2d: FastConvNeXtBlock2d,
    ResNetBlock2d: FastResNetBlock2d,
    Squeeze2d: FastSqueeze2d,
    LinearSqueeze2d: FastLinearSqueeze2d,
    ConvNeXtBlock1d: FastConvNeXtBlock1d,
    ConvPosition: FastConvPosition,
    TransformerLayer: FastTransformerLayer,
    TimeContext: FastTimeContext,
    Stage: FastStage,
}
