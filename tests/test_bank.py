import json
import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import padded, tiny_config, waves
from conftest import tiny_model as defined_model
from peft import AdaLoraConfig, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from modeling_mrl_redimnet import MRLReDimNetForSequenceClassification, MRLReDimNetForXVector, MRLReDimNetModel
from mrl_redimnet.adapters import PLACEMENTS, AdapterFacts, Base, WrongBaseError, fingerprint, hub, lora_config
from mrl_redimnet.adapters.bank import AdapterBank
from mrl_redimnet.adapters.combining import METHODS
from mrl_redimnet.adapters.placement import adapted_layers
from mrl_redimnet.adapters.strategies import batch_norms, nested_weights
from mrl_redimnet.speed import speed_up

BATCH = padded(waves(8_000, 5_000, 7_000, 6_500))
GENDER = ["female", "male", "other"]


def tiny_model(*options, **more):
    """With the kernels that banks have, so that answers are equal bit for bit."""
    return speed_up(defined_model(*options, **more))


def with_head(kind=MRLReDimNetForSequenceClassification, labels: int = 2):
    """A model whose encoder is the `tiny_model()` of the banks here."""
    model = tiny_model(tiny_config(num_labels=labels), kind=kind)
    model.redimnet.load_state_dict(tiny_model().state_dict())
    return model


def classifier(labels: int) -> MRLReDimNetForSequenceClassification:
    return with_head(labels=labels)


def save_adapter(folder, config, host=None, seed=0):
    """An adapter with an effect, saved by PEFT alone."""
    torch.manual_seed(seed)
    peft = get_peft_model(tiny_model() if host is None else host, config)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in peft.named_buffers():
            if "modules_to_save" in name and buffer.is_floating_point():
                buffer.mul_(1.2)
    peft.save_pretrained(folder)


