"""Configuration of ReDimNet-MRL: a ReDimNet (arXiv 2407.18223) or ReDimNet2 (arXiv 2603.11841) encoder with a
Matryoshka head (arXiv 2205.13147).

This file travels beside the weights to the Hub: it imports transformers and the standard library only.
"""

import difflib
import itertools
import math
import operator
from collections.abc import Iterable
from dataclasses import field, fields
from typing import Any

from transformers import PretrainedConfig


class MRLReDimNetError(Exception):
    """The base class of this project's own errors. Each has a built-in one, too, such as ValueError or OSError."""


NETWORKS = ("redimnet", "redimnet2")
FRONT_ENDS = ("mel", "tf_mel")
FEATURE_NORMS = ("mean", "mean_variance", "batch", "none")
BLOCKS_1D = ("att", "conv+att", "conv", "fc")
BLOCKS_2D = ("convnext_like", "convnext_like_relu", "basic_resnet", "basic_resnet_fwse")
POOLINGS = ("ASTP", "TAP", "TSDP", "TSTP")
SPEAKER_LOSSES = ("aam", "sphereface2")
ATTENTION_HEADS = 4
FFT_SIZE = 512
WINDOW_LENGTH = 400
SAMPLING_RATE = 16_000


STAGE_FIELDS = ("frequency_stride", "blocks", "expansion", "reduction")


def stage(
    frequency_stride: int, *, blocks: int, expansion: float, reduction: int | None, time_stride: int | None = None
) -> dict:
    """A record of `stages`; what each part of it means is said in `MRLReDimNetConfig`."""
    record = {"frequency_stride": frequency_stride, "blocks": blocks, "expansion": expansion, "reduction": reduction}
    return record if time_stride is None else {**record, "time_stride": time_stride}


# What the published ReDimNet2 files have in common, next to their TensorFlow-style front end.
_REDIMNET2 = dict(
    network="redimnet2",
    front_end="tf_mel",
    normalize_signal=True,
    num_mel_bins=72,
    block_1d="conv+att",
    block_2d="basic_resnet",
    group_divisor=1,
    grouped_strides=True,
)


