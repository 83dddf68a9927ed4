"""The `mrl-redimnet` command, from a published file to a table of error rates."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from commands import refusal, run
from conftest import relative_error, tiny_config, tiny_model, waves
from reference_weights import flattened, reference_tensor, reference_waveform
from safetensors.torch import load_file
from sounds import write
from transformers import AutoFeatureExtractor, AutoModel

from modeling_mrl_redimnet import MRLReDimNetForSequenceClassification, MRLReDimNetForXVector, MRLReDimNetModel
from mrl_redimnet.adapters import AdapterBank, AdapterFacts
from mrl_redimnet.data.corpus import SpeakerTable
from mrl_redimnet.saving import load_model, save_model
from mrl_redimnet_cli import main

RECORDINGS = json.loads((Path(__file__).parent / "data" / "reference_answers.json").read_text())["recordings"]
WAVE = reference_waveform(16_000)


def published(name: str) -> dict:
    """A checkpoint as a published file holds it."""
    shapes = flattened(RECORDINGS[name]["state_dict"])
    tensors = {key: reference_tensor(key, shape) for key, shape in shapes.items()}
    return {"model_config": RECORDINGS[name]["model_config"], "state_dict": tensors}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "corpus"
    assert run("synthesise", folder, "--train-speakers", 1, "--test-speakers", 2, "--seed", 4) == 0
    return folder


@pytest.fixture(scope="module")
def speech(tmp_path_factory) -> Path:
    """Six short files, at different depths."""
    folder = tmp_path_factory.mktemp("speech")
    for i, wave in enumerate(waves(*[6000] * 6)):
        (folder / f"{i % 2}" / "deeper").mkdir(parents=True, exist_ok=True)
        path = folder / f"{i % 2}" / f"{i}.wav" if i < 3 else folder / f"{i % 2}" / "deeper" / f"{i}.flac"
        soundfile.write(path, 0.1 * wave.numpy(), 16_000)
    return folder


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    torch.save(published("single_stage"), tmp_path / "published.pt")
    return tmp_path / "published.pt"


def embed(model, **options) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(WAVE, **options).embeddings


def cosine(embeddings: torch.Tensor) -> float:
    return torch.cosine_similarity(*embeddings, dim=0).item()


# ---------------------------------------------------------------- synthesise


def test_synthesise_makes_a_corpus(corpus):
    assert (corpus / "test" / "trials.txt").is_file()
    assert {path.name for path in (corpus / "train" / "wav").iterdir()} == {"id00001"}
    assert json.loads((corpus / "corpus.json").read_text())["seed"] == 4


def test_synthesise_refuses_a_folder_of_something_else(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("")
    assert "not a synthetic corpus" in refusal(capsys, "synthesise", tmp_path)


# ---------------------------------------------------------------- convert


def test_convert_makes_a_folder_that_answers_as_the_reference(checkpoint, tmp_path, capsys):
    assert run("convert", checkpoint, tmp_path / "out") == 0
    assert "embeddings of 32 dimensions" in capsys.readouterr().out
    model = AutoModel.from_pretrained(tmp_path / "out")
    recorded = torch.tensor(RECORDINGS["single_stage"]["answers"]["16000"]["embedding"])
    assert relative_error(embed(model), recorded) < 1e-5
    assert AutoFeatureExtractor.from_pretrained(tmp_path / "out").min_samples == model.config.min_samples


def test_convert_can_grow_the_embedding(checkpoint, tmp_path):
    assert run("convert", checkpoint, tmp_path / "out", "--embedding-size", 96) == 0
    model = load_model(tmp_path / "out")
    assert model.config.matryoshka_dims == [64, 96]
    recorded = torch.tensor(RECORDINGS["single_stage"]["answers"]["16000"]["embedding"])
    assert cosine(embed(model)) == pytest.approx(cosine(recorded), abs=1e-5)


def test_convert_can_rotate(checkpoint, speech, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("convert", checkpoint, out, "--embedding-size", 96, "--rotate-on", speech) == 0
    printed = capsys.readouterr().out
    assert "Note: 6 utterances for 96 dimensions" in printed
    assert "Rotated on 6 utterances; energy of the embeddings in each prefix: 64: 100.0 %, 96: 100.0 %" in printed
    model = load_model(out)
    recorded = torch.tensor(RECORDINGS["single_stage"]["answers"]["16000"]["embedding"])
    assert cosine(embed(model)) == pytest.approx(cosine(recorded), abs=1e-5)
    assert embed(model, truncate_dim=64).shape == (2, 64)


def test_a_broken_checkpoint_leaves_no_folder(tmp_path, capsys):
    checkpoint = published("single_stage")
    del checkpoint["state_dict"]["pool.linear1.weight"]
    torch.save(checkpoint, tmp_path / "broken.pt")
    assert "missing: pool.linear1.weight" in refusal(capsys, "convert", tmp_path / "broken.pt", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["broken.pt"]


def test_a_missing_checkpoint_is_named(tmp_path, capsys):
    assert "nothing.pt" in refusal(capsys, "convert", tmp_path / "nothing.pt", tmp_path / "out")


def test_convert_refuses_a_smaller_embedding(checkpoint, tmp_path, capsys):
    message = refusal(capsys, "convert", checkpoint, tmp_path / "out", "--embedding-size", 16)
    assert "16 is less than the checkpoint's 32" in message and not (tmp_path / "out").exists()


# ---------------------------------------------------------------- rotate


def test_rotate_keeps_the_whole_and_the_head(folder, speech, tmp_path, capsys):
    assert run("rotate", folder, speech, tmp_path / "rotated") == 0
    assert "Rotated on 6 utterances" in capsys.readouterr().out
    before, after = load_model(folder), load_model(tmp_path / "rotated")
    assert type(after) is MRLReDimNetForXVector
    assert cosine(embed(before)) == pytest.approx(cosine(embed(after)), abs=1e-5)
    with torch.inference_mode():
        assert torch.allclose(before(WAVE).logits, after(WAVE).logits, atol=3e-4)
    assert not torch.allclose(embed(before), embed(after), atol=0.01)


def test_rotate_keeps_the_names_of_the_classifiers_speakers(speech, tmp_path):
    names = SpeakerTable([f"id{i}" for i in range(5)])
    save_model(tiny_model(kind=MRLReDimNetForXVector), tmp_path / "model", names)
    assert run("rotate", tmp_path / "model", speech, tmp_path / "out") == 0
    assert SpeakerTable.load(tmp_path / "out" / "speakers.json").names == names.names


def test_any_head_can_be_rotated(speech, tmp_path):
    model = tiny_model(tiny_config(num_labels=3), kind=MRLReDimNetForSequenceClassification)
    save_model(model, tmp_path / "model")
    assert run("rotate", tmp_path / "model", speech, tmp_path / "out") == 0
    with torch.inference_mode():
        assert torch.allclose(load_model(tmp_path / "out")(WAVE).logits, model(WAVE).logits, atol=1e-4)


def test_an_existing_folder_is_refused_and_untouched(folder, checkpoint, speech, tmp_path, capsys):
    before = (folder / "model.safetensors").read_bytes()
    assert "exists already" in refusal(capsys, "rotate", folder, speech, folder)
    assert "exists already" in refusal(capsys, "convert", checkpoint, folder)
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("command", ["rotate", "convert"])
def test_a_folder_without_audio_is_refused(folder, checkpoint, tmp_path, capsys, command):
    def arguments(audio):
        if command == "rotate":
            return [command, folder, audio, tmp_path / "out"]
        return [command, checkpoint, tmp_path / "out", "--rotate-on", audio]

    (tmp_path / "empty").mkdir()
    assert f"no folder {tmp_path / 'nowhere'}" in refusal(capsys, *arguments(tmp_path / "nowhere"))
    assert "0 audio files" in refusal(capsys, *arguments(tmp_path / "empty"))
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- adapters


def test_adapters_info_tells_what_an_adapter_is(adapters, capsys):
    assert run("adapters", "info", adapters / "telephony") == 0
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    weights = adapters / "telephony" / "adapter_model.safetensors"
    count = sum(tensor.numel() for tensor in load_file(weights).values())
    assert told == {
        "adapter": str(adapters / "telephony"),
        "base": str(AdapterFacts.load(adapters / "telephony").base),
        "domain": "telephony",
        "task": "verification",
        "layers": "linear",
        "rank": "4",
        "size": f"{count:,} parameters, {weights.stat().st_size:,} bytes",
        "training": "By telephony seed 0.",
    }


def test_adapters_info_of_one_made_with_peft_alone(adapters, tmp_path, capsys):
    shutil.copytree(adapters / "noisy", tmp_path / "plain")
    (tmp_path / "plain" / "mrl_redimnet_adapter.json").unlink()
    assert run("adapters", "info", tmp_path / "plain") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "base     me/base" in lines and "domain   not said" in lines and "rank     2" in lines


def test_adapters_info_of_what_is_none(folder, capsys):
    assert "is no adapter: it lacks adapter_config.json" in refusal(capsys, "adapters", "info", folder)


def test_adapters_mix_makes_an_adapter_of_several(folder, adapters, tmp_path, capsys):
    pairs = [f"{adapters / 'telephony'}=0.5", f"{adapters / 'noisy'}=0.25"]
    assert run("adapters", "mix", folder, *pairs, "--out", tmp_path / "both", "--method", "cat") == 0
    assert "cat of" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "both").iterdir()} == {
        path.name for path in (adapters / "noisy").iterdir()
    }
    bank = AdapterBank.load(str(folder), {name: adapters / name for name in ("telephony", "noisy")})
    bank.combine("expected", {"telephony": 0.5, "noisy": 0.25}, "cat")
    bank.add("mixed", tmp_path / "both")
    assert relative_error(bank.embed(WAVE, adapter="mixed"), bank.embed(WAVE, adapter="expected")) < 1e-6
    assert relative_error(bank.embed(WAVE, adapter="mixed"), bank.embed(WAVE, adapter=None)) > 0.01
    facts = AdapterFacts.load(tmp_path / "both")
    assert set(facts.layers.values()) == {6}
    assert facts.domain == "telephony+noisy" and "0.5 x telephony + 0.25 x noisy" in facts.training


def test_adapters_mix_takes_rank_and_density(folder, adapters, tmp_path):
    pairs = [f"{adapters / 'telephony'}=0.5", f"{adapters / 'noisy'}=0.5"]
    assert run("adapters", "mix", folder, *pairs, "--out", tmp_path / "svd", "--rank", 3) == 0  # the usual method
    assert set(AdapterFacts.load(tmp_path / "svd").layers.values()) == {3}
    more = ["--method", "ties_svd", "--density", 0.5]
    assert run("adapters", "mix", folder, *pairs, "--out", tmp_path / "ties", *more) == 0
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("svd", "ties"))
    assert one.keys() == other.keys()


def test_adapters_mix_refuses_what_it_cannot_mix(folder, adapters, tmp_path, capsys):
    pair, out = f"{adapters / 'noisy'}=1", ["--out", tmp_path / "out"]
    for words in (["noisy"], ["noisy=much"], [f"{adapters / 'noisy'}="]):
        message = refusal(capsys, "adapters", "mix", folder, *words, *out)
        assert f"{words[0]!r}: expected ADAPTER=WEIGHT, a path or Hub id and a number" in message
    assert "density: got None for 'ties'" in refusal(capsys, "adapters", "mix", folder, pair, *out, "--method", "ties")
    assert "is named twice" in refusal(capsys, "adapters", "mix", folder, pair, pair, *out)
    (tmp_path / "there").mkdir()
    assert "exists already" in refusal(capsys, "adapters", "mix", folder, pair, "--out", tmp_path / "there")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "there"}  # the base, and what was there


def test_adapters_cut_makes_a_smaller_adapter(folder, adapters, tmp_path, capsys):
    assert run("adapters", "cut", folder, adapters / "telephony", tmp_path / "small", "--rank", 1) == 0
    size = (tmp_path / "small" / "adapter_model.safetensors").stat().st_size
    assert f"cut to rank 1, {size:,} bytes" in capsys.readouterr().out
    assert size < (adapters / "telephony" / "adapter_model.safetensors").stat().st_size / 2
    assert set(AdapterFacts.load(tmp_path / "small").layers.values()) == {1}
    bank = AdapterBank.load(str(folder), {"small": tmp_path / "small"})
    bank.add("cut", adapters / "telephony", rank=1)
    assert torch.equal(bank.embed(WAVE, adapter="small"), bank.embed(WAVE, adapter="cut"))
    assert relative_error(bank.embed(WAVE, adapter="small"), bank.embed(WAVE, adapter=None)) > 1e-3
    message = refusal(capsys, "adapters", "cut", folder, adapters / "telephony", tmp_path / "other", "--rank", 9)
    assert "rank: got 9, the adapter can be cut to 1 to 4" in message and not (tmp_path / "other").exists()


def test_adapters_info_tells_the_ranks_that_an_adapter_can_be_cut_to(adapters, tmp_path, capsys):
    shutil.copytree(adapters / "telephony", tmp_path / "nested")
    replace(AdapterFacts.load(adapters / "telephony"), nested_ranks=[1, 2, 4]).save(tmp_path / "nested")
    assert run("adapters", "info", tmp_path / "nested") == 0
    assert "rank     4 (trained to be cut to 1, 2)" in capsys.readouterr().out


def test_adapters_merge_makes_a_plain_model(folder, adapters, tmp_path, capsys):
    assert run("adapters", "merge", folder, adapters / "telephony", tmp_path / "merged") == 0
    assert "a model without adapters" in capsys.readouterr().out
    merged = AutoModel.from_pretrained(tmp_path / "merged")
    assert type(merged) is MRLReDimNetModel and not [n for n, _ in merged.named_parameters() if "lora" in n]
    bank = AdapterBank.load(str(folder), {"x": adapters / "telephony"})
    assert relative_error(embed(merged), bank.embed(WAVE, adapter="x")) < 1e-5
    assert relative_error(embed(merged), bank.embed(WAVE, adapter=None)) > 0.01
    assert str(tmp_path) not in (tmp_path / "merged/README.md").read_text()
    message = refusal(capsys, "adapters", "merge", folder, adapters / "noisy", tmp_path / "merged")
    assert "merged exists already" in message


def test_a_model_of_the_package_is_pushed_by_its_name(hub, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("push", "nano", "anna/voices") == 0
    assert f"{hub.url}/anna/voices: pushed, at " in capsys.readouterr().out
    assert "no folder nani, and no model in the package of that name (the nearest: nano" in refusal(
        capsys, "push", "nani", "anna/voices"
    )


def test_adapters_over_the_hub(hub, folder, adapters, corpus, capsys):
    """Pushed, found, looked at, pulled and used by their ids alone."""
    assert run("push", folder, "anna/base", "--tag", "v1") == 0
    assert f"{hub.url}/anna/base: pushed, at " in capsys.readouterr().out
    for _ in range(2):
        push = ["adapters", "push", adapters / "telephony", "anna/phone", "--base", "anna/base", "--private"]
        assert run(*push) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert "anna/phone: pushed, at" in first and "nothing new, no commit made" in second
    assert hub.repositories["anna/phone"].private and "v1" in hub.repositories["anna/base"].tags
    assert run("adapters", "list", "anna/base") == 0
    (row,) = capsys.readouterr().out.splitlines()
    assert row.split()[:2] == ["anna/phone", "telephony"] and row.endswith("private")
    assert run("adapters", "list", "anna/phone") == 0
    assert capsys.readouterr().out == "No adapter on the Hub names anna/phone as its base.\n"
    assert run("adapters", "info", "anna/phone") == 0
    assert (
        f"base     anna/base ({AdapterFacts.load(adapters / 'telephony').base.fingerprint[:19]}"
        in capsys.readouterr().out
    )
    assert run("adapters", "pull", "anna/phone") == 0
    pulled = Path(capsys.readouterr().out.strip())
    one, other = (load_file(at / "adapter_model.safetensors") for at in (pulled, adapters / "telephony"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_not_on_the_hub_is_said(hub, adapters, capsys):
    assert "anna/nothing" in refusal(capsys, "adapters", "pull", "anna/nothing")
    message = refusal(capsys, "adapters", "push", adapters / "noisy", "bert/noisy", "--base", "anna/base")
    assert "bert/noisy" in message
    assert "is no model" in refusal(capsys, "push", adapters / "noisy", "anna/noisy")


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize("argv", [[], ["fly"], ["convert"], ["evaluate", "model"], ["adapters"]])
def test_an_incomplete_command_is_explained(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2 and "usage: mrl-redimnet" in capsys.readouterr().err


def test_ctrl_c_ends_a_command_with_one_line(tmp_path):
    """A real signal to a real process, while it embeds. Python itself loses one that comes while it forks the process
    that decodes: then another one is sent, as a person would."""
    for number in range(16):
        write(tmp_path / "in" / f"{number}.wav", 0.1 * np.random.default_rng(number).standard_normal(180 * 16_000))
    command = [sys.executable, "-m", "mrl_redimnet_cli", "embed", "nano", str(tmp_path / "in")]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "out")],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs of shells ignore it
    )
    while process.poll() is None and not (tmp_path / "out").exists():
        time.sleep(0.05)
    said = None
    while said is None:
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            said = process.communicate(timeout=20)[1]
    assert said.splitlines()[-1] == "mrl-redimnet embed: stopped.", said
    assert process.returncode == 130