def save_adalora(folder):
    """AdaLoRA after pruning: directions of all layers are gone, of one layer all."""
    torch.manual_seed(6)
    config = AdaLoraConfig(target_modules=PLACEMENTS["conv"], exclude_modules=[".*"], init_r=4, total_step=10, tfinal=2)
    config.exclude_modules = lora_config("conv", model=tiny_model()).exclude_modules
    peft = get_peft_model(tiny_model(), config)
    pattern = {}
    for index, (name, layer) in enumerate(adapted_layers(peft).items()):
        keep = [index > 0, False, index > 0, index % 2 > 0]
        layer.lora_E["default"].data.normal_().mul_(torch.tensor(keep)[:, None])
        pattern[f"{name}.lora_E.default"] = keep
    peft.peft_config["default"].rank_pattern = pattern
    peft.save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One adapter of each kind, {name: folder}."""
    root = tmp_path_factory.mktemp("adapters")
    config = lora_config
    save_adapter(root / "tel", config("linear", r=2), seed=1)
    save_adapter(root / "far", config("linear", r=4, segment_ranks=(1, 2, 3), use_rslora=True), seed=2)
    save_adapter(root / "noisy", config("linear", r=2, lora_alpha=3, lora_dropout=0.5), seed=3)
    save_adapter(root / "all", config("all", r=2, model=tiny_model()), seed=4)
    save_adapter(root / "dora", config("attention", r=2, use_dora=True), seed=5)
    norms = batch_norms(tiny_model())
    save_adapter(root / "norms", config("attention", r=2, modules_to_save=norms), seed=7)
    head = dict(task_type="SEQ_CLS", modules_to_save=["classifier"])
    save_adapter(root / "gender", config("linear", r=2, segment_ranks=(1, 1, 2), **head), classifier(3), seed=8)
    save_adapter(root / "age", config("attention", r=2, **head), classifier(1), seed=9)
    save_adalora(root / "adalora")
    AdapterFacts("gender", Base("me/base", None, fingerprint(tiny_model())), "classification", GENDER).save(
        root / "gender"
    )
    return {folder.name: folder for folder in root.iterdir()}


def bank_of(folders, *names) -> AdapterBank:
    return AdapterBank.load(tiny_model(), {name: folders[name] for name in names})


def with_peft(folder, host=None):
    """What PEFT alone answers."""
    peft = PeftModel.from_pretrained(tiny_model() if host is None else host, folder).eval()
    with torch.inference_mode():
        return peft(**BATCH)


@pytest.fixture(scope="module")
def of_base():
    with torch.inference_mode():
        return tiny_model()(**BATCH).embeddings


@pytest.mark.parametrize("name", ["tel", "far", "noisy", "all", "dora", "norms"])
def test_answers_as_with_peft_alone(folders, of_base, name):
    bank = bank_of(folders, "gender", name)
    answer = bank.embed(**BATCH, adapter=name)
    assert torch.equal(answer, with_peft(folders[name]).embeddings)
    assert not torch.allclose(answer, of_base, atol=1e-2)
    assert torch.equal(bank.embed(**BATCH, adapter=name, truncate_dim=16), answer[:, :16])


def test_base_is_bit_identical(folders, of_base):
    assert torch.equal(AdapterBank.load(tiny_model()).embed(**BATCH), of_base)
    bank = bank_of(folders, *folders)
    for name in folders:
        bank.embed(**BATCH, adapter=name)
        assert torch.equal(bank.embed(**BATCH), of_base)
        bank.set_adapter(name)
        assert torch.equal(bank.embed(**BATCH, adapter=None), of_base)
        bank.disable()
    for name in folders:
        bank.delete(name)
        assert torch.equal(bank.embed(**BATCH), of_base)
    assert bank.names == [] and list(bank.peft.peft_config) == ["__base__"]


def test_active_adapter(folders, of_base):
    bank = bank_of(folders, "tel", "far")
    assert bank.names == ["tel", "far"] and bank.active is None
    bank.set_adapter("tel")
    of_tel = with_peft(folders["tel"]).embeddings
    assert bank.active == "tel" and torch.equal(bank.embed(**BATCH), of_tel)
    assert torch.equal(bank.peft(**BATCH).embeddings, of_tel)
    bank.embed(**BATCH, adapter="far")
    bank.add("third", folders["norms"])
    bank.delete("far")
    assert bank.active == "tel" and torch.equal(bank.embed(**BATCH), of_tel)
    bank.delete("tel")
    assert bank.active is None and torch.equal(bank.embed(**BATCH), of_base)
    assert not any("tel" in name.split(".") for name, _ in bank.peft.named_parameters())
    with pytest.raises(ValueError, match="no adapter 'tel'; loaded are: third"):
        bank.embed(**BATCH, adapter="tel")
    with pytest.raises(ValueError, match="no adapter 'tel'"):
        bank.set_adapter("tel")


def forwards(bank) -> list:
    """Grows by one at each forward pass of the encoder."""
    calls = []
    bank.model.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize(
    "rows, passes",
    [
        (["tel", None, "far", "tel"], 1),
        (["all", "gender", None, "adalora"], 1),
        (["dora", None, "tel", "norms"], 4),
        (["norms", None, "norms", None], 2),
        (["tel"] * 4, 1),
    ],
)
def test_rows_of_one_batch(folders, rows, passes):
    bank = bank_of(folders, *folders)
    alone = {name: bank.embed(**BATCH, adapter=name) for name in set(rows)}
    calls = forwards(bank)
    mixed = bank.embed(**BATCH, adapter=rows)
    assert len(calls) == passes
    expected = torch.stack([alone[name][row] for row, name in enumerate(rows)])
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=2e-6)
    assert len({tuple(alone[name][0].tolist()) for name in set(rows)}) == len(set(rows))


def test_rows_longer_than_the_window(folders):
    """The model then takes rows one by one, and PEFT's mixed batches would take each for the first."""
    bank = AdapterBank.load(
        tiny_model(tiny_config(window_seconds=0.2)), {name: folders[name] for name in ("tel", "far")}
    )
    rows = ["tel", None, "far", "tel"]
    mixed = bank.embed(**BATCH, adapter=rows)
    for row, name in enumerate(rows):
        torch.testing.assert_close(mixed[row], bank.embed(**BATCH, adapter=name)[row], rtol=1e-5, atol=2e-6)


