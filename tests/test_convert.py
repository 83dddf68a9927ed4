"""Conversion against recorded answers of the references (benchmarks/record_reference.py), and its strictness."""

import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from conftest import padded, reference_order, relative_error
from reference_weights import flattened, reference_tensor, reference_waveform, spread

from mrl_redimnet.convert import ConversionError, convert_checkpoint, convert_config
from mrl_redimnet_cli import main

DATA = Path(__file__).parent / "data"
RECORDINGS = {
    prefix + name: recording
    for prefix, file in (("", "reference_answers.json"), ("redimnet2_", "reference2_answers.json"))
    for name, recording in json.loads((DATA / file).read_text())["recordings"].items()
}


def reference_checkpoint(name: str) -> dict:
    """The checkpoint that a recording's answers belong to, as a published file holds it."""
    recording = RECORDINGS[name]
    shapes = flattened(recording["state_dict"])
    return {
        "model_config": json.loads(json.dumps(recording["model_config"])),
        "state_dict": {key: reference_tensor(key, shape) for key, shape in shapes.items()},
    }


@pytest.fixture
def checkpoint() -> dict:
    return reference_checkpoint("single_stage")


def with_config(checkpoint: dict, **changes) -> dict:
    return {**checkpoint, "model_config": {**checkpoint["model_config"], **changes}}


def with_spec(checkpoint: dict, **changes) -> dict:
    return with_config(checkpoint, spec_params={**checkpoint["model_config"].get("spec_params", {}), **changes})


def assert_matches(summary: dict, ours: torch.Tensor):
    assert list(ours.shape) == summary["shape"]
    assert ours.norm().item() == pytest.approx(summary["norm"], rel=1e-5)
    assert relative_error(spread(ours), torch.tensor(summary["spread"])) < 1e-5


@pytest.mark.parametrize("name", RECORDINGS)
def test_answers_as_the_reference_does(name):
    checkpoint = reference_checkpoint(name)
    model = convert_checkpoint(checkpoint)
    for length, answer in RECORDINGS[name]["answers"].items():
        wave = reference_waveform(int(length))
        with torch.inference_mode():
            assert_matches(answer["features"], model.front_end(wave).transpose(1, 2))
            pooled = reference_order(model.pooled(wave), model.config, checkpoint["model_config"])
            assert_matches(answer["pooled"], pooled)
            assert relative_error(model(wave).embeddings, torch.tensor(answer["embedding"])) < 1e-5


@pytest.mark.parametrize("name", RECORDINGS)
def test_answers_so_for_padded_utterances_too(name):
    """Utterances of both recorded lengths in one batch, which the references cannot answer."""
    model = convert_checkpoint(reference_checkpoint(name))
    answers = {int(length): answer["embedding"] for length, answer in RECORDINGS[name]["answers"].items()}
    utterances = [row for length in answers for row in reference_waveform(length)]
    with torch.inference_mode():
        together = model(**padded(utterances, extra=500, garbage=1.0)).embeddings
    for ours, expected in zip(together, (row for rows in answers.values() for row in rows), strict=True):
        assert relative_error(ours, torch.tensor(expected)) < 2e-5


def test_recordings_cover_every_kind():
    """Every value of every choice is in some recording, so that none is converted on faith."""
    seen = [{**r["model_config"], **r["model_config"].get("spec_params", {})} for r in RECORDINGS.values()]
    for key, values in {
        "block_1d_type": {"att", "conv+att", "conv", "fc"},
        "block_2d_type": {"convnext_like", "convnext_like_relu", "basic_resnet", "basic_resnet_fwse"},
        "pooling_func": {"ASTP", "TAP", "TSDP", "TSTP"},
        "feat_type": {"pt", "pt_mel", "tf", "tf_mel"},
        "spec_norm": {"mvn", "bn", "none"},
        "return_2d_output": {True, False},
        "compress_tconvs": {True, False},
        "dual_agg": {True},
        "agg_gnorm": {True, 3},
    }.items():
        assert values <= {recording.get(key) for recording in seen}, key
    both = [
        (r["model_config"].get("return_2d_output"), r["model_config"].get("out_channels")) for r in RECORDINGS.values()
    ]
    assert {(True, None), (True, 7), (False, None), (False, 40)} <= set(both)


