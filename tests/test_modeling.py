import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import EXPANDED, VARIANTS, enable_checkpointing, padded, relative_error, tiny_config, tiny_model, waves
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from masking_mrl_redimnet import BatchNorm, whole_frames
from modeling_mrl_redimnet import (
    MapMix,
    MapNorm,
    MRLReDimNetForSequenceClassification,
    MRLReDimNetForXVector,
    MRLReDimNetModel,
)
from mrl_redimnet.adapters.placement import PLACEMENTS, lora_config
from mrl_redimnet.speed import speed_up

MODELS = (MRLReDimNetModel, MRLReDimNetForXVector, MRLReDimNetForSequenceClassification)


def assert_equal(ours, expected):
    """Bit for bit; unlike `assert_equal(...)` a failure says by how much."""
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def embed(model, *args, **kwargs) -> torch.Tensor:
    with torch.inference_mode():
        return model(*args, **kwargs).embeddings


def tensors(model) -> dict[str, torch.Tensor]:
    """Copies of all parameters and buffers, those that are not saved included."""
    return {n: t.detach().clone() for n, t in [*model.named_parameters(), *model.named_buffers()]}


def assert_same_tensors(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]):
    assert before.keys() == after.keys()
    assert [name for name, tensor in before.items() if not torch.equal(tensor, after[name])] == []


# ----------------------------------------------------------------------------------------------------------------------
# Padding


def assert_padding_changes_nothing(model, utterances, limit=1e-5, **batch_options):
    before = tensors(model)
    together = embed(model, **padded(utterances, **batch_options))
    for row, utterance in zip(together, utterances, strict=True):
        assert relative_error(row, embed(model, utterance[None])[0]) < limit
    assert_same_tensors(before, tensors(model))


@pytest.mark.parametrize("variant", VARIANTS)
def test_short_and_long_utterances_in_one_batch(variant):
    """0.3 s and 20 s, noise as padding: each answers as it does alone, and evaluation changes no buffer."""
    assert_padding_changes_nothing(tiny_model(tiny_config(variant)), waves(4_800, 320_000), garbage=1.0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_shortest_utterance_in_a_batch(variant):
    model = tiny_model(tiny_config(variant))
    assert_padding_changes_nothing(model, waves(model.config.min_samples, 8_000), garbage=1.0, extra=100, limit=1e-4)


@pytest.mark.parametrize("variant", ["convnext_convatt", "tf_mel_normalized", "norm_mean_variance", "redimnet2_dual"])
def test_padding_may_be_nan(variant):
    """An uninitialised buffer's tail must not reach the answer."""
    assert_padding_changes_nothing(tiny_model(tiny_config(variant)), waves(5_000, 8_000), garbage=float("nan"))


@given(
    variant=st.sampled_from(sorted(VARIANTS)),
    lengths=st.lists(st.integers(4_800, 32_000), min_size=1, max_size=4),
    extra=st.integers(0, 500),
    garbage=st.sampled_from([0.0, 1.0, 100.0]),
)
def test_any_lengths_in_one_batch(variant, lengths, extra, garbage):
    assert_padding_changes_nothing(tiny_model(tiny_config(variant)), waves(*lengths), extra=extra, garbage=garbage)


def test_mask_of_ones_is_no_mask(model):
    batch = torch.stack(waves(16_000, 16_000))
    assert_equal(embed(model, batch, torch.ones(2, 16_000)), embed(model, batch))


def test_masks_may_be_of_any_type(model):
    batch = padded(waves(8_000, 12_000))
    answers = [
        embed(model, batch["input_values"], batch["attention_mask"].to(dtype))
        for dtype in (torch.bool, torch.int64, torch.float32)
    ]
    assert_equal(answers[0], answers[1])
    assert_equal(answers[0], answers[2])


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_does_not_see_padding(variant):
    """More padding changes neither a training batch's answer, nor the running statistics that it leaves behind."""
    utterances = waves(4_800, 9_000, 12_345)
    tight, loose = (tiny_model(tiny_config(variant)).train() for _ in range(2))
    answers = [
        tight(**padded(utterances)).embeddings,
        loose(**padded(utterances, extra=5_000, garbage=1.0)).embeddings,
    ]
    assert relative_error(answers[1], answers[0]) < 1e-4
    for name, buffer in tight.named_buffers():
        torch.testing.assert_close(dict(loose.named_buffers())[name], buffer, rtol=1e-4, atol=1e-5, msg=name)


def test_training_statistics_are_those_of_the_audio():
    """Padding behind utterances of one length: the same as the batch without it."""
    plain, behind = tiny_model().train(), tiny_model().train()
    utterances = waves(8_000, 8_000)
    plain(torch.stack(utterances))
    behind(**padded(utterances, extra=4_000, garbage=1.0))
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(dict(behind.named_buffers())[name], buffer, rtol=1e-4, atol=1e-5, msg=name)


# ----------------------------------------------------------------------------------------------------------------------
# Prefixes


@pytest.mark.parametrize("variant", ["convnext_convatt", "tstp_embedding_norm", "redimnet2_normed"])
@pytest.mark.parametrize("dim", [8, 16, 32])
def test_truncated_embedding_is_a_prefix_of_the_full_one(variant, dim):
    model, batch = tiny_model(tiny_config(variant)), padded(waves(8_000, 12_000))
    assert_equal(embed(model, **batch, truncate_dim=dim), embed(model, **batch)[:, :dim])


def test_wrong_prefix(model):
    with pytest.raises(ValueError, match=r"truncate_dim: got 12, the model has \[8, 16, 32\]"):
        model(torch.randn(1, 8_000), truncate_dim=12)


# ----------------------------------------------------------------------------------------------------------------------
# Wrong input


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.randn(8_000), r"input_values: expected floating point \[batch, samples\], got .* \(8000,\)"),
        (torch.randn(1, 1, 8_000), r"shape \(1, 1, 8000\)"),
        (torch.ones(1, 8_000, dtype=torch.int16), "got torch.int16"),
        (torch.randn(1, 256), "input_values: 256 samples, the model needs at least 257"),
    ],
)
def test_wrong_waveforms(model, values, message):
    with pytest.raises(ValueError, match=message):
        model(values)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 7_999), r"attention_mask: shape \(2, 7999\) differs from input_values' \(2, 8000\)"),
        (torch.ones(2, 8_000).index_fill(1, torch.arange(100), 0), "padding must follow the audio"),
        (torch.ones(2, 8_000).index_fill(1, torch.arange(100, 200), 0), "padding must follow the audio"),
        (torch.tensor([[1] * 8_000, [1] * 200 + [0] * 7_800]), "utterance 1 has 200 samples, the model needs 257"),
    ],
)
def test_wrong_masks(model, mask, message):
    with pytest.raises(ValueError, match=message):
        model(torch.randn(2, 8_000), mask)


