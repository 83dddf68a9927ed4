import pytest
import torch
from conftest import REDIMNET2, TINY, VARIANTS, stages, tiny_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PretrainedConfig

import configuration_mrl_redimnet as configuration
import losses_mrl_redimnet as losses
import modeling_mrl_redimnet as network
from configuration_mrl_redimnet import SIZES, MRLReDimNetConfig
from modeling_mrl_redimnet import MRLReDimNetModel

CONVNEXT2 = {**REDIMNET2, "block_2d": "convnext_like"}


def kernels(sizes: list) -> list[dict]:
    return [{**TINY["stages"][0], "kernels": sizes}]


PUBLISHED_PARAMETERS = {
    "b0": 1_004_250,
    "b1": 2_126_936,
    "b2": 4_892_848,
    "b3": 3_225_020,
    "b4": 6_441_520,
    "b5": 7_659_760,
    "b6": 15_015_472,
    "redimnet2-b3": 4_205_768 - 24 * 72,
    "redimnet2-b6": 12_394_784 - 64 * 72,
}


def test_the_configuration_names_all_that_the_network_has():
    """It is read without torch, and so has the names alone."""
    assert sorted(configuration.BLOCKS_1D) == sorted(network.BLOCKS_1D)
    assert sorted(configuration.BLOCKS_2D) == sorted(network.BLOCKS_2D)
    assert sorted(configuration.NETWORKS) == sorted(network.SQUEEZES)
    assert sorted(configuration.SPEAKER_LOSSES) == sorted(losses.LOSSES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(front_end="tf_spec"), "front_end: got 'tf_spec', expected one of mel, tf_mel"),
        (dict(feature_norm="mn"), "feature_norm: got 'mn', expected one of mean, mean_variance, batch, none"),
        (dict(front_end="tf_mel", feature_norm="batch"), "feature_norm: front_end 'tf_mel' has only 'mean'"),
        (dict(block_1d="gru"), "block_1d: got 'gru'"),
        (dict(block_2d="vgg"), "block_2d: got 'vgg'"),
        (dict(pooling="MHASTP"), "pooling: got 'MHASTP', expected one of ASTP, TAP, TSDP, TSTP"),
        (dict(num_mel_bins=0), "num_mel_bins: got 0, expected a whole number of at least 1"),
        (dict(base_channels=4.0), "base_channels: got 4.0"),
        (dict(hop_length=True), "hop_length: got True"),
        (dict(num_speakers=-1), "num_speakers: got -1"),
        (dict(pooling_bottleneck=0), "pooling_bottleneck: got 0"),
        (dict(group_divisor=0), "group_divisor: got 0, expected a whole number of at least 1, or None"),
        (dict(aggregation_channels="512"), "aggregation_channels: got '512'"),
        (dict(freq_mask_width=[6, 6]), r"freq_mask_width: got \[6, 6\], expected \[low, high\)"),
        (dict(time_mask_width=[-1, 8]), r"time_mask_width: got \[-1, 8\]"),
        (dict(map_dropout=1.0), "map_dropout: got 1.0, expected 0 <= map_dropout < 1"),
        (dict(aggregation_dropout=-0.1), "aggregation_dropout: got -0.1, expected 0 <= aggregation_dropout < 1"),
        (dict(projection_dropout=1.0), "projection_dropout: got 1.0, expected 0 <= projection_dropout < 1"),
        (dict(loss="softmax"), "loss: got 'softmax', expected one of aam, sphereface2"),
        (dict(sub_centers=0), "sub_centers: got 0, expected a whole number of at least 1"),
        (dict(hard_negatives=-1), "hard_negatives: got -1, expected a whole number of at least 0"),
        (dict(hard_negatives=0.5), "hard_negatives: got 0.5"),
        (dict(hard_negative_margin=1.5), "hard_negative_margin: got 1.5, expected 0 <= hard_negative_margin < 1.5"),
        (dict(sphereface2_balance=1.0), "sphereface2_balance: got 1.0, expected a number between 0 and 1"),
        (dict(sphereface2_balance=float("nan")), "sphereface2_balance: got nan"),
        (dict(sphereface2_exponent=0.5), "sphereface2_exponent: got 0.5, expected a number of at least 1"),
        (dict(loss="sphereface2", label_smoothing=0.1), "label_smoothing: loss 'sphereface2' has none, got 0.1"),
        (dict(label_smoothing=-0.1), "label_smoothing: got -0.1"),
        (dict(margin=1.5), "margin: got 1.5, expected 0 <= margin < 1.5"),
        (dict(scale=0), "scale: got 0, expected a number above 0"),
        (dict(network="redimnet3"), "network: got 'redimnet3', expected one of redimnet, redimnet2"),
        (dict(grouped_strides=True), "grouped_strides: network 'redimnet' has none, got True"),
        (dict(dual_maps=True), "dual_maps: network 'redimnet' has none"),
        (dict(map_norm_groups=4), "map_norm_groups: network 'redimnet' has none, got 4"),
        (dict(aggregation_per_bin=True, aggregation_channels=4), "aggregation_per_bin: network 'redimnet' has none"),
        (dict(REDIMNET2, map_norm_groups=True), "map_norm_groups: got True, expected a whole number of at least 1"),
        (dict(REDIMNET2, map_norm_groups=0), "map_norm_groups: got 0"),
        (dict(REDIMNET2, map_norm_groups=5), "map_norm_groups: 5 does not divide 96 channels"),
        (dict(REDIMNET2, aggregation_per_bin=True), "aggregation_per_bin: there are no aggregation_channels"),
        (dict(REDIMNET2, window_seconds=0.05), "window_seconds: 0.05 s is too short"),
        (dict(window_seconds=float("nan")), "window_seconds: got nan"),
        (dict(window_seconds=0.01), "window_seconds: 0.01 s is too short"),
        (dict(front_end_eps=0), "front_end_eps: got 0"),
    ],
)
def test_a_wrong_value_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(stages=[]), "stages: empty"),
        (dict(stages=[dict(blocks=1)]), r"stages\[0\]: got the entries \['blocks'\], expected"),
        (dict(stages=stages((0, 1, 1, None))), r"stages\[0\].frequency_stride: got 0"),
        (dict(stages=stages(((1, 2), 1, 1, None))), r"stages\[0\].time_stride: network 'redimnet' has none, got 2"),
        (dict(REDIMNET2, stages=[dict(TINY["stages"][0], time_stride=0)]), r"stages\[0\].time_stride: got 0"),
        (dict(REDIMNET2, stages=[dict(TINY["stages"][0], time_stride=True)]), r"stages\[0\].time_stride: got True"),
        (
            dict(REDIMNET2, stages=[dict(TINY["stages"][0], time=1)]),
            r"stages\[0\]: got the entries \['blocks'.*'time'\]",
        ),
        (dict(stages=kernels([[5, 5]])), r"stages\[0\].kernels: network 'redimnet' has none, got \[\[5, 5\]\]"),
        (dict(CONVNEXT2, stages=kernels([3, 3])), r"stages\[0\].kernels: got \[3, 3\], expected pairs of sizes"),
        (dict(CONVNEXT2, stages=kernels([[3, 0]])), r"stages\[0\].kernels: got \[\[3, 0\]\], expected whole numbers"),
        (dict(CONVNEXT2, stages=kernels([])), r"stages\[0\].kernels: got \[\], expected whole numbers"),
        (
            dict(REDIMNET2, stages=kernels([[5, 5]])),
            r"stages\[0\].kernels: block_2d 'basic_resnet' has \[\[3, 3\]\] alone",
        ),
        (dict(stages=stages((1, 1.5, 1, None))), r"stages\[0\].blocks: got 1.5"),
        (dict(stages=stages((1, 1, 0, None))), r"stages\[0\].expansion: got 0"),
        (dict(stages=stages((1, 1, 1, 97))), r"stages\[0\].reduction: got 97, expected 1 to 96, or None"),
        (dict(stages=stages((1, 1, 1, 4.0))), r"stages\[0\].reduction: got 4.0"),
        (dict(stages=stages((2, 1, 1, None), (5, 1, 1, None))), r"stages\[1\].*: 12 bins cannot be divided by 5"),
        (dict(stages=stages((1, 1, 1, 5))), r"stages\[0\].reduction: .* 96 // 5 = 19 cannot be divided among 4"),
        (dict(group_divisor=8), r"group_divisor: 8 does not fit 4 channels of stages\[0\]"),
        (dict(group_divisor=3, base_channels=5), r"group_divisor: 3 does not fit 10 channels of stages\[1\]"),
        # A convolution from 9 expanded channels back to 6 in two groups.
        (dict(group_divisor=3, base_channels=6, stages=stages((1, 1, 1.5, None))), r"3 does not fit 6 .*\(9 with"),
        (dict(group_divisor=None, stages=stages((1, 1, 0.1, None))), r"stages\[0\] \(0 with its expansion"),
    ],
)
def test_a_shape_that_does_not_fit_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(matryoshka_dims=[]), r"matryoshka_dims: got \[\], expected increasing"),
        (dict(matryoshka_dims=[16, 8, 32]), "expected increasing whole numbers"),
        (dict(matryoshka_dims=[8, 8, 32]), "expected increasing whole numbers"),
        (dict(matryoshka_dims=[8.0, 32]), "expected increasing whole numbers"),
        (dict(matryoshka_dims=[8, 16]), r"matryoshka_dims: must end at embedding_size=32, got \[8, 16\]"),
        (dict(prefix_weights=[1.0]), r"prefix_weights: got \[1.0\], expected 3 numbers"),
        (dict(prefix_weights=[0, 0, 0]), "not all 0"),
        (dict(prefix_weights=[1, -1, 1]), "numbers >= 0"),
    ],
)
def test_matryoshka_fields_must_agree(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("num_mel_bin", "num_mel_bins"),
        ("matryoshka_dim", "matryoshka_dims"),
        ("margins", "margin"),
        ("sub_centres", "sub_centers"),
    ],
)
def test_a_misspelt_field_is_refused(wrong, meant):
    """transformers keeps unknown keywords as attributes: a slip would silently change nothing."""
    with pytest.raises(ValueError, match=f"{wrong}: no such field .* did you mean {meant}?"):
        tiny_config(**{wrong: 1})


