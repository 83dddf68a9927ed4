"""Model and adapter folders: whole, loadable by every class, and replaced in one step or not at all."""

import json
import shutil
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import tiny_config, tiny_model, waves
from huggingface_hub import ModelCard
from peft import IA3Config, LoHaConfig, LoraConfig, OFTConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from modeling_mrl_redimnet import MRLReDimNetForSequenceClassification, MRLReDimNetForXVector, MRLReDimNetModel
from mrl_redimnet.adapters import AdapterBank, AdapterFacts, Base, fingerprint
from mrl_redimnet.adapters.publishing import publish_adapter, save_adapter, write_adapter_card
from mrl_redimnet.adapters.strategies import AdapterPlan, Probe, Vanilla
from mrl_redimnet.data.corpus import SpeakerTable
from mrl_redimnet.files import recover_folder, refuse_existing, replace_folder
from mrl_redimnet.hub_cards.results import Evaluation
from mrl_redimnet.rows import AttributeRow, VerificationRow
from mrl_redimnet.saving import SENTENCE_TRANSFORMERS, load_model, save_model
from mrl_redimnet.training.teachers import model_function
from mrl_redimnet_cli import main

BATCH = torch.stack(waves(*[4000] * 2))
FILES = {
    "README.md",
    "config.json",
    "configuration_mrl_redimnet.py",
    "feature_extraction_mrl_redimnet.py",
    "frontend_mrl_redimnet.py",
    "losses_mrl_redimnet.py",
    "masking_mrl_redimnet.py",
    "model.safetensors",
    "modeling_mrl_redimnet.py",
    "pipeline_mrl_redimnet.py",
    "pretrained_mrl_redimnet.py",
    "preprocessor_config.json",
}

EMBEDDING_FILES = FILES | SENTENCE_TRANSFORMERS.keys()


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("kind", [MRLReDimNetModel, MRLReDimNetForXVector, MRLReDimNetForSequenceClassification])
def test_what_was_saved_is_loaded(tmp_path, kind):
    model = tiny_model(tiny_config(num_labels=3), kind=kind)
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert type(loaded) is kind and not loaded.training
    with torch.inference_mode():
        one, other = model(BATCH), loaded(BATCH)
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert names(tmp_path / "model") == (FILES if kind is MRLReDimNetForSequenceClassification else EMBEDDING_FILES)


def spoilt(source: Path, target: Path, change) -> Path:
    """A copy of a saved model with the tensors that `change` makes of its own."""
    shutil.copytree(source, target)
    tensors = change(load_file(target / "model.safetensors"))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """An encoder and a model with a margin classifier, as folders."""
    folder = tmp_path_factory.mktemp("saved")
    save_model(tiny_model(), folder / "encoder")
    save_model(tiny_model(kind=MRLReDimNetForXVector), folder / "xvector")
    return folder


def without(*prefixes):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if not key.startswith(prefixes)}


def before(prefix):
    return lambda tensors: {prefix + key: tensor for key, tensor in tensors.items()}


def cut_to_one_row(tensors):
    return tensors | {SEGMENT: tensors[SEGMENT][:1].clone()}


SEGMENT = "projection.segments.0.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (
            without("projection.segments.0."),
            r"2 tensors are missing \(projection.segments.0.bias, projection.segments.0",
        ),
        (without("trunk."), r"\d+ tensors are missing \(trunk.mix.logits, .*, \.\.\.\)"),
        (lambda tensors: {}, r"\d+ tensors are missing"),
        (lambda tensors: tensors | {"head.weight": torch.ones(2)}, r"1 tensor is unknown to it \(head.weight\)"),
        (cut_to_one_row, rf"of another shape \({SEGMENT} \(1, \d+\), expected \(8, \d+\)\)"),
        (before("module."), "DistributedDataParallel puts 'module.' into names"),
        (before("_orig_mod."), "torch.compile puts '_orig_mod.' into names"),
        (before("net.encoder."), "All names begin with 'net.encoder.'"),
        (
            lambda t: {k.replace("segments.0.", "segments.0.base_layer."): v for k, v in t.items()},
            "Layers of adapters",
        ),
    ],
)
def test_weights_that_are_not_wholly_the_models_are_refused(saved, tmp_path, change, message):
    folder = spoilt(saved / "encoder", tmp_path / "model", change)
    for load in (
        load_model,
        AdapterBank.load,
        model_function,
        MRLReDimNetModel.from_pretrained,
        AutoModel.from_pretrained,
        lambda folder: AutoModel.from_pretrained(folder, trust_remote_code=True),
    ):
        with pytest.raises(ValueError, match=message):
            load(folder)