@pytest.mark.parametrize("kind", MODELS[1:])
def test_heads_take_no_prefix(kind):
    with pytest.raises(TypeError, match="truncate_dim and depth belong to MRLReDimNetModel"):
        tiny_model(kind=kind)(torch.randn(1, 8_000), truncate_dim=8)


@pytest.mark.parametrize("kind", MODELS)
def test_unknown_arguments_are_refused(kind):
    """`adapter_names` in particular: without PEFT around the model it would silently do nothing."""
    with pytest.raises(TypeError, match=r"no use for: adapter_names\. .*adapter_names to a PeftModel"):
        tiny_model(kind=kind)(torch.randn(1, 8_000), adapter_names=["far"])


def test_arguments_that_callers_pass_as_none_are_fine(model):
    model(torch.randn(1, 8_000), input_ids=None, inputs_embeds=None, output_attentions=False)


# ----------------------------------------------------------------------------------------------------------------------
# Long audio


@pytest.mark.parametrize("variant", ["convnext_convatt", "redimnet2_dual"])
def test_long_audio_is_the_mean_of_equal_windows(variant):
    model, whole = tiny_model(tiny_config(variant, window_seconds=0.5)), tiny_model(tiny_config(variant))
    (utterance,) = waves(20_000)  # three windows of at most 8000 samples
    windows = [utterance[None, start:end] for start, end in ((0, 6_666), (6_666, 13_333), (13_333, 20_000))]
    expected = torch.stack([embed(whole, window) for window in windows]).mean(0)
    assert relative_error(embed(model, utterance[None]), expected) < 1e-5


def test_audio_of_one_window_is_not_cut():
    (utterance,) = waves(8_000)
    assert_equal(
        embed(tiny_model(tiny_config(window_seconds=0.5)), utterance[None]), embed(tiny_model(), utterance[None])
    )