def test_fields_of_transformers_and_of_users_are_kept():
    config = tiny_config(num_labels=7, my_note="trained on noise")
    assert (config.num_labels, config.my_note) == (7, "trained on noise")


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_through_json(variant, tmp_path):
    config = tiny_config(variant, prefix_weights=[1, 2, 3])
    config.save_pretrained(tmp_path)
    assert MRLReDimNetConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_tuples_become_lists():
    """As JSON would make them, so that a configuration equals its own reloaded copy."""
    config = tiny_config(
        matryoshka_dims=(8, 32), freq_mask_width=(0, 3), stages=tuple(TINY["stages"]), prefix_weights=(1, 1)
    )
    assert (config.matryoshka_dims, config.freq_mask_width, config.prefix_weights) == ([8, 32], [0, 3], [1.0, 1.0])
    assert config.stages == TINY["stages"]


def test_defaults_are_not_shared():
    first = MRLReDimNetConfig()
    first.stages[0]["blocks"] = 99
    first.matryoshka_dims.append(1)
    assert MRLReDimNetConfig().stages[0]["blocks"] == 2
    assert MRLReDimNetConfig().matryoshka_dims == [64, 128, 192, 256]
    assert SIZES["b2"]["stages"][0]["blocks"] == 2


def test_derived_sizes():
    config = tiny_config(stages=stages((2, 1, 1, None), (3, 1, 1, None)))
    assert (config.trunk_width, config.pooling_input, config.pooled_size) == (96, 96, 192)
    assert config.stage_shapes() == [(4, 24, 8, 12), (8, 12, 24, 4)]
    assert tiny_config(pooling="TAP").pooled_size == 96
    assert tiny_config(aggregation_channels=40).pooled_size == 80