def test_every_command_that_loads_refuses_weights_that_are_not_whole(saved, tmp_path, capsys):
    folder = spoilt(saved / "encoder", tmp_path / "model", without("projection.segments.0."))
    sound = tmp_path / "a.wav"
    soundfile.write(sound, BATCH[0].numpy(), 16_000)
    (tmp_path / "list").write_text("1 a.wav a.wav\n0 a.wav a.wav\n")
    trials = ["--trials", str(tmp_path / "list"), "--folder", str(tmp_path)]
    for command in (
        ["verify", folder, sound, "--test", sound, "--threshold", "0.3"],
        ["embed", folder, sound, "--out", tmp_path / "out"],
        ["evaluate", folder, *trials],
        ["calibrate", folder, *trials],
        ["rotate", folder, tmp_path, tmp_path / "out"],
        ["export", folder, "--to", "torch", "--out", tmp_path / "model.pt2"],
        ["push", folder, "me/model"],
    ):
        assert main([str(part) for part in command]) == 2, command
        assert "2 tensors are missing (projection.segments.0.bias" in capsys.readouterr().err


def test_a_repaired_prefix_loads(saved, tmp_path):
    wrapped = spoilt(saved / "encoder", tmp_path / "model", before("module."))
    repaired = MRLReDimNetModel.from_pretrained(wrapped, key_mapping={"module[.]": ""})
    assert fingerprint(repaired) == fingerprint(load_model(saved / "encoder"))


@pytest.mark.parametrize(
    "cut", [lambda whole: whole[:-100], lambda whole: whole[:5], lambda whole: b"version https://git"]
)
def test_a_file_that_is_not_whole_is_refused(saved, tmp_path, cut):
    folder = Path(shutil.copytree(saved / "encoder", tmp_path / "model"))
    weights = folder / "model.safetensors"
    weights.write_bytes(cut(weights.read_bytes()))
    for load in (load_model, AdapterBank.load, AutoModel.from_pretrained):
        with pytest.raises(ValueError, match="model: the weights cannot be read .*damaged, not whole"):
            load(folder)


def test_a_new_head_is_put_on_an_encoder_and_an_encoder_taken_from_a_head(saved, tmp_path):
    model, info = MRLReDimNetForXVector.from_pretrained(saved / "encoder", output_loading_info=True)
    assert info["missing_keys"] == {"classifier.weight"}
    assert MRLReDimNetForXVector.from_pretrained(saved / "xvector", num_speakers=9, ignore_mismatched_sizes=True)
    assert fingerprint(MRLReDimNetModel.from_pretrained(saved / "xvector")) == fingerprint(
        load_model(saved / "xvector")
    )
    with pytest.raises(ValueError, match=r"another shape \(classifier.weight .* ignore_mismatched_sizes=True"):
        MRLReDimNetForXVector.from_pretrained(saved / "xvector", num_speakers=9)
    with pytest.raises(ValueError, match=r"1 tensor is missing \(classifier.weight\)"):
        load_model(spoilt(saved / "xvector", tmp_path / "headless", without("classifier.")))
    with pytest.raises(ValueError, match=SEGMENT):  # a new head is no new trunk
        MRLReDimNetForXVector.from_pretrained(
            spoilt(saved / "encoder", tmp_path / "cut", cut_to_one_row), ignore_mismatched_sizes=True
        )