def test_file_and_dict_give_the_same_model(checkpoint, tmp_path):
    torch.save(checkpoint, tmp_path / "b9-vox2-ptn.pt")
    from_file = convert_checkpoint(tmp_path / "b9-vox2-ptn.pt").state_dict()
    from_dict = convert_checkpoint(checkpoint).state_dict()
    assert all(torch.equal(from_file[name], tensor) for name, tensor in from_dict.items())


def test_converted_model_is_in_eval_mode(checkpoint):
    assert not any(module.training for module in convert_checkpoint(checkpoint).modules())


def test_missing_keys_take_the_reference_defaults():
    config = convert_config({})
    assert (config.num_mel_bins, config.base_channels, config.group_divisor) == (72, 16, 4)
    assert (config.block_1d, config.block_2d, config.pooling) == ("att", "convnext_like", "ASTP")
    assert (config.embedding_size, config.hop_length, config.front_end) == (192, 160, "mel")
    assert (config.pooling_context, config.embedding_norm, config.aggregation_channels) == (False, False, None)
    assert [stage["reduction"] for stage in config.stages] == [12, 12, 12, 8, 8, 4]
    assert (config.feature_norm, config.normalize_signal, config.preemphasis) == ("mean", False, True)


def test_missing_keys_take_the_defaults_of_their_network():
    """A key of ReDimNet2 alone, or pairs of strides, say that it is one."""
    for model_config in ({"compress_tconvs": True}, {"stages_setup": [[[1, 2], 1, 1, [[3, 3]], 24]]}):
        config = convert_config({"causal": "none", **model_config})
        assert (config.network, config.base_channels, config.group_divisor) == ("redimnet2", 24, 1)
        assert (config.block_1d, config.block_2d, config.pooling_context) == ("conv+att", "basic_resnet", True)
        assert (config.grouped_strides, config.dual_maps, config.map_norm_groups) == (True, False, None)
    assert convert_config({"compress_tconvs": True}).time_strides() == [1, 1, 2, 2, 4, 4]
    assert convert_config({}).network == "redimnet"


def test_norms_of_maps_in_a_number_of_groups():
    """True means base_channels of them; a number is theirs."""
    base = {"causal": "none", "C": 16}
    groups = [convert_config({**base, "agg_gnorm": norm}).map_norm_groups for norm in (True, 4, 1, False, None)]
    assert groups == [16, 4, 1, None, None]


def test_fixed_constants_may_be_spelt_out(checkpoint):
    fixed = {"sample_rate": 16000, "n_fft": 512, "win_length": 400, "f_min": 20, "f_max": 7600}
    assert convert_checkpoint(with_spec(checkpoint, **fixed)).config.num_mel_bins == 24


def test_training_only_keys_are_ignored(checkpoint):
    config = dict(num_classes=5994, class_dropout=0.1, head_activation="nn.ReLU()", return_all_outputs=True)
    convert_checkpoint(with_config(checkpoint, tf_optimized_arch=False, **config))


def test_classifier_and_front_end_constants_are_dropped(checkpoint):
    checkpoint["state_dict"] |= {
        "cls_head.2.weight": torch.zeros(10, 32),
        "spec.torchfbank.2.mel_scale.fb": torch.zeros(257, 24),
    }
    convert_checkpoint(checkpoint)


# ----------------------------------------------------------------------------------------------------------------------
# Strictness


def test_every_wrong_tensor_is_named(checkpoint):
    tensors = checkpoint["state_dict"]
    del tensors["backbone.stem.0.weight"], tensors["pool.linear1.weight"]
    tensors["linear.bias"] = torch.zeros(31)
    tensors["backbone.stem.1.weight"] = torch.zeros(5)
    tensors["backbone.stage7.0.w"] = torch.zeros(1, 8, 96, 1)
    tensors["extra"] = torch.zeros(3)
    with pytest.raises(ConversionError) as error:
        convert_checkpoint(checkpoint)
    message = str(error.value)
    for line in (
        "missing: backbone.stem.0.weight",
        "missing: pool.linear1.weight",
        "misshapen: linear.bias (31,)",
        "misshapen: backbone.stem.1.weight (5,)",
        "left over: backbone.stage7.0.w (1, 8, 96, 1)",
        "left over: extra (3,)",
    ):
        assert line in message
    assert "6 problems" in message


