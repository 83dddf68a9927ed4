"""Exits: embeddings that need only the first stages of a network."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import (
    VARIANTS,
    at_most,
    padded,
    relative_error,
    run_alone,
    stages,
    tiny_config,
    tiny_model,
    waves,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from training_runs import results_of

from modeling_mrl_redimnet import MRLReDimNetForXVector, MRLReDimNetModel
from mrl_redimnet import SpeakerEncoder
from mrl_redimnet.data.synthetic import make_corpus
from mrl_redimnet.fingerprints import fingerprint
from mrl_redimnet.saving import load_model, save_model
from mrl_redimnet.speed import speed_up
from mrl_redimnet.training.curves import Record
from mrl_redimnet_cli import main
from pretrained_mrl_redimnet import WeightsError

WITHOUT = ("tstp_embedding_norm", "redimnet2_normed")  # exits are refused there
NETWORKS = sorted(set(VARIANTS) - set(WITHOUT))
THREE = stages((1, 1, 1, None), (2, 1, 1, 4), (1, 1, 1, 4))


def with_exits(variant: str = "convnext_convatt", kind: type = MRLReDimNetModel, **changes):
    """A model that has an exit after every stage but the last."""
    if "stages" not in VARIANTS[variant]:
        changes = {"stages": THREE, **changes}
    count = len(tiny_config(variant, **changes).stages)
    return tiny_model(tiny_config(variant, **changes, exits=list(range(1, count))), kind=kind)


def embed(model, *arguments, **options) -> torch.Tensor:
    with torch.inference_mode():
        return model(*arguments, **options).embeddings


# ---------------------------------------------------------------- what an exit answers


@pytest.mark.parametrize("variant", NETWORKS)
def test_an_exit_is_a_network_of_the_first_stages(variant):
    """Bit for bit, its prefixes too, and to rounding in the faster forms."""
    model, batch = with_exits(variant), padded(waves(6_000, 9_000, 5_000))
    answers = [embed(model, **batch)]
    for depth in model.config.exits:
        cut = model.at_depth(depth)
        expected = embed(cut, **batch)
        assert len(cut.trunk.stages) == len(cut.config.stages) == depth
        assert torch.equal(embed(model, **batch, depth=depth), expected)
        assert torch.equal(embed(model, **batch, depth=depth, truncate_dim=8), expected[:, :8])
        assert relative_error(embed(speed_up(cut), **batch), expected) < 1e-5
        answers.append(expected)
    fast = speed_up(model)
    for depth, expected in zip([None, *model.config.exits], answers, strict=True):
        assert relative_error(embed(fast, **batch, depth=depth), expected) < 1e-5
    assert all(relative_error(one, answers[0]) > 0.01 for one in answers[1:])


def test_a_model_cut_at_an_exit_leaves_the_whole_alone():
    model = with_exits()
    before, wave = {name: tensor.clone() for name, tensor in model.state_dict().items()}, waves(8_000)[0][None]
    answer = embed(model, wave)
    cut = model.at_depth(2)
    with torch.no_grad():
        for parameter in cut.parameters():
            parameter.zero_()
    assert cut.config.exits == [1] and list(cut.exits) == ["1"] and model.config.exits == [1, 2]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(embed(model, wave), answer)
    assert model.at_depth(1).config.exits is None


@pytest.mark.parametrize("depth", [1, 2])
def test_stages_behind_an_exit_are_not_computed(depth):
    model, wave = with_exits(), waves(8_000)[0][None]
    expected = embed(model, wave, depth=depth)
    with torch.no_grad():
        for stage in model.trunk.stages[depth:]:
            for parameter in stage.parameters():
                parameter.fill_(torch.nan)
    assert torch.equal(embed(model, wave, depth=depth), expected)
    assert embed(model, wave).isnan().all()


@given(
    variant=st.sampled_from(NETWORKS),
    lengths=st.lists(st.integers(4_800, 24_000), min_size=1, max_size=3),
    extra=st.integers(0, 500),
    garbage=st.sampled_from([0.0, 1.0, float("nan")]),
)
@at_most(60)
def test_padding_changes_no_exit(variant, lengths, extra, garbage):
    model, utterances = with_exits(variant), waves(*lengths)
    for depth in model.config.exits:
        together = embed(model, **padded(utterances, extra=extra, garbage=garbage), depth=depth)
        for row, utterance in zip(together, utterances, strict=True):
            assert relative_error(row, embed(model, utterance[None], depth=depth)[0]) < 1e-5


def test_an_exit_in_front_of_a_time_stride_sees_frames_that_the_whole_leaves_out():
    """Its own time strides say how many frames are whole: 1, 2 and 2 here, of the whole 4."""
    model = with_exits("redimnet2")
    frames = {end: model.frames(waves(160 * 42)[0][None], None, model.exits[end])[0].shape[1] for end in model.exits}
    whole = model.frames(waves(160 * 42)[0][None])[0].shape[1]
    found = int(model.front_end.num_frames(160 * 42))
    assert whole == found // 4 * 4 < found
    assert frames == {"1": found, "2": found // 2 * 2, "3": found // 2 * 2}


@pytest.mark.parametrize("variant", ["convnext_convatt", "redimnet2_dual"])
def test_long_recordings_and_weights_of_frames_at_every_depth(variant):
    """Windows are averaged by their weights, and what is weighted is the exit's frames."""
    model = with_exits(variant, window_seconds=1.0)
    wave, short = torch.cat(waves(16_000, 16_000, 16_000))[None], waves(16_000)[0][None]
    for depth in model.config.exits:
        cut, weights = model.at_depth(depth), torch.rand(1, 2, 300)
        for audio, more in ((wave, {"frame_weights": weights}), (wave, {}), (short, {"frame_weights": weights})):
            assert torch.equal(embed(model, audio, depth=depth, **more), embed(cut, audio, **more))
        windows = [embed(model, wave[:, start : start + 16_000], depth=depth) for start in (0, 16_000, 32_000)]
        torch.testing.assert_close(embed(model, wave, depth=depth), sum(windows) / 3, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", NETWORKS)
@pytest.mark.parametrize("kind", [MRLReDimNetModel, MRLReDimNetForXVector])
def test_all_depths_from_one_pass(variant, kind):
    """Of audio that fills the frames of every stage: the answers of each depth by itself."""
    model = with_exits(variant, kind)
    hop = model.config.hop_length
    batch = torch.stack(waves(*[hop * 48 - 1 + (200 if model.config.front_end == "tf_mel" else 0)] * 2))
    if int(model.base_model.front_end.num_frames(batch.shape[1])) % 4:
        batch = batch[:, : batch.shape[1] - hop * (int(model.base_model.front_end.num_frames(batch.shape[1])) % 4)]
    with torch.inference_mode():
        found = model(batch, output_exits=True)
    assert found.exits.shape == (len(model.config.exits), 2, 32)
    assert torch.equal(found.embeddings, model(batch).embeddings) and model(batch).exits is None
    for depth, exit in zip(model.config.exits, found.exits, strict=True):
        torch.testing.assert_close(exit, embed(model.base_model, batch, depth=depth), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["convnext_convatt", "redimnet2_dual", "aggregation"])
def test_faster_forms_train_exits_as_the_definition_does(variant):
    batch, gradients = padded(waves(6_000, 8_000, 5_000)), []
    for fast in (False, True):
        model = with_exits(variant).double().train()
        found = (speed_up(model) if fast else model)(**batch, output_exits=True)
        (found.exits.sin().sum() + found.embeddings.cos().sum()).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)
    assert all(gradient is not None for gradient in gradients[0].values())