def test_derived_sizes_of_redimnet2():
    config = tiny_config("redimnet2_normed")
    assert config.time_strides() == [1, 2, 2, 4]
    assert config.map_strides() == [1, 1, 2, 2, 4]
    assert config.map_strides(0) == [1] and config.map_strides(2) == [1, 1, 2]
    assert tiny_config("redimnet2_dual").map_strides() == [1, 1, 1, 2, 2, 2, 4, 4]  # one stage has no 1-D block
    assert config.stage_shapes() == [(4, 24, 4, 24), (4, 24, 8, 12), (8, 12, 16, 6), (16, 6, 16, 6)]
    assert [config.stride_groups(i) for i in range(4)] == [4, 4, 8, 4]
    assert tiny_config("redimnet2_ungrouped").stride_groups(3) == 1
    assert (config.pooling_input, config.pooled_size) == (30, 60)  # 5 channels of each of 6 bins


def test_the_usual_stride_and_kernels_are_left_out():
    """As in configurations from before there was a choice, which are therefore equal to new ones."""
    spelt_out = [{**stage, "time_stride": 1, "kernels": [(3, 3)]} for stage in TINY["stages"]]
    assert tiny_config(stages=spelt_out).stages == TINY["stages"]


@pytest.mark.parametrize(
    ("variant", "frames"),
    [("convnext_convatt", 2), ("hop_240", 2), ("tf_mel", 2), ("tf_mel_normalized", 2)]
    + [("redimnet2", 4), ("redimnet2_dual", 4), ("redimnet2_convnext", 6)],
)
def test_min_samples_is_the_shortest_that_gives_two_frames_or_one_of_the_last_stage(variant, frames):
    """One frame less has no deviation, and the reflection needs more than half an FFT window."""
    config = tiny_config(variant)
    model = MRLReDimNetModel(config).eval()
    front_end = model.front_end
    assert front_end.num_frames(config.min_samples) >= frames
    assert model(torch.randn(1, config.min_samples)).embeddings.isfinite().all()
    if front_end.num_frames(config.min_samples - 1) >= frames:
        with pytest.raises(RuntimeError):
            front_end(torch.randn(1, config.min_samples - 1))


