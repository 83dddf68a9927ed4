import json

import pytest
import torch
from conftest import tiny_config, tiny_model, waves
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from configuration_mrl_redimnet import MRLReDimNetConfig
from modeling_mrl_redimnet import MRLReDimNetForSequenceClassification, MRLReDimNetForXVector, MRLReDimNetModel
from mrl_redimnet.adapters import (
    PLACEMENTS,
    AdapterFacts,
    Base,
    WrongBaseError,
    adapter_report,
    fingerprint,
    lora_config,
)
from mrl_redimnet.fingerprints import ANSWERING, same_weights

TARGETS = {  # of the tiny model: one 1-D block of four convolution units and a transformer layer, three segments
    "attention": 4,
    "attention+ffn": 6,
    "pointwise": 6,
    "projection": 3,
    "linear": 15,
    "conv": 16,  # the stem; the blocks' convolutions are grouped
    "all": 23,  # 2 strides, 2 pointwise layers and the pooling's 3 besides
}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_placement_reaches_the_layers_it_names(placement):
    model = tiny_model()
    adapted = get_peft_model(model, lora_config(placement, r=2, model=model))
    assert len(adapted.base_model.targeted_module_names) == TARGETS[placement]


# Four stages, the first of them and the last two with a 1-D block; all expand, but for one.
TARGETS2 = {
    "attention": 12,
    "attention+ffn": 18,
    "pointwise": 3 * 6 + 1,  # with the layer behind the last mixing
    "projection": 3,
    "linear": 18 + 19 + 3,
    "conv": 18 + 19 + 3 + 1,
    "all": 41 + 8 + 3 + 3,  # 2 pointwise layers a block, 3 squeezes, the pooling's 3; the strides are grouped
}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_placement_reaches_the_same_layers_in_redimnet2(placement):
    model = tiny_model(tiny_config("redimnet2_normed"))
    adapted = get_peft_model(model, lora_config(placement, r=2, model=model))
    assert len(adapted.base_model.targeted_module_names) == TARGETS2[placement]


def test_ungrouped_strides_over_time_are_adapted():
    model = tiny_model(tiny_config("redimnet2_ungrouped"))
    adapted = get_peft_model(model, lora_config("all", r=2, model=model, init_lora_weights=False)).eval()
    names = adapted.base_model.targeted_module_names
    assert [name for name in names if name.endswith("stride")] == [f"trunk.stages.{i}.stride" for i in range(4)]
    batch = torch.stack(waves(8000))
    answer = adapted(input_values=batch).embeddings
    torch.testing.assert_close(adapted.merge_and_unload()(batch).embeddings, answer, rtol=1e-4, atol=1e-5)


def test_ungrouped_convolutions_are_adapted_and_merged():
    model = tiny_model(tiny_config("resnet_ungrouped"))
    adapted = get_peft_model(model, lora_config("conv", r=2, model=model, init_lora_weights=False)).eval()
    names = adapted.base_model.targeted_module_names
    assert [name for name in names if "blocks" in name] == [
        f"trunk.stages.{stage}.blocks.0.conv{i}" for stage in (0, 1) for i in (1, 2)
    ]
    batch = torch.stack(waves(8000))
    answer = adapted(input_values=batch).embeddings
    torch.testing.assert_close(adapted.merge_and_unload()(batch).embeddings, answer, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(placement="convs"), "placement: got 'convs', expected one of attention"),
        (dict(placement="all"), "placement 'all': pass model="),
        (dict(placement="attention", segment_ranks=[4, 2, 1]), "does not reach the projection"),
    ],
)
def test_what_cannot_be_placed_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        lora_config(**arguments)


def test_adapter_survives_saving_and_merging(tmp_path):
    """A trained adapter answers the same after loading it onto a fresh base, and merged into it."""
    batch = torch.stack(waves(8_000, 8_000))
    adapted = get_peft_model(tiny_model(), lora_config("linear", r=2, init_lora_weights=False)).eval()
    with torch.inference_mode():
        answer = adapted(input_values=batch).embeddings
        assert not torch.allclose(answer, tiny_model()(batch).embeddings, atol=1e-3)
        adapted.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_model(tiny_config()), tmp_path).eval()
        assert torch.equal(loaded(input_values=batch).embeddings, answer)
        torch.testing.assert_close(loaded.merge_and_unload()(batch).embeddings, answer, rtol=1e-5, atol=1e-5)