@pytest.mark.parametrize("variant", ["convnext_convatt", "redimnet2_dual"])
def test_padding_of_long_audio(variant):
    """Windows are those of each utterance alone: one window, just two, and more."""
    model = tiny_model(tiny_config(variant, window_seconds=0.5))
    assert_padding_changes_nothing(model, waves(4_800, 8_000, 8_001, 21_000), extra=123, garbage=1.0)


def test_prefix_of_long_audio():
    model, batch = tiny_model(tiny_config(window_seconds=0.5)), padded(waves(8_000, 21_000))
    assert_equal(embed(model, **batch, truncate_dim=8), embed(model, **batch)[:, :8])


# ----------------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("variant", ["convnext_convatt", "convnext_conv", "fwse_att", "redimnet2_dual"])
@pytest.mark.parametrize("options", [None, {"use_reentrant": False}, {"preserve_rng_state": True}])
def test_gradient_checkpointing_changes_nothing(variant, options):
    """Least of all the running statistics, which a second forward pass would update twice."""
    config = tiny_config(variant, map_dropout=0.1)
    plain, saving = (tiny_model(config, kind=MRLReDimNetForXVector).train() for _ in range(2))
    enable_checkpointing(saving, options)
    assert saving.is_gradient_checkpointing
    batch = padded(waves(6_000, 8_000, 8_000))
    losses = []
    for model in (plain, saving):
        torch.manual_seed(0)
        losses.append(model(**batch, labels=torch.tensor([0, 3, 1])).loss)
        losses[-1].backward()
    assert_equal(*losses)
    assert_same_tensors(dict(plain.named_buffers()), dict(saving.named_buffers()))
    gradients = dict(saving.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, msg=name)


@pytest.mark.parametrize("variant", ["convnext_convatt", "redimnet2_dual"])
@pytest.mark.parametrize("lora", [False, True])
def test_reentrant_checkpointing_is_replaced_by_the_other_with_a_warning(variant, lora):
    """Of maps in a list it would see no gradients, in silence: most weights would not train."""
    plain, saving = (tiny_model(tiny_config(variant)).train() for _ in range(2))
    with pytest.warns(UserWarning, match="use_reentrant=True.* is checkpointed with use_reentrant=False") as warned:
        enable_checkpointing(saving, {"use_reentrant": True})
    assert len(warned) == 1
    if lora:
        config = LoraConfig(target_modules=LINEAR, init_lora_weights=False)
        plain, saving = (get_peft_model(model, config) for model in (plain, saving))
        saving.load_state_dict(plain.state_dict())
    for model in (plain, saving):
        model(input_values=torch.stack(waves(6_000, 8_000)[1:] * 2)).embeddings.square().sum().backward()
    gradients = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    assert gradients and all(gradient is not None for gradient in gradients.values())
    torch.testing.assert_close({n: p.grad for n, p in saving.named_parameters() if p.requires_grad}, gradients)
    torch.testing.assert_close(dict(saving.named_buffers()), dict(plain.named_buffers()))


def test_only_some_stages_checkpointed_is_the_same():
    plain, saving = (tiny_model().train() for _ in range(2))
    enable_checkpointing(saving, every_n_layers=2)
    assert [stage.gradient_checkpointing for stage in saving.trunk.stages] == [True, False]
    for model in (plain, saving):
        model(torch.stack(waves(8_000, 8_000))).embeddings.square().sum().backward()
    gradients = ({name: p.grad for name, p in model.named_parameters()} for model in (saving, plain))
    torch.testing.assert_close(*gradients)


@pytest.mark.filterwarnings("error::FutureWarning")
def test_peft_looks_for_gradient_checkpointing_without_a_warning(model):
    assert not get_peft_model(model, LoraConfig(target_modules=LINEAR)).base_model.model.is_gradient_checkpointing


def test_a_copy_of_a_checkpointed_model_moves_its_statistics_once():
    plain, saving = (tiny_model().train() for _ in range(2))
    enable_checkpointing(saving)
    copied = copy.deepcopy(saving)
    for model in (plain, copied):
        model(torch.stack(waves(8_000, 8_000))).embeddings.sum().backward()
    assert_same_tensors(dict(plain.named_buffers()), dict(copied.named_buffers()))