@pytest.mark.parametrize(
    ("depth", "message"),
    [
        (3, r"depth: got 3, the model has exits after the stages \[1, 2\]; None is the whole network"),
        (0, "depth: got 0"),
        (True, "depth: got True"),
    ],
)
def test_wrong_depths(depth, message):
    for call in (lambda model: model(waves(8_000)[0][None], depth=depth), lambda model: model.at_depth(depth)):
        with pytest.raises(ValueError, match=message):
            call(with_exits())
    with pytest.raises(ValueError, match="depth: got 1, the model has no exits; None is the whole network"):
        tiny_model()(waves(8_000)[0][None], depth=1)
    with pytest.raises(TypeError, match="no use for: depth"):
        with_exits(kind=MRLReDimNetForXVector)(waves(8_000)[0][None], depth=1)


@pytest.mark.parametrize("more", [dict(depth=1), dict(truncate_dim=8), dict(frame_weights=torch.ones(1, 3))])
def test_all_exits_are_whole_embeddings(more):
    with pytest.raises(ValueError, match="output_exits: is for whole embeddings"):
        with_exits()(waves(8_000)[0][None], output_exits=True, **more)


# ---------------------------------------------------------------- configuration, fingerprints, files


@pytest.mark.parametrize("exits", [[], [0], [3], [2, 1], [1, 1], [1.0], [True], ["1"]])
def test_wrong_exits(exits):
    with pytest.raises(ValueError, match="exits: got .*, expected increasing whole numbers from 1 to 2, or None"):
        tiny_config(stages=THREE, exits=exits)