def test_pickled_weights_are_refused_and_can_be_converted(saved, tmp_path):
    folder = Path(shutil.copytree(saved / "encoder", tmp_path / "model"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    for load in (load_model, AdapterBank.load, MRLReDimNetModel.from_pretrained):
        with pytest.raises(OSError, match="pickle only .*safetensors, or, if you trust it, convert it"):
            load(folder)
    MRLReDimNetModel.from_pretrained(folder, use_safetensors=False).save_pretrained(tmp_path / "converted")
    assert fingerprint(load_model(tmp_path / "converted")) == fingerprint(load_model(saved / "encoder"))


def wrapped(kind: str) -> MRLReDimNetModel:
    """A model whose layers are not its own any more."""
    model, linear = tiny_model(), r".*segments\.\d+"
    if kind == "compiled":
        model.trunk = torch.compile(model.trunk)
        return model
    config = {
        "lora": LoraConfig(target_modules=linear),
        "merged lora": LoraConfig(target_modules=linear),
        "dora": LoraConfig(target_modules=linear, use_dora=True),
        "modules to save": LoraConfig(target_modules=linear, modules_to_save=["norm"]),
        "ia3": IA3Config(target_modules=linear, feedforward_modules=[]),
        "loha": LoHaConfig(target_modules=linear),
        "oft": OFTConfig(target_modules=linear, oft_block_size=8),
    }[kind]
    adapted = get_peft_model(model, config)
    if kind == "merged lora":
        adapted.merge_adapter()
    return adapted.get_base_model()


@pytest.mark.parametrize("kind", ["lora", "merged lora", "dora", "modules to save", "ia3", "loha", "oft", "compiled"])
@pytest.mark.parametrize("save", [lambda model, folder: model.save_pretrained(folder), save_model])
def test_a_model_with_wrapped_layers_is_not_saved(tmp_path, kind, save):
    cause = "torch.compile puts" if kind == "compiled" else "Layers of adapters .* merge_and_unload"
    with pytest.raises(ValueError, match=f"cannot be saved, because nothing could load it again: .*{cause}"):
        save(wrapped(kind), tmp_path / "model")
    assert names(tmp_path) == set()


def test_what_peft_gives_back_plain_is_saved(tmp_path):
    model = tiny_model()
    adapted = get_peft_model(model, LoraConfig(target_modules=r".*segments\.\d+"))
    with pytest.raises(ValueError, match="PeftModel cannot be saved as a model"):
        save_model(adapted, tmp_path / "model")
    save_model(adapted.merge_and_unload(), tmp_path / "model")
    assert fingerprint(load_model(tmp_path / "model")) == fingerprint(model)


def test_saving_draws_no_random_numbers(tmp_path):
    model, state = tiny_model(kind=MRLReDimNetForXVector), torch.get_rng_state()
    model.save_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def test_speakers_and_card_facts_are_written(tmp_path):
    save_model(tiny_model(), tmp_path / "some-name", SpeakerTable(["b", "a"]), training="Not at all.")
    assert SpeakerTable.load(tmp_path / "some-name/speakers.json").names == ("b", "a")
    card = (tmp_path / "some-name/README.md").read_text()
    assert "some-name" in card and "Not at all." in card


def rates(percent: float) -> list[VerificationRow]:
    return [VerificationRow(dim, percent / 100, 0.5, percent / 200, percent / 50) for dim in (8, 32)]


def test_an_evaluation_stands_on_the_card_and_beside_it(tmp_path):
    evaluation = Evaluation("rotated", {"vox": {"as trained": rates(3.21), "rotated": rates(1.87)}})
    save_model(tiny_model(), tmp_path / "model", evaluation=evaluation)
    assert names(tmp_path / "model") == EMBEDDING_FILES | {"evaluation.json", "eer.png"}
    assert Evaluation.load(tmp_path / "model") == evaluation
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert "1.87 [0.9, 3.7]" in card.text and "3.21" in card.text
    assert [result.metric_value for result in card.data.eval_results] == [1.87, 1.87]


def test_an_evaluation_of_earlier_weights_does_not_stay(tmp_path):
    save_model(tiny_model(), tmp_path / "model", evaluation=Evaluation("base", {"vox": {"base": rates(3.21)}}))
    save_model(tiny_model(), tmp_path / "model")
    assert names(tmp_path / "model") == EMBEDDING_FILES
    assert "3.21" not in (tmp_path / "model" / "README.md").read_text()


def test_the_shortest_utterance_is_the_models(tmp_path):
    model = tiny_model(tiny_config("tf_mel", hop_length=320))
    save_model(model, tmp_path / "model")
    stored = json.loads((tmp_path / "model/preprocessor_config.json").read_text())
    assert stored["min_samples"] == model.config.min_samples


def test_a_folder_is_replaced_whole(tmp_path):
    folder = tmp_path / "deep" / "model"
    save_model(tiny_model(seed=0), folder, SpeakerTable(["a"]))
    (folder / "stale.txt").write_text("of the old model")
    new = tiny_model(seed=1)
    save_model(new, folder)
    assert names(folder) == EMBEDDING_FILES
    assert torch.equal(load_file(folder / "model.safetensors")["trunk.mix.logits"], new.trunk.mix.logits)
    assert names(folder.parent) == {"model"}  # nothing beside it


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path, monkeypatch, error):
    folder, model = tmp_path / "model", tiny_model()
    save_model(model, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*arguments):
        raise error

    monkeypatch.setattr(SpeakerTable, "save", fail)  # the last thing written
    with pytest.raises(type(error)):
        save_model(tiny_model(seed=1), folder, SpeakerTable(["a"]))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert names(tmp_path) == {"model"}


def test_an_error_where_there_was_nothing_leaves_nothing(tmp_path):
    def write(folder):
        (folder / "half").write_text("")
        raise ValueError

    with pytest.raises(ValueError):
        replace_folder(tmp_path / "model", write)
    assert names(tmp_path) == set()


def test_what_a_killed_process_left_does_not_matter(tmp_path):
    for leftover in (".model.writing", ".model.old"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "half").write_text("")
    replace_folder(tmp_path / "model", lambda folder: (folder / "new").write_text(""))
    assert names(tmp_path) == {"model"} and names(tmp_path / "model") == {"new"}


def test_what_was_moved_aside_when_a_process_was_killed_is_put_back(tmp_path):
    """Killed between the renaming of the old folder and that of the new one."""
    (tmp_path / ".model.old").mkdir()
    (tmp_path / ".model.old" / "weights").write_text("good")
    recover_folder(tmp_path / "model")
    assert (tmp_path / "model" / "weights").read_text() == "good" and names(tmp_path) == {"model"}
    recover_folder(tmp_path / "model")
    assert names(tmp_path) == {"model"}


def test_an_error_while_replacing_such_a_folder_loses_nothing(tmp_path):
    (tmp_path / ".model.old").mkdir()
    with pytest.raises(OSError):
        replace_folder(tmp_path / "model", lambda folder: (folder / "no" / "such").write_text(""))
    assert names(tmp_path) == {"model"}


def test_another_architecture_is_refused(tmp_path):
    save_model(tiny_model(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["WhisperModel"]}))
    with pytest.raises(ValueError, match="is a WhisperModel, expected one of .*MRLReDimNetForXVector"):
        load_model(tmp_path)


