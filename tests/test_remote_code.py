"""A saved folder works where nothing of this project is installed: the code in it is all that a user needs."""

import json
import sys

import pytest
import torch
from conftest import run_alone, tiny_config, tiny_model, waves
from safetensors.torch import load_file, save_file
from transformers.dynamic_module_utils import get_imports

from feature_extraction_mrl_redimnet import MRLReDimNetFeatureExtractor
from modeling_mrl_redimnet import MRLReDimNetForSequenceClassification, MRLReDimNetForXVector, MRLReDimNetModel
from mrl_redimnet.adapters.hub import push_base
from mrl_redimnet.saving import code_files, load_model

KINDS = {
    "encoder": MRLReDimNetModel,
    "xvector": MRLReDimNetForXVector,
    "classes": MRLReDimNetForSequenceClassification,
    "redimnet2": MRLReDimNetModel,
}

# Runs in another process, because in this one the classes are importable. There, what a user of the Hub may not have
# looks as if it were not installed.
LOADER = """
import sys

hidden = {"mrl_redimnet", "train_hf", "torchaudio", "peft", "accelerate", "datasets", "evaluate", "scipy", "soundfile",
          "av"}

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        first = name.split(".")[0]
        gone = first in hidden or first.endswith("_mrl_redimnet")
        return None if gone else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]

import torch
from safetensors.torch import load_file, save_file
from transformers import (AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification,
                          AutoModelForAudioXVector)

torch.set_num_threads(1)
folder, out = sys.argv[1:]
extractor = AutoFeatureExtractor.from_pretrained(f"{folder}/encoder", trust_remote_code=True)
config = AutoConfig.from_pretrained(f"{folder}/encoder", trust_remote_code=True)
assert config.min_samples == extractor.min_samples == 257
batch = extractor([wave.numpy() for wave in load_file(f"{folder}/waves.safetensors").values()], sampling_rate=16_000)
answers = {}
for kind, auto in (("encoder", AutoModel), ("xvector", AutoModelForAudioXVector),
                   ("classes", AutoModelForAudioClassification), ("redimnet2", AutoModel)):
    for loader in {auto, AutoModel}:
        model = loader.from_pretrained(f"{folder}/{kind}", trust_remote_code=True).eval()
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        with torch.inference_mode():
            answer = model(**batch)
        name = "logits" if loader is not AutoModel else "embeddings"
        answers[f"{kind}.{loader.__name__}.{name}"] = answer[name].contiguous()
save_file(answers, out)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every kind of model and the feature extractor, saved, and two waveforms."""
    folder = tmp_path_factory.mktemp("saved")
    for name, kind in KINDS.items():
        variant = "redimnet2_dual" if name == "redimnet2" else "convnext_convatt"
        tiny_model(tiny_config(variant, num_labels=3), kind=kind).save_pretrained(folder / name)
    MRLReDimNetFeatureExtractor().save_pretrained(folder / "encoder")
    save_file(dict(zip("ab", waves(4_800, 8_000), strict=True)), folder / "waves.safetensors")
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_saved_configuration_names_every_auto_class(folder, name):
    auto_map = json.loads((folder / name / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_mrl_redimnet.MRLReDimNetConfig",
        "AutoModel": "modeling_mrl_redimnet.MRLReDimNetModel",
        "AutoModelForAudioXVector": "modeling_mrl_redimnet.MRLReDimNetForXVector",
        "AutoModelForAudioClassification": "modeling_mrl_redimnet.MRLReDimNetForSequenceClassification",
    }


@pytest.mark.parametrize("name", KINDS)
def test_saved_folder_holds_the_code(folder, name):
    code = {path.name for path in (folder / name).glob("*.py")}
    parts = ("configuration", "frontend", "losses", "masking", "modeling", "pretrained")
    assert code >= {f"{part}_mrl_redimnet.py" for part in parts}


def test_loads_where_nothing_is_installed(folder, tmp_path):
    """The encoder, each head, and the encoder out of each head's folder, bit for bit as loaded here."""
    out = tmp_path / "answers.safetensors"
    run_alone(LOADER, folder, out, folder=tmp_path)
    answers = load_file(out)
    assert len(answers) == 6
    batch = MRLReDimNetFeatureExtractor()(waves(4_800, 8_000), sampling_rate=16_000)
    for name, kind in KINDS.items():
        with torch.inference_mode():
            ours = kind.from_pretrained(folder / name)(**batch)
            encoder = MRLReDimNetModel.from_pretrained(folder / name)(**batch)
        torch.testing.assert_close(answers[f"{name}.AutoModel.embeddings"], encoder.embeddings, rtol=0, atol=0)
        if kind is not MRLReDimNetModel:
            (logits,) = (v for key, v in answers.items() if key.startswith(name) and key.endswith("logits"))
            torch.testing.assert_close(logits, ours.logits, rtol=0, atol=0)


# ---------------------------------------------------------------- from the Hub


@pytest.mark.parametrize("file", code_files(), ids=lambda file: file.stem)
def test_transformers_finds_nothing_that_its_users_lack(file):
    """Of a file from the Hub, and not of one in a folder, it wants everything to be installed that `import` names
    outside of a `try`."""
    theirs = {"torch", "transformers", "numpy", "safetensors", "huggingface_hub", "fsspec"}
    assert {*get_imports(file)} - sys.stdlib_module_names <= theirs


FROM_THE_HUB = """
import os

os.environ |= {"HF_ENDPOINT": sys.argv[1], "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
from transformers import AutoModel

model = AutoModel.from_pretrained("anna/voices", trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
print(sum(parameter.double().sum().item() for parameter in model.parameters()))
"""


def test_loads_from_the_hub_where_nothing_is_installed(hub, tmp_path):
    push_base("nano", "anna/voices")
    code = LOADER[: LOADER.index("import torch")] + FROM_THE_HUB
    printed = run_alone(code, hub.url, folder=tmp_path)
    expected = sum(parameter.double().sum().item() for parameter in load_model("nano").parameters())
    assert float(printed.splitlines()[-1]) == pytest.approx(expected, abs=1e-6)