@pytest.mark.parametrize("variant", WITHOUT)
def test_networks_that_have_no_exits(variant):
    with pytest.raises(ValueError, match="exits: not with (embedding_norm|aggregation_per_bin)"):
        tiny_config(variant, exits=[1])


def test_exits_change_neither_the_whole_network_nor_its_fingerprint():
    plain, model = tiny_model(tiny_config(stages=THREE)), with_exits()
    model.load_state_dict(plain.state_dict(), strict=False)
    wave = waves(8_000)[0][None]
    assert torch.equal(embed(model, wave), embed(plain, wave)) and fingerprint(model) == fingerprint(plain)
    assert len({fingerprint(plain), *(fingerprint(model.at_depth(depth)) for depth in (1, 2))}) == 3
    before = fingerprint(model.at_depth(1))
    with torch.no_grad():
        model.exits["1"].mix.logits[0] += 1
    assert fingerprint(model.at_depth(1)) != before and fingerprint(model) == fingerprint(plain)


def test_exits_are_saved_and_loaded(tmp_path):
    model, batch = with_exits(), padded(waves(6_000, 9_000))
    save_model(model, tmp_path / "model")
    save_model(model.at_depth(2), tmp_path / "cut")
    loaded, cut = load_model(tmp_path / "model"), load_model(tmp_path / "cut")
    assert loaded.config.exits == [1, 2] and cut.config.exits == [1]
    for depth in (None, 1, 2):
        assert torch.equal(embed(loaded, **batch, depth=depth), embed(model, **batch, depth=depth))
    assert torch.equal(embed(cut, **batch), embed(model, **batch, depth=2))
    assert torch.equal(embed(cut, **batch, depth=1), embed(model, **batch, depth=1))


def test_exits_are_new_where_they_are_asked_for_alone(tmp_path):
    """Those that the model has keep their weights, others are left out; nothing else may be missing."""
    model, wave = with_exits(), waves(8_000)[0][None]
    model.save_pretrained(tmp_path / "both")
    model.at_depth(2).save_pretrained(tmp_path / "one")
    plain = MRLReDimNetModel.from_pretrained(tmp_path / "both", exits=None)
    # Weights that are read lie elsewhere in memory, for which some processors' kernels round otherwise.
    assert not plain.exits and relative_error(embed(plain.eval(), wave), embed(model, wave)) < 1e-6
    plain.save_pretrained(tmp_path / "plain")
    later = MRLReDimNetModel.from_pretrained(tmp_path / "both", exits=[2])
    assert relative_error(embed(later.eval(), wave, depth=2), embed(model, wave, depth=2)) < 1e-6
    new = MRLReDimNetModel.from_pretrained(tmp_path / "plain", exits=[1, 2]).eval()
    assert relative_error(embed(new, wave), embed(model, wave)) < 1e-6
    assert not new.exits["1"].mix.logits.any() and new.exits["2"].norm.running_var.eq(1).all()
    with pytest.raises(ValueError, match="exits: got"):
        MRLReDimNetModel.from_pretrained(tmp_path / "plain", exits=[7])
    config = json.loads((tmp_path / "plain/config.json").read_text())
    (tmp_path / "plain/config.json").write_text(json.dumps({**config, "exits": [1]}))
    with pytest.raises(WeightsError, match=r"missing \(exits.1"):
        MRLReDimNetModel.from_pretrained(tmp_path / "plain")


LOADER = """
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel
folder, out = sys.argv[1:]
wave = load_file(f"{folder}/wave.safetensors")["wave"]
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules."), type(model)
with torch.inference_mode():
    found = {"exit": model(wave, depth=1).embeddings, "cut": model.at_depth(1)(wave).embeddings}
save_file(found, out)
"""


