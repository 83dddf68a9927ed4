"""Model folders: whole, loadable by every class, and replaced in one step or not at all."""

import json

import pytest
import torch
from conftest import tiny_config, tiny_model, waves
from safetensors.torch import load_file

from modeling_mrl_redimnet import MRLReDimNetForSequenceClassification, MRLReDimNetForXVector, MRLReDimNetModel
from mrl_redimnet.corpus import SpeakerTable
from mrl_redimnet.folders import replace_folder
from mrl_redimnet.saving import load_model, save_model

BATCH = torch.stack(waves(*[4000] * 2))
FILES = {
    "README.md",
    "config.json",
    "configuration_mrl_redimnet.py",
    "feature_extraction_mrl_redimnet.py",
    "model.safetensors",
    "modeling_mrl_redimnet.py",
    "preprocessor_config.json",
}


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
    assert names(tmp_path / "model") == FILES


def test_speakers_and_card_facts_are_written(tmp_path):
    save_model(tiny_model(), tmp_path / "some-name", SpeakerTable(["b", "a"]), training="Not at all.")
    assert SpeakerTable.load(tmp_path / "some-name/speakers.json").names == ("b", "a")
    card = (tmp_path / "some-name/README.md").read_text()
    assert "some-name" in card and "Not at all." in card


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
    assert names(folder) == FILES
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


def test_another_architecture_is_refused(tmp_path):
    save_model(tiny_model(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["WhisperModel"]}))
    with pytest.raises(ValueError, match="is a WhisperModel, expected one of .*MRLReDimNetForXVector"):
        load_model(tmp_path)


def test_a_path_without_a_model_is_not_taken_for_a_hub_id(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder: give a saved model's folder, or a Hub id"):
        load_model(tmp_path / "missing")