def test_a_forward_that_raises_leaves_the_bank_as_it_was(folders):
    bank = bank_of(folders, "tel", "far", "norms")
    bank.set_adapter("far")
    expected = {name: bank.embed(**BATCH, adapter=name) for name in ("tel", "far", "norms", None)}
    mixed = bank.embed(**BATCH, adapter=["tel", None, "far", "tel"])

    def fail(*_):
        raise RuntimeError("in the middle")

    for adapter in ("tel", None, "norms", ["tel", None, "far", "tel"], ["tel", "norms", None, "far"]):
        hook = bank.model.pooling.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            bank.embed(**BATCH, adapter=adapter)
        hook.remove()
        assert bank.active == "far" and torch.equal(bank.embed(**BATCH), expected["far"])
        hooks = [part._forward_pre_hooks for part in bank.model.modules()]  # noqa: SLF001 -- torch lists them nowhere else
        assert not any(hooks)
    for rows in (["tel"], ["tel", None, "far", "nobody"], []):
        with pytest.raises(ValueError, match="names for a batch of 4|no adapter 'nobody'"):
            bank.embed(**BATCH, adapter=rows)
    with pytest.raises(ValueError, match="attention_mask: "):
        bank.embed(BATCH["input_values"][:2], BATCH["attention_mask"], adapter=["norms", None])
    assert all(torch.equal(bank.embed(**BATCH, adapter=name), answer) for name, answer in expected.items())
    assert torch.equal(bank.embed(**BATCH, adapter=["tel", None, "far", "tel"]), mixed)


def test_classification(folders):
    bank = bank_of(folders, "tel", "gender")
    expected = with_peft(folders["gender"], classifier(3))
    answer = bank.classify(**BATCH, adapter="gender")
    assert list(answer) == GENDER
    torch.testing.assert_close(torch.stack(list(answer.values()), dim=1), expected.logits.softmax(-1))
    assert torch.equal(bank.embed(**BATCH, adapter="gender"), expected.embeddings)
    assert bank.facts("gender").labels == GENDER and bank.facts("tel") is None
    with pytest.raises(ValueError, match="'tel' has no classifier"):
        bank.classify(**BATCH, adapter="tel")


def test_regression_and_classes_without_names(folders, tmp_path):
    bank = bank_of(folders, "age")
    expected = with_peft(folders["age"], classifier(1)).logits[:, 0]
    torch.testing.assert_close(bank.classify(**BATCH, adapter="age"), expected)
    shutil.copytree(folders["gender"], tmp_path / "nameless", ignore=lambda *_: ["mrl_redimnet_adapter.json"])
    bank.add("nameless", tmp_path / "nameless")
    assert list(bank.classify(**BATCH, adapter="nameless")) == ["0", "1", "2"]


