"""ReDimNet and ReDimNet2 speaker encoders (arXiv 2407.18223, 2603.11841) with a Matryoshka head (arXiv 2205.13147).

    waveform [B, T] -> MelFrontEnd [B, frames, bins] -> ReDimNetTrunk [B, frames, channels]
                    -> statistics pooling [B, P] -> MatryoshkaProjection [B, D]

The whole trunk has one memory layout: [batch, frames, bins, channels], contiguous. The 1-D view [batch, frames,
bins * channels] of a feature map is then the same memory as its 2-D view, a frequency stride is a reshape before a
linear layer, and every norm and 1x1 layer works on the last axis. 3x3 convolutions see it as channels-last images
with frames as height; convolutions over time alone as channels-last images of height one with frames as width.

An utterance has the same embedding alone and padded in a batch, because every layer that looks across frames gets a
mask: [B, frames, 1], true where a frame belongs to the utterance, or None when every frame of the batch does.

This file is the definition of the network. Beside it are the mel front end (`frontend_mrl_redimnet.py`), masks,
statistics and batch norms that leave padding out (`masking_mrl_redimnet.py`), the speaker losses
(`losses_mrl_redimnet.py`), how weights are loaded and saved (`pretrained_mrl_redimnet.py`), and the configuration. All
travel with the weights to the Hub, where torch and transformers are all that they need. Faster forms of the same
modules are in the package (`mrl_redimnet.speed`).
"""

import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput, can_return_tuple

# The other files are beside this one on the Hub, and modules of their own where the package is installed. The relative
# import comes first, so that the code of a Hub repository never mixes with an installed version of it. In a Hub
# repository an ImportError is raised as it is: there the second way would only hide what is wrong.
try:
    if not __package__:
        raise ImportError("not part of a package")
    from .configuration_mrl_redimnet import ATTENTION_HEADS, SAMPLING_RATE, MRLReDimNetConfig, conv_groups
    from .frontend_mrl_redimnet import MelFrontEnd
    from .losses_mrl_redimnet import LOSSES, NORM_FLOOR, SpeakerLoss, harder_negatives
    from .masking_mrl_redimnet import BatchNorm, masked_mean, moments, stretched, whole_frames, zero_padding
    from .pretrained_mrl_redimnet import CheckedModel
except ImportError:
    if __package__:
        raise
    from configuration_mrl_redimnet import ATTENTION_HEADS, SAMPLING_RATE, MRLReDimNetConfig, conv_groups
    from frontend_mrl_redimnet import MelFrontEnd
    from losses_mrl_redimnet import LOSSES, NORM_FLOOR, SpeakerLoss, harder_negatives
    from masking_mrl_redimnet import BatchNorm, masked_mean, moments, stretched, whole_frames, zero_padding
    from pretrained_mrl_redimnet import CheckedModel

NORM_EPS = 1e-6  # of every layer norm, and of the batch norm after an expanded stage


@dataclass
class SpeakerEmbeddingOutput(ModelOutput):
    """`embeddings` [B, D] (or the prefix that was asked for), not normalised: compare by cosine; `exits` [exits, B, D]
    where they were asked for.
    """

    embeddings: torch.FloatTensor | None = None
    exits: torch.FloatTensor | None = None