@pytest.mark.parametrize(
    "key", ["backbone.stem.0.weight", "backbone.fin_wght1d.w", "backbone.stage0.2.weight", "linear.weight"]
)
def test_a_tensor_of_another_rank_is_misshapen(checkpoint, key):
    checkpoint["state_dict"][key] = torch.zeros(3)
    with pytest.raises(ConversionError, match=f"misshapen: {key}"):
        convert_checkpoint(checkpoint)


@pytest.mark.parametrize("rows", [16, 40])
@pytest.mark.parametrize("embedding_size", [None, 64])
def test_a_head_of_another_size_than_the_configuration_says(checkpoint, rows, embedding_size):
    """Growing the head must not hide that rows are missing."""
    checkpoint["state_dict"]["linear.weight"] = torch.zeros(rows, 192)
    checkpoint["state_dict"]["linear.bias"] = torch.zeros(rows)
    with pytest.raises(ConversionError, match=rf"(?s)misshapen: linear.weight \({rows}, 192\).*linear.bias"):
        convert_checkpoint(checkpoint, embedding_size)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("fwse_fc", "bn2.weight"),
        ("spec_bn", "spec.spec_norm.running_var"),
        ("aggregation_att", "backbone.mfa.0.weight"),
    ],
)
def test_optional_layers_must_be_whole(name, key):
    checkpoint = reference_checkpoint(name)
    del checkpoint["state_dict"][key]
    with pytest.raises(ConversionError, match=f"missing: {key}"):
        convert_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["fwse_fc", "aggregation_att", "fractional_expansion"])
def test_every_missing_tensor_is_noticed(name):
    """Each key of a checkpoint counts: without any one of them there is no model."""
    checkpoint = reference_checkpoint(name)
    for key in checkpoint["state_dict"]:
        rest = {k: v for k, v in checkpoint["state_dict"].items() if k != key}
        with pytest.raises(ConversionError, match="1 problems"):
            convert_checkpoint({**checkpoint, "state_dict": rest})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(surprise=1), "model_config.surprise: unknown key"),
        (dict(feat_type="tf_spec"), "model_config.feat_type: 'tf_spec'"),
        (dict(tf_optimized_arch=True), "model_config.tf_optimized_arch: True"),
        (dict(pooling_func="MHASTP"), "pooling: got 'MHASTP'"),
        (dict(block_1d_type="gru"), "block_1d: got 'gru'"),
        (dict(stages_setup=[[1, 2, 1, None]]), r"model_config.stages_setup\[0\]"),
        (dict(stages_setup=[[1, 1, 1, [[3, 3]], None], [5, 1, 1, [[3, 3]], None]]), "24 bins cannot be divided by 5"),
    ],
)
def test_unknown_architectures_are_named(checkpoint, changes, message):
    with pytest.raises(ConversionError, match=message):
        convert_checkpoint(with_config(checkpoint, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(surprise=1), "model_config.spec_params.surprise: unknown key"),
        (dict(n_fft=1024), "model_config.spec_params.n_fft: 1024, only 512"),
        (dict(f_max=8000), "model_config.spec_params.f_max: 8000, only 7600"),
    ],
)
def test_unknown_front_ends_are_named(checkpoint, changes, message):
    with pytest.raises(ConversionError, match=message):
        convert_checkpoint(with_spec(checkpoint, **changes))