def test_running_statistics_still_move_under_gradient_checkpointing():
    model = tiny_model().train()
    enable_checkpointing(model)
    before = tensors(model)
    model(torch.stack(waves(8_000, 8_000))).embeddings.sum().backward()
    norms = [name for name in before if name.endswith("running_mean")]
    assert not any(torch.equal(before[name], tensors(model)[name]) for name in norms)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(enable|disable)` is deprecated")
def test_gradient_checkpointing_by_its_older_name_and_off_again(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.is_gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient(variant):
    model = tiny_model(tiny_config(variant), kind=MRLReDimNetForXVector).train()
    model(**padded(waves(8_000, 6_000, 7_000)), labels=torch.tensor([0, 1, 2])).loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []


def test_spec_augment_hides_stretches_in_training_only():
    config = tiny_config(spec_augment=True, freq_mask_width=[5, 6], time_mask_width=[7, 8], freq_mask_start=3)
    front_end = tiny_model(config).front_end
    wave = torch.stack(waves(8_000, 8_000))
    assert (front_end(wave) != 0).all()
    hidden = front_end.train()(wave) == 0
    assert hidden.all(2).sum(1).tolist() == [7, 7]
    assert hidden.all(1).sum(1).tolist() == [5, 5]
    assert not hidden.all(1)[:, :3].any()


def test_aggregation_dropout_hides_what_the_pooling_sees_in_training_only():
    wave = torch.stack(waves(8_000, 8_000))
    for variant in ("convnext_convatt", "aggregation"):
        model, plain = (tiny_model(tiny_config(variant, aggregation_dropout=p)) for p in (0.4, 0.0))
        assert_equal(embed(model, wave), embed(plain, wave))
        features = model.front_end(wave)
        hidden = model.train().trunk(features) == 0
        assert hidden.float().mean().item() == pytest.approx(0.4, abs=0.05)
        assert not (plain.train().trunk(features) == 0).any()


def test_projection_dropout_hides_pooled_numbers_in_training_only():
    """Behind the batch norm, whose statistics therefore do not change; the same numbers for every prefix."""
    projection, plain = (tiny_model(tiny_config(projection_dropout=p)).projection for p in (0.4, 0.0))
    pooled = torch.randn(8, plain.norm.num_features)
    assert_equal(projection(pooled), plain(pooled))
    seen = []
    for segment in projection.segments:
        segment.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for each in (projection, plain):
        each.train()(pooled)
    assert (seen[0] == 0).float().mean().item() == pytest.approx(0.4, abs=0.05)
    assert all(torch.equal(one, seen[0]) for one in seen)
    assert_equal(projection.norm.running_var, plain.norm.running_var)


# ----------------------------------------------------------------------------------------------------------------------
# Saving and precision


@pytest.mark.parametrize("variant", ["convnext_convatt", "norm_batch", "tf_mel", "redimnet2_dual"])
@pytest.mark.parametrize("kind", MODELS)
def test_save_and_load(kind, variant, tmp_path):
    """Every tensor bit for bit, the front end's constants included, which are not in the file.

    Answers may differ in the last digit: tensors of a file lie elsewhere in memory, where sums have another order.
    """
    model = tiny_model(tiny_config(variant, num_labels=3), kind=kind)
    model.save_pretrained(tmp_path)
    loaded, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same_tensors(tensors(model), tensors(loaded))
    batch = padded(waves(8_000, 12_000))
    assert relative_error(embed(loaded, **batch), embed(model, **batch)) < 1e-5


@pytest.mark.parametrize("kind", MODELS[1:])
def test_encoder_alone_from_a_saved_head_model(kind, tmp_path):
    model = tiny_model(kind=kind)
    model.save_pretrained(tmp_path)
    assert_same_tensors(tensors(model.redimnet), tensors(MRLReDimNetModel.from_pretrained(tmp_path)))


def test_head_on_a_saved_encoder_starts_fresh(model, tmp_path):
    """What the file lacks is initialised, not left as the memory was."""
    model.save_pretrained(tmp_path)
    loaded = MRLReDimNetForXVector.from_pretrained(tmp_path, num_speakers=500)
    assert_same_tensors(tensors(model), tensors(loaded.redimnet))
    assert loaded.classifier.weight.std().item() == pytest.approx(32**-0.5, rel=0.05)


@pytest.mark.parametrize("variant", ["convnext_convatt", "redimnet2_normed"])
def test_loading_in_bfloat16(variant, tmp_path):
    """Weights in bfloat16, but a front end in float32: log-mel features need its digits."""
    model = tiny_model(tiny_config(variant))
    model.save_pretrained(tmp_path)
    half = MRLReDimNetModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.trunk.stem.conv.weight.dtype == torch.bfloat16
    assert_same_tensors(tensors(model.front_end), tensors(half.front_end))
    batch = padded(waves(8_000, 16_000))
    assert relative_error(embed(half, **batch), embed(model, **batch)) < 0.05


def test_front_end_of_a_model_cast_as_a_whole(model):
    """`model.to(bfloat16)` casts buffers as well: features lose digits, but stay float32 and finite."""
    wave = torch.stack(waves(8_000))
    features = model.front_end(wave)
    cast = copy.deepcopy(model).to(torch.bfloat16).front_end(wave)
    assert cast.dtype == torch.float32
    assert relative_error(cast, features) < 0.05


@pytest.mark.parametrize("variant", ["convnext_convatt", "fwse_att", "norm_batch", "tf_mel", "redimnet2_normed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_close_to_float32(variant, dtype):
    model, batch = tiny_model(tiny_config(variant)), padded(waves(8_000, 16_000))
    exact = embed(model, **batch)
    with torch.autocast("cpu", dtype=dtype):
        assert relative_error(embed(model, **batch), exact) < (0.05 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_step_under_autocast(variant):
    """As training loops do it, the backward pass outside."""
    model = tiny_model(tiny_config(variant), kind=MRLReDimNetForXVector).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**padded(waves(8_000, 6_000)), labels=torch.tensor([0, 1])).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("variant", "masked"),
    [("convnext_convatt", False), ("convnext_convatt", True)]
    + [pytest.param("redimnet2_dual", masked, marks=pytest.mark.slow) for masked in (False, True)]
    + [pytest.param("redimnet2_ungrouped", masked, marks=pytest.mark.slow) for masked in (False, True)],
)
def test_trunk_compiles_as_one_graph(variant, masked):
    model = tiny_model(tiny_config(variant))
    features = torch.randn(2, 52, 24)
    mask = (torch.arange(52) < torch.tensor([[52], [32]]))[..., None] if masked else None
    compiled = torch.compile(model.trunk, fullgraph=True, backend="eager")
    with torch.inference_mode():
        assert_equal(compiled(features, mask), model.trunk(features, mask))


@pytest.mark.parametrize(
    ("variant", "training", "masked"),
    [
        pytest.param("convnext_convatt", True, True, marks=pytest.mark.slow),
        ("fwse_att", True, False),
        ("redimnet2_dual", False, True),
    ],
)
def test_a_whole_model_compiles_as_one_graph_with_the_loss(variant, training, masked):
    torch.compiler.reset()  # it compiles the same code only so often
    config = tiny_config(variant, scale=8.0)
    model = tiny_model(config, kind=MRLReDimNetForXVector).double().train(training)
    batch = padded(waves(8_000, 6_000)) if masked else {"input_values": torch.stack(waves(8_000, 8_000))}
    gradients = []
    for call in (model, torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")):
        answer = call(**batch, labels=torch.tensor([0, 3]))
        answer.loss.backward()
        gradients.append([answer.loss, answer.embeddings, *(p.grad for p in call.parameters())])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_tuple_output(model):
    wave = torch.stack(waves(8_000))
    with torch.inference_mode():
        assert_equal(model(wave, return_dict=False)[0], model(wave).embeddings)


# ----------------------------------------------------------------------------------------------------------------------
# Heads


def test_xvector_without_labels():
    model = tiny_model(kind=MRLReDimNetForXVector)
    wave = torch.stack(waves(8_000, 8_000))
    answer = model(wave)
    assert answer.loss is None and answer.prefix_losses is None
    assert_equal(answer.embeddings, model.redimnet(wave).embeddings)
    cosines = F.cosine_similarity(answer.embeddings[:, None], model.classifier.weight[None], dim=-1)
    torch.testing.assert_close(answer.logits, 32.0 * cosines)


def test_xvector_with_labels():
    model = tiny_model(tiny_config(prefix_weights=[1, 1, 2]), kind=MRLReDimNetForXVector)
    batch, labels = padded(waves(8_000, 6_000)), torch.tensor([4, 0])
    answer = model(**batch, labels=labels)
    loss, prefix_losses, logits = model.classifier(model.redimnet(**batch).embeddings, labels)
    assert_equal(answer.loss, loss)
    assert_equal(answer.prefix_losses, prefix_losses)
    assert_equal(answer.logits, logits)
    assert not torch.equal(answer.loss, model(**batch, labels=labels, margin=0.0).loss)


def test_classification():
    model = tiny_model(tiny_config(num_labels=3), kind=MRLReDimNetForSequenceClassification)
    labels = torch.tensor([2, 0])
    answer = model(**padded(waves(8_000, 6_000)), labels=labels)
    assert answer.logits.shape == (2, 3)
    torch.testing.assert_close(answer.loss, F.cross_entropy(model.classifier(answer.embeddings), labels))


def test_regression():
    model = tiny_model(tiny_config(num_labels=1), kind=MRLReDimNetForSequenceClassification)
    labels = torch.tensor([25, 60])
    answer = model(**padded(waves(8_000, 6_000)), labels=labels)
    torch.testing.assert_close(answer.loss, (answer.logits[:, 0] - labels).square().mean())
    assert model(**padded(waves(8_000))).loss is None


# ----------------------------------------------------------------------------------------------------------------------
# Frozen batch norms

NORMED = ["convnext_convatt", "fwse_att", "aggregation", "tstp_embedding_norm", "norm_batch", "redimnet2_dual"]


def norms_of(model) -> dict[str, nn.BatchNorm1d]:
    return {name: part for name, part in model.named_modules() if isinstance(part, nn.BatchNorm1d)}


def drawn(norm: nn.BatchNorm1d) -> nn.BatchNorm1d:
    """With weights and statistics as after a training."""
    generator = torch.Generator().manual_seed(1)
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        tensor.uniform_(0.5, 1.5, generator=generator)
    return norm


@pytest.mark.parametrize("variant", NORMED)
def test_a_frozen_model_in_training_answers_as_in_use_and_keeps_its_statistics(variant):
    model = tiny_model(tiny_config(variant)).requires_grad_(False)
    batch, before = padded(waves(4_800, 9_000), extra=3_000, garbage=1.0), tensors(model)
    in_use, in_training = embed(model, **batch), embed(model.train(), **batch)
    assert_equal(in_training, in_use)
    assert_same_tensors(before, tensors(model))


@pytest.mark.parametrize("variant", NORMED)
def test_a_model_that_trains_normalises_by_the_batch_and_moves_its_statistics(variant):
    model = tiny_model(tiny_config(variant))
    batch, before = padded(waves(4_800, 9_000)), tensors(model)
    in_use, in_training = embed(model, **batch), embed(model.train(), **batch)
    assert relative_error(in_training, in_use) > 0.05
    after = tensors(model)
    for name in norms_of(model):
        for statistic in ("running_mean", "running_var", "num_batches_tracked"):
            assert not torch.equal(before[f"{name}.{statistic}"], after[f"{name}.{statistic}"]), name


def test_of_all_norms_only_the_frozen_ones_keep_their_statistics():
    model = tiny_model().train()
    norms = norms_of(model)
    frozen = set(list(norms)[::2])
    for name in frozen:
        norms[name].requires_grad_(False)
    before = tensors(model)
    embed(model, **padded(waves(4_800, 9_000)))
    after = tensors(model)
    kept = {name for name in norms if torch.equal(before[f"{name}.running_mean"], after[f"{name}.running_mean"])}
    assert kept == frozen and 1 < len(kept) < len(norms)


def test_a_frozen_norm_passes_gradients_of_its_statistics_not_of_the_batch():
    norm = drawn(BatchNorm(3)).requires_grad_(False).train()
    x = torch.randn(2, 5, 3, requires_grad=True)
    norm(x, torch.ones(2, 5, 1, dtype=torch.bool)).sum().backward()
    slope = norm.weight / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(x.grad, slope.expand(2, 5, 3))


@pytest.mark.parametrize("frozen", [True, False])
def test_gradient_checkpointing_leaves_frozen_norms_frozen(frozen):
    """The second forward pass included: the same gradients, the same statistics."""
    plain, saving = (tiny_model(kind=MRLReDimNetForXVector).train() for _ in range(2))
    enable_checkpointing(saving)
    batch, before = padded(waves(6_000, 8_000, 8_000)), tensors(plain)
    for model in (plain, saving):
        for norm in norms_of(model.redimnet.trunk).values():
            norm.requires_grad_(not frozen)
        model(**batch, labels=torch.tensor([0, 3, 1])).loss.backward()
    after = tensors(saving)
    assert_same_tensors(dict(plain.named_buffers()), dict(saving.named_buffers()))
    for name in norms_of(saving.redimnet.trunk):
        statistic = f"redimnet.trunk.{name}.running_mean"
        assert torch.equal(before[statistic], after[statistic]) is frozen, name
    gradients = dict(saving.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, msg=name)
    assert plain.redimnet.trunk.stem.conv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("shape", [(6, 4), (2, 5, 4), (2, 5, 3, 4)])
def test_a_norm_that_trains_is_torchs_own(shape):
    """Answers, gradients and statistics; with a mask those of the frames that it lets through."""
    ours = drawn(BatchNorm(4)).double().train()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    masks = [None]
    if len(shape) > 2:
        mask = torch.ones(2, 5, 1, dtype=torch.bool)
        mask[1, 3:] = False
        masks.append(mask)
    for mask in masks:
        theirs = copy.deepcopy(ours)
        theirs.__class__ = nn.BatchNorm1d
        valid = ... if mask is None else mask[..., 0]
        one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        answer = ours(one) if mask is None else ours(one, mask)
        expected = theirs(other[valid].flatten(0, -2))
        torch.testing.assert_close(answer[valid].flatten(0, -2), expected)
        assert mask is None or not answer[~valid].any()
        answer.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(one.grad, other.grad)
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
        torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)
        torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))
        ours.zero_grad()


def test_a_norm_that_trains_refuses_a_single_value():
    with pytest.raises(ValueError, match="at least 2 values"):
        BatchNorm(3).train()(torch.randn(1, 3))


# ----------------------------------------------------------------------------------------------------------------------
# Feature maps of fewer frames


@pytest.mark.parametrize("strides", [[1], [1, 1], [1, 2], [1, 1, 2, 2, 6], [1, 4]])
@pytest.mark.parametrize("fast", [False, True])
def test_mixed_maps_are_those_of_repeated_frames(strides, fast):
    """Repeated one by one, weighted by a softmax over maps, added up."""
    torch.manual_seed(0)
    mix = MapMix(strides, 10)
    mix.logits.data.normal_()
    maps = [torch.randn(2, 12 // stride, 10) for stride in strides]
    whole = [x.repeat_interleave(stride, dim=1) for x, stride in zip(maps, strides, strict=True)]
    expected = sum(x * weight for x, weight in zip(whole, mix.logits.softmax(0), strict=True))
    torch.testing.assert_close((speed_up(mix) if fast else mix)(maps), expected)


@pytest.mark.parametrize("groups", [1, 3, 12])
def test_a_maps_norm_is_torchs_group_norm_of_its_valid_frames(groups):
    torch.manual_seed(0)
    norm = MapNorm(groups, 12)
    norm.weight.data.normal_()
    norm.bias.data.normal_()
    x = 3.0 + torch.randn(2, 9, 12)
    mask = (torch.arange(9) < torch.tensor([[9], [4]]))[..., None]
    expected = F.group_norm(x.transpose(1, 2), groups, norm.weight, norm.bias).transpose(1, 2)
    torch.testing.assert_close(norm(x, None), expected, rtol=1e-4, atol=1e-5)
    ours = norm(x, mask)
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[1, :4], norm(x[1:, :4], None)[0], rtol=1e-4, atol=1e-5)


def test_frames_are_cut_to_whole_strides_for_each_utterance():
    features = torch.arange(11.0).reshape(1, 11, 1).expand(3, 11, 5)
    mask = (torch.arange(11) < torch.tensor([[11], [8], [3]]))[..., None]
    cut, valid = whole_frames(features, mask, 4)
    assert_equal(cut, features[:, :8])
    assert valid[..., 0].sum(1).tolist() == [8, 8, 0] and valid[:2].all()
    assert whole_frames(features, None, 4)[1] is None
    assert whole_frames(features, mask, 1) == (features, mask)


@pytest.mark.parametrize("samples", [8_000, 8_159, 8_160, 8_480])  # 51, 51, 52 and 54 frames: four fill one of the last
def test_frames_past_a_whole_stride_are_seen_by_the_front_end_alone(samples):
    """Alone and in a batch an utterance is cut by its own length."""
    model = tiny_model(tiny_config("redimnet2_dual", feature_norm="none"))
    (wave,) = waves(samples)
    features = model.front_end(wave[None])
    frames = model.front_end.num_frames(samples)
    whole = model.trunk(features[:, : frames // 4 * 4])
    assert_equal(model.pooled(wave[None]), model.pooling(whole, None))
    assert_padding_changes_nothing(model, [wave, *waves(12_345)], garbage=1.0)


# ----------------------------------------------------------------------------------------------------------------------
# Adapters

LINEAR = r".*\.(q_proj|v_proj|ffn_in|ffn_out|reduce|expand|pointwise|stride|attention_in)|projection\.segments\.\d"


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("convnext_convatt", dict(stages=EXPANDED)),
        ("fwse_att", dict(stages=EXPANDED)),
        ("redimnet2_ungrouped", {}),
    ],
)
def test_lora(variant, changes):
    """A LoRA adapter changes the answer, and merged into the weights it gives the same one."""
    model, batch = tiny_model(tiny_config(variant, **changes)), padded(waves(8_000, 6_000))
    base = embed(model, **batch)
    torch.manual_seed(0)
    adapter = LoraConfig(task_type="FEATURE_EXTRACTION", target_modules=LINEAR, r=4, init_lora_weights=False)
    adapted = get_peft_model(model, adapter).eval()
    unmerged = embed(adapted, **batch)
    assert relative_error(unmerged, base) > 1e-2
    assert relative_error(embed(adapted.merge_and_unload(), **batch), unmerged) < 1e-5


def test_lora_trains_nothing_else():
    adapted = get_peft_model(tiny_model(), LoraConfig(task_type="FEATURE_EXTRACTION", target_modules=LINEAR))
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    adapted.train()(input_values=torch.stack(waves(8_000, 8_000))).embeddings.sum().backward()


def test_adapters_chosen_per_utterance():
    """One batch, the second utterance with an adapter, the first without."""
    model, wave = tiny_model(), torch.stack(waves(8_000, 8_000))
    base = embed(model, wave)
    torch.manual_seed(0)
    config = LoraConfig(task_type="FEATURE_EXTRACTION", target_modules=LINEAR, init_lora_weights=False)
    adapted = get_peft_model(model, config, adapter_name="far").eval()
    mixed = embed(adapted, input_values=wave, adapter_names=["__base__", "far"])
    assert relative_error(mixed[0], base[0]) < 1e-5
    assert relative_error(mixed[1], embed(adapted, input_values=wave)[1]) < 1e-5


@pytest.mark.parametrize("variant", ["convnext_relu_att", "fwse_att", "redimnet2"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_an_adapter_switched_off_leaves_the_base(variant, placement):
    """Bit for bit."""
    model, batch = tiny_model(tiny_config(variant)), padded(waves(8_000, 6_000))
    base = embed(model, **batch)
    adapted = get_peft_model(model, lora_config(placement, model=model, init_lora_weights=False)).eval()
    assert relative_error(embed(adapted, **batch), base) > 1e-3
    with adapted.disable_adapter():
        off = embed(adapted, **batch)
    assert_equal(off, base)


def test_norms_fold_into_the_last_axis():
    """Evaluation computes a batch norm as one multiply-add: the same as PyTorch's own."""
    model = tiny_model()
    norm = next(m for m in model.trunk.modules() if isinstance(m, nn.BatchNorm1d))
    x = torch.randn(2, 5, 3, norm.num_features)
    expected = F.batch_norm(
        x.movedim(-1, 1), norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
    ).movedim(1, -1)
    torch.testing.assert_close(norm(x), expected)


def test_a_norm_in_float16_does_not_overflow_between():
    """Its scale is 300 / sqrt(1e-6), and its shift twice that: more than float16 holds."""
    norm = BatchNorm(2, eps=1e-6).half().eval()
    norm.weight.data.fill_(300.0)
    norm.running_mean.fill_(2.0)
    norm.running_var.fill_(0.0)
    scale, shift = norm.scale_and_shift()
    assert scale.isfinite().all() and shift.isfinite().all() and scale.max() > 65_504
    half = torch.float16
    wide = BatchNorm(2).half().eval()
    wide.running_var.fill_(60_000.0)
    x = torch.tensor([[60_000.0, -60_000.0]], dtype=half)
    torch.testing.assert_close(wide(x), (x.float() / 60_000.0**0.5).half())


@pytest.mark.slow
def test_narrow_time_convolutions_return_in_bfloat16():
    """In a process of its own: where the library's kernel hangs, it cannot be interrupted."""
    code = """
import torch
from modeling_mrl_redimnet import conv_time, depthwise_time_conv
with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
    for width in (8, 12, 16):
        conv_time(depthwise_time_conv(width, 59), torch.randn(2, 101, width), None)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
