"""Training of adapters, parts and attributes by the script: resumed, in two processes, and refused for good reasons."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, tiny_model, waves
from peft import PeftModel
from safetensors.torch import load_file
from training_runs import command_line, finish, results_of, start
from transformers import AutoModelForAudioClassification

from modeling_mrl_redimnet import MRLReDimNetForXVector, MRLReDimNetModel
from mrl_redimnet.adapters import AdapterBank, AdapterFacts, fingerprint
from mrl_redimnet.data.synthetic import make_corpus
from mrl_redimnet.saving import save_model

ADAPTER = dict(finetune="adapter", model_options="{}", rank=3, start_rank=5, steps=8, checkpoint_every=2, batch_size=8)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    root = make_corpus(tmp_path_factory.mktemp("train") / "corpus", 6, 2, sessions=2, utterances=2, seconds=(0.6, 0.9))
    lines = {"speaker": ["speaker,gender"], "path": ["path,age"]}
    for i, folder in enumerate(sorted(path for part in ("train", "test") for path in (root / part / "wav").iterdir())):
        lines["speaker"].append(f"{folder.name},{'fm'[i % 2]}")
        for file in sorted(folder.rglob("*.flac")) + sorted(folder.rglob("*.wav")):
            lines["path"].append(f"{file.relative_to(folder.parent).as_posix()},{20 + 5 * i}")
    for name, rows in lines.items():
        (root / f"{name}.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A saved model; its classifier is of another number of speakers, so training starts a fresh one."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "my-base"
    save_model(tiny_model(tiny_config(), kind=MRLReDimNetForXVector), folder)
    return folder


def adapter_of(output: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return load_file(output / name / "adapter_model.safetensors")


RESUMED = {
    "vanilla": {},
    "dynamic": dict(strategy="dynamic"),
    "warm_up, after the cut": dict(strategy="warm_up", cut_at=0.4),
    "warm_up, before the cut": dict(strategy="warm_up", cut_at=0.9),
    "warm_up, at the cut": dict(strategy="warm_up", cut_at=0.75),
    "mixed": dict(strategy="mixed"),
    "matryoshka": dict(strategy="matryoshka"),
    "pissa": dict(peft_options="{init_lora_weights: pissa}"),
    "eva": dict(peft_options="{init_lora_weights: eva}"),
    "norms": dict(adapter_norms="true"),
    "two stages, at the change": dict(finetune="all", trunk_frozen_until=0.75),
    "two stages": dict(finetune="all", trunk_frozen_until=0.5, part_learning_rates="{trunk: 1e-4}"),
}


DAILY = ("vanilla", "dynamic", "warm_up, at the cut", "two stages, at the change")


@pytest.mark.parametrize("way", [pytest.param(n, marks=[] if n in DAILY else pytest.mark.slow) for n in RESUMED])
def test_a_resumed_run_ends_with_the_same_weights(train, base, way):
    settings = ADAPTER | dict(model=base) | RESUMED[way]
    output = train(**settings)
    file = "model.safetensors" if settings["finetune"] == "all" else "adapter_model.safetensors"
    whole = load_file(output / "last" / file)
    shutil.rmtree(output / "checkpoints/step-00000008")
    shutil.rmtree(output / "last")
    train("--resume", **settings)
    again = load_file(output / "last" / file)
    assert whole.keys() == again.keys()
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []


def test_an_adapter_run_leaves_an_adapter_that_plain_peft_loads(train, base, capsys):
    output = train(model=base, domain="telephony", base_repository="me/my-base", **ADAPTER)
    printed = capsys.readouterr().out
    assert "projection.segments.2" in printed and "trainable parameters" in printed
    for title in ("development, telephony", "development, as it is"):
        assert title in printed
    facts = AdapterFacts.load(output / "best")
    model = MRLReDimNetModel.from_pretrained(base)
    assert (facts.domain, facts.task, facts.base.repository) == ("telephony", "verification", "me/my-base")
    assert facts.base.fingerprint == fingerprint(model)
    assert set(facts.layers.values()) == {3}
    config = json.loads((output / "best/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/my-base"
    before = model(torch.stack(waves(8000))).embeddings
    after = PeftModel.from_pretrained(model, output / "best")(input_values=torch.stack(waves(8000))).embeddings
    assert not torch.equal(before, after)
    rows = results_of(output)["results"]["synthetic"]
    assert list(rows) == ["base", "adapter"]


def test_an_adapter_is_trained_in_mixed_precision_on_a_base_in_bfloat16(train, base, tmp_path, seen_types):
    """The facts name the base as those find it who load it in bfloat16."""
    MRLReDimNetForXVector.from_pretrained(base).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    settings = ADAPTER | dict(model=tmp_path / "half", steps=2, mixed_precision="bf16")
    output = train(**settings)
    assert seen_types == {torch.bfloat16}
    assert {tensor.dtype for tensor in adapter_of(output).values()} == {torch.float32}
    model = MRLReDimNetModel.from_pretrained(tmp_path / "half")
    assert model.dtype == torch.bfloat16 and AdapterFacts.load(output / "best").base.fingerprint == fingerprint(model)


def test_an_adapter_for_several_ranks_says_so_and_is_cut_where_it_is_loaded(train, base):
    output = train(model=base, **ADAPTER, strategy="matryoshka")
    facts = AdapterFacts.load(output / "best")
    assert facts.nested_ranks == [1, 2, 3] and set(facts.layers.values()) == {3}
    bank = AdapterBank.load(str(base), {"whole": output / "best"})
    bank.add("cut", output / "best", rank=1)
    audio = torch.stack(waves(8000))
    answers = [bank.embed(audio, adapter=name) for name in (None, "cut", "whole")]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(answers, 2))


def test_no_file_of_an_adapter_says_where_the_base_lies(train, base):
    output = train(model=base, **ADAPTER)
    for file in (output / "best").iterdir():
        assert str(base.parent).encode() not in file.read_bytes(), file


def test_ranks_of_the_four_strategies(train, base, tmp_path, capsys):
    """Final ranks are those of the saved weights: one rank, or one on average."""
    ranks = {}
    capsys.readouterr()
    for strategy in ("vanilla", "warm_up", "dynamic", "mixed"):
        output = train(model=base, strategy=strategy, cut_at=0.4, **ADAPTER).rename(tmp_path / strategy)
        ranks[strategy] = list(AdapterFacts.load(output / "best").layers.values())
    assert set(ranks["vanilla"]) == set(ranks["warm_up"]) == {3}
    assert len(set(ranks["mixed"])) > 1
    assert sum(ranks["dynamic"]) <= 3 * 15
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Ranks: ")]
    assert len(printed) == 4 and printed[0].count(" 3") == 15


@pytest.mark.parametrize(
    ("finetune", "frozen", "moved"),
    [
        ("head", "redimnet.trunk.mix.logits", "redimnet.pooling.attention_in.weight"),
        ("projection", "redimnet.pooling.attention_in.weight", "redimnet.projection.segments.0.weight"),
    ],
)
def test_parts_that_are_not_trained_stay_to_the_bit(train, base, finetune, frozen, moved):
    output = train(model=base, finetune=finetune, model_options="{}", steps=3)
    before, after = load_file(base / "model.safetensors"), load_file(output / "last/model.safetensors")
    assert torch.equal(before[frozen], after[frozen]) and not torch.equal(before[moved], after[moved])
    trunk = [name for name in before if ".trunk." in name]  # running statistics among them
    assert [name for name in trunk if not torch.equal(before[name], after[name])] == []


def test_the_trunk_waits_for_the_head(train, base):
    settings = dict(model=base, model_options="{}", trunk_frozen_until=0.5, steps=4, checkpoint_every=2)
    output = train(**settings)
    before = load_file(base / "model.safetensors")["redimnet.trunk.stem.conv.weight"]
    at = {
        step: load_file(output / f"checkpoints/step-0000000{step}/model.safetensors")["redimnet.trunk.stem.conv.weight"]
        for step in (2, 4)
    }
    assert torch.equal(at[2], before) and not torch.equal(at[4], before)


def test_a_gender_adapter_answers_by_plain_peft(train, corpus, base):
    tests = json.dumps({"held out": {"folder": str(corpus / "test")}})
    labels = dict(label_file=corpus / "speaker.csv", label_column="gender", tests=tests, noise="null")
    output = train(model=base, **labels, **ADAPTER)
    facts = AdapterFacts.load(output / "best")
    assert (facts.domain, facts.task, facts.labels) == ("gender", "classification", ["f", "m"])
    (row,) = results_of(output)["results"]["held out"]["adapter"]
    assert row["metric"] == "accuracy" and 0 <= row["low"] <= row["value"] <= row["high"] <= 1
    model = AutoModelForAudioClassification.from_pretrained(base, num_labels=2, ignore_mismatched_sizes=True)
    adapted = PeftModel.from_pretrained(model, output / "best").eval()
    assert adapted.get_base_model()(torch.stack(waves(8000, 8000))).logits.shape == (2, 2)


def test_an_age_adapter_estimates_a_number(train, corpus, base):
    tests = json.dumps({"held out": {"folder": str(corpus / "test")}})
    labels = dict(label_file=corpus / "path.csv", label_column="age", label_key="path", tests=tests, noise="null")
    output = train(model=base, **labels, **ADAPTER)
    (row,) = results_of(output)["results"]["held out"]["adapter"]
    assert row["metric"] == "mean absolute error" and 0 < row["value"] < 100
    assert AdapterFacts.load(output / "best").task == "regression"


@pytest.mark.slow
def test_two_processes_train_one_adapter_through_the_cut(corpus, base):
    output = corpus.parent / "two"
    settings = ADAPTER | dict(model=base, strategy="warm_up", cut_at=0.5, batch_size=4, domain="telephony")
    printed = finish(start(corpus, command_line(corpus, output, **settings), processes=2))
    assert printed.count("Rank 5 cut to 3") == 1 and printed.count("Saved:") == 1
    assert all(torch.isfinite(tensor).all() for tensor in adapter_of(output).values())
    assert {tensor.shape[0] for name, tensor in adapter_of(output).items() if "lora_A" in name} == {3}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(finetune="adapter"), "an adapter needs a trained base; name it by model.start"),
        (dict(model="/nowhere", model_options="{}"), "/nowhere is not a folder: give a saved folder, or a Hub id"),
        (dict(segment_ranks=[4, 2], finetune="adapter", base=True), "segment_ranks: 2 ranks for the segments of"),
    ],
)
def test_settings_that_cannot_be_met_are_refused_before_the_first_step(train, base, settings, message):
    if settings.pop("base", False):
        settings |= dict(model=base, model_options="{}")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(**settings)