def test_tensorflow_front_end_has_no_spec_norm():
    with pytest.raises(ConversionError, match="spec_params.spec_norm"):
        convert_checkpoint(with_spec(reference_checkpoint("tf"), spec_norm="mvn"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(surprise=1), "model_config.surprise: unknown key"),
        (dict(causal="full"), "model_config.causal: 'full' is not supported"),
        (dict(causal="only_1d"), "model_config.causal: 'only_1d'"),
        (dict(causal=True), "model_config.causal: True"),
        (dict(spec_in_channels=2), "model_config.spec_in_channels: 2"),
        (dict(fm_weigthing_type="N"), "model_config.fm_weigthing_type: 'N'"),
        (dict(use_freq_pos_enc=True), "model_config.use_freq_pos_enc: True"),
        (dict(pad_right_samples=160), "model_config.pad_right_samples: 160"),
        (dict(before_pool_offset=2), "model_config.before_pool_offset: 2"),
        (dict(is_subnet=True), "model_config.is_subnet: True"),
        (dict(offset_fm_weights=3), "model_config.offset_fm_weights: 3"),
        (dict(feat_type="tf_spec"), "model_config.feat_type: 'tf_spec'"),
        (dict(feat_type="pt_stft"), "model_config.feat_type: 'pt_stft'"),
        *(
            (dict(block_1d_type=kind), f"block_1d: got '{kind}'")
            for kind in ("v2_att", "tf-att", "rope-att", "att-causal")
        ),
        *((dict(block_2d_type=kind), f"block_2d: got '{kind}'") for kind in ("sdwm_resnet", "convnext_like_ws")),
        (dict(tf_optimized_arch=False), "model_config.tf_optimized_arch: unknown key"),
        (dict(agg_gnorm=0), "map_norm_groups: got 0"),
        (dict(agg_gnorm=7), "map_norm_groups: 7 does not divide 96 channels"),
        (dict(stages_setup=[[[1, 1, 1], 1, 1, [[3, 3]], None]]), r"stages_setup\[0\].*not \(\(bins' stride"),
        (dict(stages_setup=[[[1, 1], 1, 1, [[3, 3]], None], [2, 1, 1, [[3, 3]], None]]), r"stages_setup\[1\]: \[2, 1,"),
        (dict(stages_setup=[[[1, 0], 1, 1, [[3, 3]], None]]), r"stages\[0\].time_stride: got 0"),
        (
            dict(block_2d_type="convnext_like", stages_setup=[[[1, 1], 1, 1, [[3, 3, 3]], None]]),
            r"stages\[0\].kernels: got \[\[3, 3, 3\]\], expected pairs",
        ),
    ],
)
def test_unknown_architectures_of_redimnet2_are_named(changes, message):
    with pytest.raises(ConversionError, match=message):
        convert_checkpoint(with_config(reference_checkpoint("redimnet2_end_1d"), **changes))


def test_strides_of_one_axis_among_pairs_are_named(checkpoint):
    rows = [[1, 1, 1, [[3, 3]], None], [[2, 2], 1, 1, [[3, 3]], None]]
    with pytest.raises(ConversionError, match=r"stages_setup\[0\].* is not \(\(bins' stride"):
        convert_checkpoint(with_config(checkpoint, stages_setup=rows))


@pytest.mark.slow
def test_every_tensor_of_redimnet2_is_used_and_needed():
    checkpoint = reference_checkpoint("redimnet2_convatt_dual_normed")
    tensors = checkpoint["state_dict"]
    for key in tensors:
        rest = {k: v for k, v in tensors.items() if k != key}
        with pytest.raises(ConversionError, match=f"1 problems.*\n  missing: {re.escape(key)}"):
            convert_checkpoint({**checkpoint, "state_dict": rest})
    with pytest.raises(ConversionError, match=r"left over: backbone.stage0_up_2d.2.weight \(96,\)"):
        extra = {**tensors, "backbone.stage0_up_2d.2.weight": torch.zeros(96)}
        convert_checkpoint({**checkpoint, "state_dict": extra})


def test_all_configuration_problems_are_listed_at_once(checkpoint):
    with pytest.raises(ConversionError, match="(?s)one: unknown.*feat_type.*spec_params.two"):
        convert_checkpoint(with_spec(with_config(checkpoint, one=1, feat_type="x"), two=2))


# ----------------------------------------------------------------------------------------------------------------------
# Files


class RunsCode:
    def __reduce__(self):
        return print, ("code ran while a checkpoint was read",)


def test_missing_file(tmp_path):
    with pytest.raises(ConversionError, match="No checkpoint file at .*nothing.pt"):
        convert_checkpoint(tmp_path / "nothing.pt")


def test_file_that_is_no_checkpoint(tmp_path):
    (tmp_path / "notes.pt").write_text("not a checkpoint")
    with pytest.raises(
        ConversionError, match=r"notes.pt cannot be read .* \(UnpicklingError\): it is damaged, .* code\.$"
    ):
        convert_checkpoint(tmp_path / "notes.pt")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))])
