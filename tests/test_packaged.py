"""The models and recordings that come with the package."""

import contextlib
import io
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_alone
from safetensors.torch import load_file
from transformers import AutoModel

from mrl_redimnet import MRLReDimNetModel, SpeakerEncoder, recordings
from mrl_redimnet.adapters import AdapterFacts
from mrl_redimnet.adapters.hub import pull, push_base
from mrl_redimnet.audio.io import read_audio
from mrl_redimnet.saving import code_files, packaged_adapters, packaged_models
from mrl_redimnet.scoring.calibration import Thresholds
from mrl_redimnet_cli import main
from mrl_redimnet_cli.names import adapter_names

ROOT = Path(__file__).resolve().parents[1]
EACH = pytest.mark.parametrize("name", packaged_models())
EACH_ADAPTER = pytest.mark.parametrize("name", packaged_adapters())

LOADER = """
import sys
import soundfile, torch
from transformers import AutoModel

sys.modules |= {name: None for name in sys.argv[3:]}  # as if the package were not installed
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
wave = torch.from_numpy(soundfile.read(sys.argv[2], dtype="float32")[0])[None]
with torch.inference_mode():
    print(model(wave).embeddings[0].tolist())
"""


def test_there_are_models():
    assert "nano" in packaged_models()


@EACH
def test_a_model_is_small_and_has_no_names_of_speakers_and_no_code(name):
    folder = packaged_models()[name]
    files = {file.name: file.stat().st_size for file in folder.iterdir()}
    expected = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", "thresholds.json"}
    assert expected <= files.keys() and sum(files.values()) < 10e6
    assert not [file for file in files if file.endswith(".py") or "speakers" in file]
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} <= {torch.float16, torch.int64}


@EACH
def test_a_model_computes_in_float32(name):
    model = MRLReDimNetModel.from_pretrained(packaged_models()[name])
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert AutoModel.from_pretrained(packaged_models()[name]).dtype == torch.float32


@EACH
def test_thresholds_are_of_these_weights_and_of_every_dimension(name):
    encoder = SpeakerEncoder.from_pretrained(name, device="cpu")
    thresholds = Thresholds.load(packaged_models()[name])
    for dim in encoder.config.matryoshka_dims:
        for enrolments in (1, 2, 3):
            thresholds.find(dim, weights=encoder.fingerprint, enrolments=enrolments)


@EACH
def test_a_model_knows_one_woman_from_another_at_every_dimension_of_64_or_more(name):
    encoder = SpeakerEncoder.from_pretrained(name, device="cpu")
    for dim in [dim for dim in encoder.config.matryoshka_dims if dim >= 64]:
        for first, same in (
            (recordings.FIRST, recordings.SAME_SPEAKER),
            (recordings.SAME_SPEAKER, recordings.FIRST),
        ):
            found = encoder.verify([first], [same, recordings.OTHER_SPEAKER], dim)
            assert [decision.accepted for decision in found] == [True, False], (dim, found)


@EACH_ADAPTER
def test_an_adapter_is_small_belongs_to_a_model_here_and_states_its_licence(name):
    folder = packaged_adapters()[name]
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1e6
    facts, base = AdapterFacts.load(folder), packaged_models()[AdapterFacts.load(folder).base.repository]
    assert name == f"{base.name}-{facts.domain}"
    facts.check_base(MRLReDimNetModel.from_pretrained(base), base.name)
    card = (folder / "README.md").read_text()
    assert "license: cc-by-sa-4.0" in card and "Data: " in card and not (folder / "speakers.json").exists()


@EACH_ADAPTER
def test_an_adapter_of_the_package_is_found_by_its_name(name, capsys, tmp_path, monkeypatch):
    """Offline, in Python and by every command that takes an adapter."""
    monkeypatch.chdir(tmp_path)
    base = AdapterFacts.load(packaged_adapters()[name]).base.repository
    encoder = SpeakerEncoder.from_pretrained(base, device="cpu")
    encoder.adapters.add("mine", name)
    plain = encoder.embed([recordings.FIRST])
    encoder.adapters.set_adapter("mine")
    adapted = encoder.embed([recordings.FIRST])
    assert 0.5 < float(encoder.similarity(plain, adapted)[0, 0]) < 0.9999
    merged = SpeakerEncoder.from_pretrained(base, name, device="cpu").embed([recordings.FIRST])
    torch.testing.assert_close(torch.from_numpy(merged), torch.from_numpy(adapted), rtol=1e-3, atol=1e-3)
    assert not main(["adapters", "info", name])
    assert f"adapter  {name}" in capsys.readouterr().out
    assert main(["adapters", "info", f"{name}x"])
    assert f"the nearest: {name}" in capsys.readouterr().err


def test_the_command_line_knows_the_adapters_of_the_package():
    assert adapter_names() == tuple(packaged_adapters())


def test_recordings_are_a_few_seconds_each():
    for file in (recordings.FIRST, recordings.SAME_SPEAKER, recordings.OTHER_SPEAKER):
        wave = read_audio(file)
        assert 3 < len(wave) / 16_000 < 6 and np.abs(wave).max() > 0.05


def test_the_first_example_of_the_readme_is_the_one_that_the_demo_runs():
    example = ROOT / "examples/first_steps.py"
    assert f"```python\n{example.read_text()}```" in (ROOT / "README.md").read_text()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(example))
    assert printed.getvalue().count("accepted") == printed.getvalue().count("rejected") == 2


def test_the_command_line_decides(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    enrolled, same, other = (
        str(file) for file in (recordings.FIRST, recordings.SAME_SPEAKER, recordings.OTHER_SPEAKER)
    )
    assert not main(["verify", "nano", enrolled, "--test", same])
    assert "accepted " in capsys.readouterr().out
    assert main(["verify", "nano", enrolled, "--test", other])
    assert "rejected " in capsys.readouterr().out


def test_a_model_of_the_package_is_pushed_with_the_code_it_needs(hub, tmp_path):
    push_base("nano", "anna/voices")
    folder = pull("anna/voices")
    assert {file.name for file in code_files()} <= {file.name for file in folder.iterdir()}
    assert "anna/voices" in (folder / "README.md").read_text()
    hidden = ["mrl_redimnet", *(file.stem for file in code_files())]
    printed = run_alone(LOADER, folder, recordings.FIRST, *hidden, folder=tmp_path)
    ours = SpeakerEncoder.from_pretrained("nano", device="cpu").embed([recordings.FIRST])[0]
    np.testing.assert_allclose(json.loads(printed.splitlines()[-1]), ours, atol=2e-4)