def test_the_report_adds_up():
    adapted = get_peft_model(tiny_model(), lora_config("linear", r=2, segment_ranks=[6, 4, 2]))
    *rows, last = adapter_report(adapted).splitlines()
    total = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert len(rows) == 15 and sum(int(row.split()[-1].replace(",", "")) for row in rows) == total
    assert f"{total:,} trainable parameters" in last and f"{4 * total / 1e6:.2f} MB" in last
    assert [row.split()[-2] for row in rows[-3:]] == ["6", "4", "2"]


# ---------------------------------------------------------------- facts and fingerprints


def test_the_fingerprint_is_of_the_encoder_whatever_is_around_it():
    model = tiny_model(kind=MRLReDimNetForXVector)
    own = fingerprint(model)
    assert own == fingerprint(model.redimnet) == fingerprint(tiny_model(kind=MRLReDimNetForXVector).redimnet)
    adapted = get_peft_model(model.redimnet, lora_config("all", r=2, model=model, modules_to_save=["projection.norm"]))
    assert fingerprint(adapted) == fingerprint(model) == own
    assert fingerprint(tiny_model(kind=MRLReDimNetForXVector).bfloat16()) == own


@pytest.mark.parametrize("name", ["trunk.stem.conv.weight", "projection.norm.running_mean"])
def test_the_fingerprint_changes_with_any_weight_or_statistic(name):
    model = tiny_model()
    before = fingerprint(model)
    model.state_dict()[name].view(-1)[-1] += 0.5
    assert fingerprint(model) != before


TRAINING_ALONE = {  # fields that leave embeddings (of the whole network) as they are
    *("spec_augment", "spec_augment_repeats", "freq_mask_width", "time_mask_width", "freq_mask_start"),
    *("map_dropout", "aggregation_dropout", "projection_dropout", "num_speakers", "loss", "margin", "scale"),
    *("label_smoothing", "sphereface2_balance", "sphereface2_exponent", "sub_centers", "hard_negatives"),
    *("hard_negative_margin", "prefix_weights", "exits"),
}


def test_the_fingerprint_knows_every_field_that_changes_an_embedding():
    fields = set(MRLReDimNetConfig.__annotations__) - {"model_type"}
    assert fields == {*ANSWERING, *TRAINING_ALONE}
    of_base = fingerprint(tiny_model())
    assert of_base == fingerprint(tiny_model(tiny_config(margin=0.3, projection_dropout=0.5, num_speakers=9)))
    for changes in ({"hop_length": 240}, {"preemphasis": False}, {"feature_norm": "none"}, {"window_seconds": 30.0}):
        model = tiny_model()
        for name, value in changes.items():
            setattr(model.config, name, value)
        other = fingerprint(model)
        assert other != of_base and other.split("+config:")[0] == of_base.split("+config:")[0]
        with pytest.raises(WrongBaseError, match="another configuration") as error:
            AdapterFacts("telephony", Base("me/base", None, of_base)).check_base(model, "me/base")
        assert of_base[-16:] in str(error.value) and other[-16:] in str(error.value)


def test_a_fingerprint_of_the_weights_alone_is_still_that_of_its_base():
    model = tiny_model()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(0.5)
    old = "sha256:eb60b54d061fe5f4d3e9544aadb54bd9d90d090fa7f4e24505dd3e003d32f69a"  # saved without the configuration
    AdapterFacts("telephony", Base("me/base", None, old)).check_base(model, "me/base")
    assert same_weights(f"{old}+sha256:ab", f"{fingerprint(model)}+sha256:ab")
    assert not same_weights(f"{old}+sha256:ab", f"{fingerprint(model)}+sha256:cd")
    with pytest.raises(WrongBaseError):
        AdapterFacts("telephony", Base("me/base", None, old)).check_base(tiny_model(), "me/base")