def test_unknown_size():
    with pytest.raises(ValueError, match="size: got 'b9', expected one of nano, b0"):
        MRLReDimNetConfig.from_size("b9")


def test_size_with_replaced_fields():
    config = MRLReDimNetConfig.from_size("nano", num_mel_bins=32, num_speakers=10)
    assert (config.num_mel_bins, config.num_speakers, config.base_channels) == (32, 10, 8)


@pytest.mark.parametrize(("size", "expected"), PUBLISHED_PARAMETERS.items())
def test_sizes_have_the_published_families_parameters(size, expected):
    """Counted as the published files are; their weights over a single map are not ours."""
    config = MRLReDimNetConfig.from_size(size, embedding_size=192, matryoshka_dims=[64, 128, 192])
    with torch.device("meta"):
        model = MRLReDimNetModel(config)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_the_nano_networks_cost_alike():
    """Multiply-adds of two seconds, those of attention among them in every torch, within a fiftieth."""
    costs = []
    for size in ("nano", "redimnet2-nano"):
        model = MRLReDimNetModel(MRLReDimNetConfig.from_size(size)).eval()
        with FlopCounterMode(display=False) as counted, torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
            model(torch.zeros(1, 32_000))
        costs.append(counted.get_total_flops() / 2)
    assert costs[0] == pytest.approx(166e6, rel=0.02)
    assert costs[1] == pytest.approx(costs[0], rel=0.02)


def test_is_a_transformers_configuration():
    assert issubclass(MRLReDimNetConfig, PretrainedConfig)
    assert MRLReDimNetConfig.model_type == "mrl_redimnet"