@pytest.mark.parametrize("labels, size", [(["a", "b"], 32), (GENDER, 16)])
def test_classifier_that_does_not_fit(folders, tmp_path, labels, size):
    folder = shutil.copytree(folders["gender"], tmp_path / "gender")
    AdapterFacts("x", AdapterFacts.load(folder).base, "classification", labels).save(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.classifier.weight"] = torch.zeros(3, size)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="its classifier"):
        AdapterBank.load(tiny_model(), {"gender": folder})


def test_encoder_layers_of_a_model_with_a_head(folders, tmp_path):
    """PEFT alone would load such an adapter without effect."""
    layer = "redimnet.projection.segments.1"
    patterns = dict(rank_pattern={layer: 3}, alpha_pattern={layer.replace(".", r"\."): 20})
    config = LoraConfig(r=2, target_modules=[layer, "q_proj"], **patterns)
    save_adapter(tmp_path / "xv", config, with_head(MRLReDimNetForXVector))
    expected = with_peft(tmp_path / "xv", with_head(MRLReDimNetForXVector)).embeddings
    bank = AdapterBank.load(with_head(MRLReDimNetForXVector), {"xv": tmp_path / "xv"})
    assert torch.equal(bank.embed(**BATCH, adapter="xv"), expected)


def test_adalora(folders):
    bank = bank_of(folders, "tel", "adalora")
    torch.testing.assert_close(
        bank.embed(**BATCH, adapter="adalora"), with_peft(folders["adalora"]).embeddings, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", ["tel", "far", "all", "dora", "norms", "gender", "adalora"])
def test_merged(folders, tmp_path, name):
    bank = bank_of(folders, "norms", "tel", *({name} - {"norms", "tel"}))
    before = bank.embed(**BATCH, adapter=name)
    model = bank.merged(name)
    assert torch.equal(bank.embed(**BATCH, adapter=name), before)
    assert type(model) is MRLReDimNetModel and all(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    loaded = MRLReDimNetModel.from_pretrained(tmp_path).eval()  # nothing of PEFT is left
    assert loaded.state_dict().keys() == tiny_model().state_dict().keys()
    with torch.inference_mode():
        for merged in (model, loaded):
            torch.testing.assert_close(merged(**BATCH).embeddings, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["far", "dora", "norms", "gender", "adalora"])
def test_saved_adapters_load_again(folders, tmp_path, name):
    """In a bank and in PEFT; an adapter's name that is part of layers' names confuses nothing."""
    bank = AdapterBank.load(tiny_model(), {"proj": folders[name], "conv": folders["tel"]})
    bank.save("proj", tmp_path / "a")
    bank.add("segments", tmp_path / "a")
    expected = bank.embed(**BATCH, adapter="proj")
    assert torch.equal(bank.embed(**BATCH, adapter="segments"), expected)
    host = classifier(3) if name == "gender" else None
    answer = with_peft(tmp_path / "a", host)
    assert torch.equal(answer.embeddings, expected)
    if name == "gender":
        probabilities = bank.classify(**BATCH, adapter="segments")
        torch.testing.assert_close(torch.stack(list(probabilities.values()), 1), answer.logits.softmax(-1))
        assert bank.facts("segments").layers["projection.segments.2"] == 2
        assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model_name_or_path"] == "me/base"


def change(bank, name) -> dict[str, torch.Tensor]:
    """What an adapter adds to each weight of the base."""
    base = tiny_model().state_dict()
    return {key: value - base[key] for key, value in bank.merged(name).state_dict().items() if key.endswith("weight")}


def test_concatenation_is_the_weighted_sum_and_svd_the_nearest(folders):
    bank = bank_of(folders, "tel", "far", "all")
    weights = {"tel": 0.7, "far": -0.4, "all": 0.5}
    parts = {name: change(bank, name) for name in weights}
    bank.combine("cat", weights, "cat")
    bank.combine("svd", weights, rank=100)
    bank.combine("low", weights, rank=3)
    exact, svd, low = (change(bank, name) for name in ("cat", "svd", "low"))
    for key in exact:
        expected = sum(weight * parts[name][key] for name, weight in weights.items())
        torch.testing.assert_close(exact[key], expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(svd[key], expected, rtol=1e-5, atol=1e-5)
        if expected.dim() > 1 and expected.abs().max() > 1e-5:
            values = torch.linalg.svdvals(expected.flatten(1))
            error = torch.linalg.svdvals((low[key] - expected).flatten(1))
            torch.testing.assert_close(error.square().sum(), values[3:].square().sum(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_combinations_as_in_peft(folders, method):
    """Ranks are equal here, as PEFT wants them."""
    density = None if method in ("cat", "svd", "linear") else 1.0 if "dare" in method else 0.5
    bank = bank_of(folders, "tel", "noisy")
    bank.combine("ours", {"tel": 0.8, "noisy": -0.5}, method, density=density)
    peft = PeftModel.from_pretrained(tiny_model(), folders["tel"], adapter_name="tel")
    peft.load_adapter(folders["noisy"], adapter_name="noisy")
    peft.add_weighted_adapter(["tel", "noisy"], [0.8, -0.5], "theirs", method, density=density)
    peft.set_adapter("theirs")
    with torch.inference_mode():
        theirs = peft.eval()(**BATCH).embeddings
    ours = bank.embed(**BATCH, adapter="ours")
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, bank.embed(**BATCH, adapter="tel"), atol=1e-2)


@pytest.mark.parametrize("method", ["cat", "svd", "ties_svd", "dare_linear_svd"])
def test_combinations_of_unequal_ranks_are_adapters_like_others(folders, tmp_path, method):
    bank = bank_of(folders, "far", "all", "adalora")
    density = 0.5 if method not in ("cat", "svd") else None
    bank.combine("both", {"far": 0.5, "all": 0.5, "adalora": 0.1}, method, density=density)
    bank.save("both", tmp_path / "both")
    facts = AdapterFacts.load(tmp_path / "both")
    assert facts.domain == "far+all+adalora" and "0.1 x adalora" in facts.training
    fresh = AdapterBank.load(tiny_model(), {"both": tmp_path / "both"})
    answer = bank.embed(**BATCH, adapter="both")
    assert torch.equal(fresh.embed(**BATCH, adapter="both"), answer)
    torch.testing.assert_close(bank.embed(**BATCH, adapter=["both", None, "far", "all"])[0], answer[0])


@pytest.mark.parametrize(
    "weights, options, message",
    [
        ({"tel": 1, "far": 1}, dict(method="linear"), "linear.*of tel, far: ranks 2, 1 differ; cat, svd"),
        ({"tel": 1, "noisy": 1}, dict(method="ties"), "density: got None for 'ties'"),
        ({"tel": 1, "noisy": 1}, dict(method="ties", density=1.5), "density: got 1.5"),
        ({"tel": 1, "noisy": 1}, dict(method="svd", density=0.5), "density: got 0.5 for 'svd'"),
        ({"tel": 1, "noisy": 1}, dict(method="cat", rank=3), "rank: got 3 for 'cat'"),
        ({"tel": 1, "noisy": 1}, dict(rank=0), "rank: got 0"),
        ({"tel": 1, "noisy": 1}, dict(method="average"), "method: got 'average', expected one of cat, svd"),
        ({"tel": 1, "dora": 1}, {}, "'dora' is more than plain LoRA"),
        ({"tel": 1, "norms": 1}, {}, "'norms' is more than plain LoRA"),
        ({"tel": 1, "nobody": 1}, {}, "no adapter 'nobody'"),
        ({}, {}, "no adapter is named"),
    ],
)
def test_a_combination_that_fails_leaves_nothing(folders, weights, options, message):
    bank = bank_of(folders, "tel", "far", "noisy", "dora", "norms")
    names, tensors = bank.names, bank.peft.state_dict().keys()
    with pytest.raises(ValueError, match=message):
        bank.combine("new", weights, **options)
    assert bank.names == names and bank.peft.state_dict().keys() == tensors and "new" not in bank.peft.peft_config


# ---------------------------------------------------------------- cut to a rank


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_an_adapter_cut_to_a_rank_is_the_nearest_to_it(folders, rank):
    """The best of that rank for every layer's change by itself (Eckart, Young 1936); layers below it stay."""
    bank = bank_of(folders, "far")
    bank.add("cut", folders["far"], rank=rank)
    before, after = change(bank, "far"), change(bank, "cut")
    for key in [f"{name}.weight" for name in adapted_layers(bank.model, "far")]:
        whole = before[key]
        left, values, right = torch.linalg.svd(whole.flatten(1).double(), full_matrices=False)
        best = ((left[:, :rank] * values[:rank]) @ right[:rank]).float().reshape(whole.shape)
        torch.testing.assert_close(after[key], best, rtol=1e-4, atol=1e-5)
    ranks = {layer.r["cut"] for layer in adapted_layers(bank.model, "cut").values()}
    assert max(ranks) == rank


def nested(folder, source, ranks):
    """A copy of an adapter whose facts say that it was trained for several ranks."""
    shutil.copytree(source, folder)
    facts = AdapterFacts("telephony", Base("me/base", None, fingerprint(tiny_model())), nested_ranks=ranks)
    facts.save(folder)
    return folder


@pytest.mark.parametrize("name", ["far", "all"])
def test_an_adapter_for_several_ranks_is_cut_to_its_first_components(folders, tmp_path, name):
    source = nested(tmp_path / "nested", folders[name], [1, 2])
    bank = bank_of(folders, name)
    bank.add("cut", source, rank=1)
    for key, layer in adapted_layers(bank.model, name).items():
        down, up = layer.lora_A[name].weight[:1], layer.lora_B[name].weight[:, :1]
        weights = nested_weights([1, 2], layer.r[name])  # of which the first component is given the weight of all
        added = (up.flatten(1) @ down.flatten(1)) * layer.scaling[name] * (weights.sum() / weights[0])
        cut = bank.model.get_submodule(key)
        found = cut.lora_B["cut"].weight.flatten(1) @ cut.lora_A["cut"].weight.flatten(1) * cut.scaling["cut"]
        torch.testing.assert_close(found, added)
    assert bank.facts("cut").nested_ranks == []
    bank.save("cut", tmp_path / "saved")
    torch.testing.assert_close(with_peft(tmp_path / "saved").embeddings, bank.embed(**BATCH, adapter="cut"))
    assert AdapterFacts.load(tmp_path / "saved").layers.keys() == adapted_layers(bank.model, "cut").keys()


def test_a_cut_adapter_keeps_its_classifier_and_has_weights_of_its_own(folders):
    bank = bank_of(folders, "gender")
    bank.add("cut", folders["gender"], rank=1)
    assert list(bank.classify(**BATCH, adapter="cut")) == GENDER
    assert bank.fingerprint("cut") == bank.fingerprint("gender") + ":rank1"
    bank.add("whole", folders["gender"], rank=2)
    torch.testing.assert_close(bank.embed(**BATCH, adapter="whole"), bank.embed(**BATCH, adapter="gender"))


@pytest.mark.parametrize(
    ("name", "rank", "message"),
    [
        ("tel", 0, "rank: got 0, the adapter can be cut to 1 to 2"),
        ("tel", 3, "rank: got 3, the adapter can be cut to 1 to 2"),
        ("dora", 1, "Only plain LoRA can be cut"),
        ("norms", 1, "Only plain LoRA can be cut"),
    ],
)
def test_a_cut_that_cannot_be_leaves_the_bank_as_it_was(folders, of_base, name, rank, message):
    bank = bank_of(folders)
    with pytest.raises(ValueError, match=message):
        bank.add("cut", folders[name], rank=rank)
    assert bank.names == [] and torch.equal(bank.embed(**BATCH), of_base)


def test_wrong_base(folders, tmp_path):
    folder = shutil.copytree(folders["tel"], tmp_path / "tel")
    other, ours = fingerprint(tiny_model(seed=1)), fingerprint(tiny_model())
    AdapterFacts("telephony", Base("me/other", "v1", other)).save(folder)
    bank = bank_of(folders, "far")
    with pytest.raises(WrongBaseError, match="me/other at v1") as error:
        bank.add("tel", folder)
    assert other[:19] in str(error.value) and ours[:19] in str(error.value) and bank.names == ["far"]
    bank.add("tel", folder, any_base=True)
    assert bank.facts("tel").domain == "telephony"
    AdapterBank.load(tiny_model(seed=1), {"tel": folder})
    AdapterBank.load(tiny_model(), {"tel": folder}, any_base=True)


def spoil_tensors(change_tensors):
    def spoil(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        change_tensors(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return spoil


def spoil_config(**values):
    def spoil(folder):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return spoil


KEY = "base_model.model.projection.segments.0.lora_A.weight"


@pytest.mark.parametrize(
    "spoil, message",
    [
        (spoil_tensors(lambda t: t.pop(KEY)), "segments.0.lora_A.weight is not in the file"),
        (spoil_tensors(lambda t: t.update(stray=torch.zeros(1))), "stray has no place in the model"),
        (spoil_tensors(lambda t: t.update({KEY: torch.zeros(2, 3)})), r"is \(2, 3\) in the file"),
        (spoil_tensors(lambda t: t.update({KEY: torch.zeros(3, 2)})), "segments.0.lora_A.weight is"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no adapter: it has no adapter_model"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "no adapter: it has no adapter_config.json"),
        (spoil_config(target_modules=".*nowhere"), "not found in the base model"),
        (spoil_config(target_modules=r".*(q_proj|pooling)"), "not supported"),
        (spoil_config(target_modules=".*(q_proj|k_proj)"), "has no place in the model"),
        (spoil_config(bias="all"), "bias='all', which changes the base"),
        (spoil_config(init_lora_weights="pissa_niter_4"), "changes the base"),
        (
            lambda folder: LoHaConfig(target_modules=["q_proj"]).save_pretrained(folder),
            "a LOHA adapter, expected LORA or ADALORA",
        ),
        (lambda folder: (folder / "mrl_redimnet_adapter.json").write_text("{}"), "not a description of an adapter"),
    ],
)
def test_an_adapter_that_fails_leaves_the_bank_as_it_was(folders, tmp_path, of_base, spoil, message):
    bank = bank_of(folders, "far", "norms")
    bank.set_adapter("far")
    expected = bank.embed(**BATCH)
    folder = shutil.copytree(folders["tel"], tmp_path / "tel")
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        bank.add("tel", folder)
    assert bank.names == ["far", "norms"] and bank.active == "far" and "tel" not in bank.peft.peft_config
    assert not any("tel" in key.split(".") for key in bank.peft.state_dict())
    assert torch.equal(bank.embed(**BATCH), expected) and torch.equal(bank.embed(**BATCH, adapter=None), of_base)
    bank.add("tel", folders["tel"])
    assert torch.equal(bank.embed(**BATCH, adapter="tel"), with_peft(folders["tel"]).embeddings)


@pytest.mark.parametrize("name", ["", "a.b", "default", "__base__", "keys", "training"])
def test_names_that_will_not_do(folders, name):
    with pytest.raises(ValueError, match="adapter name"):
        bank_of(folders).add(name, folders["tel"])


def test_names_are_distinct(folders):
    bank = bank_of(folders, "tel")
    for attempt in (
        lambda: bank.add("tel", folders["far"]),
        lambda: bank.combine("tel", {"tel": 1.0}),
        lambda: bank.prepare_hot_swap(2, name="tel"),
    ):
        with pytest.raises(ValueError, match="there is a 'tel' already"):
            attempt()
    assert torch.equal(bank.embed(**BATCH, adapter="tel"), with_peft(folders["tel"]).embeddings)


def test_threads_never_see_each_others_adapters(folders):
    bank = bank_of(folders, "tel", "far", "dora", "norms")
    bank.set_adapter("far")
    batch = {key: value[:2, :4_000] for key, value in BATCH.items()}
    kinds = ["tel", None, "far", "dora", "norms", ("tel", None), ("far", "norms"), ("dora", "tel")]
    expected = {kind: bank.embed(**batch, adapter=kind) for kind in kinds}
    work = kinds * 8
    random.Random(0).shuffle(work)
    start = threading.Barrier(8)

    def answer(share):
        start.wait()
        return [(kind, bank.embed(**batch, adapter=kind)) for kind in share]

    with ThreadPoolExecutor(8) as pool:
        answers = [pair for part in pool.map(answer, [work[i::8] for i in range(8)]) for pair in part]
    assert len(answers) == len(work) and bank.active == "far"
    assert all(torch.equal(found, expected[kind]) for kind, found in answers)


def test_hot_swap_does_not_recompile(folders):
    bank = bank_of(folders, "tel", "far", "gender")
    bank.prepare_hot_swap(4)
    bank.set_adapter("hot")
    assert torch.equal(bank.embed(**BATCH), bank.embed(**BATCH, adapter=None))
    graphs = []
    torch.compiler.reset()
    bank.model.compile(backend=lambda module, _: graphs.append(module) or module.forward)
    bank.embed(**BATCH)
    compiled = len(graphs)
    ordinary = {name: with_peft(folders[name]).embeddings for name in ("tel", "far")}
    ordinary["gender"] = with_peft(folders["gender"], classifier(3)).embeddings
    with torch.compiler.set_stance("fail_on_recompile"):
        for name in ("far", "tel", "gender", "far"):
            bank.hot_swap(folders[name])
            torch.testing.assert_close(bank.embed(**BATCH), ordinary[name], rtol=1e-5, atol=2e-6)
    assert len(graphs) == compiled > 0
    torch.compiler.reset()


def test_hot_swap_keeps_facts_and_classifier(folders, tmp_path):
    bank = bank_of(folders, "tel")
    bank.prepare_hot_swap(3, placement="conv")
    bank.hot_swap(folders["gender"])
    expected = bank_of(folders, "gender").classify(**BATCH, adapter="gender")
    for label, probability in bank.classify(**BATCH, adapter="hot").items():
        torch.testing.assert_close(probability, expected[label])
    bank.hot_swap(folders["adalora"])
    of_adalora = with_peft(folders["adalora"]).embeddings
    torch.testing.assert_close(bank.embed(**BATCH, adapter="hot"), of_adalora, rtol=1e-5, atol=1e-5)
    assert bank.facts("hot") is None
    bank.save("hot", tmp_path / "hot")
    torch.testing.assert_close(with_peft(tmp_path / "hot").embeddings, of_adalora, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name, message",
    [
        ("all", "outside the room"),
        ("far", r"has rank \d, prepare_hot_swap made room for 2"),
        ("dora", "Only plain LoRA can be swapped"),
        ("norms", "Only plain LoRA can be swapped"),
        ("torn", "not in its file: .*segments.0.lora_A.weight"),
    ],
)
def test_hot_swap_that_does_not_fit(folders, tmp_path, name, message):
    torn = shutil.copytree(folders["tel"], tmp_path / "torn")
    spoil_tensors(lambda tensors: tensors.pop(KEY))(torn)
    bank = bank_of(folders, "tel")
    bank.prepare_hot_swap(2)
    bank.hot_swap(folders["noisy"])
    before = bank.embed(**BATCH, adapter="hot")
    with pytest.raises(ValueError, match=message):
        bank.hot_swap({**folders, "torn": torn}[name])
    assert torch.equal(bank.embed(**BATCH, adapter="hot"), before)
    with pytest.raises(ValueError, match="no room made by prepare_hot_swap"):
        bank.hot_swap(folders["noisy"], name="tel")


def test_base_from_a_folder(folders, tmp_path, of_base):
    with_head(MRLReDimNetForXVector).save_pretrained(tmp_path / "base")
    bank = AdapterBank.load(tmp_path / "base", {"gender": folders["gender"]})
    assert torch.equal(bank.embed(**BATCH), of_base)
    half = AdapterBank.load(tmp_path / "base", {"gender": folders["gender"]}, dtype=torch.bfloat16)
    assert half.model.dtype == torch.bfloat16
    near = half.embed(**BATCH, adapter="gender").float()
    torch.testing.assert_close(near, bank.embed(**BATCH, adapter="gender"), rtol=0.1, atol=0.1)
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        AdapterBank.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="dtype"):
        AdapterBank.load(tiny_model(), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="carries adapters already"):
        AdapterBank.load(bank.model)


def test_adapters_from_the_hub(folders, tmp_path, monkeypatch):
    asked = []
    tiny_model().save_pretrained(tmp_path / "base")
    local = {"me/base": tmp_path / "base", "me/tel": folders["tel"]}
    monkeypatch.setattr(hub, "pull", lambda name, **options: asked.append((name, options)) or local[name])
    bank = AdapterBank.load("me/base", {"tel": "me/tel"}, revision="v1", token="secret")
    bank.add("again", "me/tel", revision="v2")
    versions = [("me/base", "v1"), ("me/tel", None), ("me/tel", "v2")]
    assert asked == [(name, dict(revision=revision, token="secret")) for name, revision in versions]
    assert torch.equal(bank.embed(**BATCH, adapter="again"), bank.embed(**BATCH, adapter="tel"))