@dataclass
class MatryoshkaXVectorOutput(ModelOutput):
    """`loss` [] when labels were given, `logits` [B, speakers] (scaled cosines, no margin), `embeddings` [B, D],
    `prefix_losses` [len(matryoshka_dims)] when labels were given, NaN for a prefix of weight 0; `exits` [exits, B, D]
    where they were asked for.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    embeddings: torch.FloatTensor | None = None
    prefix_losses: torch.FloatTensor | None = None
    exits: torch.FloatTensor | None = None


@dataclass
class SpeakerClassifierOutput(ModelOutput):
    """`loss` [] when labels were given, `logits` [B, num_labels], `embeddings` [B, D]."""

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    embeddings: torch.FloatTensor | None = None


# ----------------------------------------------------------------------------------------------------------------------
# Convolutions of the trunk


def conv_image(conv: nn.Conv2d, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Convolution of x [B, frames, bins, C] over frames and bins, as a channels-last image."""
    return conv(zero_padding(x, mask).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def conv_time(conv: nn.Conv2d, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Depthwise convolution of x [B, frames, C] over frames, as a channels-last image of height one."""
    image = zero_padding(x, mask).transpose(1, 2)[:, :, None]
    if x.shape[-1] < 20 and x.device.type == "cpu":
        # Some CPUs' kernel for so few channels, in bfloat16 and channels-last, never returns: change the layout.
        image = image.contiguous()
    return conv(image)[:, :, 0].transpose(1, 2)


def image_conv(
    channels_in: int, channels_out: int, group_divisor: int | None, bias: bool = True, kernel: tuple[int, int] = (3, 3)
) -> nn.Conv2d:
    """The layer that `conv_image` calls. kernel: over (bins, frames); grouped over the output channels."""
    groups = conv_groups(channels_out, group_divisor)
    return nn.Conv2d(channels_in, channels_out, (kernel[1], kernel[0]), padding="same", groups=groups, bias=bias)


def depthwise_time_conv(channels: int, kernel: int) -> nn.Conv2d:
    """The layer that `conv_time` calls. kernel: in frames."""
    return nn.Conv2d(channels, channels, (1, kernel), padding="same", groups=channels)


# ----------------------------------------------------------------------------------------------------------------------
# 2-D blocks, over frames and frequency bins


class ConvNeXtBlock2d(nn.Module):
    """x + pointwise(act(norm(conv3x3(x)))) ("convnext_like", "convnext_like_relu").

    kernels over (bins, frames): others than 3x3, or convolutions of several of them side by side.
    """

    def __init__(
        self,
        config: MRLReDimNetConfig,
        channels: int,
        bins: int,
        kernels: Sequence[tuple[int, int]] = ((3, 3),),
        activation: Callable[[], nn.Module] = nn.GELU,
    ) -> None:
        super().__init__()
        self.conv, *others = (image_conv(channels, channels, config.group_divisor, kernel=k) for k in kernels)
        self.other_convs = nn.ModuleList(others)
        self.norm = BatchNorm(channels * len(kernels))
        self.act = activation()
        self.pointwise = nn.Linear(channels * len(kernels), channels)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """x [B, frames, bins, C] -> the same shape."""
        y = torch.cat([conv_image(conv, x, mask) for conv in (self.conv, *self.other_convs)], dim=-1)
        return x + self.pointwise(self.act(self.norm(y, mask)))


class BinSqueezeExcitation(nn.Module):
    """Scales each frequency bin by a gate that is computed from the means of all bins ("_fwse")."""

    def __init__(self, bins: int, hidden: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(bins, hidden)
        self.excite = nn.Linear(hidden, bins)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """x [B, frames, bins, C] -> the same shape."""
        mean = masked_mean(x.mean(-1), mask)  # [B, 1, bins]
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(mean))))
        return x * gate[..., None]


class ResNetBlock2d(nn.Module):
    """Residual block of two 3x3 convolutions ("basic_resnet", "basic_resnet_fwse").

    The published networks put ReLU before the first norm. Ungrouped blocks have no pointwise layers.
    """

    def __init__(self, config: MRLReDimNetConfig, channels: int, bins: int, bin_gate: bool = False) -> None:
        super().__init__()
        grouped = config.group_divisor is not None
        self.conv1 = image_conv(channels, channels, config.group_divisor, bias=False)
        self.pointwise1 = nn.Linear(channels, channels) if grouped else nn.Identity()
        self.norm1 = BatchNorm(channels)
        self.conv2 = image_conv(channels, channels, config.group_divisor, bias=False)
        self.pointwise2 = nn.Linear(channels, channels) if grouped else nn.Identity()
        self.norm2 = BatchNorm(channels)
        self.bin_gate = BinSqueezeExcitation(bins, min(64, max(channels, 32))) if bin_gate else None

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """x [B, frames, bins, C] -> the same shape."""
        y = F.relu(self.pointwise1(conv_image(self.conv1, x, mask)))
        y = self.pointwise2(conv_image(self.conv2, self.norm1(y, mask), mask))
        y = self.norm2(y, mask)
        if self.bin_gate is not None:
            y = self.bin_gate(y, mask)
        return F.relu(x + y)


# By config.block_2d; the configuration knows the names.
BLOCKS_2D: dict[str, Callable[..., nn.Module]] = {
    "convnext_like": ConvNeXtBlock2d,
    "convnext_like_relu": functools.partial(ConvNeXtBlock2d, activation=nn.ReLU),
    "basic_resnet": ResNetBlock2d,
    "basic_resnet_fwse": functools.partial(ResNetBlock2d, bin_gate=True),
}


class Squeeze2d(nn.Module):
    """Behind the 2-D blocks of a stage with an `expansion`: from its channels back to as many as the 1-D view has for
    each bin, by a 3x3 convolution and a 1x1 layer ("redimnet").
    """

    def __init__(self, config: MRLReDimNetConfig, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv = image_conv(channels_in, channels_out, config.group_divisor)
        self.norm = BatchNorm(channels_out, eps=NORM_EPS)
        self.pointwise = nn.Linear(channels_out, channels_out)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """x [B, frames, bins, channels_in] -> [B, frames, bins, channels_out]."""
        return self.pointwise(F.gelu(self.norm(conv_image(self.conv, x, mask), mask)))


class LinearSqueeze2d(nn.Module):
    """In the place of `Squeeze2d`: a 1x1 layer and a norm alone ("redimnet2")."""

    def __init__(self, config: MRLReDimNetConfig, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.pointwise = nn.Linear(channels_in, channels_out)
        self.norm = BatchNorm(channels_out, eps=NORM_EPS)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """x [B, frames, bins, channels_in] -> [B, frames, bins, channels_out]."""
        return self.norm(self.pointwise(x), mask)


# By config.network.
SQUEEZES: dict[str, Callable[..., nn.Module]] = {"redimnet": Squeeze2d, "redimnet2": LinearSqueeze2d}


# ----------------------------------------------------------------------------------------------------------------------
# 1-D blocks, over frames


class ConvNeXtBlock1d(nn.Module):
    """x + pointwise(gelu(norm(depthwise convolutions of x, side by side)))."""

    def __init__(self, channels: int, kernels: tuple[int, ...]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(depthwise_time_conv(channels, kernel) for kernel in kernels)
        self.norm = BatchNorm(channels * len(kernels))
        self.pointwise = nn.Linear(channels * len(kernels), channels)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """x [B, frames, C] -> the same shape."""
        y = torch.cat([conv_time(conv, x, mask) for conv in self.convs], dim=-1)
        return x + self.pointwise(F.gelu(self.norm(y, mask)))


class ConvPosition(nn.Module):
    """x + norm(depthwise convolution over 59 frames): it tells the attention behind it where a frame stands."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = depthwise_time_conv(channels, 59)
        self.norm = nn.LayerNorm(channels, eps=NORM_EPS)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """x [B, frames, C] -> the same shape."""
        return x + self.norm(conv_time(self.conv, x, mask))


class TransformerLayer(nn.Module):
    """Post-norm transformer layer of 4 heads; padded frames are no keys."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.out_proj = nn.Linear(channels, channels)
        self.attention_norm = nn.LayerNorm(channels, eps=NORM_EPS)
        self.ffn_in = nn.Linear(channels, hidden)
        self.ffn_out = nn.Linear(hidden, channels)
        self.ffn_norm = nn.LayerNorm(channels, eps=NORM_EPS)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """x [B, frames, C] -> the same shape."""
        # [B, frames, C] -> [B, heads, frames, C / heads]
        q, k, v = (
            proj(x).unflatten(-1, (ATTENTION_HEADS, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = self.attend(q, k, v, None if mask is None else mask[:, None, None, :, 0])
        x = self.attention_norm(x + self.out_proj(attended.transpose(1, 2).flatten(2)))
        return self.ffn_norm(x + self.ffn_out(F.gelu(self.ffn_in(x), approximate="tanh")))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor | None) -> torch.Tensor:
        """q, k, v [B, heads, frames, size] -> the same shape; keys [B, 1, 1, frames] true where a key counts, or
        None.
        """
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keys)


class FeedForward1d(nn.Module):
    """Frame by frame: linear to twice the width, norm, GELU, linear back ("fc")."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.widen = nn.Linear(channels, 2 * channels)
        self.norm = nn.LayerNorm(2 * channels, eps=NORM_EPS)
        self.narrow = nn.Linear(2 * channels, channels)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """x [B, frames, C] -> the same shape."""
        return self.narrow(F.gelu(self.norm(self.widen(x))))


# By config.block_1d: the layers of a 1-D block, for its reduced width h; the configuration knows the names.
BLOCKS_1D = {
    "fc": lambda h: [FeedForward1d(h)],
    "conv": lambda h: [ConvNeXtBlock1d(h, (7, 15, 31)) for _ in range(4)],
    "att": lambda h: [ConvPosition(h), TransformerLayer(h, 2 * h)],
    "conv+att": lambda h: [*(ConvNeXtBlock1d(h, (kernel,)) for kernel in (7, 19, 31, 59)), TransformerLayer(h, h)],
}


class TimeContext(nn.Module):
    """The 1-D block: reduce the width, look along time, expand, add."""

    def __init__(self, config: MRLReDimNetConfig, reduction: int) -> None:
        super().__init__()
        hidden = config.trunk_width // reduction
        self.reduce = nn.Linear(config.trunk_width, hidden)
        self.norm = nn.LayerNorm(hidden, eps=NORM_EPS)
        self.layers = nn.ModuleList(BLOCKS_1D[config.block_1d](hidden))
        self.expand = nn.Linear(hidden, config.trunk_width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """x [B, frames, width] -> the same shape."""
        y = self.norm(self.reduce(x))
        for layer in self.layers:
            y = layer(y, mask)
        return x + self.expand(y)


# ----------------------------------------------------------------------------------------------------------------------
# Trunk: its feature maps are [B, frames, width]


class MapNorm(nn.GroupNorm):
    """Group norm of a feature map over valid frames and within groups of neighbouring channels."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """x [B, frames, width] -> the same shape."""
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = masked_mean(values, mask)
        variance = masked_mean(self.squares(values, mean), mask)
        # Both [B, 1, width] -> [B, 1, groups, width / groups]; a group's variance is that within its channels and that
        # between their means.
        mean, variance = (part.unflatten(-1, (self.num_groups, -1)) for part in (mean, variance))
        group_mean = mean.mean(-1, keepdim=True)
        group_variance = (variance + (mean - group_mean).square()).mean(-1, keepdim=True)
        scale = self.weight * (group_variance + self.eps).rsqrt().expand_as(mean).flatten(2)
        shift = self.bias - group_mean.expand_as(mean).flatten(2) * scale
        return torch.addcmul(shift, values, scale).to(x.dtype)

    def squares(self, x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        """(x - mean)^2 of x [B, frames, width] and mean [B, 1, width]."""
        return (x - mean).square()


class NoMapNorm(nn.Module):
    """Takes the place of `MapNorm` in networks whose maps have no norm."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """x [B, frames, width], as it is."""
        return x


def map_norm(config: MRLReDimNetConfig) -> nn.Module:
    """The norm of a feature map: `MapNorm`, or `NoMapNorm` where the network's maps have none."""
    groups = config.map_norm_groups
    return NoMapNorm() if groups is None else MapNorm(groups, config.trunk_width)


def aggregate_norm(config: MRLReDimNetConfig) -> BatchNorm | None:
    """The norm behind the 1x1 layer after the last mixing, if the network has one."""
    wide = config.aggregation_channels
    return None if wide is None or config.network == "redimnet2" else BatchNorm(wide)


class MapMix(nn.Module):
    """Softmax-weighted sum of earlier feature maps, a weight per map and channel.

    strides: how many of the sum's frames a frame of each map stands for; such a frame is repeated.
    """

    def __init__(self, strides: list[int], width: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(len(strides), width))
        self.strides = strides

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        """As many maps [B, frames / stride, width] as strides -> [B, frames, width]."""
        weights, mixed = self.logits.softmax(0), 0.0
        for x, weight, stride in zip(maps, weights, self.strides, strict=True):
            weighted = x * weight.to(x.dtype)
            mixed = mixed + (weighted.repeat_interleave(stride, dim=1) if stride > 1 else weighted)
        return mixed


class Stage(GradientCheckpointingLayer):
    """Mixes all earlier maps, strides over frequency and time, 2-D blocks, then the 1-D block.

    There is no residual connection here: later stages mix the maps of all earlier ones.
    """

    def __init__(self, config: MRLReDimNetConfig, index: int) -> None:
        super().__init__()
        stage = config.stages[index]
        self.channels_in, _, channels, self.bins = config.stage_shapes()[index]
        width = int(channels * stage["expansion"])
        self.time_stride = config.time_strides()[index]  # from the stem on: what was mixed has the stem's frames
        strides = config.map_strides(index)
        self.mix = MapMix(strides, config.trunk_width) if index > 0 else None  # one map needs no weights
        kernel = (self.time_stride, stage["frequency_stride"])
        groups = config.stride_groups(index)
        self.grouped = groups > 1
        if self.grouped:
            self.stride = nn.Conv2d(self.channels_in, width, kernel, stride=kernel, groups=groups)
        else:  # a convolution that strides by its kernel is a linear layer on neighbouring places side by side
            self.stride = nn.Linear(math.prod(kernel) * self.channels_in, width)
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

    def forward(self, maps: list[torch.Tensor], mask: torch.Tensor | None) -> list[torch.Tensor]:
        """maps: of the stem and all earlier stages, [B, frames / their stride, width]; mask [B, frames, 1]: of the
        stem's map, cut as by `whole_frames` -> the stage's map [B, frames / time stride, width], or two where maps are
        dual: from before and from after the 1-D block.
        """
        mask = None if mask is None else mask[:, :: self.time_stride]
        x = self._strided(maps[0] if self.mix is None else self.mix(maps))
        for block in self.blocks:
            x = block(x, mask)
        if self.squeeze is not None:
            x = self.squeeze(x, mask)
        x = x.flatten(2)  # [B, frames, bins, C] -> [B, frames, width]
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
    """Features to the first map."""

    def __init__(self, config: MRLReDimNetConfig) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, config.base_channels, 3, padding="same")
        self.norm = nn.LayerNorm(config.base_channels, eps=NORM_EPS)
        self.map_norm = map_norm(config)

    def forward(self, features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """features [B, frames, bins] -> [B, frames, width]."""
        x = features.to(self.conv.weight.dtype)[..., None]
        return self.map_norm(self.norm(conv_image(self.conv, x, mask)).flatten(2), mask)


class Exit(nn.Module):
    """What an exit behind some stages has of its own: how it mixes the maps made so far, and the batch norms after the
    mixing, because statistics differ between depths (as in arXiv 1812.08928). It shares all else with the whole.
    """

    def __init__(self, config: MRLReDimNetConfig, depth: int) -> None:
        super().__init__()
        self.depth = depth
        self.mix = MapMix(config.map_strides(depth), config.trunk_width)
        self.aggregate_norm = aggregate_norm(config)
        self.norm = BatchNorm(config.pooled_size)  # in front of the projection


class ReDimNetTrunk(nn.Module):
    """Features to frame-level speaker features: the stem, the stages, and a last mixing of all their maps.

    Takes as many frames as `whole_frames` leaves for config.time_strides().
    """

    def __init__(self, config: MRLReDimNetConfig) -> None:
        super().__init__()
        self.stem = Stem(config)
        self.stages = nn.ModuleList(Stage(config, i) for i in range(len(config.stages)))
        self.mix = MapMix(config.map_strides(), config.trunk_width)
        self.bins = config.stage_shapes()[-1][-1] if config.aggregation_per_bin else 1
        wide = config.aggregation_channels
        self.aggregate = None if wide is None else nn.Linear(config.trunk_width // self.bins, wide)
        self.aggregate_norm = aggregate_norm(config)
        self.dropout = nn.Dropout(config.aggregation_dropout)

    def forward(
        self, features: torch.Tensor, mask: torch.Tensor | None = None, end: Exit | None = None
    ) -> torch.Tensor:
        """features [B, frames, bins] -> [B, frames, config.pooling_input].

        end: the exit behind which no stage is computed; None: the whole.
        """
        return self.mixed(self.maps(features, mask, None if end is None else end.depth), mask, end)

    def maps(self, features: torch.Tensor, mask: torch.Tensor | None, depth: int | None = None) -> list[torch.Tensor]:
        """features [B, frames, bins] -> the maps of the stem and of the first `depth` stages, or of all."""
        maps = [self.stem(features, mask)]
        for stage in self.stages[:depth]:
            maps = [*maps, *stage(maps, mask)]  # not longer in place: checkpointing may call the stage again
        return maps

    def mixed(self, maps: list[torch.Tensor], mask: torch.Tensor | None, end: Exit | None = None) -> torch.Tensor:
        """The maps up to an exit, or all -> what is pooled, [B, frames, config.pooling_input]."""
        own = self if end is None else end  # whose mixing and norm
        x = own.mix(maps[: len(own.mix.strides)])
        if self.aggregate is not None:
            x = self.aggregate(x.unflatten(-1, (self.bins, -1))).flatten(2)
        if own.aggregate_norm is not None:
            x = own.aggregate_norm(x, mask)
        return self.dropout(x)


# ----------------------------------------------------------------------------------------------------------------------
# Pooling and projection


class StatisticsPooling(nn.Module):
    """Mean ("TAP"), deviation ("TSDP") or both ("TSTP") over time."""

    def __init__(self, config: MRLReDimNetConfig) -> None:
        super().__init__()
        self.kind = config.pooling

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None, weights: torch.Tensor | None = None) -> torch.Tensor:
        """x [B, frames, C] -> [B, config.pooled_size] float32.

        weights: of frames, [B, frames, 1], in the place of the mask.
        """
        x = x.float()  # sums over thousands of frames
        mean, variance = moments(x, mask, weights)
        deviation = (variance + 1e-7).sqrt()
        if self.kind == "TAP":
            return mean[:, 0]
        if self.kind == "TSDP":
            return deviation[:, 0]
        return torch.cat([mean, deviation], dim=-1)[:, 0]


class AttentiveStatisticsPooling(nn.Module):
    """Attention-weighted mean and deviation per channel (arXiv 1803.10963)."""

    def __init__(self, config: MRLReDimNetConfig) -> None:
        super().__init__()
        channels = config.pooling_input
        self.attention_in = nn.Linear(channels, config.pooling_bottleneck)
        # The utterance's mean and deviation are the same for all frames: what they add is computed once, not per frame.
        self.context_in = (
            nn.Linear(2 * channels, config.pooling_bottleneck, bias=False) if config.pooling_context else None
        )
        self.attention_out = nn.Linear(config.pooling_bottleneck, channels)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None, weights: torch.Tensor | None = None) -> torch.Tensor:
        """x [B, frames, C] -> [B, 2 C] float32.

        weights: of frames, [B, frames, 1], in the place of the mask: they multiply the attention.
        """
        hidden = self.attention_in(x)
        stats_x = x.float()  # sums over thousands of frames, differences of squares
        if self.context_in is not None:
            mean, variance = moments(stats_x, mask, weights)
            hidden = hidden + self.context_in(torch.cat([mean, (variance + 1e-7).sqrt()], dim=-1).to(x.dtype))
        logits = self.attention_out(torch.tanh(hidden)).float()
        if weights is not None:
            logits = logits + weights.log()
        elif mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf)
        attention = logits.softmax(1)
        weighted = attention * stats_x
        mean = weighted.sum(1)
        variance = (weighted * stats_x).sum(1) - mean.square()
        return torch.cat([mean, variance.clamp(min=1e-7).sqrt()], dim=-1)


class MatryoshkaProjection(nn.Module):
    """Pooled vector to embedding, one linear layer per Matryoshka segment.

    dims (2, 4): segments give [a b] and [c d]; the prefixes are [a b] and [a b c d]. A short prefix computes only its
    own segments, and an adapter can give each segment its own rank.
    """

    def __init__(self, config: MRLReDimNetConfig) -> None:
        super().__init__()
        self.dims = config.matryoshka_dims
        starts = [0, *self.dims[:-1]]
        self.norm = BatchNorm(config.pooled_size)
        self.dropout = nn.Dropout(config.projection_dropout)
        self.segments = nn.ModuleList(
            nn.Linear(config.pooled_size, end - start) for start, end in zip(starts, self.dims, strict=True)
        )
        self.embedding_norm = BatchNorm(config.embedding_size) if config.embedding_norm else None

    def forward(self, pooled: torch.Tensor, truncate_dim: int | None = None, end: Exit | None = None) -> torch.Tensor:
        """pooled [B, P] -> embeddings [B, D], or their prefix [B, truncate_dim]. end: the exit that `pooled` is of."""
        norm = self.norm if end is None else end.norm
        pooled = self.dropout(norm(pooled.to(norm.weight.dtype)))
        # A batch norm behind the projection knows only the whole embedding; then the prefix is cut at the end.
        wanted = self.dims[-1] if truncate_dim is None or self.embedding_norm is not None else truncate_dim
        used = [segment for segment, start in zip(self.segments, [0, *self.dims], strict=False) if start < wanted]
        embedding = torch.cat([segment(pooled) for segment in used], dim=-1)
        if self.embedding_norm is not None:
            embedding = self.embedding_norm(embedding)
        return embedding if truncate_dim is None else embedding[:, :truncate_dim]


# ----------------------------------------------------------------------------------------------------------------------
# Classifier over speakers


class MatryoshkaMarginClassifier(nn.Module):
    """One of `LOSSES` over every Matryoshka prefix, one weight matrix for all.

    Embedding e and row w are cut to each prefix and normalised there: cos_d = <e[:d], w[:d]> / |e[:d]| |w[:d]|. A
    speaker with several rows (sub-centers, side by side in `weight` [speakers * sub_centers, D]) has the largest of
    their cosines, at each prefix anew. Computed in float32 whatever the dtype around it.
    """

    def __init__(self, config: MRLReDimNetConfig) -> None:
        super().__init__()
        self.config = config
        self.dims = config.matryoshka_dims
        self.scale, self.margin = config.scale, config.margin
        self.prefix_weights = list(config.prefix_weights or [1.0] * len(self.dims))
        self.shares()  # raises for weights that do not fit
        self.weight = nn.Parameter(torch.empty(config.num_speakers * config.sub_centers, config.embedding_size))
        nn.init.normal_(self.weight, std=config.embedding_size**-0.5)
        start = self.start_bias()
        self.bias = None if start is None else nn.Parameter(torch.full((len(self.dims),), start))

    @property
    def loss(self) -> SpeakerLoss:
        """The configured entry of `LOSSES`."""
        return LOSSES[self.config.loss]

    @property
    def num_speakers(self) -> int:
        """Speakers that labels may name; fewer than the configuration's while a sample of the rows is in use."""
        return self.weight.shape[0] // self.config.sub_centers

    def start_bias(self) -> float | None:
        """Where `bias` [len(dims)] starts; None when the loss has none."""
        return None if self.loss.start_bias is None else self.loss.start_bias(self.config)

    def forward(
        self,
        embeddings: torch.Tensor,
        labels: torch.Tensor,
        margin: float | None = None,
        prefix_weights: list[float] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """embeddings [B, D], labels [B] -> loss [], prefix losses [len(dims)], full-width logits [B, speakers].

        margin: replaces the configured one (a schedule's value at this step), in its unit; the one of hard negatives
        rises in proportion. prefix_weights: replace the configured ones; only ratios matter. A prefix of weight 0 is
        left out, its prefix loss is NaN.

        Raises ValueError for weights that do not fit.
        """
        margin = self.margin if margin is None else margin
        shares = self.shares(prefix_weights)
        with torch.autocast(embeddings.device.type, enabled=False):
            losses = self.prefix_losses(embeddings.float(), labels, margin, shares)
            logits = self.logits(embeddings).detach()
        loss = sum(loss * share for loss, share in zip(losses, shares, strict=True) if share > 0)
        return loss, torch.stack([loss.detach() for loss in losses]), logits

    def prefix_losses(
        self, embeddings: torch.Tensor, labels: torch.Tensor, margin: float, shares: list[float]
    ) -> list[torch.Tensor]:
        """The mean loss of each prefix, embeddings [B, D] float32, labels [B]; NaN for a share of 0."""
        losses, weight = [], self.weight.float()
        for k, (dim, share) in enumerate(zip(self.dims, shares, strict=True)):
            if share == 0:
                losses.append(embeddings.new_full((), torch.nan))
                continue
            logits = self.scaled_cosines(embeddings[:, :dim], weight[:, :dim])
            logits = harder_negatives(logits, labels, self.config.hard_negatives, self.gain(margin), self.scale)
            bias = None if self.bias is None else self.bias[k].float()
            losses.append(self.loss.compute(logits, labels, margin, self.scale, bias, self.config).mean())
        return losses

    def scaled_cosines(self, embeddings: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """embeddings [B, d], rows of the classifier [rows, d] -> [B, speakers], the nearest sub-centre's."""
        cosines = F.linear(F.normalize(embeddings, eps=NORM_FLOOR), F.normalize(weight, eps=NORM_FLOOR))
        centers = self.config.sub_centers
        return self.scale * (cosines if centers == 1 else cosines.unflatten(1, (-1, centers)).max(2).values)

    def gain(self, margin: float) -> float:
        """The margin of hard negatives at a step whose own margin is `margin`: both rise in proportion."""
        return self.config.hard_negative_margin * (margin / self.margin if self.margin else 1.0)

    def shares(self, weights: list[float] | None = None) -> list[float]:
        """Prefix weights, by default the configured ones, as parts of one. Raises ValueError for what does not fit."""
        weights = self.prefix_weights if weights is None else weights
        if len(weights) != len(self.dims) or not min(weights) >= 0 or not sum(weights) > 0:
            raise ValueError(f"prefix_weights: got {weights}, expected {len(self.dims)} numbers >= 0, not all 0.")
        return [weight / sum(weights) for weight in weights]

    def logits(self, embeddings: torch.Tensor) -> torch.Tensor:
        """embeddings [B, D] -> scaled cosines at full width [B, speakers], without margin."""
        with torch.autocast(embeddings.device.type, enabled=False):
            return self.scaled_cosines(embeddings.float(), self.weight.float())

    def extra_repr(self) -> str:
        """What `print(model)` shows of it."""
        return (
            f"speakers={self.num_speakers}, dims={self.dims}, loss={self.config.loss}, margin={self.margin}, "
            f"scale={self.scale}"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Models


class MRLReDimNetPreTrainedModel(CheckedModel):
    """What the models below share."""

    config_class = MRLReDimNetConfig
    base_model_prefix = "redimnet"
    main_input_name = "input_values"
    input_modalities = ("audio",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    auto_classes = {
        "AutoConfig": "configuration_mrl_redimnet.MRLReDimNetConfig",
        "AutoModel": "modeling_mrl_redimnet.MRLReDimNetModel",
        "AutoModelForAudioXVector": "modeling_mrl_redimnet.MRLReDimNetForXVector",
        "AutoModelForAudioClassification": "modeling_mrl_redimnet.MRLReDimNetForSequenceClassification",
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
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


class MRLReDimNetModel(MRLReDimNetPreTrainedModel):
    """Speaker embeddings from waveforms: front end, trunk, pooling, Matryoshka projection."""

    _keys_to_ignore_on_load_unexpected = [r"^classifier\."]  # of a model saved with its head

    def __init__(self, config: MRLReDimNetConfig) -> None:
        super().__init__(config)
        self.front_end = MelFrontEnd(config)
        self.trunk = ReDimNetTrunk(config)
        attentive = config.pooling == "ASTP"
        self.pooling = AttentiveStatisticsPooling(config) if attentive else StatisticsPooling(config)
        self.projection = MatryoshkaProjection(config)
        self.exits = nn.ModuleDict({str(depth): Exit(config, depth) for depth in config.checked_exits()})
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        truncate_dim: int | None = None,
        frame_weights: torch.Tensor | None = None,
        depth: int | None = None,
        output_exits: bool = False,
        **kwargs: Any,
    ) -> SpeakerEmbeddingOutput:
        """input_values [B, T] mono at 16 kHz, attention_mask [B, T] 1 = audio, 0 = padding behind it.

        truncate_dim: one of config.matryoshka_dims; only that prefix is computed and returned.
        frame_weights: how much each part of the audio counts in the pooling, >= 0: [B, n] for any n parts of equal
        length of T (padding included), or [B, S, n] for S embeddings of each row, `embeddings` [B, S, D], from one pass
        of the trunk (of the speakers of a conversation, say). Only their ratios matter; weights of one change nothing;
        an embedding whose weights are all 0 is NaN.
        depth: one of config.exits, behind which no stage is computed; None: the whole network.
        output_exits: beside the whole embeddings those of all exits, from one pass of the trunk: for training. All see
        the frames of the whole, which are cut to what its time strides fill.
        Utterances longer than config.window_seconds are cut into equal windows whose embeddings are averaged.

        Raises ValueError for a wrong shape, a prefix or depth the model was not built for, too short an utterance, or
        padding in front of audio; TypeError for arguments it has no use for.
        """
        self.refuse_extras(kwargs)
        self.check_waveforms(input_values)
        self.check_prefix(truncate_dim)
        self.check_depth(depth)
        lengths = self.lengths_of(input_values, attention_mask)
        window = int(self.config.window_seconds * SAMPLING_RATE)
        weights = self.check_weights(frame_weights, input_values)
        end = None if depth is None else self.exits[str(depth)]
        exits: list[torch.Tensor] = []
        if output_exits:
            if input_values.shape[1] > window or any(x is not None for x in (truncate_dim, depth, frame_weights)):
                raise ValueError("output_exits: is for whole embeddings of utterances that fit into a window.")
            embeddings, *exits = self.at_all_depths(input_values, lengths)
        elif input_values.shape[1] > window:
            embeddings = self._embed_windows(input_values, lengths, window, truncate_dim, weights, end)
        else:
            embeddings = self.projection(self.pooled(input_values, lengths, weights, end), truncate_dim, end)
        if frame_weights is not None and frame_weights.dim() == 3:  # [B * S, D] -> [B, S, D]
            several = frame_weights.shape[:2]
            if weights is None:  # all of them are ones: a row has one embedding, S times
                embeddings = embeddings.repeat_interleave(several[1], 0)
            embeddings = embeddings.unflatten(0, several)
        return SpeakerEmbeddingOutput(embeddings=embeddings, exits=torch.stack(exits) if exits else None)

    def at_all_depths(self, input_values: torch.Tensor, lengths: torch.Tensor | None = None) -> list[torch.Tensor]:
        """input_values [B, T], lengths [B] in samples or None -> embeddings [B, D] of the whole, then of each exit."""
        features, mask = self.features(input_values, lengths)
        maps, embeddings = self.trunk.maps(features, mask), []
        for end in (None, *self.exits.values()):
            embeddings.append(self.projection(self.pooling(self.trunk.mixed(maps, mask, end), mask), end=end))
        return embeddings

    def at_depth(self, depth: int) -> "MRLReDimNetModel":
        """A model of its own that ends at an exit, and answers as `forward` does with this depth: an ordinary smaller
        model to save, export or adapt. Raises ValueError for a depth that is none of config.exits.
        """
        self.check_depth(depth)
        model = copy.deepcopy(self)
        end, config = model.exits[str(depth)], model.config
        del model.trunk.stages[depth:]
        model.trunk.mix, model.trunk.aggregate_norm, model.projection.norm = end.mix, end.aggregate_norm, end.norm
        config.stages, config.exits = config.stages[:depth], [each for each in config.exits if each < depth] or None
        model.exits = nn.ModuleDict({str(each): model.exits[str(each)] for each in config.exits or ()})
        return model

    def pooled(
        self,
        input_values: torch.Tensor,
        lengths: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        end: Exit | None = None,
    ) -> torch.Tensor:
        """input_values [B, T], lengths [B] in samples or None, weights [B, S, n] or None -> pooled statistics [B, P]
        float32, with weights [B * S, P]. end: one of `exits`.
        """
        x, mask = self.frames(input_values, lengths, end)
        if weights is None:
            return self.pooling(x, mask)
        weights = stretched(weights.float(), x.shape[1])
        if mask is not None:
            weights = weights.masked_fill(~mask.transpose(1, 2), 0.0)
        if weights.shape[1] > 1:
            x = x.repeat_interleave(weights.shape[1], 0)
        return self.pooling(x, None, weights.flatten(0, 1)[..., None])

    def frames(
        self, input_values: torch.Tensor, lengths: torch.Tensor | None = None, end: Exit | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What is pooled: input_values [B, T], lengths [B] in samples or None -> the trunk's [B, frames, C] and their
        mask [B, frames, 1] or None. A frame stands for config.hop_length samples. end: one of `exits`.
        """
        features, mask = self.features(input_values, lengths, end)
        return self.trunk(features, mask, end), mask

    def features(
        self, input_values: torch.Tensor, lengths: torch.Tensor | None, end: Exit | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """input_values [B, T], lengths [B] in samples or None -> what the trunk sees, [B, frames, bins], and its mask,
        both cut to what the time strides up to `end` fill.
        """
        features = self.front_end(input_values, lengths)
        mask = self.front_end.frame_mask(lengths, features.shape[1])
        return whole_frames(features, mask, self.config.time_strides()[-1 if end is None else end.depth - 1])

    def _embed_windows(
        self,
        input_values: torch.Tensor,
        lengths: torch.Tensor | None,
        window: int,
        truncate_dim: int | None,
        weights: torch.Tensor | None,
        end: Exit | None,
    ) -> torch.Tensor:
        """input_values [B, T] -> embeddings [B, D]: of each utterance the mean over equal windows of at most `window`
        samples. With weights [B, S, n]: [B * S, D], and each window counts by the sum of its weights.

        One window at a time, so that memory is bounded by a window whatever the utterance's length.
        """
        hop, found = self.config.hop_length, []
        ends = [input_values.shape[1]] * len(input_values) if lengths is None else lengths.tolist()
        if weights is not None:  # -> one for every frame of the front end
            weights = stretched(weights.float(), math.ceil(input_values.shape[1] / hop))
        for row, (wave, samples) in enumerate(zip(input_values, ends, strict=True)):
            count = math.ceil(samples / window)
            bounds = [i * samples // count for i in range(count + 1)]
            embeddings, sums = [], []
            for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
                inside = None
                if weights is not None:
                    inside = weights[row, None, :, start // hop : math.ceil(stop / hop)]  # [1, S, frames]
                    sums.append(inside[0].sum(-1, keepdim=True))
                pooled = self.pooled(wave[None, start:stop], None, inside, end)
                embeddings.append(self.projection(pooled, truncate_dim, end))
            of_windows = torch.stack(embeddings)  # [windows, S or 1, D]
            if weights is None:
                found.append(of_windows.mean(0))
            else:  # a window whose weights are all 0 has no embedding, but NaN
                shares = torch.stack(sums)  # [windows, S, 1]
                found.append((of_windows.masked_fill(shares <= 0, 0.0) * shares).sum(0) / shares.sum(0))
        return torch.cat(found)


class MRLReDimNetForXVector(MRLReDimNetPreTrainedModel):
    """The speaker encoder with its margin classifier: what training from speaker labels needs."""

    def __init__(self, config: MRLReDimNetConfig) -> None:
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
        output_exits: bool = False,
        **kwargs: Any,
    ) -> MatryoshkaXVectorOutput:
        """input_values [B, T], attention_mask [B, T], labels [B] speaker ids; margin, prefix_weights as in the
        classifier's forward; output_exits as in MRLReDimNetModel.

        num_items_in_batch: the loss is then the sum over this batch divided by it, as transformers' Trainer asks for
        when it accumulates gradients over several batches.
        """
        self.refuse_extras(kwargs)
        found = self.redimnet(input_values, attention_mask, output_exits=output_exits)
        if labels is None:
            return MatryoshkaXVectorOutput(logits=self.classifier.logits(found.embeddings), **found)
        loss, prefix_losses, logits = self.classifier(found.embeddings, labels, margin, prefix_weights)
        loss = self.share_of_items(loss, labels, num_items_in_batch)
        return MatryoshkaXVectorOutput(loss=loss, logits=logits, prefix_losses=prefix_losses, **found)


class MRLReDimNetForSequenceClassification(MRLReDimNetPreTrainedModel):
    """A classifier (gender, language) or, with one label, a regressor (age) on the embedding."""

    has_own_pipeline = False

    def __init__(self, config: MRLReDimNetConfig) -> None:
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
        **kwargs: Any,
    ) -> SpeakerClassifierOutput:
        """input_values [B, T], attention_mask [B, T], labels [B]: class ids, or numbers when num_labels is 1;
        num_items_in_batch: as in MRLReDimNetForXVector.
        """
        self.refuse_extras(kwargs)
        embeddings = self.redimnet(input_values, attention_mask).embeddings
        logits = self.classifier(embeddings)
        loss = None
        if labels is not None and self.config.num_labels == 1:
            loss = F.mse_loss(logits[:, 0].float(), labels.float())
        elif labels is not None:
            loss = F.cross_entropy(logits.float(), labels)
        if loss is not None:
            loss = self.share_of_items(loss, labels, num_items_in_batch)
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