def test_another_base_is_refused_and_both_are_shown():
    facts = AdapterFacts("telephony", Base("me/base", "v1", fingerprint(tiny_model())))
    facts.check_base(tiny_model(), "me/base", "v1")
    other = tiny_model(seed=1)
    with pytest.raises(WrongBaseError) as error:
        facts.check_base(other, "you/base")
    for part in ("me/base at v1", fingerprint(tiny_model())[:19], "you/base", fingerprint(other)[:19], "any_base=True"):
        assert part in str(error.value)


def test_facts_survive_saving(tmp_path):
    base = Base("me/base", None, "sha256:0")
    facts = AdapterFacts("gender", base, "classification", ["f", "m"], "Trained.", {"projection.segments.0": 4})
    facts.save(tmp_path)
    assert AdapterFacts.load(tmp_path) == facts
    assert [path.name for path in tmp_path.iterdir()] == ["mrl_redimnet_adapter.json"]


def test_facts_of_a_later_version_are_read(tmp_path):
    AdapterFacts("noisy", Base("me/base", None, "sha256:0")).save(tmp_path)
    file = tmp_path / "mrl_redimnet_adapter.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"colour": "blue"}))
    assert AdapterFacts.load(tmp_path).domain == "noisy"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"domain": "x", "base": {"repository": "y"}}'])
def test_facts_that_are_none_are_refused_by_the_files_name(tmp_path, content):
    (tmp_path / "mrl_redimnet_adapter.json").write_text(content)
    with pytest.raises(ValueError, match="mrl_redimnet_adapter.json is not a description of an adapter"):
        AdapterFacts.load(tmp_path)


def test_no_facts_are_none(tmp_path):
    assert AdapterFacts.load(tmp_path) is None


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="task: got 'guessing'"):
        AdapterFacts("x", Base("me/base", None, ""), task="guessing")


# ---------------------------------------------------------------- transformers' own adapter methods


@pytest.mark.parametrize("kind", [MRLReDimNetModel, MRLReDimNetForSequenceClassification])
def test_the_adapter_methods_of_transformers_equal_peft(tmp_path, kind):
    """Needs a pair of transformers and PEFT that work together: pyproject.toml's ranges."""
    model, batch = tiny_model(kind=kind), {"input_values": torch.stack(waves(8000, 8000))}
    expected = {}
    with torch.inference_mode():
        expected[None] = model(**batch).embeddings
        for seed, name in enumerate(("telephony", "noisy")):
            torch.manual_seed(seed)
            config = lora_config("linear", 2, init_lora_weights=False)
            adapted = get_peft_model(tiny_model(kind=kind), config).eval()
            adapted.save_pretrained(tmp_path / name)
            expected[name] = PeftModel.from_pretrained(tiny_model(kind=kind), tmp_path / name)(**batch).embeddings

        def answers(name):
            return torch.equal(model(**batch).embeddings, expected[name])

        for name in ("telephony", "noisy"):
            model.load_adapter(str(tmp_path / name), adapter_name=name)
        for name in ("telephony", "noisy", "telephony"):
            model.set_adapter(name)
            assert model.active_adapters() == [name] and answers(name)
        model.disable_adapters()
        assert answers(None)
        model.enable_adapters()
        assert answers("telephony")
        model.save_pretrained(tmp_path / "saved")  # the active adapter, as transformers saves it
        again = PeftModel.from_pretrained(tiny_model(kind=kind), tmp_path / "saved")
        assert torch.equal(again(**batch).embeddings, expected["telephony"])
        model.delete_adapter("telephony")
        model.set_adapter("noisy")
        assert answers("noisy")
        model.add_adapter(lora_config("linear", 2), "fresh")
        assert model.active_adapters() == ["fresh"] and answers(None)  # it has learnt nothing yet
        state, stored = model.get_adapter_state_dict("noisy"), load_file(tmp_path / "noisy/adapter_model.safetensors")
        assert {f"base_model.model.{key}" for key in state} == stored.keys()
        assert all(torch.equal(tensor, stored[f"base_model.model.{key}"]) for key, tensor in state.items())