# The published families, as shapes to train from scratch. A conversion never looks here: the architecture of a
# checkpoint is in the checkpoint. The nano ones are ours: they train in minutes on two CPU cores.
SIZES: dict[str, dict] = {
    "nano": dict(
        num_mel_bins=64,
        base_channels=8,
        block_1d="conv+att",
        block_2d="convnext_like",
        group_divisor=8,
        stages=[
            stage(2, blocks=2, expansion=1, reduction=None),
            stage(2, blocks=2, expansion=1, reduction=8),
            stage(2, blocks=2, expansion=1, reduction=8),
        ],
    ),
    "b0": dict(
        num_mel_bins=60,
        base_channels=10,
        block_1d="conv+att",
        block_2d="basic_resnet",
        group_divisor=1,
        stages=[
            stage(1, blocks=2, expansion=1, reduction=30),
            stage(2, blocks=3, expansion=2, reduction=30),
            stage(1, blocks=3, expansion=3, reduction=30),
            stage(2, blocks=4, expansion=2, reduction=10),
            stage(1, blocks=3, expansion=1, reduction=10),
        ],
    ),
    "b1": dict(
        num_mel_bins=72,
        base_channels=12,
        block_1d="conv+att",
        block_2d="convnext_like",
        group_divisor=8,
        stages=[
            stage(1, blocks=2, expansion=1, reduction=None),
            stage(2, blocks=3, expansion=1, reduction=None),
            stage(3, blocks=4, expansion=1, reduction=12),
            stage(2, blocks=5, expansion=1, reduction=12),
            stage(2, blocks=3, expansion=1, reduction=8),
        ],
    ),
    "b2": dict(
        num_mel_bins=72,
        base_channels=16,
        block_1d="conv+att",
        block_2d="convnext_like",
        group_divisor=4,
        stages=[
            stage(1, blocks=2, expansion=1, reduction=12),
            stage(2, blocks=2, expansion=1, reduction=12),
            stage(1, blocks=3, expansion=1, reduction=12),
            stage(2, blocks=4, expansion=1, reduction=8),
            stage(1, blocks=4, expansion=1, reduction=8),
            stage(2, blocks=4, expansion=1, reduction=4),
        ],
    ),
    "b3": dict(
        num_mel_bins=72,
        base_channels=16,
        block_1d="conv+att",
        block_2d="basic_resnet_fwse",
        group_divisor=1,
        stages=[
            stage(1, blocks=6, expansion=4, reduction=32),
            stage(2, blocks=6, expansion=2, reduction=32),
            stage(1, blocks=8, expansion=2, reduction=32),
            stage(2, blocks=10, expansion=2, reduction=16),
            stage(1, blocks=10, expansion=1, reduction=16),
            stage(2, blocks=8, expansion=1, reduction=16),
        ],
    ),
    "b4": dict(
        num_mel_bins=72,
        base_channels=32,
        block_1d="conv+att",
        block_2d="basic_resnet_fwse",
        group_divisor=1,
        stages=[
            stage(1, blocks=4, expansion=2, reduction=48),
            stage(2, blocks=4, expansion=2, reduction=48),
            stage(1, blocks=6, expansion=2, reduction=48),
            stage(2, blocks=6, expansion=1, reduction=32),
            stage(1, blocks=8, expansion=1, reduction=24),
            stage(2, blocks=4, expansion=1, reduction=16),
        ],
    ),
    "b5": dict(
        num_mel_bins=72,
        base_channels=32,
        block_1d="conv+att",
        block_2d="basic_resnet_fwse",
        group_divisor=16,
        stages=[
            stage(1, blocks=4, expansion=2, reduction=48),
            stage(2, blocks=4, expansion=2, reduction=48),
            stage(1, blocks=6, expansion=2, reduction=48),
            stage(2, blocks=6, expansion=1, reduction=32),
            stage(1, blocks=8, expansion=1, reduction=24),
            stage(2, blocks=4, expansion=1, reduction=16),
        ],
    ),
    "b6": dict(
        num_mel_bins=72,
        base_channels=32,
        block_1d="conv+att",
        block_2d="basic_resnet",
        group_divisor=32,
        stages=[
            stage(1, blocks=4, expansion=4, reduction=32),
            stage(2, blocks=6, expansion=2, reduction=32),
            stage(1, blocks=6, expansion=2, reduction=24),
            stage(3, blocks=8, expansion=1, reduction=24),
            stage(1, blocks=8, expansion=1, reduction=16),
            stage(2, blocks=8, expansion=1, reduction=16),
        ],
    ),
    "redimnet2-nano": dict(  # of nano's multiply-adds, and behind its front end
        _REDIMNET2,
        front_end="mel",
        normalize_signal=False,
        num_mel_bins=64,
        base_channels=8,
        map_norm_groups=8,
        stages=[
            stage(2, time_stride=1, blocks=2, expansion=2, reduction=8),
            stage(1, time_stride=2, blocks=2, expansion=2, reduction=8),
            stage(2, time_stride=1, blocks=3, expansion=1, reduction=8),
            stage(1, time_stride=2, blocks=2, expansion=1, reduction=8),
        ],
    ),
    "redimnet2-b3": dict(
        _REDIMNET2,
        base_channels=24,
        map_norm_groups=24,
        stages=[
            stage(1, time_stride=1, blocks=2, expansion=4, reduction=24),
            stage(2, time_stride=1, blocks=3, expansion=3, reduction=24),
            stage(1, time_stride=2, blocks=4, expansion=2, reduction=24),
            stage(2, time_stride=1, blocks=5, expansion=1, reduction=24),
            stage(1, time_stride=2, blocks=4, expansion=1, reduction=24),
            stage(2, time_stride=1, blocks=3, expansion=1, reduction=24),
        ],
    ),
    "redimnet2-b6": dict(
        _REDIMNET2,
        base_channels=64,
        aggregation_channels=224,
        aggregation_per_bin=True,
        stages=[
            stage(1, time_stride=1, blocks=3, expansion=3, reduction=64),
            stage(2, time_stride=1, blocks=4, expansion=2, reduction=64),
            stage(1, time_stride=2, blocks=5, expansion=2, reduction=48),
            stage(2, time_stride=1, blocks=5, expansion=1, reduction=48),
            stage(1, time_stride=2, blocks=4, expansion=0.75, reduction=32),
            stage(2, time_stride=1, blocks=3, expansion=0.5, reduction=24),
        ],
    ),
}