def test_exits_where_the_package_is_not_imported(tmp_path):
    from safetensors.torch import save_file

    model, wave = with_exits(), waves(8_000)[0][None]
    save_model(model, tmp_path / "model")
    save_file({"wave": wave}, tmp_path / "model/wave.safetensors")
    run_alone(LOADER, tmp_path / "model", tmp_path / "out.safetensors", folder=tmp_path)
    found = load_file(tmp_path / "out.safetensors")
    assert relative_error(found["exit"], embed(model, wave, depth=1)) < 1e-6
    assert relative_error(found["cut"], found["exit"]) < 1e-6


# ---------------------------------------------------------------- in use


@pytest.fixture
def saved(tmp_path) -> Path:
    save_model(with_exits(kind=MRLReDimNetForXVector), tmp_path / "model")
    return tmp_path / "model"


def test_an_encoder_at_a_depth(saved):
    audio = [wave.numpy() for wave in waves(6_000, 9_000)]
    whole = SpeakerEncoder.from_pretrained(saved)
    for depth in (1, 2):
        encoder = SpeakerEncoder.from_pretrained(saved, depth=depth)
        expected = embed(whole.model.redimnet, **padded(waves(6_000, 9_000)), depth=depth)
        assert relative_error(torch.from_numpy(encoder.embed(audio)), expected) < 1e-5
        assert encoder.embed(audio, dim=8).shape == (2, 8) and encoder.name == f"model at depth {depth}"
        assert encoder.fingerprint == fingerprint(whole.model.redimnet.at_depth(depth)) != whole.fingerprint
    with pytest.raises(ValueError, match="depth: got 5"):
        SpeakerEncoder.from_pretrained(saved, depth=5)


def test_an_adapter_of_the_whole_reaches_an_exit(folder, adapters, tmp_path):
    """It is merged into the stages and the projection that an exit shares; another depth has another name."""
    plain = load_model(folder).redimnet
    model = MRLReDimNetModel(tiny_config(exits=[1])).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    save_model(model, tmp_path / "with exit")
    audio = [waves(9_000)[0].numpy()]
    base = SpeakerEncoder.from_pretrained(tmp_path / "with exit", depth=1)
    adapted = SpeakerEncoder.from_pretrained(tmp_path / "with exit", adapters / "telephony", depth=1)
    assert np.abs(adapted.embed(audio) - base.embed(audio)).max() > 1e-3
    assert adapted.fingerprint.startswith(f"{base.fingerprint}+sha256:") and adapted.adapter == "telephony"
    with pytest.raises(ValueError, match="other weights|another base|trained on"):
        base.adapters.add("telephony", adapters / "telephony")


def test_thresholds_of_one_depth_are_not_those_of_another(saved, speech, tmp_path, capsys):
    lists = ["--trials", speech / "few.txt", "--folder", speech / "wav", "--false-accept", 0.2]
    assert main(["calibrate", str(saved), *map(str, lists), "--depth", "1"]) == 2
    assert "--depth: give --out, a folder of its own" in capsys.readouterr().err
    (tmp_path / "of depth 1").mkdir()
    own = ["--depth", 1, "--out", tmp_path / "of depth 1"]
    assert not main(list(map(str, ["calibrate", saved, *lists, *own])))
    files = sorted(map(str, (speech / "wav").rglob("*.wav")))[:2]
    words = ["verify", str(saved), files[0], "--test", files[1], "--thresholds", str(tmp_path / "of depth 1")]
    assert main([*words, "--depth", "1"]) in (0, 1)
    assert "model at depth 1, 32 dimensions, cosine" in capsys.readouterr().out
    assert main([*words, "--depth", "2"]) == 2
    assert "was set on other weights" in capsys.readouterr().err


