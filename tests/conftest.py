"""Small models and waveforms for the tests: `from conftest import tiny_config, tiny_model, waves`."""

import os
import time

import pytest
import torch

from configuration_mrl_redimnet import MRLReDimNetConfig
from modeling_mrl_redimnet import MRLReDimNetModel

torch.set_num_threads(1)


def stages(*rows: tuple) -> list[dict]:
    """Rows (frequency stride, blocks, expansion, reduction) as a configuration's records; a stride may be a pair of
    (frequency stride, time stride)."""
    records = []
    for stride, *row in rows:
        frequency, time = stride if isinstance(stride, tuple) else (stride, 1)
        names = ("frequency_stride", "blocks", "expansion", "reduction")
        records.append(dict(zip(names, (frequency, *row), strict=True)) | ({"time_stride": time} if time > 1 else {}))
    return records


# 1-D blocks are 24 wide: below 20 `conv_time` takes another path than in any network of use.
TINY = dict(
    num_mel_bins=24,
    base_channels=4,
    stages=stages((1, 1, 1, None), (2, 1, 1, 4)),
    group_divisor=2,
    pooling_bottleneck=16,
    embedding_size=32,
    matryoshka_dims=[8, 16, 32],
    num_speakers=5,
)
EXPANDED = stages((1, 1, 2, None), (2, 1, 2, 4))

# Maps of 1, 2, 2 and 4 frames a frame, expansions up and down.
REDIMNET2 = dict(
    network="redimnet2",
    block_2d="basic_resnet",
    group_divisor=1,
    grouped_strides=True,
    stages=stages((1, 1, 2, 4), ((2, 2), 1, 1, None), ((2, 1), 1, 0.5, 4), ((1, 2), 1, 0.75, 4)),
)

# What to change in TINY to have every kind of block, pooling, norm and front end in one model at least.
VARIANTS: dict[str, dict] = {
    "convnext_convatt": {},
    "convnext_conv": dict(block_1d="conv", stages=EXPANDED),
    "convnext_relu_att": dict(block_1d="att", block_2d="convnext_like_relu", group_divisor=None),
    "resnet_fc": dict(block_1d="fc", block_2d="basic_resnet", stages=EXPANDED),
    "resnet_ungrouped": dict(block_1d="att", block_2d="basic_resnet", group_divisor=None),
    "fwse_att": dict(block_1d="att", block_2d="basic_resnet_fwse", stages=EXPANDED),
    "aggregation": dict(block_1d="fc", aggregation_channels=40),
    "astp_without_context": dict(block_1d="fc", pooling_context=False),
    "tap": dict(block_1d="fc", pooling="TAP"),
    "tsdp": dict(block_1d="fc", pooling="TSDP"),
    "tstp_embedding_norm": dict(block_1d="fc", pooling="TSTP", embedding_norm=True),
    "norm_mean_variance": dict(block_1d="fc", feature_norm="mean_variance", normalize_signal=True),
    "norm_batch": dict(block_1d="fc", feature_norm="batch"),
    "norm_none": dict(block_1d="fc", feature_norm="none", preemphasis=False),
    "hop_240": dict(block_1d="fc", hop_length=240),
    "tf_mel": dict(front_end="tf_mel"),
    "tf_mel_normalized": dict(block_1d="fc", front_end="tf_mel", normalize_signal=True, hop_length=120),
    "redimnet2": dict(REDIMNET2, front_end="tf_mel", normalize_signal=True),
    "redimnet2_normed": dict(REDIMNET2, map_norm_groups=4, aggregation_channels=5, aggregation_per_bin=True),
    "redimnet2_dual": dict(REDIMNET2, map_norm_groups=8, dual_maps=True, block_1d="conv"),
    "redimnet2_ungrouped": dict(REDIMNET2, grouped_strides=False, dual_maps=True, block_2d="basic_resnet_fwse"),
    "redimnet2_convnext": dict(
        REDIMNET2,
        block_1d="att",
        block_2d="convnext_like",
        map_norm_groups=1,
        aggregation_channels=40,
        stages=[
            dict(stages(((2, 2), 1, 2, None))[0], kernels=[[3, 5], [7, 1]]),
            *stages(((1, 3), 1, 1, 4)),
        ],
    ),
}


def tiny_config(variant: str = "convnext_convatt", **overrides) -> MRLReDimNetConfig:
    """The configuration of one of VARIANTS, single fields replaced."""
    return MRLReDimNetConfig(**{**TINY, **VARIANTS[variant], **overrides})


def tiny_model(config: MRLReDimNetConfig | None = None, seed: int = 0, kind: type = MRLReDimNetModel):
    """A model in eval mode that looks trained: its norms, running statistics and mixing weights are not at the start.

    With fresh ones many mistakes (a norm left out, a map mixed wrongly) would change nothing.
    """
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = kind(config or tiny_config())
        for module in model.modules():
            if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.LayerNorm, torch.nn.GroupNorm)):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.2)
            if isinstance(module, torch.nn.BatchNorm1d):
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 1.5)
        for name, parameter in model.named_parameters():
            if name.endswith("mix.logits"):
                parameter.normal_()
    return model.eval()


def waves(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    """Utterances of noise, each with its own loudness and colour."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i, length in enumerate(lengths):
        noise = torch.randn(length, generator=generator)
        made.append(0.05 * (1 + i) * (noise + 0.9 * torch.cat([torch.zeros(1), noise[:-1]])))
    return made


def padded(utterances: list[torch.Tensor], extra: int = 0, garbage: float = 0.0) -> dict[str, torch.Tensor]:
    """A batch {input_values, attention_mask}, `extra` samples longer than it must be, noise of a size as padding."""
    longest = max(map(len, utterances)) + extra
    values = garbage * torch.randn(len(utterances), longest, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(len(utterances), longest, dtype=torch.int32)
    for row, utterance in enumerate(utterances):
        values[row, : len(utterance)] = utterance
        mask[row, : len(utterance)] = 1
    return {"input_values": values, "attention_mask": mask}


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """|ours - expected| / |expected|."""
    return ((ours.double() - expected.double()).norm() / expected.double().norm()).item()


def reference_order(ours: torch.Tensor, config: MRLReDimNetConfig, model_config: dict) -> torch.Tensor:
    """Pooled statistics, or what is pooled, with channels as the reference has them: outside of bins where it pools 2-D
    maps. ours [..., statistics * channels]."""
    if not model_config.get("return_2d_output"):
        return ours
    *_, bins = config.stage_shapes()[-1]
    return ours.unflatten(-1, (-1, bins, config.pooling_input // bins)).transpose(-1, -2).flatten(-3)


@pytest.fixture
def model() -> MRLReDimNetModel:
    """A small model of the usual kind, its own for each test."""
    return tiny_model()


def leave_together(rank: int, folder: str, results: dict):
    """Writes a process's results, and ends its group when both processes have: one that leaves while the other still
    reads its last message can keep that one waiting for ever."""
    torch.save(results, f"{folder}/{rank}.part")
    os.replace(f"{folder}/{rank}.part", f"{folder}/{rank}.pt")
    deadline = time.monotonic() + 120
    while not os.path.exists(f"{folder}/{1 - rank}.pt") and time.monotonic() < deadline:
        time.sleep(0.01)
    torch.distributed.destroy_process_group()