def conv_groups(channels: int, group_divisor: int | None) -> int:
    """Groups of a 3x3 convolution over `channels`: channels // group_divisor, or one group when that is None."""
    return 1 if group_divisor is None else channels // group_divisor


class MRLReDimNetConfig(PretrainedConfig):
    """Architecture and training settings of a ReDimNet-MRL model; every value is checked, and an error names the field.

    A field is documented as `name (type, default): meaning`. What only training needs comes last; an embedding does not
    depend on it.

    Args:
        front_end (str, "mel"): "mel", torchaudio's kind of mel spectrogram, or "tf_mel", TensorFlow's, which some
            published files have.
        num_mel_bins (int, 72): mel filters from 20 to 7600 Hz.
        hop_length (int, 160): samples between frames at 16 kHz: 160 is 10 ms, published ReDimNet checkpoints have 240.
        normalize_signal (bool, False): subtract the mean of the waveform and divide by its standard deviation.
        preemphasis (bool, True): y[t] = x[t] - 0.97 x[t-1].
        feature_norm (str, "mean"): over time, for each bin: "mean", "mean_variance", "batch" (learned) or "none".
        front_end_eps (float, 1e-8): the smallest power of "tf_mel".
        network (str, "redimnet"): "redimnet", or "redimnet2", which strides over time, too.
        base_channels (int, 16): 2-D channels after the stem; times num_mel_bins it is the 1-D width at every depth.
        stages (list, those of b2): a record for each stage: frequency_stride; blocks, the number of 2-D blocks;
            expansion of the channels within the stage; reduction of the 1-D block's width, None for no 1-D block.
            "redimnet2" may add time_stride (from this stage on a frame of a map stands for so many times more frames)
            and, for "convnext_like" blocks, kernels: sizes over (bins, frames) of convolutions side by side, usually
            [[3, 3]].
        block_1d (str, "conv+att"): the kind of 1-D block: "att", "conv+att", "conv" or "fc".
        block_2d (str, "convnext_like"): the kind of 2-D block: "convnext_like", "convnext_like_relu", "basic_resnet" or
            "basic_resnet_fwse".
        group_divisor (int | None, 4): channels in each group of the 3x3 convolutions, None for one group.
        grouped_strides (bool, False): "redimnet2": striding convolutions have as many groups as their channels allow,
            the greatest common divisor.
        dual_maps (bool, False): "redimnet2": a stage with a 1-D block adds two maps, from before and from after that
            block.
        map_norm_groups (int | None, None): "redimnet2": group norm of every map over time and so many groups of
            channels, None for no norm.
        aggregation_channels (int | None, None): width of the 1x1 layer after the last mixing (in "redimnet" with a
            norm), None for no such layer.
        aggregation_per_bin (bool, False): "redimnet2": that 1x1 layer sees the channels of one bin at a time.
        exits (list | None, None): increasing numbers of stages after which an embedding can be taken besides the whole
            network's, at less cost (`depth` of the forward pass).
        pooling (str, "ASTP"): "ASTP" (attentive statistics), "TAP" (mean), "TSDP" (standard deviation) or "TSTP"
            (both).
        pooling_context (bool, True): the attention sees the mean and the standard deviation of the utterance.
        pooling_bottleneck (int, 128): hidden width of the attention.
        embedding_size (int, 256): numbers of an embedding.
        embedding_norm (bool, False): a batch norm after the projection.
        matryoshka_dims (list, [64, 128, 192, 256]): increasing lengths of the prefixes that stand alone; the last one
            is embedding_size.
        window_seconds (float, 60.0): a longer utterance is cut into equal windows of at most this length, whose
            embeddings are averaged.
        spec_augment (bool, False): SpecAugment (arXiv 1904.08779): stretches of frames and of bins are set to zero.
        spec_augment_repeats (int, 1): how many stretches of each.
        freq_mask_width (list, [0, 6]): bins of a stretch, drawn from [low, high).
        time_mask_width (list, [0, 8]): frames of a stretch, drawn from [low, high).
        freq_mask_start (int, 0): the lowest bin that may be masked.
        map_dropout (float, 0.0): dropout on each stage's feature map.
        aggregation_dropout (float, 0.0): dropout on what the pooling sees.
        projection_dropout (float, 0.0): dropout on the pooled vector, between its batch norm and the projection.
        num_speakers (int, 2): speakers of the classifier.
        loss (str, "aam"): "aam", additive angular margin softmax (arXiv 1801.07698), or "sphereface2", a yes-or-no
            question for each speaker (arXiv 2108.01513, its type C: the margin moves similarities, not angles).
        margin (float, 0.2): radians for "aam", a part of a similarity from -1 to 1 for "sphereface2".
        scale (float, 32.0): what cosines are multiplied by.
        label_smoothing (float, 0.0): "aam": the part of the target that is spread over all speakers.
        sphereface2_balance (float, 0.7): "sphereface2": weight of the positive pair (lambda in the paper).
        sphereface2_exponent (float, 3.0): "sphereface2": t of the similarity 2 ((cosine + 1) / 2)^t - 1, which spreads
            out high cosines.
        sub_centers (int, 1): rows of each speaker in the classifier, of which the nearest counts (sub-center ArcFace,
            Deng et al. 2020).
        hard_negatives (int, 0): how many of the nearest wrong speakers are made harder (inter-top-k, arXiv 2110.05042).
        hard_negative_margin (float, 0.06): radians by which the angles to them are reduced.
        prefix_weights (list | None, None): weight of each Matryoshka prefix in the loss, None for equal ones; only
            their ratios matter.
    """

    model_type = "mrl_redimnet"
    attribute_map = {"hidden_size": "embedding_size"}  # the name by which other libraries ask

    # The architecture. Front end
    front_end: str = "mel"
    num_mel_bins: int = 72
    hop_length: int = 160
    normalize_signal: bool = False
    preemphasis: bool = True
    feature_norm: str = "mean"
    front_end_eps: float = 1e-8

    network: str = "redimnet"
    base_channels: int = 16
    stages: list[dict] = field(default_factory=lambda: [dict(record) for record in SIZES["b2"]["stages"]])
    block_1d: str = "conv+att"
    block_2d: str = "convnext_like"
    group_divisor: int | None = 4
    grouped_strides: bool = False
    dual_maps: bool = False
    map_norm_groups: int | None = None
    aggregation_channels: int | None = None
    aggregation_per_bin: bool = False
    exits: list[int] | None = None

    pooling: str = "ASTP"
    pooling_context: bool = True
    pooling_bottleneck: int = 128
    embedding_size: int = 256
    embedding_norm: bool = False
    matryoshka_dims: list[int] = field(default_factory=lambda: [64, 128, 192, 256])
    window_seconds: float = 60.0

    # What only training needs. Masks and dropout
    spec_augment: bool = False
    spec_augment_repeats: int = 1
    freq_mask_width: list[int] = field(default_factory=lambda: [0, 6])
    time_mask_width: list[int] = field(default_factory=lambda: [0, 8])
    freq_mask_start: int = 0
    map_dropout: float = 0.0
    aggregation_dropout: float = 0.0
    projection_dropout: float = 0.0

    num_speakers: int = 2
    loss: str = "aam"
    margin: float = 0.2
    scale: float = 32.0
    label_smoothing: float = 0.0
    sphereface2_balance: float = 0.7
    sphereface2_exponent: float = 3.0
    sub_centers: int = 1
    hard_negatives: int = 0
    hard_negative_margin: float = 0.06
    prefix_weights: list[float] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._refuse_misspelt(kwargs)
        self._check_choices()
        self._check_numbers()
        self.stages = [self._checked_stage(i, stage) for i, stage in enumerate(self.stages)]
        self._check_shapes()
        self._check_matryoshka()
        super().__post_init__(**kwargs)

    @classmethod
    def from_size(cls, size: str, **overrides: Any) -> "MRLReDimNetConfig":
        """A ready-made size by name ("nano", "b0" ... "b6", "redimnet2-nano", "redimnet2-b3", "redimnet2-b6"), single
        fields replaced by `overrides`.
        """
        if size not in SIZES:
            raise ValueError(f"size: got {size!r}, expected one of {', '.join(SIZES)}.")
        return cls(**{**SIZES[size], **overrides})

    @property
    def trunk_width(self) -> int:
        """Channels of the 1-D view: base_channels * num_mel_bins, the same at every depth."""
        return self.base_channels * self.num_mel_bins

    @property
    def pooling_input(self) -> int:
        """Channels the pooling sees."""
        if self.aggregation_channels is None:
            return self.trunk_width
        *_, bins = self.stage_shapes()[-1]
        return self.aggregation_channels * (bins if self.aggregation_per_bin else 1)

    @property
    def pooled_size(self) -> int:
        """Length of the pooled vector: one statistic per channel, or two."""
        return self.pooling_input * (1 if self.pooling in ("TAP", "TSDP") else 2)

    @property
    def hop_ms(self) -> float:
        """Milliseconds between two frames of the front end."""
        return 1000 * self.hop_length / SAMPLING_RATE

    @property
    def min_samples(self) -> int:
        """Shortest waveform in samples: two frames (and one of the last stage, which may span more), and more than half
        an FFT window to reflect.
        """
        frames = max(2, self.time_strides()[-1])
        if self.front_end == "tf_mel":
            least = WINDOW_LENGTH + (frames - 1) * self.hop_length - 2 * (self.hop_length // 2)
        else:
            least = (frames - 1) * self.hop_length
        return max(FFT_SIZE // 2 + 1, least)

    def stage_shapes(self) -> list[tuple[int, int, int, int]]:
        """Per stage (channels in, bins in, channels out, bins out)."""
        shapes, channels, bins = [], self.base_channels, self.num_mel_bins
        for stage in self.stages:
            stride = stage["frequency_stride"]
            shapes.append((channels, bins, channels * stride, bins // stride))
            channels, bins = channels * stride, bins // stride
        return shapes

    def time_strides(self) -> list[int]:
        """Per stage the frames that one frame of its maps stands for."""
        strides = itertools.accumulate((stage.get("time_stride", 1) for stage in self.stages), operator.mul)
        return list(strides)

    def stride_groups(self, index: int) -> int:
        """Groups of a stage's striding convolution."""
        channels_in, _, channels, _ = self.stage_shapes()[index]
        width = int(channels * self.stages[index]["expansion"])
        return math.gcd(channels_in, width) if self.grouped_strides else 1

    def map_strides(self, index: int | None = None) -> list[int]:
        """Time strides of the maps that stage `index` mixes, the stem's and those of the stages before it; of all."""
        strides = [1]
        for stage, stride in zip(self.stages[:index], self.time_strides()[:index], strict=True):
            strides += [stride] * (2 if self.dual_maps and stage["reduction"] is not None else 1)
        return strides

    def _refuse_misspelt(self, kwargs: dict) -> None:
        """PretrainedConfig takes any keyword; one that nearly is a field of ours is a slip, not an extra."""
        own = [f.name for f in fields(self) if f.name in MRLReDimNetConfig.__annotations__]
        for name in kwargs:
            near = difflib.get_close_matches(name, own, n=1, cutoff=0.85)
            if near:
                raise ValueError(f"{name}: no such field in MRLReDimNetConfig, did you mean {near[0]}?")

    def _check_choices(self) -> None:
        for name, allowed in (
            ("network", NETWORKS),
            ("front_end", FRONT_ENDS),
            ("feature_norm", FEATURE_NORMS),
            ("block_1d", BLOCKS_1D),
            ("block_2d", BLOCKS_2D),
            ("pooling", POOLINGS),
            ("loss", SPEAKER_LOSSES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(allowed)}.")
        if self.front_end == "tf_mel" and self.feature_norm != "mean":
            raise ValueError(f"feature_norm: front_end 'tf_mel' has only 'mean', got {self.feature_norm!r}.")
        for name in ("grouped_strides", "dual_maps", "map_norm_groups", "aggregation_per_bin"):
            if self.network == "redimnet" and getattr(self, name):
                raise ValueError(f"{name}: network 'redimnet' has none, got {getattr(self, name)!r}.")
        if self.loss == "sphereface2" and self.label_smoothing != 0:
            raise ValueError(f"label_smoothing: loss {self.loss!r} has none, got {self.label_smoothing!r}, expected 0.")

    def _check_numbers(self) -> None:
        for name, least in (
            ("num_mel_bins", 1),
            ("hop_length", 1),
            ("base_channels", 1),
            ("pooling_bottleneck", 1),
            ("embedding_size", 1),
            ("num_speakers", 1),
            ("sub_centers", 1),
            ("hard_negatives", 0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: got {value!r}, expected a whole number of at least {least}.")
        for name in ("group_divisor", "aggregation_channels", "map_norm_groups"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}: got {value!r}, expected a whole number of at least 1, or None.")
        for name in ("freq_mask_width", "time_mask_width"):
            low_high = list(getattr(self, name))
            if len(low_high) != 2 or not 0 <= low_high[0] < low_high[1]:
                raise ValueError(f"{name}: got {low_high}, expected [low, high) with 0 <= low < high.")
            setattr(self, name, low_high)
        for name, low, high in (
            ("map_dropout", 0, 1),
            ("aggregation_dropout", 0, 1),
            ("projection_dropout", 0, 1),
            ("label_smoothing", 0, 1),
            ("margin", 0, 1.5),
            ("hard_negative_margin", 0, 1.5),
        ):
            if not low <= getattr(self, name) < high:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {low} <= {name} < {high}.")
        if not 0 < self.sphereface2_balance < 1:
            raise ValueError(
                f"sphereface2_balance: got {self.sphereface2_balance!r}, expected a number between 0 and 1."
            )
        if not self.sphereface2_exponent >= 1:  # below, the similarity has an infinite slope at a cosine of -1
            raise ValueError(
                f"sphereface2_exponent: got {self.sphereface2_exponent!r}, expected a number of at least 1."
            )
        for name in ("scale", "window_seconds", "front_end_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected a number above 0.")

    def _checked_stage(self, index: int, stage: dict) -> dict:
        where, stage = f"stages[{index}]", dict(stage)
        if set(stage) - {"time_stride", "kernels"} != set(STAGE_FIELDS):
            raise ValueError(f"{where}: got the entries {sorted(stage)}, expected {sorted(STAGE_FIELDS)}.")
        for name in ("frequency_stride", "time_stride", "blocks"):
            value = stage.get(name, 1)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{where}.{name}: got {value!r}, expected a whole number of at least 1.")
        if "kernels" in stage:
            stage["kernels"] = self._checked_kernels(f"{where}.kernels", stage["kernels"])
        for name, usual in (("time_stride", 1), ("kernels", [[3, 3]])):
            if stage.get(name, usual) == usual:
                stage.pop(name, None)  # left out, as in configurations from before there was a choice
            elif self.network == "redimnet":
                raise ValueError(f"{where}.{name}: network 'redimnet' has none, got {stage[name]}.")
        if not isinstance(stage["expansion"], (int, float)) or not stage["expansion"] > 0:
            raise ValueError(f"{where}.expansion: got {stage['expansion']!r}, expected a number above 0.")
        reduction = stage["reduction"]
        if reduction is not None and not (isinstance(reduction, int) and 1 <= reduction <= self.trunk_width):
            raise ValueError(f"{where}.reduction: got {reduction!r}, expected 1 to {self.trunk_width}, or None.")
        return stage

    def _checked_kernels(self, where: str, kernels: Iterable) -> list[list[int]]:
        try:
            kernels = [[bins, frames] for bins, frames in kernels]
        except (TypeError, ValueError):
            raise ValueError(f"{where}: got {kernels!r}, expected pairs of sizes over (bins, frames).") from None
        if not kernels or any(type(size) is not int or size < 1 for kernel in kernels for size in kernel):
            raise ValueError(f"{where}: got {kernels}, expected whole numbers of at least 1 for (bins, frames).")
        if not self.block_2d.startswith("convnext") and kernels != [[3, 3]]:
            raise ValueError(f"{where}: block_2d {self.block_2d!r} has [[3, 3]] alone, got {kernels}.")
        return kernels

    def _check_shapes(self) -> None:
        if not self.stages:
            raise ValueError("stages: empty, expected at least one record.")
        for i, (stage, (_, bins_in, channels, _)) in enumerate(zip(self.stages, self.stage_shapes(), strict=True)):
            stride = stage["frequency_stride"]
            if bins_in % stride:
                raise ValueError(f"stages[{i}].frequency_stride: {bins_in} bins cannot be divided by {stride}.")
            width = int(channels * stage["expansion"])
            squeezed = stage["expansion"] != 1 and self.network == "redimnet"  # by a grouped convolution
            for width_out in [width] + ([channels] if squeezed else []):
                groups = conv_groups(width_out, self.group_divisor)
                if width < 1 or groups < 1 or width % groups or width_out % groups:
                    raise ValueError(
                        f"group_divisor: {self.group_divisor} does not fit {width_out} channels of stages[{i}] "
                        f"({width} with its expansion)."
                    )
            if stage["reduction"] is not None and self.block_1d in ("att", "conv+att"):
                hidden = self.trunk_width // stage["reduction"]
                if hidden % ATTENTION_HEADS:
                    raise ValueError(
                        f"stages[{i}].reduction: hidden width {self.trunk_width} // {stage['reduction']} = {hidden} "
                        f"cannot be divided among {ATTENTION_HEADS} attention heads."
                    )

        if self.map_norm_groups is not None and self.trunk_width % self.map_norm_groups:
            raise ValueError(f"map_norm_groups: {self.map_norm_groups} does not divide {self.trunk_width} channels.")
        if self.aggregation_per_bin and self.aggregation_channels is None:
            raise ValueError("aggregation_per_bin: there are no aggregation_channels.")
        self.checked_exits()
        if self.window_seconds * SAMPLING_RATE < 2 * self.min_samples:
            raise ValueError(f"window_seconds: {self.window_seconds} s is too short to cut utterances into.")

    def checked_exits(self) -> list[int]:
        """The exits, none where that is None. Raises ValueError for wrong ones, also where the field was set later."""
        if self.exits is None:
            return []
        exits, last = list(self.exits), len(self.stages) - 1
        whole = all(type(each) is int and 1 <= each <= last for each in exits)
        if not exits or not whole or sorted(set(exits)) != exits:
            raise ValueError(f"exits: got {exits}, expected increasing whole numbers from 1 to {last}, or None.")
        if self.aggregation_per_bin:
            raise ValueError("exits: not with aggregation_per_bin, whose layer is made for the bins of the last stage.")
        if self.embedding_norm:
            raise ValueError("exits: not with embedding_norm; `mrl-redimnet rotate` folds it into the projection.")
        self.exits = exits
        return exits

    def _check_matryoshka(self) -> None:
        dims = list(self.matryoshka_dims)
        if not dims or any(not isinstance(d, int) or d < 1 for d in dims) or sorted(set(dims)) != dims:
            raise ValueError(f"matryoshka_dims: got {dims}, expected increasing whole numbers.")
        if dims[-1] != self.embedding_size:
            raise ValueError(f"matryoshka_dims: must end at embedding_size={self.embedding_size}, got {dims}.")
        self.matryoshka_dims = dims
        if self.prefix_weights is not None:
            weights = [float(w) for w in self.prefix_weights]
            if len(weights) != len(dims) or min(weights) < 0 or sum(weights) <= 0:
                raise ValueError(f"prefix_weights: got {weights}, expected {len(dims)} numbers >= 0, not all 0.")
            self.prefix_weights = weights


MRLReDimNetConfig.register_for_auto_class()

__all__ = ["MRLReDimNetConfig"]