def test_a_path_without_a_model_is_not_taken_for_a_hub_id(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder: give a saved folder, or a Hub id"):
        load_model(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=r"my-b2 is not a folder: .* Hub id \(OWNER/NAME\), or one of nano\.$"):
        load_model("my-b2")


def test_a_folder_that_is_there_is_refused(tmp_path):
    refuse_existing(tmp_path / "new")
    (tmp_path / "file").write_text("")
    for there in (tmp_path, tmp_path / "file"):
        with pytest.raises(FileExistsError, match=f"{there.name} exists already: give a new folder, or remove it"):
            refuse_existing(there)


# ---------------------------------------------------------------- adapters

ADAPTER_FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "mrl_redimnet_adapter.json"}


@pytest.fixture
def strategy() -> Vanilla:
    """An adapter on a small encoder, of two ranks, that changes its answers."""
    plan = AdapterPlan(steps=1, placement="linear", rank=3, segment_ranks=[1, 2, 3])
    made = Vanilla(tiny_model(), plan, Probe(list, lambda batch: None))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in made.peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return made


def facts(**changes) -> AdapterFacts:
    return AdapterFacts(**{"domain": "telephony", "base": Base("me/base", "v2", fingerprint(tiny_model())), **changes})


def embed(model) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_values=BATCH).embeddings