def test_an_exit_is_exported(saved, tmp_path, capsys):
    file = tmp_path / "exit.onnx"
    assert not main(["export", str(saved), "--depth", "1", "--out", str(file)])
    session, batch = onnxruntime.InferenceSession(file), padded(waves(6_000, 9_000))
    feeds = {"input_values": batch["input_values"].numpy(), "attention_mask": batch["attention_mask"].long().numpy()}
    found = torch.from_numpy(session.run(["embeddings"], feeds)[0])
    assert relative_error(found, embed(load_model(saved).redimnet, **batch, depth=1)) < 1e-4
    assert not main(["export", str(saved), "--out", str(tmp_path / "whole.onnx")])
    assert file.stat().st_size < (tmp_path / "whole.onnx").stat().st_size
    adapter = ["--to", "onnx-adapter", "--adapter", str(saved), "--out", str(tmp_path / "a.onnx_adapter")]
    assert main(["export", str(saved), "--depth", "1", *adapter]) == 2
    assert "--depth is for models" in capsys.readouterr().err


# ---------------------------------------------------------------- training


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("depth") / "corpus"
    return make_corpus(root, 6, 3, sessions=2, utterances=2, seconds=(0.8, 1.2))


@pytest.fixture
def base(tmp_path) -> Path:
    """A model without exits."""
    save_model(tiny_model(tiny_config(stages=THREE)), tmp_path / "base")
    return tmp_path / "base"


EXITS = "{exits: [1, 2]}"


def weights(output: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return load_file(output / name / "model.safetensors")


def losses(output: Path) -> list[float]:
    return [line["exits_loss"] for line in Record(output).lines("train")]


def test_exits_learn_on_a_frozen_network(train, base):
    """They come nearer to the whole network, whose answers stay bit for bit."""
    how = dict(finetune="exits", margin_weight=0, batch_size=12, steps=60, learning_rate=0.05, evaluate_every=60)
    output = train(model=base, model_options=EXITS, **how)
    found = losses(output)
    assert np.mean(found[-5:]) < 0.7 * found[0]
    before, after = load_file(base / "model.safetensors"), weights(output)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {name.split(".")[1] for name in after.keys() - before.keys()} == {"1", "2"}
    assert not torch.equal(after["exits.1.norm.running_mean"], torch.zeros_like(after["exits.1.norm.running_mean"]))
    assert {"synthetic", "synthetic, depth 1", "synthetic, depth 2"} == results_of(output)["results"].keys()


@pytest.mark.parametrize("labels", [False, True])
def test_all_learn_together(train, base, labels):
    """Beside the margin loss or a teacher; each adds its part."""
    how = {} if labels else dict(margin_weight=0, teacher=base)
    output = train(model=base, model_options=EXITS, **how, batch_size=12, steps=3)
    line = Record(output).lines("train")[0]
    assert 0 < line["exits_loss"] < 2 and ("loss" in line) == labels and ("teacher_loss" in line) != labels
    after, kind = weights(output), "redimnet." if labels else ""
    before = {f"{kind}{name}": tensor for name, tensor in load_file(base / "model.safetensors").items()}
    moved = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert f"{kind}trunk.stem.conv.weight" in moved and f"{kind}pooling.attention_in.weight" in moved
    assert after[f"{kind}exits.2.mix.logits"].any()


def test_without_weight_exits_stay(train, saved):
    output = train(model=saved, model_options="{}", exits_weight=0, steps=2)
    before, after = load_file(saved / "model.safetensors"), weights(output)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if ".exits." in name)
    assert "exits_loss" not in Record(output).lines("train")[0]
    assert "synthetic, depth 1" not in results_of(output)["results"]


def test_a_resumed_run_ends_with_the_same_exits(train, base):
    settings = dict(model=base, model_options=EXITS, steps=4, checkpoint_every=2, evaluate_every=2)
    output = train(**settings)
    whole = weights(output)
    shutil.rmtree(output / "checkpoints/step-00000004")
    shutil.rmtree(output / "last")
    train("--resume", **settings)
    after = weights(output)
    assert whole.keys() == after.keys() and all(torch.equal(whole[name], after[name]) for name in whole)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(finetune="exits"), "finetune: exits learn from the whole network alone; give margin_weight: 0"),
        (dict(finetune="exits", margin_weight=0, model_options="{}"), "finetune: the model has no exits; name them"),
        (dict(model_options="{exits: [3]}"), "model_options.exits: got .3., expected increasing whole numbers"),
    ],
)
def test_wrong_recipes(train, base, capsys, settings, message):
    with pytest.raises((ValueError, SystemExit)) as error:
        train(**{"model": base, "model_options": EXITS, **settings})
    assert re.search(message, f"{error.value} {capsys.readouterr().err}")