def test_pickled_code_is_not_run(tmp_path, capsys, write):
    write({"model_config": {}, "state_dict": RunsCode()}, tmp_path / "code.pt")
    with pytest.raises(ConversionError, match="code.pt cannot be read"):
        convert_checkpoint(tmp_path / "code.pt")
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize(("content", "found"), [({"weights": 1}, "weights"), ([1, 2], "list")])
def test_file_with_other_content(tmp_path, content, found):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ConversionError, match=f"'model_config' and 'state_dict', got .*{found}"):
        convert_checkpoint(tmp_path / "other.pt")


@pytest.mark.parametrize(
    ("key", "number"), [("linear.weight", "nan"), ("backbone.stem.0.bias", "inf"), ("bn.running_var", "-inf")]
)
def test_numbers_that_are_none_are_named(checkpoint, key, number):
    checkpoint["state_dict"][key].view(-1)[:2] = float(number)
    with pytest.raises(
        ConversionError, match=rf"\(1 problems\):\n  damaged: {key} .* has 2 numbers that are NaN or inf"
    ):
        convert_checkpoint(checkpoint)


def test_a_damaged_checkpoint_leaves_no_folder(checkpoint, tmp_path, capsys):
    checkpoint["state_dict"]["bn.running_var"][0] = -1.0
    torch.save(checkpoint, tmp_path / "damaged.pt")
    assert main(["convert", str(tmp_path / "damaged.pt"), str(tmp_path / "out")]) == 2
    assert "damaged: bn.running_var" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("prefix", "by"),
    [("module.", "DistributedDataParallel"), ("_orig_mod.", "torch.compile"), ("net.encoder.", "a model around it")],
)
def test_a_prefix_names_its_cause(checkpoint, prefix, by):
    checkpoint["state_dict"] = {prefix + key: value for key, value in checkpoint["state_dict"].items()}
    with pytest.raises(ConversionError, match=f"begin with '{prefix}' .*, which {by} has put there") as error:
        convert_checkpoint(checkpoint)
    assert "missing" not in str(error.value)
    checkpoint["state_dict"] = {key.removeprefix(prefix): value for key, value in checkpoint["state_dict"].items()}
    convert_checkpoint(checkpoint)


def test_a_wrapped_checkpoint_says_where_it_is(checkpoint, tmp_path):
    state_dict = checkpoint["state_dict"]
    for content, message in (
        ({"epoch": 3, "model": checkpoint}, "one level deeper: give what is under 'model'"),
        (state_dict, r"weights alone, \d+ tensors. The network's settings must come with them"),
        (checkpoint | {"model_config": "b2"}, "model_config: expected a dict, got str"),
        (
            checkpoint | {"state_dict": {"model": state_dict, "optimizer": {}}},
            "'model' is a dict, expected tensors alone",
        ),
    ):
        torch.save(content, tmp_path / "wrapped.pt")
        with pytest.raises(ConversionError, match=message):
            convert_checkpoint(tmp_path / "wrapped.pt")


# ----------------------------------------------------------------------------------------------------------------------
# Embedding size


@pytest.mark.parametrize("name", ["single_stage", "fwse_fc"])  # without and with a norm behind the projection
def test_a_larger_embedding_keeps_every_cosine(name):
    small = convert_checkpoint(reference_checkpoint(name))
    large = convert_checkpoint(reference_checkpoint(name), embedding_size=100)
    assert (large.config.embedding_size, large.config.matryoshka_dims) == (100, [64, 100])
    with torch.inference_mode():
        cosines = [
            torch.cosine_similarity(*model(reference_waveform(16_000)).embeddings, dim=0) for model in (small, large)
        ]
    assert cosines[0].item() == pytest.approx(cosines[1].item(), abs=1e-6)


def test_a_smaller_embedding_is_refused(checkpoint):
    with pytest.raises(ConversionError, match="embedding_size: 16 is less than the checkpoint's 32"):
        convert_checkpoint(checkpoint, embedding_size=16)


def test_grown_rows_can_learn(checkpoint):
    """They are zero, but their gradient is not."""
    model = convert_checkpoint(checkpoint, embedding_size=64)
    model(reference_waveform(16_000)).embeddings.sum().backward()
    assert model.projection.segments[0].weight.grad[32:].abs().min() > 0
