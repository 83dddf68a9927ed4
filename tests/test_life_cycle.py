"""The whole life of adapters, through training, commands, a Hub over HTTP, and another process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import run
from conftest import tiny_config, tiny_model, waves
from local_hub import LocalHub
from peft import PeftModel

from modeling_mrl_redimnet import MRLReDimNetForXVector, MRLReDimNetModel
from mrl_redimnet.adapters import fingerprint
from mrl_redimnet.data.synthetic import make_corpus
from mrl_redimnet.saving import save_model

BASE = "anna/base"
# What the other machine runs: it has the ids and nothing else.
ELSEWHERE = """
import json, sys, torch
from mrl_redimnet.adapters.bank import AdapterBank
base, wave = sys.argv[1], torch.tensor(json.loads(sys.stdin.read()))
bank = AdapterBank.load(base, {"telephony": f"{base}-telephony", "gender": f"{base}-gender"})
answers = {"off": bank.embed(wave)}
for name in bank.names:
    bank.set_adapter(name)
    answers[name] = bank.embed(wave)
answers["rows"] = bank.embed(wave, adapter=["telephony", None])
answers["labels"] = list(bank.classify(wave, adapter="gender"))
merged = bank.merged("telephony")
answers["merged"] = merged(wave).embeddings
bank.delete("telephony")
bank.delete("gender")
answers["unloaded"] = bank.embed(wave)
print(json.dumps({k: v.tolist() if torch.is_tensor(v) else v for k, v in answers.items()}))
"""


@pytest.fixture
def corpus(tmp_path) -> Path:
    root = make_corpus(tmp_path / "corpus", 6, 2, sessions=2, utterances=2, seconds=(0.6, 0.9))
    speakers = sorted(path.name for path in (root / "train/wav").iterdir())
    lines = [f"{speaker},{'fm'[i % 2]}" for i, speaker in enumerate(speakers)]
    (tmp_path / "labels.csv").write_text("\n".join(["speaker,gender", *lines]))
    return root


def elsewhere(hub: LocalHub, home: Path, base: str, wave: torch.Tensor) -> dict:
    """What ELSEWHERE prints, in a process of its own with an empty cache."""
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HOME": str(home),
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-c", ELSEWHERE, base]
    options = dict(cwd=home, env=environment, input=json.dumps(wave.tolist()), capture_output=True, text=True)
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("variant", ["convnext_convatt", pytest.param("redimnet2_normed", marks=pytest.mark.slow)])
def test_train_push_pull_swap_merge_unload(variant, train, hub, corpus, tmp_path, capsys):
    """Trained here, pushed, pulled on a machine with an empty cache, swapped, merged, unloaded; answers as trained."""
    torch.manual_seed(0)
    base = tiny_model(tiny_config(variant, num_speakers=4), kind=MRLReDimNetForXVector)
    save_model(base, tmp_path / "base")
    settings = dict(model=tmp_path / "base", model_options="{}", finetune="adapter", rank=4, learning_rate=0.02)
    settings |= dict(steps=4, checkpoint_every=4, evaluate_every=4)
    train(domain="telephony", **settings).rename(tmp_path / "telephony")
    labels = dict(label_file=tmp_path / "labels.csv", label_column="gender", tests="{}", noise="null")
    train(**labels, **settings).rename(tmp_path / "gender")
    hub.lfs = True

    def printed(*argv) -> str:
        capsys.readouterr()
        assert run(*argv) == 0
        return capsys.readouterr().out

    assert "pushed" in printed("push", tmp_path / "base", BASE)
    for domain in ("telephony", "gender"):
        push = ["adapters", "push", tmp_path / domain / "best", f"{BASE}-{domain}", "--base", BASE]
        assert "pushed" in printed(*push)
    assert [line.split()[:2] for line in printed("adapters", "list", BASE).splitlines()] == [
        [f"{BASE}-gender", "gender"],
        [f"{BASE}-telephony", "telephony"],
    ]
    told = printed("adapters", "info", f"{BASE}-telephony")
    assert fingerprint(base)[:19] in told and "rank     4" in told
    wave = torch.stack(waves(8000, 8000))
    (tmp_path / "other").mkdir()
    check(elsewhere(hub, tmp_path / "other", BASE, wave), tmp_path, base, wave)


def check(there: dict, folder: Path, base, wave: torch.Tensor):
    """What came back, against the adapters that were trained, loaded by plain PEFT."""
    with torch.inference_mode():
        plain = base.redimnet(wave).embeddings
        model = PeftModel.from_pretrained(
            MRLReDimNetModel.from_pretrained(folder / "base"), folder / "telephony" / "best"
        ).eval()
        telephony = model(input_values=wave).embeddings
    assert not torch.allclose(telephony, plain, atol=1e-2)
    answers = {name: torch.tensor(value) for name, value in there.items() if name != "labels"}
    assert torch.equal(answers["off"], answers["unloaded"])
    torch.testing.assert_close(answers["off"], plain)  # a bank runs the faster forms
    torch.testing.assert_close(answers["telephony"], telephony)
    torch.testing.assert_close(answers["rows"], torch.stack([telephony[0], plain[1]]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(answers["merged"], telephony, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(answers["gender"], plain, atol=1e-3)
    assert there["labels"] == ["f", "m"]