def test_an_adapter_is_saved_for_plain_peft(strategy, tmp_path):
    save_adapter(strategy, facts(), tmp_path / "best")
    assert names(tmp_path / "best") == ADAPTER_FILES and names(tmp_path) == {"best"}
    assert torch.equal(embed(PeftModel.from_pretrained(tiny_model(), tmp_path / "best")), embed(strategy.peft))
    assert not torch.allclose(embed(strategy.peft), embed(tiny_model()), atol=0.01)
    config = json.loads((tmp_path / "best" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/base", "v2")


def test_the_facts_of_an_adapter_hold_the_ranks_of_its_layers(strategy, tmp_path):
    save_adapter(strategy, facts(), tmp_path / "best")
    stored = AdapterFacts.load(tmp_path / "best")
    assert stored.layers == strategy.ranks()
    assert [stored.layers[f"projection.segments.{i}"] for i in range(3)] == [1, 2, 3]
    assert set(stored.layers.values()) == {1, 2, 3} and len(stored.layers) > 3
    assert (stored.domain, stored.base, stored.training) == ("telephony", facts().base, "")


def test_the_card_of_an_adapter_tells_base_domain_and_size(strategy, tmp_path):
    save_adapter(strategy, facts(), tmp_path / "best")
    card = ModelCard.load(tmp_path / "best" / "README.md")
    assert (card.data.base_model, card.data.library_name) == ("me/base", "peft")
    count = sum(tensor.numel() for tensor in load_file(tmp_path / "best" / "adapter_model.safetensors").values())
    layers = len(strategy.ranks())
    assert "# base-telephony\n" in card.text and f"{count:,} parameters, ranks 1 to 3 in {layers} layers" in card.text
    assert "No results are recorded" in card.text and str(tmp_path) not in card.text


@pytest.mark.parametrize("kind", ["verification", "classification"])
def test_a_published_adapter_is_the_saved_one_with_training_and_results(strategy, tmp_path, kind):
    if kind == "verification":
        told, results, shown = facts(), {"base": rates(9.25), "adapter": rates(4.75)}, ["9.25", "4.75 [2.4, 9.5]"]
    else:
        told = facts(domain="gender", task="classification", labels=["f", "m"])
        results, shown = {"adapter": [AttributeRow("accuracy", 0.9625, 0.9, 0.9875)]}, ["96.25 [90.0, 98.8]"]
    evaluation = Evaluation("adapter", {"held out": results}, "On a small machine.")
    save_adapter(strategy, told, tmp_path / "best_as_trained")
    publish_adapter(tmp_path / "best_as_trained", tmp_path / "best", "Trained for 7 steps.", evaluation)
    pictures = {"eer.png"} if kind == "verification" else set()
    assert names(tmp_path / "best") == ADAPTER_FILES | {"evaluation.json"} | pictures
    assert names(tmp_path / "best_as_trained") == ADAPTER_FILES
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "best" / file).read_bytes() == (tmp_path / "best_as_trained" / file).read_bytes()
    before, after = (AdapterFacts.load(tmp_path / name) for name in ("best_as_trained", "best"))
    assert (before.training, after.training) == ("", "Trained for 7 steps.")
    assert (after.domain, after.labels, after.layers, after.base) == (
        told.domain,
        told.labels,
        before.layers,
        told.base,
    )
    card = (tmp_path / "best" / "README.md").read_text()
    assert all(text in card for text in (*shown, "Trained for 7 steps.", "On a small machine."))
    stored = json.loads((tmp_path / "best" / "evaluation.json").read_text())
    assert Evaluation.load(tmp_path / "best") == evaluation and stored["results"]["held out"].keys() == results.keys()


def test_publishing_again_replaces_what_was_measured(strategy, tmp_path):
    save_adapter(strategy, facts(), tmp_path / "trained")
    for percent in (9.25, 4.75):
        evaluation = Evaluation("adapter", {"vox": {"adapter": rates(percent)}})
        publish_adapter(tmp_path / "trained", tmp_path / "best", f"At {percent}.", evaluation)
    card = (tmp_path / "best" / "README.md").read_text()
    assert "At 4.75." in card and "9.25" not in card and Evaluation.load(tmp_path / "best") == evaluation
    publish_adapter(tmp_path / "best", tmp_path / "copy")  # what is not said again is not claimed
    assert names(tmp_path / "copy") == ADAPTER_FILES and AdapterFacts.load(tmp_path / "copy").training == ""


def test_an_adapter_that_cannot_be_published_leaves_nothing(strategy, tmp_path):
    save_adapter(strategy, facts(), tmp_path / "trained")
    (tmp_path / "trained" / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        publish_adapter(tmp_path / "trained", tmp_path / "best")
    assert names(tmp_path) == {"trained"}


def test_a_card_can_be_written_again_from_the_files(strategy, tmp_path):
    save_adapter(strategy, facts(), tmp_path / "best")
    before = (tmp_path / "best" / "README.md").read_text()
    (tmp_path / "best" / "README.md").unlink()
    write_adapter_card(tmp_path / "best")
    assert (tmp_path / "best" / "README.md").read_text() == before


def test_an_encoder_loads_from_a_model_with_its_head_without_complaints(tmp_path):
    save_model(tiny_model(kind=MRLReDimNetForXVector), tmp_path / "model")
    _, report = MRLReDimNetModel.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values())
